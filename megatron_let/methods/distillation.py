"""A global batch under RKD or SALT: Megatron's forward-backward function with the teacher in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.utils import VocabUtility
from megatron.core.utils import unwrap_model

from megatron_let.config.let_config import LETConfig
from megatron_let.losses.distilled_cross_entropy import SoftTargets
from megatron_let.methods.base import TaughtForwardBackward
from megatron_let.methods.distillation_schedule import distillation_weight
from megatron_let.methods.global_batch import TokenSharing, read_ahead
from megatron_let.methods.logits_hook import DistillationHook
from megatron_let.metrics.write import SOFT_LOSS_KEY, WEIGHT_KEY
from megatron_let.placement.sequence_shard import SequenceShard
from megatron_let.teacher.head import OutputLayer, load_teacher_with_head
from megatron_let.teacher.inspect import TeacherFolder
from megatron_let.teacher.model import Teacher


@dataclass
class _Attachment:
    """The teacher and the hook, on a rank of the last stage."""

    hook: DistillationHook
    teacher: Teacher
    head: OutputLayer
    vocabulary: range
    shard: SequenceShard
    tokens: torch.Tensor | None = None
    not_finite: torch.Tensor | None = None

    def begin(self, tokens: torch.Tensor) -> None:
        """Take the tokens of a global batch, [num_microbatches, b, s]."""
        self.tokens = tokens
        self.not_finite = torch.zeros(len(tokens), device=tokens.device)

    def state(self, microbatch: int) -> torch.Tensor:
        """Teacher state of this rank's tokens, [s / cp, b, d_T]; zeros if any is NaN or Inf."""
        assert self.tokens is not None and self.not_finite is not None, "state() outside a step"
        state = self.teacher.hidden_state(self.tokens[microbatch])
        failed = ~state.sum(dtype=torch.float32).isfinite()
        self.not_finite[microbatch] = failed.float()
        return self.shard.slice(state.transpose(0, 1)).contiguous().masked_fill_(failed, 0)


class DistilledForwardBackward(TaughtForwardBackward):
    """Trains with RKD or SALT.

    The teacher is on the ranks of the last stage from the first step whose weight is above 0 to
    the first whose weight is 0.
    """

    def __init__(
        self,
        config: LETConfig,
        folder: TeacherFolder,
        vocab_size: int,
        current_step: Callable[[], int],
        report: Callable[[str], None],
    ) -> None:
        """
        Args:
            config: with method `rkd` or `salt`.
            folder: the teacher's, already checked.
            vocab_size: of the tokenizer; the teacher's rows beyond it are padding.
            current_step: 0-based training step.
            report: prints one line on one rank.
        """
        super().__init__(folder, current_step, report)
        self._config = config
        self._vocab_size = vocab_size
        self._started = False
        self._attachment: _Attachment | None = None

    def _weight(self, step: int) -> float:
        return distillation_weight(step, self._config)

    def _run_taught(
        self, forward_backward: Callable[..., Any], weight: float, kwargs: dict[str, Any]
    ) -> Any:
        if not self._started:
            self._attach(kwargs["model"])
        num_microbatches = kwargs["num_microbatches"]
        shape = (kwargs["micro_batch_size"], kwargs["seq_length"])
        device = next(kwargs["model"][0].parameters()).device
        kwargs["data_iterator"], microbatches = read_ahead(
            kwargs["data_iterator"], num_microbatches
        )
        # Each step anew: no tokens are shared ahead here.
        sharing = TokenSharing(self._folder, device)
        batch = sharing.share(microbatches, None, (num_microbatches, *shape), 0, False)
        if self._attachment is not None:
            self._attachment.begin(batch.tokens)
            targets = self._targets(self._attachment, weight)
            self._attachment.hook.open_step(self._attachment.state, targets)
        losses = forward_backward(**kwargs)
        totals = self._close(num_microbatches, device)
        for index, report in enumerate(losses):
            report[SOFT_LOSS_KEY] = totals if index == 0 else torch.zeros_like(totals)
            report[WEIGHT_KEY] = totals.new_tensor([weight])
        return losses

    def _targets(self, attachment: _Attachment, weight: float) -> SoftTargets:
        return SoftTargets(
            head=attachment.head,
            vocabulary_start=attachment.vocabulary.start,
            weight=weight,
            temperature=self._config.kd_temperature,
            top_k=self._config.kd_top_k,
            group=parallel_state.get_tensor_model_parallel_group(),
        )

    def _attach(self, model: list[torch.nn.Module]) -> None:
        self._started = True
        last = next((chunk for chunk in unwrap_model(model) if chunk.post_process), None)
        if last is None:
            return
        vocabulary = _vocabulary(last.vocab_size)
        stop = max(vocabulary.start, min(vocabulary.stop, self._vocab_size))
        known = range(vocabulary.start, stop)
        device = next(last.parameters()).device
        teacher, head = load_teacher_with_head(self._folder, self._config, device, known)
        shard = SequenceShard(
            cp_size=parallel_state.get_context_parallel_world_size(),
            cp_rank=parallel_state.get_context_parallel_rank(),
        )
        self._attachment = _Attachment(DistillationHook(last), teacher, head, vocabulary, shard)

    def _close(self, num_microbatches: int, device: torch.device) -> torch.Tensor:
        """Return [sum of CE(teacher), tokens] of this replica on all of its ranks.

        Raises:
            LETError: the teacher gave NaN or Inf; raised before the optimizer's step.
        """
        totals = torch.zeros(2 + num_microbatches, device=device)
        if self._attachment is not None:
            soft_sum, num_tokens = self._attachment.hook.close_step()
            # Every tensor-parallel rank holds the same tokens.
            if parallel_state.get_tensor_model_parallel_rank() == 0:
                totals[0], totals[1] = soft_sum, num_tokens
            assert self._attachment.not_finite is not None
            totals[2:] = self._attachment.not_finite
        group = parallel_state.get_model_parallel_group()
        if group.size() > 1:
            torch.distributed.all_reduce(totals, group=group)
        self._refuse_failed(totals[2:])
        return totals[:2]

    def _release(self) -> bool:
        """Free the teacher, and give the student its own loss back."""
        if self._attachment is not None:
            self._attachment.hook.remove()
            self._attachment = None
        started, self._started = self._started, False
        return started


def _vocabulary(padded_size: int) -> range:
    """Token ids of this tensor-parallel rank."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    return range(*VocabUtility.vocab_range_from_global_vocab_size(padded_size, rank, size))
