"""The table of all patches of Megatron and torch, with their reasons.

`python -m megatron_let.compat` prints it. Patch only what Megatron's hooks (arguments, config
container, layer spec) cannot do.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from megatron_let.errors import LETError

# pip's version is 0.19.2; checkouts of Megatron-LM 0.19 and one commit of main were tested too
# (docs/upstream.md).
MEGATRON_VERSIONS = ">=0.19.0.dev0,<=0.20.0"
TORCH_VERSIONS = ">=2.9"


class PatchError(LETError):
    """A patch does not fit what is installed, or conflicts with another patch."""


@dataclass(frozen=True)
class Patch:
    """One row of the table.

    Attributes:
        target: `module:attribute`, e.g. `megatron.training.training:train_step`; the attribute
            may be dotted (`torch:Tensor.cuda`).
        reason: failure without the patch.
        parameters: leading parameter names that the target must have; None for C functions.
        unnecessary_when: the change upstream that would make the row unnecessary.
        test: the test that fails without it, as `file::test`.
        kind: `wrap` calls the original, `replace` does not.
        package: distribution whose version is checked against `versions`.
        versions: PEP 440 range in which the target behaves as the row assumes.
    """

    target: str
    reason: str
    parameters: tuple[str, ...] | None
    unnecessary_when: str
    test: str
    kind: Literal["wrap", "replace"] = "wrap"
    package: Literal["megatron-core", "torch"] = "megatron-core"
    versions: str = MEGATRON_VERSIONS


def _cpu(target: str, reason: str) -> Patch:
    of_torch = target.startswith("torch")
    return Patch(
        target=target,
        kind="replace",
        reason=reason,
        package="torch" if of_torch else "megatron-core",
        versions=TORCH_VERSIONS if of_torch else MEGATRON_VERSIONS,
        parameters=None,
        unnecessary_when="Megatron's training loop runs on a CPU",
        test="tests/distributed/test_cpu_host.py::test_every_shim_is_needed_or_documented",
    )


_TRAINING = "megatron.training.training:"
_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer."
_STRATEGIES = "megatron.core.dist_checkpointing.strategies."

_CONTROL_TESTS = "tests/distributed/test_control.py"
_DEEPSPEED_TESTS = "tests/distributed/test_deepspeed"
_WRITER_TESTS = "tests/distributed/test_checkpoint_writer.py"

_metrics = functools.partial(
    Patch,
    unnecessary_when="pretrain() accepts a logger",
    test="tests/distributed/test_training.py::test_metrics_file_has_one_row_per_step",
)
_deepspeed = functools.partial(
    Patch,
    kind="replace",
    unnecessary_when="pretrain() takes these functions from its config container",
)

ROWS: tuple[Patch, ...] = (
    # A CPU in place of a GPU.
    _cpu("torch.cuda:is_available", "initialize_megatron asserts that CUDA is available"),
    _cpu("torch.cuda:device_count", "with 0 devices initialize_model_parallel is skipped"),
    _cpu("torch.cuda:set_device", "initialize_distributed selects a GPU"),
    _cpu("torch.cuda:current_device", "tensors are created on the current GPU by number"),
    _cpu("torch.cuda:get_device_properties", "argument validation reads the capability"),
    _cpu("torch.cuda:synchronize", "timers synchronise"),
    _cpu("torch.cuda:get_rng_state", "the RNG tracker and checkpoints save the generator"),
    _cpu("torch.cuda:manual_seed", "each rank seeds its dropout generator differently"),
    _cpu("torch.cuda:Stream", "DDP is built on a side stream"),
    _cpu("torch.cuda:current_stream", "collectives wait for the current stream"),
    _cpu("torch.cuda:stream", "DDP is built on a side stream"),
    _cpu("torch.cuda:is_current_stream_capturing", "torch's Adam asks it before torch 2.13"),
    _cpu("torch.accelerator:is_available", "DataLoader would pin memory for a GPU"),
    _cpu(
        "torch.distributed.device_mesh:DeviceMesh.from_group",
        "Megatron's wrapper of FSDP2 shards over a mesh of GPUs",
    ),
    _cpu("torch:Tensor.cuda", "batches and models are moved to the GPU"),
    _cpu("torch:Tensor.type", "optimizers accept parameters of type torch.cuda.*Tensor only"),
    _cpu(
        "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
        "the RNG tracker reads a CUDA generator",
    ),
    _cpu(
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        "the RNG tracker writes a CUDA generator",
    ),
    _cpu(
        "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
        "the split sizes of the experts' all-to-all become arrays on their way from a GPU only",
    ),
    # pip's wheel.
    Patch(
        target="megatron.core.datasets.utils:compile_helpers",
        kind="replace",
        reason="pip's wheel has the compiled helper but no makefile, and start-up exits",
        parameters=(),
        unnecessary_when="the wheel ships core/datasets/Makefile or start-up does not call make",
        test="tests/unit/compat/test_patch_table.py::test_compile_helpers_is_replaced_without_a_makefile",
    ),
    # The asynchronous checkpoint writer.
    Patch(
        target=_STRATEGIES + "async_utils:PersistentAsyncCaller.async_loop",
        kind="replace",
        reason="the asynchronous checkpoint writer dies of a signal that its trainer handles; on a"
        " CPU it fails to select a GPU",
        parameters=("rank", "queue", "preload_q", "comp_q"),
        unnecessary_when="the writer ignores the trainer's exit signal",
        test=_WRITER_TESTS + "::test_sigterm_to_torchrun_saves_and_the_run_resumes",
    ),
    Patch(
        target=_STRATEGIES + "async_utils:PersistentAsyncCaller._get_process",
        reason="the trainer waits indefinitely for a writer that has died",
        parameters=("rank", "mp_mode"),
        unnecessary_when="the trainer checks the writer's exit code while it waits",
        test=_WRITER_TESTS + "::test_killed_writer_ends_the_run_and_keeps_the_checkpoint",
    ),
    Patch(
        target=_STRATEGIES + "filesystem_async:get_write_results_queue",
        kind="replace",
        reason="the process of the queue of results dies of a signal that its trainer handles",
        parameters=("mp_mode",),
        unnecessary_when="that process ignores the trainer's exit signal",
        test=_WRITER_TESTS + "::test_sigterm_to_torchrun_saves_and_the_run_resumes",
    ),
    # Resume with torch's Adam, and with another learning rate.
    Patch(
        target=_OPTIMIZER + "state_dict",
        reason="with torch's Adam it asserts that a step was taken, so no checkpoint can be loaded",
        parameters=("self",),
        unnecessary_when="state_dict() of a new optimizer over torch's Adam returns step 0",
        test=_CONTROL_TESTS + "::test_stopped_run_resumes_with_the_same_losses",
    ),
    Patch(
        target=_OPTIMIZER + "load_state_dict",
        reason="with torch's Adam the step counter is 0 after a resume, so the bias correction"
        " restarts, and fp32 parameters cannot be loaded; with another --lr no group is found",
        parameters=("self", "state_dict"),
        unnecessary_when="load_state_dict() restores the step of torch's Adam, and"
        " --override-opt-param-scheduler changes the rates of the loaded groups",
        test=_CONTROL_TESTS + "::test_stopped_run_resumes_with_the_same_losses",
    ),
    Patch(
        target=_OPTIMIZER + "_set_main_param_and_optimizer_states",
        reason="with torch's Adam it asks each parameter of a checkpoint for its step, so no"
        " checkpoint with --dist-ckpt-optim-fully-reshardable can be loaded",
        parameters=("self", "model_param", "tensors"),
        unnecessary_when="it skips the step, as the other checkpoint formats do",
        test=_CONTROL_TESTS + "::test_sharded_optimizer_resumes_in_another_layout",
    ),
    Patch(
        target="megatron.core.optimizer.optimizer:"
        "MegatronOptimizer._filter_and_reorder_param_groups",
        reason="a checkpoint's parameter groups are found by their rates, so no run can be resumed"
        " with another --lr, in spite of --override-opt-param-scheduler",
        parameters=("current_groups", "state_dict_groups"),
        unnecessary_when="--override-opt-param-scheduler changes the rates of the loaded groups",
        test=_CONTROL_TESTS + "::test_rate_changes_on_resume_if_it_is_overridden",
    ),
    # Methods with a teacher.
    Patch(
        target=_TRAINING + "get_forward_backward_func",
        reason="the alignment needs a global batch's tokens on the stage of layer k, the index of"
        " each microbatch, and a place before the optimizer step",
        parameters=None,
        unnecessary_when="pretrain() accepts a forward-backward function or a step callback",
        test="tests/distributed/test_layout_matrix.py::test_layout_matches_one_process",
    ),
    Patch(
        target=_TRAINING + "training_log",
        reason="an average that is no longer reported is printed as 0, so the log would show a"
        " cosine after the teacher is freed",
        parameters=("loss_dict", "total_loss_dict"),
        unnecessary_when="training_log drops keys that loss_dict no longer has",
        test="tests/distributed/test_training.py::test_log_shows_no_cosine_after_the_teacher",
    ),
    Patch(
        target=_TRAINING + "setup_model_and_optimizer",
        reason="a learned projection is created after the model is built and loaded, and its"
        " parameters are stepped with the model's; commits of hub ids are compared before it",
        parameters=("model_type", "model_provider_func", "checkpointing_context"),
        unnecessary_when="pretrain() accepts a callback after the set-up, with model and optimizer",
        test="tests/distributed/test_projection.py::test_layout_matches_one_process",
    ),
    # The metrics file.
    _metrics(
        target=_TRAINING + "train_step",
        reason="one JSON line per step needs the loss, the gradient norm and the time together",
        parameters=(
            "forward_step_func",
            "data_iterator",
            "model",
            "optimizer",
            "opt_param_scheduler",
            "config",
            "forward_backward_func",
            "iteration",
        ),
    ),
    _metrics(
        target=_TRAINING + "evaluate_and_print_results",
        reason="evaluate() knows neither its iteration nor whether the data is validation or test",
        parameters=("prefix", "forward_step_func", "data_iterator", "model", "iteration"),
    ),
    _metrics(
        target=_TRAINING + "evaluate",
        reason="the validation loss is printed but not returned to the caller",
        parameters=("forward_step_func", "data_iterator", "model"),
    ),
    # Control files, and steps that are rejected.
    Patch(
        target=_TRAINING + "checkpoint_and_decide_exit",
        reason="the control files are checked between two steps, where the model, the optimizer"
        " and the data iterator are available for a save",
        parameters=(
            "model",
            "optimizer",
            "opt_param_scheduler",
            "iteration",
            "num_floating_point_operations_so_far",
            "checkpointing_context",
            "train_data_iterator",
        ),
        unnecessary_when="pretrain() accepts a step callback that can save and exit",
        test=_CONTROL_TESTS + "::test_stop_saves_and_ends_the_run",
    ),
    Patch(
        target=_TRAINING + "save_checkpoint_and_time",
        reason="a step whose result is rejected is saved without a check of --save, and the"
        " TypeError hides why the run ends",
        parameters=("iteration",),
        unnecessary_when="train() saves only with --save, as checkpoint_and_decide_exit() does",
        test=_CONTROL_TESTS + "::test_rejected_result_ends_a_run_without_save",
    ),
    # wandb.
    Patch(
        target="megatron.training.wandb_utils:on_save_checkpoint_success",
        reason="pretrain() finishes wandb before the last asynchronous save, whose artifact then"
        " fails and the last rank exits with a traceback",
        parameters=("checkpoint_path", "tracker_filename", "save_dir", "iteration"),
        unnecessary_when="pretrain() finishes wandb after maybe_finalize_async_save()",
        test="tests/unit/run/test_artifacts.py::test_artifact_is_logged_while_wandb_runs",
    ),
    # Restarts within the job.
    Patch(
        target="megatron.training.ft_integration:setup",
        reason="it parses the command line again, without the recipe: --enable-ft-package of a"
        " recipe has no effect, and --save of a recipe is reported as missing",
        parameters=(),
        unnecessary_when="setup() takes the arguments from get_args()",
        test="tests/unit/run/test_restarts_in_job.py::test_setup_reads_the_arguments_of_the_run",
    ),
    # Layers by torch.
    Patch(
        target="megatron.training.models.gpt:mtp_block_spec",
        reason="without Transformer Engine the layers of multi-token prediction are stock ones,"
        " which support neither sequence parallelism nor multi-latent attention",
        parameters=("config", "transformer_layer_spec", "vp_stage"),
        unnecessary_when="GPTModelConfig takes a spec of these layers",
        test="tests/distributed/test_students.py::test_layout_matches_one_process",
    ),
    # The DeepSpeed engine.
    _deepspeed(
        target=_TRAINING + "get_megatron_optimizer",
        reason="under --engine deepspeed the optimizer is inside DeepSpeed's engine",
        parameters=("config", "model_chunks", "config_overrides"),
        test=_DEEPSPEED_TESTS + ".py::test_steps_match_megatron_engine",
    ),
    _deepspeed(
        target=_TRAINING + "save_checkpoint",
        reason="ZeRO's shards of master weights and moments are saved by DeepSpeed's engine",
        parameters=("iteration", "model", "optimizer", "opt_param_scheduler"),
        test=_DEEPSPEED_TESTS + "_checkpoint.py::test_resumed_run_has_the_same_losses",
    ),
    _deepspeed(
        target=_TRAINING + "load_checkpoint",
        reason="ZeRO's shards of master weights and moments are loaded by DeepSpeed's engine",
        parameters=("ddp_model", "optimizer", "opt_param_scheduler"),
        test=_DEEPSPEED_TESTS + "_checkpoint.py::test_resumed_run_has_the_same_losses",
    ),
)
PATCHES = {row.target: row for row in ROWS}


@dataclass(frozen=True)
class ObjectPatch:
    """A change to one object of a run; see `removed_when`.

    Attributes:
        target: the object and what changes on it.
        where: `module:symbol` of this package that does it.
        reason: failure without the change.
        removed_when: when the change is undone.
        test: the test that fails without it, as `file::test`.
    """

    target: str
    where: str
    reason: str
    removed_when: str
    test: str


_LAYOUTS = "tests/distributed/test_layout_matrix.py"
_PROJECTION = "tests/unit/methods/test_learned_projection.py"

OBJECT_PATCHES = (
    ObjectPatch(
        target="forward-backward function from get_forward_backward_func: wrapped",
        where="megatron_let.methods.base:TeacherMethod.wrap_getter",
        reason="a method needs the whole global batch before its first microbatch, and must report"
        " its values and check the teacher after the last",
        removed_when="never; a batch whose weight is 0 is passed on unchanged",
        test=_LAYOUTS + "::test_layout_matches_one_process",
    ),
    ObjectPatch(
        target="finalize_model_grads_func of the model's config: wrapped",
        where="megatron_let.methods.let:before_finalizing",
        reason="teacher states of the next global batch are computed after the last backward, while"
        " other stages still work; the schedule has no other callback there",
        removed_when="each global batch ends",
        test="tests/unit/methods/test_let.py"
        "::test_before_finalizing_runs_work_first_and_restores_the_function",
    ),
    ObjectPatch(
        target="batch_p2p_sync of the model's config: False",
        where="megatron_let.placement.transfer:without_device_wait",
        reason="each pipeline communication would wait for the device, and with it for teacher"
        " states that are needed later; it works around a race in old versions of torch",
        removed_when="the teacher is freed",
        test="tests/distributed/test_placement.py"
        "::test_communication_waits_for_the_device_only_without_states",
    ),
    ObjectPatch(
        target="iterable of Megatron's RerunDataIterator: put behind a LookAhead",
        where="megatron_let.methods.global_batch:LookAhead",
        reason="the tokens of the next global batch must be read without consuming them; above the"
        " iterator, replays and saved positions would be wrong",
        removed_when="never; without read-ahead it passes items on unchanged",
        test="tests/unit/methods/test_global_batch.py::test_peek_consumes_nothing",
    ),
    ObjectPatch(
        target="compute_language_model_loss of the last stage's model: replaced on the object",
        where="megatron_let.methods.distillation:LogitsHook",
        reason="the teacher's distribution enters the loss, whose logits are not output otherwise",
        removed_when="the first step whose weight is 0",
        test="tests/unit/methods/test_distillation.py"
        "::test_hook_replaces_loss_of_wrapped_model_until_removed",
    ),
    ObjectPatch(
        target="step of Megatron's optimizer: replaced on the object",
        where="megatron_let.methods.learned_projection:ProjectionTraining",
        reason="a learned projection is updated if and only if Megatron's optimizer updates",
        removed_when="the last step whose weight is above 0",
        test=_PROJECTION + "::test_free_restores_model_and_optimizer",
    ),
    ObjectPatch(
        target="model chunk of layer k: buffers let_projection_* added",
        where="megatron_let.methods.learned_projection:ProjectionTraining",
        reason="Megatron's checkpoints save the buffers of the model, and nothing beside it",
        removed_when="the last step whose weight is above 0",
        test=_PROJECTION + "::test_free_restores_model_and_optimizer",
    ),
)
