"""Triton kernel of the cosine loss and its launch: one pass over a token's row.

Notation: `h` is a token's student row `[d_M]`, `t` its teacher row `[d_T]`, `W` the interpolation
of equation 6 (target column j reads sources `floor u_j` and `floor u_j + 1`), `p = W h`.

    cos = p.t / (|p| |t|),  a = 1 / (|p| |t|),  b = cos / |p|^2
    out = grad - scale W^T (a t - b p)

A program reads its rows once for the three sums and, from its cache, again for the gradient. The
columns are read in one of two ways, by the structure of `W`:

* block: `d_M = r d_T` with `r` 1, 2 or 4, where target j reads sources `r j .. r j + r - 1` only. A
  thread holds all that it needs, and every access is a wide, aligned stream.
* gather: any widths. Columns are read where `u_j` falls, neighbours through the L1 cache, and the
  transpose is a gather too: without atomics, so that runs are bitwise reproducible.

Tiles are `[TOKENS, LANES, columns per thread]`: lanes lie along the row, and the tokens of a
program share the column arithmetic. That arithmetic uses integers over the common denominator
`d_T - 1`, so weights have one rounding at any width. Row offsets are 64-bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_let.losses.interpolation import work_dtype

# Four warps share a row, so that the rows of a multiprocessor's programs stay in its L1 cache.
NUM_WARPS = 4
_LANES = 32 * NUM_WARPS
_TL_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _weight(distance, D_T: tl.constexpr, DTYPE: tl.constexpr):
    """Return the weight of a source column `distance / (d_T - 1)` away from a target's `u_j`."""
    return tl.maximum(D_T - 1 - tl.abs(distance), 0).to(DTYPE) * (1.0 / (D_T - 1))


@triton.jit
def _rows(pointer, tokens, num_tokens, stride):
    """Return row addresses `[TOKENS, 1, 1]`, clamped to the last row so that loads need no mask."""
    tokens = tl.minimum(tokens, num_tokens - 1)
    return pointer + (tokens.to(tl.int64) * stride)[:, None, None]


@triton.jit
def _load(pointer, in_row, MASKED: tl.constexpr, DTYPE: tl.constexpr):
    """Load and widen; masked only if a tile overhangs the row."""
    if MASKED:
        return tl.load(pointer, mask=in_row, other=0.0).to(DTYPE)
    return tl.load(pointer).to(DTYPE)


@triton.jit
def _coefficients(dot, student_sq, teacher_sq):
    """Sum the lanes' parts; return the cosine, a and b, `[TOKENS]`, 0 where a vector is zero."""
    dot = tl.sum(tl.sum(dot, 2), 1)
    student_sq = tl.sum(tl.sum(student_sq, 2), 1)
    norms = tl.sqrt(student_sq) * tl.sqrt(tl.sum(tl.sum(teacher_sq, 2), 1))
    is_zero = norms == 0  # not the negation of `norms > 0`: a NaN must propagate to the cosine
    a = tl.where(is_zero, 0.0, 1.0 / tl.where(is_zero, 1.0, norms))
    cosine = tl.where(is_zero, 0.0, dot * a)
    return cosine, a, cosine / tl.where(is_zero, 1.0, student_sq)


@triton.jit
def _scaled(coefficient, scale_ptr):
    """Return `-scale` times a coefficient, `[TOKENS, 1, 1]`."""
    return (coefficient * -tl.load(scale_ptr).to(coefficient.dtype))[:, None, None]


@triton.jit
def _store_gradient(
    out_ptr, grad_ptr, gradient, tokens, num_tokens, grad_stride, source,
    D_M: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Add the incoming gradient to the loss's and store the sum."""
    grad_row = _rows(grad_ptr, tokens, num_tokens, grad_stride)
    gradient += _load(grad_row + source, source < D_M, MASKED, DTYPE)
    in_tensor = (tokens < num_tokens)[:, None, None]
    if MASKED:
        in_tensor &= source < D_M
    tl.store(_rows(out_ptr, tokens, num_tokens, D_M) + source, gradient, mask=in_tensor)


@triton.jit
def _interpolate_block(
    student_row, teacher_row, lanes,
    D_M: tl.constexpr, D_T: tl.constexpr, TOKENS: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Load `p`, `t`, `[TOKENS, LANES, COLUMNS]`, and W's blocks, `[1, LANES, COLUMNS, r]`."""
    RATIO: tl.constexpr = D_M // D_T
    MASKED: tl.constexpr = D_M % (LANES * VECTOR) != 0
    source = lanes * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    target = lanes * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    h = _load(student_row + source, source < D_M, MASKED, DTYPE)
    t = _load(teacher_row + target, target < D_T, MASKED, DTYPE)
    distance = tl.reshape(source, [1, LANES, COLUMNS, RATIO]) * (D_T - 1)
    weights = _weight(distance - (target * (D_M - 1))[:, :, :, None], D_T, DTYPE)
    p = tl.sum(tl.reshape(h, [TOKENS, LANES, COLUMNS, RATIO]) * weights, axis=3)
    return p, t, weights


@triton.jit
def _interpolate_gather(
    student_row, teacher_row, start,
    D_M: tl.constexpr, D_T: tl.constexpr, LANES: tl.constexpr,
    COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Load `p` and `t`, `[TOKENS, LANES, COLUMNS]`, at any widths."""
    MASKED: tl.constexpr = D_T % (LANES * COLUMNS) != 0
    lanes = tl.arange(0, LANES)[None, :, None]
    target = start + lanes * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    in_row = target < D_T
    # At the row's end: one column lower, with weight 1 above it, so that `upper` is in the row.
    lower = tl.maximum(tl.minimum(target * (D_M - 1) // (D_T - 1), D_M - 2), 0)
    upper = lower + min(D_M - 1, 1)
    fraction = _weight((lower + 1) * (D_T - 1) - target * (D_M - 1), D_T, DTYPE)
    t = _load(teacher_row + target, in_row, MASKED, DTYPE)
    h_lower = _load(student_row + lower, in_row, MASKED, DTYPE)
    h_upper = _load(student_row + upper, in_row, MASKED, DTYPE)
    return h_lower + fraction * (h_upper - h_lower), t


@triton.jit
def _shift_right(x, edge, TOKENS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Return `[edge, x[0], .., x[WIDTH - 2]]` in a thread's registers, without an exchange."""
    if WIDTH == 1:
        return edge
    else:
        even, odd = tl.split(tl.reshape(x, [TOKENS, LANES, WIDTH // 2, 2]))
        odd = _shift_right(odd, edge, TOKENS, LANES, WIDTH // 2)
        return tl.reshape(tl.join(odd, even), [TOKENS, LANES, WIDTH])


@triton.jit
def _shift_left(x, edge, TOKENS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Return `[x[1], .., x[WIDTH - 1], edge]`, likewise."""
    if WIDTH == 1:
        return edge
    else:
        even, odd = tl.split(tl.reshape(x, [TOKENS, LANES, WIDTH // 2, 2]))
        even = _shift_left(even, edge, TOKENS, LANES, WIDTH // 2)
        return tl.reshape(tl.join(odd, even), [TOKENS, LANES, WIDTH])


@triton.jit
def _gather_gradient(
    student_row, teacher_row, edge, a, b,
    D_M: tl.constexpr, D_T: tl.constexpr, TARGETS: tl.constexpr, UNROLL: tl.constexpr,
    TOKENS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Return `W^T (a t - b p)` of the columns from `edge` on, with `W^T p = (W^T W) h`.

    `W^T W` is tridiagonal, so a tile reads one column past each edge.
    """
    MASKED: tl.constexpr = D_M % (LANES * VECTOR) != 0
    source = edge + tl.arange(0, VECTOR)[None, None, :]
    in_row = source < D_M
    # Targets with |u_j - i| < 1 are consecutive; the first is floor((i-1)(d_T-1)/(d_M-1)) + 1.
    first_target = tl.maximum((source - 1) * (D_T - 1) + (D_M - 1), 0) // max(D_M - 1, 1)
    diagonal = tl.zeros([1, LANES, VECTOR], DTYPE)
    to_left = tl.zeros_like(diagonal)
    to_right = tl.zeros_like(diagonal)
    towards_teacher = tl.zeros([TOKENS, LANES, VECTOR], DTYPE)
    for k in tl.range(0, TARGETS, loop_unroll_factor=UNROLL):
        target = first_target + k
        distance = target * (D_M - 1) - source * (D_T - 1)
        weight = tl.where(target < D_T, _weight(distance, D_T, DTYPE), 0.0)
        t = _load(teacher_row + tl.minimum(target, D_T - 1), in_row, False, DTYPE)
        towards_teacher += weight * t
        diagonal += weight * weight
        mixed = weight * (1.0 - weight)
        to_left += tl.where(distance < 0, mixed, 0.0)
        to_right += tl.where(distance < 0, 0.0, mixed)

    h = _load(student_row + source, in_row, MASKED, DTYPE)
    before = _load(student_row + edge - 1, (edge > 0) & (edge <= D_M), True, DTYPE)
    after = _load(student_row + edge + VECTOR, edge + VECTOR < D_M, True, DTYPE)
    from_student = diagonal * h
    from_student += to_left * _shift_right(h, before, TOKENS, LANES, VECTOR)
    from_student += to_right * _shift_left(h, after, TOKENS, LANES, VECTOR)
    return a * towards_teacher - b * from_student


@triton.jit
def cosine_kernel(
    student_ptr,  # [num_tokens, D_M], bf16 | fp16 | fp32 | fp64
    teacher_ptr,  # [num_tokens, D_T], likewise
    scale_ptr,  # 0-dim, fp32 | fp64
    grad_ptr,  # [num_tokens, D_M]
    cosine_ptr,  # [num_tokens], DTYPE
    out_ptr,  # [num_tokens, D_M], contiguous
    num_tokens,
    student_stride,
    teacher_stride,
    grad_stride,
    D_M: tl.constexpr,
    D_T: tl.constexpr,
    BLOCK: tl.constexpr,  # whether W is block diagonal
    GRADIENT: tl.constexpr,  # without it only the cosine is computed
    TOKENS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,  # source columns per thread
    COLUMNS: tl.constexpr,  # target columns per thread
    TARGETS: tl.constexpr,  # upper bound of the target columns that read one source column
    UNROLL: tl.constexpr,
    DTYPE: tl.constexpr,
):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    student_row = _rows(student_ptr, tokens, num_tokens, student_stride)
    teacher_row = _rows(teacher_ptr, tokens, num_tokens, teacher_stride)
    dot = tl.zeros([TOKENS, LANES, COLUMNS], DTYPE)
    student_sq = tl.zeros_like(dot)
    teacher_sq = tl.zeros_like(dot)
    # In lanes of a block, or in target columns.
    END: tl.constexpr = (D_M + VECTOR - 1) // VECTOR if BLOCK else D_T
    STEP: tl.constexpr = LANES if BLOCK else LANES * COLUMNS
    for start in range(0, END, STEP):
        if BLOCK:
            lanes = (start + tl.arange(0, LANES))[None, :, None]
            p, t, _ = _interpolate_block(
                student_row, teacher_row, lanes, D_M, D_T, TOKENS, LANES, VECTOR, COLUMNS, DTYPE
            )
        else:
            p, t = _interpolate_gather(
                student_row, teacher_row, start, D_M, D_T, LANES, COLUMNS, DTYPE
            )
        dot += p * t
        student_sq += p * p
        teacher_sq += t * t
    cosine, a, b = _coefficients(dot, student_sq, teacher_sq)
    tl.store(cosine_ptr + tokens, cosine, mask=tokens < num_tokens)
    if GRADIENT:
        a = _scaled(a, scale_ptr)
        b = _scaled(b, scale_ptr)
        for start in range(0, (D_M + VECTOR - 1) // VECTOR, LANES):
            lanes = (start + tl.arange(0, LANES))[None, :, None]
            if BLOCK:
                p, t, weights = _interpolate_block(
                    student_row, teacher_row, lanes, D_M, D_T, TOKENS, LANES, VECTOR, COLUMNS, DTYPE
                )
                gradient = (a * t - b * p)[:, :, :, None] * weights
                gradient = tl.reshape(gradient, [TOKENS, LANES, VECTOR])
            else:
                gradient = _gather_gradient(
                    student_row, teacher_row, lanes * VECTOR, a, b,
                    D_M, D_T, TARGETS, UNROLL, TOKENS, LANES, VECTOR, DTYPE,
                )  # fmt: skip
            source = lanes * VECTOR + tl.arange(0, VECTOR)[None, None, :]
            _store_gradient(
                out_ptr, grad_ptr, gradient, tokens, num_tokens, grad_stride, source,
                D_M, D_M % (LANES * VECTOR) != 0, DTYPE,
            )  # fmt: skip


def is_block_diagonal(num_source: int, num_target: int) -> bool:
    """Return whether each target column reads 1, 2 or 4 source columns that no other reads.

    With `d_M = r d_T`, `u_j = r j + j (r - 1) / (d_T - 1)` stays in `[r j, r j + r - 1]`.
    """
    return num_source in (num_target, 2 * num_target, 4 * num_target)


def max_targets_per_source(num_source: int, num_target: int) -> int:
    """Return an upper bound of the target columns with `|u_j - i| < 1`."""
    if num_source == 1:
        return num_target
    return min(triton.cdiv(2 * (num_target - 1), num_source - 1), num_target)


def plan(student: Tensor, num_target: int, gradient: bool = True) -> dict[str, Any]:
    """Return the kernel's compile-time constants for `student [N, d_M]` and teacher width `d_T`.

    Args:
        student: its width and dtype are used.
        gradient: whether the gradient is computed besides the cosine.

    Raises:
        ValueError: the product of the widths overflows the kernel's column arithmetic.
    """
    num_source = student.shape[1]
    # A 16-byte access per thread; at least 4 columns, which a block of 4 needs.
    vector = max(16 // student.element_size(), 4)
    if (num_source + _LANES * vector) * (num_target + _LANES * vector) >= 2**31:
        raise ValueError(
            f"widths {num_source} and {num_target} overflow the kernel's 32-bit column arithmetic: "
            "keep their product below 2**31"
        )
    is_block = is_block_diagonal(num_source, num_target)
    # A lane reads `d_M / d_T` source columns per target column: two targets per lane keep a warp's
    # gathered load within few cache lines; its 16-bit teacher load is one line.
    columns = vector * num_target // num_source if is_block else 2
    targets = max_targets_per_source(num_source, num_target)
    # Threads hold source columns: the wider the teacher, the further their gathered reads spread.
    vector = vector if num_source >= num_target else 2
    return {
        "D_M": num_source, "D_T": num_target, "BLOCK": is_block, "GRADIENT": gradient, "TOKENS": 2,
        "LANES": _LANES, "VECTOR": vector, "COLUMNS": columns, "TARGETS": targets,
        "UNROLL": min(targets, 2), "DTYPE": _TL_DTYPE[work_dtype(student)],
    }  # fmt: skip


def _unit_stride(rows: Tensor) -> Tensor:
    """Return the tensor itself if its columns are adjacent in memory, else a contiguous copy."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def cosine_alignment(
    student: Tensor, teacher: Tensor, scale: Tensor, grad_hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `grad_hidden - scale * d(sum of cos) / d student`, `[N, d_M]`, and cos, `[N]`.

    Args:
        student: `h`, `[N, d_M]`.
        teacher: `t`, `[N, d_T]`.
        scale: 0-dim, on the same device.
        grad_hidden: `[N, d_M]`, the gradient to add to; not modified.
    """
    gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    return gradient, _launch(student, teacher, scale, _unit_stride(grad_hidden), gradient)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the cosine alone, `[N]` in fp32 (fp64 for fp64); arguments as above."""
    return _launch(student, teacher, None, None, None)


def _launch(
    student: Tensor,
    teacher: Tensor,
    scale: Tensor | None,
    grad: Tensor | None,
    gradient: Tensor | None,
) -> Tensor:
    student, teacher = _unit_stride(student), _unit_stride(teacher)
    num_tokens = student.shape[0]
    result = torch.empty(num_tokens, dtype=work_dtype(student), device=student.device)
    constants = plan(student, teacher.shape[1], gradient is not None)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(student):
        cosine_kernel[(triton.cdiv(num_tokens, constants["TOKENS"]),)](
            student, teacher, scale, grad, result, gradient, num_tokens, student.stride(0),
            teacher.stride(0), 0 if grad is None else grad.stride(0), **constants,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return result
