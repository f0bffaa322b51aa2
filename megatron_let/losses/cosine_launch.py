"""Which kernel and which tile for a pair of widths, and its launch."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_let.losses import cosine_kernels as kernels
from megatron_let.losses.cosine_reference import work_dtype

# One warp a program: sums end in shuffles, and many small programs hide one another's latency.
NUM_WARPS = 1
_LANES = 32
_TL_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


@dataclass(frozen=True)
class KernelPlan:
    """A kernel, its compile-time constants, and how many tiles a row of columns is cut into."""

    kernel: Any
    constants: dict[str, Any]
    tiles_per_row: int

    def grid(self, num_tokens: int) -> tuple[int]:
        return (triton.cdiv(num_tokens, self.constants["TOKENS"]) * self.tiles_per_row,)


def is_block_diagonal(num_source: int, num_target: int) -> bool:
    """Whether each target column reads its own 1, 2 or 4 source columns and no others.

    With `d_M = r d_T`, `u_j = r j + j (r - 1) / (d_T - 1)` stays in `[r j, r j + r - 1]`.
    """
    return num_source in (num_target, 2 * num_target, 4 * num_target)


def max_targets_per_source(num_source: int, num_target: int) -> int:
    """Most target columns with `|u_j - i| < 1`: whole numbers in an open interval."""
    if num_source == 1:
        return num_target
    return min(triton.cdiv(2 * (num_target - 1), num_source - 1), num_target)


def _widest_vector(student: Tensor) -> int:
    """Elements of one 16-byte access; four at least, which a block of four columns needs."""
    return max(16 // student.element_size(), 4)


def _constants(student: Tensor, num_target: int, tokens: int, vector: int) -> dict[str, Any]:
    num_source = student.shape[1]
    if (num_source + _LANES * vector) * (num_target + _LANES * vector) >= 2**31:
        raise ValueError(
            f"widths {num_source} and {num_target} overflow the kernel's 32-bit column arithmetic: "
            "keep their product below 2**31"
        )
    return {
        "D_M": num_source,
        "D_T": num_target,
        "TOKENS": tokens,
        "LANES": _LANES,
        "VECTOR": vector,
        "DTYPE": _TL_DTYPE[work_dtype(student)],
    }


def plan_forward(student: Tensor, num_target: int) -> KernelPlan:
    """The forward kernel for `student [N, d_M]` and teacher width `d_T`: a program owns tokens."""
    if is_block_diagonal(student.shape[1], num_target):
        constants = _constants(student, num_target, tokens=2, vector=_widest_vector(student))
        return KernelPlan(kernels.cosine_forward_block, constants, 1)
    # A lane reads `d_M / d_T` source columns per target column it owns: owning two keeps a warp's
    # gathered load within few cache lines, while its 16-bit teacher load is one whole line.
    constants = _constants(student, num_target, tokens=4, vector=2)
    return KernelPlan(kernels.cosine_forward_gather, constants, 1)


def plan_backward(student: Tensor, num_target: int) -> KernelPlan:
    """The backward kernel: a program owns some tokens and one tile of their columns."""
    width, vector = student.shape[1], _widest_vector(student)
    if is_block_diagonal(width, num_target):
        kernel = kernels.cosine_backward_block
        constants = _constants(student, num_target, tokens=2, vector=vector)
    else:
        kernel = kernels.cosine_backward_gather
        # Here a lane owns source columns: the wider the teacher, the further its reads spread.
        vector = vector if width > num_target else 2
        constants = _constants(student, num_target, tokens=4, vector=vector)
        constants["TARGETS"] = max_targets_per_source(width, num_target)
    return KernelPlan(kernel, constants, triton.cdiv(width, _LANES * constants["VECTOR"]))


def _unit_stride(rows: Tensor) -> Tensor:
    """The tensor itself if its columns are adjacent in memory, else a contiguous copy."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def cosine_forward(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`reference.cosine_forward` in one kernel."""
    student, teacher = _unit_stride(student), _unit_stride(teacher)
    num_tokens = student.shape[0]
    dtype = work_dtype(student)
    cosine = torch.empty(num_tokens, dtype=dtype, device=student.device)
    coefficients = torch.empty(2, num_tokens, dtype=dtype, device=student.device)
    plan = plan_forward(student, teacher.shape[1])
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(student):
        plan.kernel[plan.grid(num_tokens)](
            student, teacher, None if mask is None else mask.contiguous(), cosine, coefficients,
            num_tokens, student.stride(0), teacher.stride(0), **plan.constants, num_warps=NUM_WARPS,
        )  # fmt: skip
    return cosine, coefficients


def cosine_backward(
    student: Tensor, teacher: Tensor, coefficients: Tensor, grad_hidden: Tensor | None
) -> Tensor:
    """`reference.cosine_backward` in one kernel."""
    student, teacher = _unit_stride(student), _unit_stride(teacher)
    num_tokens = student.shape[0]
    grad = None if grad_hidden is None else _unit_stride(grad_hidden)
    result = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    plan = plan_backward(student, teacher.shape[1])
    with torch.cuda.device_of(student):
        plan.kernel[plan.grid(num_tokens)](
            student, teacher, coefficients, grad, result, num_tokens, student.stride(0),
            teacher.stride(0), 0 if grad is None else grad.stride(0),
            **plan.constants, num_warps=NUM_WARPS,
        )  # fmt: skip
    return result
