"""The student's language-model loss, replaced on the last stage while a step is open."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_let.losses.distilled_cross_entropy import SoftTargets, distilled_cross_entropy

TeacherState = Callable[[int], Tensor]
_METHOD = "compute_language_model_loss"


class DistillationHook:
    """Stands in for the `compute_language_model_loss` of one model object.

    Megatron calls it once a microbatch, in order, with the logits of its own part of the
    vocabulary. Outside an open step (evaluation) the model's own loss is computed.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """
        Args:
            model: the GPTModel of the last stage, or what forwards its attributes.
        """
        method = getattr(model, _METHOD)
        # An engine's wrapper forwards the method; what is set on the wrapper is never called.
        self._model = method.__self__
        self._original: Callable[[Tensor, Tensor], Tensor] = method
        self._teacher_state: TeacherState | None = None
        self._targets: SoftTargets | None = None
        self._num_microbatches = 0
        self._soft_sum: Tensor | None = None
        self._num_tokens = 0
        # On the object, where it hides the method of its class.
        setattr(self._model, _METHOD, self._loss)

    def open_step(self, teacher_state: TeacherState, targets: SoftTargets) -> None:
        """Begin a global batch.

        Args:
            teacher_state: from the microbatch's index to the teacher's [s / cp, b, d_T].
            targets: what the student's logits are held against.
        """
        self._teacher_state, self._targets = teacher_state, targets
        self._num_microbatches, self._num_tokens, self._soft_sum = 0, 0, None

    def close_step(self) -> tuple[Tensor | float, int]:
        """End the global batch; return the sum of CE(teacher) and the number of local tokens."""
        self._teacher_state = self._targets = None
        return 0.0 if self._soft_sum is None else self._soft_sum, self._num_tokens

    def remove(self) -> None:
        """Give the model its own loss back."""
        delattr(self._model, _METHOD)

    def _loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Labels `[b, s]` and logits `[s, b, V / tp]` -> losses `[b, s]`, as Megatron's own."""
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
