"""One rank of `step_time.py`: the entry, alternating blocks of steps without and with a teacher.

torchrun ... step_time_run.py METHOD STEPS_PER_BLOCK [the entry's flags]
"""

import dataclasses
import functools
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch

from megatron_let import pretrain
from megatron_let.compat.device import detect_host, prepare_process

HasTeacher = Callable[[int], bool]


def main() -> int:
    """Prepare the method and run the entry with the rest of the command line."""
    method, block, flags = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    # Before any module of Megatron, as in the entry.
    prepare_process(detect_host(), int(os.environ["RANK"]))
    _peaks_of_one_step()

    def has_teacher(step: int) -> bool:
        return step // block % 2 == 1

    if method == "let":
        _alternate_let(has_teacher)
        return pretrain.main(flags)
    _alternate_modelopt(has_teacher)
    return pretrain.main([*flags, "--let-method", "none"])


def _peaks_of_one_step() -> None:
    """Make `max_memory_bytes` of the metrics the peak since the previous row, not the run's."""
    from megatron_let.metrics.write import MetricsFile

    original = MetricsFile._step_row

    @functools.wraps(original)
    def step_row(*args: Any, **kwargs: Any) -> dict[str, Any]:
        row = original(*args, **kwargs)
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        return row

    MetricsFile._step_row = step_row  # type: ignore[method-assign]


def _alternate_let(has_teacher: HasTeacher) -> None:
    """Set the weight to 0 in every other block, which frees the teacher as at S_stop."""
    from megatron_let.methods.let import LETMethod

    original = LETMethod.weight

    def weight(self: LETMethod, step: int) -> float:
        return original(self, step) if has_teacher(step) else 0.0

    LETMethod.weight = weight  # type: ignore[method-assign]


# ModelOpt


def _alternate_modelopt(has_teacher: HasTeacher) -> None:
    """Wrap the student when it is built, and the loss of every microbatch."""
    from megatron.training import argument_utils

    from megatron_let.methods import forward_step

    make_config, make_step = argument_utils.gpt_config_from_args, forward_step.make_forward_step

    def gpt_config_from_args(args: Namespace, *rest: Any, **kwargs: Any) -> Any:
        config = make_config(args, *rest, **kwargs)
        config.pre_wrap_hooks = [lambda model: [_distilled(model[0], config, args, has_teacher)]]
        return config

    def make_forward_step(args: Namespace) -> Callable[..., Any]:
        return _with_modelopt_loss(make_step(args), args, has_teacher)

    argument_utils.gpt_config_from_args = gpt_config_from_args
    forward_step.make_forward_step = make_forward_step


def _distilled(student: Any, config: Any, args: Namespace, has_teacher: HasTeacher) -> Any:
    """Wrap student and teacher with ModelOpt's Megatron plugin."""
    import modelopt.torch.distill as mtd
    from modelopt.torch.distill.plugins import megatron as plugin

    from megatron_let.config.arguments import layer_number

    teacher = _teacher(config, args)
    loss = plugin.HiddenStateCosineLoss(
        student.config, plugin.ProjectionLayer(student.config, teacher.config)
    )
    # Whole layers, whose outputs are tuples, as the plugin's loss requires.
    layers = (f"decoder.layers.{layer_number(args) - 1}",
              f"decoder.layers.{teacher.config.num_layers - 1}")  # fmt: skip
    settings = plugin.DistillationConfig(
        skip_lm_loss=False,
        criterion={layers: loss},
        loss_balancer=mtd.StaticLossBalancer(args.let_weight),
    )
    model = mtd.convert(
        student,
        mode=[("kd_loss", {"teacher_model": teacher, "criterion": settings.criterion,
                           "loss_balancer": settings.loss_balancer})],
    )  # fmt: skip
    plugin.adjust_distillation_model_for_mcore(model, settings)
    _switch_forward(model, args, has_teacher)
    return model


def _teacher(config: Any, args: Namespace) -> Any:
    """Build a random GPTModel of the teacher's shape."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_let.planner.sizes import teacher_size

    size = teacher_size(str(args.let_teacher))
    transformer = dataclasses.replace(
        config.transformer,
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        ffn_hidden_size=size.ffn_hidden_size,
        num_attention_heads=size.num_heads,
        num_query_groups=size.num_kv_heads,
        kv_channels=size.head_dim,
    )
    own = dataclasses.replace(
        config,
        transformer=transformer,
        share_embeddings_and_output_weights=size.tied,
        pre_wrap_hooks=[],
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return own.get_builder_cls()(own).build_model(groups)


def _switch_forward(model: Any, args: Namespace, has_teacher: HasTeacher) -> None:
    """Run the teacher, which the plugin's forward always does, only in blocks with a teacher."""
    both = model.forward

    def forward(*inputs: Any, **kwargs: Any) -> Any:
        if has_teacher(args.curr_iteration):
            return both(*inputs, **kwargs)
        model._lm_loss_call_count = 0
        with model.only_student_forward():
            return type(model).forward(model, *inputs, **kwargs)

    model.forward = forward


def _with_modelopt_loss(
    forward_step: Callable[..., Any], args: Namespace, has_teacher: HasTeacher
) -> Callable[..., Any]:
    """Add ModelOpt's loss to the entry's forward step in blocks with a teacher."""
    from megatron.core.utils import unwrap_model

    def step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
        output, loss = forward_step(data_iterator, model)
        add = _add_loss if has_teacher(args.curr_iteration) else _add_nothing
        return output, functools.partial(add, unwrap_model(model), loss)

    return step


def _add_loss(model: Any, loss: Callable[..., Any], output: torch.Tensor) -> tuple[Any, ...]:
    """Add the distillation loss; mock data masks no token, so it sums over all."""
    total, *rest = loss(output)
    return model.compute_kd_loss(total, loss_reduction_fn=lambda found: found[0].sum()), *rest


def _add_nothing(model: Any, loss: Callable[..., Any], output: torch.Tensor) -> tuple[Any, ...]:
    """Drop the captured activations; give the projection, which DDP waits for, a gradient of 0."""
    total, *rest = loss(output)
    for student_layer, _ in model._layers_to_loss:
        student_layer._intermediate_output = None
    nothing = sum(parameter.sum() for parameter in model.loss_modules.parameters())
    return total + 0 * nothing, *rest


if __name__ == "__main__":
    sys.exit(main())
