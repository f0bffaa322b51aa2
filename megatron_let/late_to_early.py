"""LET in any PyTorch training loop, without Megatron."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_let.config.let_config import alignment_weight
from megatron_let.errors import LETError
from megatron_let.losses import CCA_TOKENS_PER_FEATURE, LOSSES, AlignmentLoss, load_loss
from megatron_let.losses.alignment_hook import AlignmentHook
from megatron_let.losses.interpolation import check_shapes


class LateToEarly:
    """Aligns one layer of a model with a teacher's hidden state in the backward pass.

        let = LateToEarly(model.model.layers[2], weight=0.1, stop_step=1500)
        with let.step(step, teacher_state):
            loss = model(batch).loss
            loss.backward()

    Losses, schedule and gradient are those of `--let-method let`. The loss that the user computes
    does not include the alignment: its gradient is added where the layer's output gets its own, so
    that layers after it get none. At `stop_step` the hook is removed from the layer. The teacher's
    state is referred to within the `with` block only.

    Attributes:
        report: mean over the (valid) tokens of the last microbatch, 0-dim tensors on the device:
            `cosine`, and the loss under its name if it is another; empty if the weight was 0.
    """

    def __init__(
        self,
        student_layer: torch.nn.Module,
        weight: float = 0.1,
        stop_step: int = 1500,
        loss: str = "cosine",
    ) -> None:
        """Register the hook; a model must not be compiled and run before.

        Args:
            student_layer: layer k; returns the hidden state, or a tuple that begins with it.
            weight: lambda_0, the weight of the alignment loss at step 0.
            stop_step: S_stop, the 0-based step from which on the weight is 0.
            loss: `cosine`, `logsum` or `cca`.

        Raises:
            LETError: a value is out of range.
        """
        if not math.isfinite(weight) or weight < 0:
            raise LETError(f"weight is {weight}; give a finite weight of at least 0.")
        if stop_step < 1:
            raise LETError(
                f"stop_step is {stop_step}; give the step, at least 1, from which on the weight is"
                " 0."
            )
        if loss not in LOSSES:
            raise LETError(f"loss is {loss!r}; choose one of {', '.join(LOSSES)}.")
        self._initial_weight, self._stop_step = weight, stop_step
        self._loss = _LossOfValidTokens(load_loss(loss, None))
        names = self._loss.loss.names
        self._hook: AlignmentHook | None = AlignmentHook(
            student_layer, AlignmentLoss(names, self._loss)
        )
        self._is_open = False
        self.report: dict[str, Tensor] = {}

    def weight(self, step: int) -> float:
        """Return lambda(s) of equation 5; where it is 0, `step` needs no teacher state."""
        return alignment_weight(step, self._initial_weight, self._stop_step)

    @contextmanager
    def step(
        self,
        step: int,
        teacher_state: Tensor | None,
        *,
        mask: Tensor | None = None,
        num_tokens: int | Tensor | None = None,
        loss_scale: float | Tensor = 1.0,
    ) -> Iterator[None]:
        """Align one microbatch, whose forward and backward pass run in the `with` block.

        The gradient is that of `lambda(s) * sum over valid tokens of the loss / num_tokens`.

        Args:
            step: s, 0-based optimizer step.
            teacher_state: `[..., d_T]` with the leading dimensions of the layer's output, such as
                `[b, s]`; may be None if the weight is 0.
            mask: `[...]`, bool or 0 and 1; tokens with 0 (padding) get no gradient and are not
                reported. None for no padding.
            num_tokens: what the sum is divided by; None for the valid tokens of this microbatch.
                With gradient accumulation, the valid tokens of all microbatches of the step.
            loss_scale: factor of the user's loss that is removed after the backward pass, such as
                `GradScaler.get_scale()`.

        Raises:
            LETError: no state, the block was not used as described, or the shapes do not match.
        """
        weight = self.weight(step)
        self.report = {}
        if weight == 0:
            if step >= self._stop_step:
                self.remove()
            yield
            return
        hook = self._check(step, teacher_state, mask)
        assert teacher_state is not None
        state = _TeacherState(teacher_state)
        self._loss.mask = None if mask is None else mask.bool()
        scale = _scale(weight, teacher_state, mask, num_tokens, loss_scale)
        hook.open_step(state, scale, teacher_state.device)
        self._is_open = True
        try:
            yield
        finally:
            sums, count = hook.close_step()
            self._is_open, self._loss.mask = False, None
            state.end()
        state.check_used()
        self.report = dict(zip(self._loss.loss.names, sums / count, strict=True))

    def remove(self) -> None:
        """Remove the hook from the layer; the object cannot be used at steps before S_stop."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def _check(self, step: int, state: Tensor | None, mask: Tensor | None) -> AlignmentHook:
        """Check the arguments of `step`; return the hook."""
        if self._hook is None:
            raise LETError(
                f"LET has ended and step {step} is before stop_step {self._stop_step}; create"
                " another LateToEarly for another training."
            )
        if self._is_open:
            raise LETError("Another `step()` is open; end it before the next microbatch.")
        if state is None:
            raise LETError(f"teacher_state is None at step {step}, whose weight is not 0.")
        if mask is not None and mask.shape != state.shape[:-1]:
            raise LETError(
                f"mask has shape {tuple(mask.shape)} and teacher_state {tuple(state.shape)}; give"
                " one value per token."
            )
        return self._hook


class _TeacherState:
    """Holds the teacher's state of one microbatch (`TeacherStates` of the hook)."""

    def __init__(self, state: Tensor) -> None:
        self._state: Tensor | None = state
        self._num_forward = 0
        self._num_backward = 0

    def before_forward(self, microbatch: int) -> None:
        self._num_forward += 1
        if self._num_forward > 1:
            raise LETError(
                "The student's layer ran twice inside `step()`; open one step per microbatch."
            )

    def state(self, microbatch: int) -> Tensor:
        if self._state is None:
            raise LETError(
                "The backward pass ran after `step()` had ended; call backward() inside the `with`"
                " block."
            )
        self._num_backward += 1
        if self._num_backward > 1:
            raise LETError(
                "The student's layer received a second gradient inside `step()`, to which the"
                " alignment would be added again; call backward() once, on the sum of the losses."
            )
        return self._state

    def end(self) -> None:
        self._state = None

    def check_used(self) -> None:
        """Check that the layer ran and received a gradient."""
        if not self._num_forward:
            raise LETError(
                "The student's layer did not run inside `step()`; give a layer of the model that is"
                " trained, and create LateToEarly before a compiled model first runs."
            )
        if not self._num_backward:
            raise LETError(
                "The student's layer received no gradient inside `step()`; call backward() inside"
                " the `with` block, and train parameters of this layer or of earlier ones."
            )


@dataclass
class _LossOfValidTokens:
    """A loss function (`LossFunction`) on the tokens whose mask, `[...]` bool, is true."""

    loss: AlignmentLoss
    mask: Tensor | None = None

    def __call__(
        self, hidden: Tensor, teacher: Tensor, scale: Tensor, grad_hidden: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        try:
            check_shapes(hidden, teacher)
        except ValueError as error:
            raise LETError(f"The {error}.") from error
        # The losses compute in fp32, also if the user calls backward() under autocast.
        with torch.autocast(hidden.device.type, enabled=False):
            if self.mask is None:
                return self._of_rows(hidden, teacher, scale, grad_hidden)
            rows = (hidden[self.mask], teacher[self.mask], scale, grad_hidden[self.mask])
            if not len(rows[0]):
                return grad_hidden, [scale.new_empty(0)] * len(self.loss.names)
            of_rows, values = self._of_rows(*rows)
            gradient = grad_hidden.clone(memory_format=torch.contiguous_format)
            gradient[self.mask] = of_rows
            return gradient, values

    def _of_rows(
        self, hidden: Tensor, teacher: Tensor, scale: Tensor, grad_hidden: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        count, needed = hidden.shape[:-1].numel(), CCA_TOKENS_PER_FEATURE * teacher.shape[-1]
        if self.loss.names[-1] == "cca" and count < needed:
            raise LETError(
                f"The cca loss correlates {teacher.shape[-1]} features over {count} valid tokens of"
                f" a microbatch and needs {needed}; use larger microbatches, or another loss."
            )
        return self.loss.function(hidden, teacher, scale, grad_hidden)


def _scale(
    weight: float,
    teacher_state: Tensor,
    mask: Tensor | None,
    num_tokens: int | Tensor | None,
    loss_scale: float | Tensor,
) -> float | Tensor:
    """Return `lambda(s) * loss_scale / num_tokens`; a 0-dim tensor if one of them is on a device.

    A number of tokens that is not known on the host is not copied to it.
    """
    if num_tokens is None:
        valid = None if mask is None else mask.bool().sum().clamp(min=1)
        num_tokens = teacher_state.shape[:-1].numel() if valid is None else valid
    scale = loss_scale * weight / num_tokens
    if isinstance(scale, Tensor):
        return scale.to(teacher_state.device, torch.float32).view(())
    return scale
