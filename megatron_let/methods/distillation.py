"""RKD and SALT: the student also learns from the teacher's output distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.utils import VocabUtility
from torch import Tensor

from megatron_let.config.let_config import LETConfig
from megatron_let.errors import raised_on_all_ranks
from megatron_let.losses.distilled_cross_entropy import SoftTargets, distilled_cross_entropy
from megatron_let.methods.base import (
    ForwardBackward,
    TeacherMethod,
    TrainingRun,
    add_metrics,
    teacher_group,
    unwrap_chunks,
)
from megatron_let.methods.global_batch import TokenSharing, read_ahead
from megatron_let.metrics.write import SOFT_LOSS_KEY
from megatron_let.placement.sample_sharing import SampleSharing, local_shard, stage_ranks
from megatron_let.teacher.head import OutputLayer, load_teacher_with_head

_METHOD = "compute_language_model_loss"


class LogitsHook:
    """Replaces `compute_language_model_loss` of one model object.

    Megatron calls it once per microbatch, in order, with the logits of this rank's part of the
    vocabulary. Outside an open step (evaluation) the model's original loss is computed.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """Replace the model's loss method by the hook.

        Args:
            model: the model of the last stage, or a wrapper that forwards its attributes.
        """
        method = getattr(model, _METHOD)
        # A wrapper forwards the method; an attribute set on the wrapper would never be called.
        self._model = method.__self__
        self._original: Callable[[Tensor, Tensor], Tensor] = method
        self._teacher_state: Callable[[int], Tensor] | None = None
        self._targets: SoftTargets | None = None
        self._num_microbatches = 0
        self._soft_sum: Tensor | None = None
        self._num_tokens = 0
        # Set on the object, where it shadows the method of its class.
        setattr(self._model, _METHOD, self._loss)

    def open_step(self, teacher_state: Callable[[int], Tensor], targets: SoftTargets) -> None:
        """Begin a global batch.

        Args:
            teacher_state: maps a microbatch's index to the teacher's state [s / cp, b, d_T].
        """
        self._teacher_state, self._targets = teacher_state, targets
        self._num_microbatches, self._num_tokens, self._soft_sum = 0, 0, None

    def close_step(self) -> tuple[Tensor | float, int]:
        """End the global batch; return the sum of CE(teacher) and the number of local tokens."""
        self._teacher_state = self._targets = None
        return 0.0 if self._soft_sum is None else self._soft_sum, self._num_tokens

    def remove(self) -> None:
        """Restore the model's original loss."""
        delattr(self._model, _METHOD)

    def _loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Map labels [b, s] and logits [s, b, V / tp] to losses [b, s], as Megatron's method."""
        if self._teacher_state is None or self._targets is None or not torch.is_grad_enabled():
            return self._original(labels, logits)
        state = self._teacher_state(self._num_microbatches)
        self._num_microbatches += 1
        hard, soft = distilled_cross_entropy(
            logits, labels.transpose(0, 1).contiguous(), state, self._targets
        )
        total = soft.sum()
        self._soft_sum = total if self._soft_sum is None else self._soft_sum + total
        self._num_tokens += soft.numel()
        return hard.transpose(0, 1).contiguous()


@dataclass
class _Context:
    """Teacher and hook on a rank of the last stage."""

    hook: LogitsHook
    samples: SampleSharing
    head: OutputLayer
    vocabulary: range
    tokens: Tensor | None = None
    not_finite: Tensor | None = None

    def begin(self, tokens: Tensor) -> None:
        """Begin a global batch with tokens [num_microbatches, b, s]."""
        self.tokens = tokens
        self.not_finite = torch.zeros(len(tokens), device=tokens.device)

    def state(self, microbatch: int) -> Tensor:
        """Return the teacher state of this rank's tokens, [s / cp, b, d_T]."""
        assert self.tokens is not None and self.not_finite is not None, "state() outside a step"
        state, self.not_finite[microbatch] = self.samples.state(self.tokens[microbatch])
        return state


class DistillationMethod(TeacherMethod):
    """Trains with RKD or SALT.

    The ranks of the last stage hold the teacher from the first step whose weight is above 0 to the
    first whose weight is 0, and share the samples of a microbatch over TP and CP. Tensor-parallel
    ranks split the vocabulary, so each needs the states of all local tokens.
    """

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        self._started = False
        self._context: _Context | None = None

    def weight(self, step: int) -> float:
        """Return w(s)."""
        return distillation_weight(step, self._config)

    def describe(self) -> str:
        """Return one line for the log."""
        end = "the end"
        if self._config.traits.ends_at_stop_step:
            end = f"step {self._config.stop_step}"
        return (
            f"the output distribution of {self._teacher_name} has weight"
            f" {self._config.kd_weight} in the targets to {end}"
        )

    def run_with_teacher(
        self, forward_backward: ForwardBackward, weight: float, kwargs: dict[str, Any]
    ) -> Any:
        """Run one global batch whose targets include the teacher's distribution."""
        num_microbatches, micro_batch_size = kwargs["num_microbatches"], kwargs["micro_batch_size"]
        if not self._started:
            self._context = self._start(kwargs["model"])
            self._started = True
        device = next(kwargs["model"][0].parameters()).device
        kwargs["data_iterator"], microbatches = read_ahead(
            kwargs["data_iterator"], num_microbatches
        )
        shape = (num_microbatches, micro_batch_size, kwargs["seq_length"])
        last_stage = parallel_state.get_pipeline_model_parallel_world_size() - 1
        sharing = TokenSharing(self._run.folder, None, device, last_stage)
        batch = sharing.share(microbatches, None, shape, 0, False)
        context = self._context
        if context is not None:
            context.begin(batch.tokens)
            context.hook.open_step(context.state, self._targets(context, weight))
        losses = forward_backward(**kwargs)
        means = self._close(num_microbatches, device)
        return add_metrics(losses, {SOFT_LOSS_KEY: means}, weight)

    def _targets(self, context: _Context, weight: float) -> SoftTargets:
        return SoftTargets(
            head=context.head,
            vocabulary_start=context.vocabulary.start,
            weight=weight,
            temperature=self._config.kd_temperature,
            top_k=self._config.kd_top_k,
            group=parallel_state.get_tensor_model_parallel_group(),
        )

    def _start(self, model: list[torch.nn.Module]) -> _Context | None:
        """Load the teacher on the ranks of the last stage; collective over all ranks."""
        last = next((chunk for chunk in unwrap_chunks(model) if chunk.post_process), None)
        with raised_on_all_ranks(next(model[0].parameters()).device):
            return None if last is None else self._load(last)

    def _load(self, last: Any) -> _Context:
        """Load the teacher and attach the hook to the model of the last stage."""
        vocabulary = _vocabulary(last.vocab_size)
        # The rows beyond the tokenizer's vocabulary are padding.
        stop = max(vocabulary.start, min(vocabulary.stop, self._run.vocab_size))
        teacher, head = load_teacher_with_head(
            self._run.folder,
            self._config,
            next(last.parameters()).device,
            range(vocabulary.start, stop),
            self._run.documents,
            teacher_group(on_all_stages=False),
        )
        samples = SampleSharing(teacher, local_shard(sequence_parallel=False), stage_ranks())
        return _Context(LogitsHook(last), samples, head, vocabulary)

    def _close(self, num_microbatches: int, device: torch.device) -> Tensor:
        """Return [sum of CE(teacher), tokens] of this replica, on all of its ranks."""
        sums, not_finite = (torch.zeros(n, device=device) for n in (2, num_microbatches))
        if self._context is not None:
            soft_sum, num_tokens = self._context.hook.close_step()
            # Every tensor-parallel rank holds the same tokens.
            if parallel_state.get_tensor_model_parallel_rank() == 0:
                sums[0], sums[1] = soft_sum, num_tokens
            assert self._context.not_finite is not None
            not_finite = self._context.not_finite
        return self._reduce(sums, not_finite)

    def release(self) -> bool:
        """Free the teacher and restore the student's original loss."""
        if self._context is not None:
            self._context.hook.remove()
            self._context = None
        started, self._started = self._started, False
        return started


def distillation_weight(step: int, config: LETConfig) -> float:
    """Return w(s): constant for `rkd`; constant for `salt` until `stop_step`, then 0.

    Args:
        step: 0-based training step.
    """
    over = config.traits.ends_at_stop_step and step >= config.stop_step
    return 0.0 if over else config.kd_weight


def _vocabulary(padded_size: int) -> range:
    """Return the token ids of this tensor-parallel rank."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    return range(*VocabUtility.vocab_range_from_global_vocab_size(padded_size, rank, size))
