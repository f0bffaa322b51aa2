"""The public functions and their gradients, over whichever path the device has.

The two passes are registered as opaque operators (`torch.library.custom_op`, not `triton_op`):
torch.compile then calls them as they are, where seeing inside would let it split what is already
one pass, and the dispatcher picks the kernel on CUDA and the torch path elsewhere. The gradient is
an autograd Function around them because an operator may not return its input, as the identity on
the hidden state has to.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_let.losses import cosine_reference as reference

# hidden [..., d_M], teacher [..., d_T], gradient scale -> hidden, and numbers of each token.
Align = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, list[Tensor]]]


@torch.library.custom_op("megatron_let::cosine_forward", mutates_args=())
def _cosine_forward(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return reference.cosine_forward(student, teacher, mask)


@_cosine_forward.register_kernel("cuda")
def _cosine_forward_cuda(
    student: Tensor, teacher: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    from megatron_let.losses import cosine_launch as launch

    return launch.cosine_forward(student, teacher, mask)


@_cosine_forward.register_fake
def _cosine_forward_fake(
    student: Tensor, teacher: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    cosine = student.new_empty(student.shape[0], dtype=reference.work_dtype(student))
    return cosine, cosine.new_empty(2, student.shape[0])


@torch.library.custom_op("megatron_let::cosine_backward", mutates_args=())
def _cosine_backward(
    student: Tensor, teacher: Tensor, coefficients: Tensor, grad_hidden: Tensor | None
) -> Tensor:
    return reference.cosine_backward(student, teacher, coefficients, grad_hidden)


@_cosine_backward.register_kernel("cuda")
def _cosine_backward_cuda(
    student: Tensor, teacher: Tensor, coefficients: Tensor, grad_hidden: Tensor | None
) -> Tensor:
    from megatron_let.losses import cosine_launch as launch

    return launch.cosine_backward(student, teacher, coefficients, grad_hidden)


@_cosine_backward.register_fake
def _cosine_backward_fake(
    student: Tensor, teacher: Tensor, coefficients: Tensor, grad_hidden: Tensor | None
) -> Tensor:
    return student.new_empty(student.shape)


def _rows(tensor: Tensor) -> Tensor:
    """`[..., d]` as `[N, d]`; a copy only where the leading dimensions do not lie evenly."""
    return tensor.reshape(-1, tensor.shape[-1])


class _InterpolatedCosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        cosine, coefficients = _cosine_forward(student, teacher, mask)
        ctx.save_for_backward(student, teacher, coefficients)
        return cosine

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_cosine: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, coefficients = ctx.saved_tensors
        return _cosine_backward(student, teacher, coefficients * grad_cosine, None), None, None


class _AlignHiddenState(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, teacher: Tensor, gradient_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        cosine, coefficients = _cosine_forward(_rows(hidden), _rows(teacher), None)
        ctx.save_for_backward(hidden, teacher, coefficients, gradient_scale)
        cosine = cosine.view(hidden.shape[:-1])
        ctx.mark_non_differentiable(cosine)
        # detach, not view_as: the pipeline schedule frees a stage's output only if it is no view.
        return hidden.detach(), cosine

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor, grad_cosine: Tensor) -> tuple[Tensor, None, None]:
        hidden, teacher, coefficients, gradient_scale = ctx.saved_tensors
        # A new tensor, not a sum in place: autograd gives both inputs of an addition one and the
        # same gradient, so this one may be another branch's too. The bytes moved are equal.
        gradient = _cosine_backward(
            _rows(hidden), _rows(teacher), coefficients * -gradient_scale, _rows(grad_hidden)
        )
        return gradient.view(hidden.shape), None, None


class _AlignInBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        teacher: Callable[[], Tensor],
        gradient_scale: Tensor,
        align: Align,
        report: Callable[[list[Tensor]], None],
    ) -> Tensor:
        ctx.save_for_backward(hidden, gradient_scale)
        ctx.teacher, ctx.align, ctx.report = teacher, align, report
        # detach, not view_as: the pipeline schedule frees a stage's output only if it is no view.
        return hidden.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor) -> tuple[Tensor, None, None, None, None]:
        hidden, gradient_scale = ctx.saved_tensors
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            aligned, values = ctx.align(leaf, ctx.teacher(), gradient_scale)
        ctx.report(values)
        (gradient,) = torch.autograd.grad(aligned, leaf, grad_hidden)
        return gradient, None, None, None, None


def _check_inputs(student: Tensor, teacher: Tensor) -> None:
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} hold different "
            "tokens: give both the same leading dimensions"
        )
    if student.shape[-1] < 1 or teacher.shape[-1] < 2:
        raise ValueError(
            f"cannot interpolate width {student.shape[-1]} to {teacher.shape[-1]}: equation 6 "
            "needs d_M of at least 1 and d_T of at least 2"
        )


def interpolated_cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """`cos(interp(h_M), h_T)` of each token (equations 4 and 6), differentiable in the student.

    A CUDA tensor takes the Triton kernel, any other the torch path; both read the inputs once a
    pass and save two numbers a token beside them.

    Args:
        student: `h_M`, `[N, d_M]`, bf16, fp16, fp32 or fp64.
        teacher: `h_T`, `[N, d_T]` on the same device; it gets no gradient.
        mask: `[N]` bool, True where the token is ignored: cosine 0 and gradient 0.

    Returns:
        The cosine, `[N]` in fp32 (fp64 for fp64). A zero vector has cosine 0 and gradient 0.

    Raises:
        ValueError: shapes that do not match, or `d_T` below 2.
    """
    _check_inputs(student, teacher)
    if student.dim() != 2:
        raise ValueError(f"student is {tuple(student.shape)}: flatten it to [N, d_M]")
    if mask is not None and (mask.shape != student.shape[:1] or mask.dtype != torch.bool):
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}: give one bool a token, "
            f"[{student.shape[0]}], True where it is ignored"
        )
    return _InterpolatedCosine.apply(student, teacher, mask)


def align_hidden_state(
    hidden: Tensor, teacher: Tensor, gradient_scale: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Pass the hidden state on unchanged, and in the backward pull it towards the teacher's.

    The backward is `grad_out + gradient_scale * d(-sum_tokens cos) / d hidden`: the alignment loss
    (equation 7) with its weight and token mean in `gradient_scale`, as a gradient, so that no loss
    tensor has to travel through the pipeline schedule. The direction stays in fp32 until it is
    scaled and added.

    Args:
        hidden: `h_M`, `[..., d_M]`, bf16, fp16, fp32 or fp64; `[s, b, h]` in Megatron.
        teacher: `h_T`, `[..., d_T]` with the same leading dimensions; it gets no gradient.
        gradient_scale: a number, or a 0-dim tensor, whose value is never copied to the host.

    Returns:
        hidden's values, `[..., d_M]`, in a tensor that is no view; and the cosine, `[...]` in fp32
        (fp64 for fp64), with no gradient.

    Raises:
        ValueError: shapes that do not match, or `d_T` below 2.
    """
    _check_inputs(hidden, teacher)
    return _AlignHiddenState.apply(hidden, teacher, _scalar(gradient_scale))


def align_in_backward(
    hidden: Tensor,
    teacher: Callable[[], Tensor],
    gradient_scale: float | Tensor,
    align: Align,
    report: Callable[[list[Tensor]], None],
) -> Tensor:
    """Align with a teacher's state that need not be there before the backward.

    Args:
        hidden: `h_M`, `[..., d_M]`, as in `align_hidden_state`.
        teacher: called once, in the backward; returns `h_T`, `[..., d_T]`.
        gradient_scale: as in `align_hidden_state`.
        align: called in the backward; its result's gradient is hidden's.
        report: called in the backward with the numbers that `align` gives for each token.

    Returns:
        hidden's values, `[..., d_M]`, in a tensor that is no view.

    Raises:
        ValueError: a scale that is no number; in the backward, what `align` raises.
    """
    return _AlignInBackward.apply(hidden, teacher, _scalar(gradient_scale), align, report)


def _scalar(gradient_scale: float | Tensor) -> Tensor:
    if not isinstance(gradient_scale, Tensor):
        return torch.tensor(gradient_scale, dtype=torch.float64)
    if gradient_scale.dim() != 0:
        raise ValueError(
            f"gradient_scale is {tuple(gradient_scale.shape)}: give a number or a 0-dim tensor"
        )
    return gradient_scale
