"""Triton kernels: interpolation and cosine in one pass forward and one pass backward.

Notation: `h` is a token's student row `[d_M]`, `t` its teacher row `[d_T]`, `W` the interpolation
of equation 6 (target column j reads sources `floor u_j` and `floor u_j + 1`), `p = W h`.

    forward    cos = p.t / (|p| |t|),  a = 1 / (|p| |t|),  b = cos / |p|^2
    backward   out = grad + W^T (a t - b p)

Two pairs, one for each shape that `W` can take:

* block: `d_M = r d_T`, `r` 1, 2 or 4, where target j reads sources `r j .. r j + r - 1` only: a
  thread holds all that it needs, and every access is a wide, aligned stream.
* gather: any widths. Columns are read where `u_j` falls, neighbours through the L1 cache, and the
  transpose is a gather too: no atomics, so a run repeats to the bit.

Tiles are `[TOKENS, LANES, columns of one thread]`: lanes lie along the row, and the tokens of a
program share the column arithmetic. That arithmetic is in whole numbers over the common
denominator `d_T - 1`, so weights have one rounding at any width. Row offsets are 64-bit.
"""

import triton
import triton.language as tl


@triton.jit
def _weight(distance, D_T: tl.constexpr, DTYPE: tl.constexpr):
    """Weight of a source column `distance / (d_T - 1)` away from a target's `u_j`."""
    return tl.maximum(D_T - 1 - tl.abs(distance), 0).to(DTYPE) * (1.0 / (D_T - 1))


@triton.jit
def _rows(pointer, tokens, num_tokens, stride):
    """Row addresses `[TOKENS, 1, 1]`; past the end the last row again, so loads need no mask."""
    tokens = tl.minimum(tokens, num_tokens - 1)
    return pointer + (tokens.to(tl.int64) * stride)[:, None, None]


@triton.jit
def _load(pointer, in_row, MASKED: tl.constexpr, DTYPE: tl.constexpr):
    """Load and widen; the mask only where a tile overhangs the row."""
    if MASKED:
        return tl.load(pointer, mask=in_row, other=0.0).to(DTYPE)
    return tl.load(pointer).to(DTYPE)


@triton.jit
def _store_cosine(
    cosine_ptr, coefficient_ptr, mask_ptr, tokens, num_tokens, dot, student_sq, teacher_sq
):  # fmt: skip
    """Sum the lanes' parts; store the cosine and the backward's a and b.

    All three are zero where a vector is zero and where the token is ignored.
    """
    dot = tl.sum(tl.sum(dot, 2), 1)
    student_sq = tl.sum(tl.sum(student_sq, 2), 1)
    norms = tl.sqrt(student_sq) * tl.sqrt(tl.sum(tl.sum(teacher_sq, 2), 1))
    exists = tokens < num_tokens
    dead = norms == 0  # not `norms > 0` negated: a NaN must show in the cosine
    if mask_ptr is not None:
        dead |= tl.load(mask_ptr + tokens, mask=exists, other=1) != 0
    a = tl.where(dead, 0.0, 1.0 / tl.where(dead, 1.0, norms))
    cosine = tl.where(dead, 0.0, dot * a)
    b = cosine / tl.where(dead, 1.0, student_sq)
    tl.store(cosine_ptr + tokens, cosine, mask=exists)
    tl.store(coefficient_ptr + tokens, a, mask=exists)
    tl.store(coefficient_ptr + num_tokens + tokens, b, mask=exists)


@triton.jit
def _store_gradient(
    out_ptr, grad_ptr, gradient, a, tokens, num_tokens, grad_stride, source,
    D_M: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Add the incoming gradient, if any, to the alignment's and store the sum."""
    # An ignored token may hold a NaN, which 0 * NaN would let through.
    gradient = tl.where(a == 0, 0.0, gradient)
    if grad_ptr is not None:
        grad_row = _rows(grad_ptr, tokens, num_tokens, grad_stride)
        gradient += _load(grad_row + source, source < D_M, MASKED, DTYPE)
    in_tensor = (tokens < num_tokens)[:, None, None]
    if MASKED:
        in_tensor &= source < D_M
    tl.store(_rows(out_ptr, tokens, num_tokens, D_M) + source, gradient, mask=in_tensor)


@triton.jit
def _load_coefficients(coefficient_ptr, tokens, num_tokens):
    tokens = tl.minimum(tokens, num_tokens - 1)
    a = tl.load(coefficient_ptr + tokens)
    b = tl.load(coefficient_ptr + num_tokens + tokens)
    return a[:, None, None], b[:, None, None]


@triton.jit
def _interpolate_block(
    student_row, teacher_row, start,
    D_M: tl.constexpr, D_T: tl.constexpr,
    TOKENS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`p` and `t`, `[TOKENS, LANES, VECTOR / r]`, and `W`'s blocks `[1, LANES, VECTOR / r, r]`."""
    RATIO: tl.constexpr = D_M // D_T
    MASKED: tl.constexpr = D_M % (LANES * VECTOR) != 0
    lanes = (start + tl.arange(0, LANES))[None, :, None]
    source = lanes * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    target = lanes * (VECTOR // RATIO) + tl.arange(0, VECTOR // RATIO)[None, None, :]
    h = _load(student_row + source, source < D_M, MASKED, DTYPE)
    t = _load(teacher_row + target, target < D_T, MASKED, DTYPE)
    distance = tl.reshape(source, [1, LANES, VECTOR // RATIO, RATIO]) * (D_T - 1)
    weights = _weight(distance - (target * (D_M - 1))[:, :, :, None], D_T, DTYPE)
    p = tl.sum(tl.reshape(h, [TOKENS, LANES, VECTOR // RATIO, RATIO]) * weights, axis=3)
    return p, t, weights


@triton.jit
def cosine_forward_block(
    student_ptr,  # [num_tokens, D_M], bf16 | fp16 | fp32 | fp64
    teacher_ptr,  # [num_tokens, D_T], likewise
    mask_ptr,  # [num_tokens] bool, True where ignored, or None
    cosine_ptr,  # [num_tokens], DTYPE
    coefficient_ptr,  # [2, num_tokens], DTYPE
    num_tokens,
    student_stride,
    teacher_stride,
    D_M: tl.constexpr,
    D_T: tl.constexpr,
    TOKENS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    DTYPE: tl.constexpr,
):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    student_row = _rows(student_ptr, tokens, num_tokens, student_stride)
    teacher_row = _rows(teacher_ptr, tokens, num_tokens, teacher_stride)
    dot = tl.zeros([TOKENS, LANES, VECTOR // (D_M // D_T)], DTYPE)
    student_sq = tl.zeros_like(dot)
    teacher_sq = tl.zeros_like(dot)
    for start in tl.range(0, (D_M + VECTOR - 1) // VECTOR, LANES, loop_unroll_factor=2):
        p, t, _ = _interpolate_block(
            student_row, teacher_row, start, D_M, D_T, TOKENS, LANES, VECTOR, DTYPE
        )
        dot += p * t
        student_sq += p * p
        teacher_sq += t * t
    _store_cosine(
        cosine_ptr, coefficient_ptr, mask_ptr, tokens, num_tokens, dot, student_sq, teacher_sq
    )


@triton.jit
def cosine_backward_block(
    student_ptr,  # [num_tokens, D_M]
    teacher_ptr,  # [num_tokens, D_T]
    coefficient_ptr,  # [2, num_tokens], DTYPE, already scaled
    grad_ptr,  # [num_tokens, D_M] or None
    out_ptr,  # [num_tokens, D_M], contiguous
    num_tokens,
    student_stride,
    teacher_stride,
    grad_stride,
    D_M: tl.constexpr,
    D_T: tl.constexpr,
    TOKENS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    DTYPE: tl.constexpr,
):
    TILES: tl.constexpr = (D_M + LANES * VECTOR - 1) // (LANES * VECTOR)
    program = tl.program_id(0)
    tokens = (program // TILES) * TOKENS + tl.arange(0, TOKENS)
    start = (program % TILES) * LANES
    student_row = _rows(student_ptr, tokens, num_tokens, student_stride)
    teacher_row = _rows(teacher_ptr, tokens, num_tokens, teacher_stride)
    p, t, weights = _interpolate_block(
        student_row, teacher_row, start, D_M, D_T, TOKENS, LANES, VECTOR, DTYPE
    )
    a, b = _load_coefficients(coefficient_ptr, tokens, num_tokens)
    gradient = tl.reshape((a * t - b * p)[:, :, :, None] * weights, [TOKENS, LANES, VECTOR])
    source = (start + tl.arange(0, LANES))[None, :, None] * VECTOR
    source += tl.arange(0, VECTOR)[None, None, :]
    _store_gradient(
        out_ptr, grad_ptr, gradient, a, tokens, num_tokens, grad_stride, source,
        D_M, D_M % (LANES * VECTOR) != 0, DTYPE,
    )  # fmt: skip


@triton.jit
def cosine_forward_gather(
    student_ptr,  # [num_tokens, D_M], bf16 | fp16 | fp32 | fp64
    teacher_ptr,  # [num_tokens, D_T], likewise
    mask_ptr,  # [num_tokens] bool, True where ignored, or None
    cosine_ptr,  # [num_tokens], DTYPE
    coefficient_ptr,  # [2, num_tokens], DTYPE
    num_tokens,
    student_stride,
    teacher_stride,
    D_M: tl.constexpr,
    D_T: tl.constexpr,
    TOKENS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    DTYPE: tl.constexpr,
):
    MASKED: tl.constexpr = D_T % (LANES * VECTOR) != 0
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    student_row = _rows(student_ptr, tokens, num_tokens, student_stride)
    teacher_row = _rows(teacher_ptr, tokens, num_tokens, teacher_stride)
    dot = tl.zeros([TOKENS, LANES, VECTOR], DTYPE)
    student_sq = tl.zeros_like(dot)
    teacher_sq = tl.zeros_like(dot)
    for start in range(0, D_T, LANES * VECTOR):
        lanes = tl.arange(0, LANES)[None, :, None]
        target = start + lanes * VECTOR + tl.arange(0, VECTOR)[None, None, :]
        in_row = target < D_T
        # At the row's end one column lower, with weight 1 above it, so that `upper` is in the row.
        lower = tl.maximum(tl.minimum(target * (D_M - 1) // (D_T - 1), D_M - 2), 0)
        upper = lower + min(D_M - 1, 1)
        fraction = _weight((lower + 1) * (D_T - 1) - target * (D_M - 1), D_T, DTYPE)
        t = _load(teacher_row + target, in_row, MASKED, DTYPE)
        h_lower = _load(student_row + lower, in_row, MASKED, DTYPE)
        h_upper = _load(student_row + upper, in_row, MASKED, DTYPE)
        p = h_lower + fraction * (h_upper - h_lower)
        dot += p * t
        student_sq += p * p
        teacher_sq += t * t
    _store_cosine(
        cosine_ptr, coefficient_ptr, mask_ptr, tokens, num_tokens, dot, student_sq, teacher_sq
    )


@triton.jit
def _shift_right(x, edge, TOKENS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """`[x[-1] = edge, x[0], .., x[WIDTH - 2]]` in a thread's registers, with no exchange."""
    if WIDTH == 1:
        return edge
    else:
        even, odd = tl.split(tl.reshape(x, [TOKENS, LANES, WIDTH // 2, 2]))
        odd = _shift_right(odd, edge, TOKENS, LANES, WIDTH // 2)
        return tl.reshape(tl.join(odd, even), [TOKENS, LANES, WIDTH])


@triton.jit
def _shift_left(x, edge, TOKENS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """`[x[1], .., x[WIDTH - 1], edge]`, likewise."""
    if WIDTH == 1:
        return edge
    else:
        even, odd = tl.split(tl.reshape(x, [TOKENS, LANES, WIDTH // 2, 2]))
        even = _shift_left(even, edge, TOKENS, LANES, WIDTH // 2)
        return tl.reshape(tl.join(odd, even), [TOKENS, LANES, WIDTH])


@triton.jit
def cosine_backward_gather(
    student_ptr,  # [num_tokens, D_M]
    teacher_ptr,  # [num_tokens, D_T]
    coefficient_ptr,  # [2, num_tokens], DTYPE, already scaled
    grad_ptr,  # [num_tokens, D_M] or None
    out_ptr,  # [num_tokens, D_M], contiguous
    num_tokens,
    student_stride,
    teacher_stride,
    grad_stride,
    D_M: tl.constexpr,
    D_T: tl.constexpr,
    TARGETS: tl.constexpr,  # most target columns that read one source column
    TOKENS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """`W^T p = (W^T W) h` with `W^T W` tridiagonal: a tile needs one column beyond each edge."""
    MASKED: tl.constexpr = D_M % (LANES * VECTOR) != 0
    TILES: tl.constexpr = (D_M + LANES * VECTOR - 1) // (LANES * VECTOR)
    program = tl.program_id(0)
    tokens = (program // TILES) * TOKENS + tl.arange(0, TOKENS)
    teacher_row = _rows(teacher_ptr, tokens, num_tokens, teacher_stride)
    edge = (program % TILES * LANES + tl.arange(0, LANES))[None, :, None] * VECTOR
    source = edge + tl.arange(0, VECTOR)[None, None, :]
    in_row = source < D_M

    # Targets with |u_j - i| < 1 are consecutive; the first is floor((i-1)(d_T-1)/(d_M-1)) + 1.
    first_target = tl.maximum((source - 1) * (D_T - 1) + (D_M - 1), 0) // max(D_M - 1, 1)
    diagonal = tl.zeros([1, LANES, VECTOR], DTYPE)
    to_left = tl.zeros_like(diagonal)
    to_right = tl.zeros_like(diagonal)
    towards_teacher = tl.zeros([TOKENS, LANES, VECTOR], DTYPE)
    for k in tl.range(0, TARGETS, loop_unroll_factor=min(TARGETS, 2)):
        target = first_target + k
        distance = target * (D_M - 1) - source * (D_T - 1)
        weight = tl.where(target < D_T, _weight(distance, D_T, DTYPE), 0.0)
        t = _load(teacher_row + tl.minimum(target, D_T - 1), in_row, False, DTYPE)
        towards_teacher += weight * t
        diagonal += weight * weight
        mixed = weight * (1.0 - weight)
        to_left += tl.where(distance < 0, mixed, 0.0)
        to_right += tl.where(distance < 0, 0.0, mixed)

    student_row = _rows(student_ptr, tokens, num_tokens, student_stride)
    h = _load(student_row + source, in_row, MASKED, DTYPE)
    before = _load(student_row + edge - 1, (edge > 0) & (edge <= D_M), True, DTYPE)
    after = _load(student_row + edge + VECTOR, edge + VECTOR < D_M, True, DTYPE)
    from_student = diagonal * h
    from_student += to_left * _shift_right(h, before, TOKENS, LANES, VECTOR)
    from_student += to_right * _shift_left(h, after, TOKENS, LANES, VECTOR)
    a, b = _load_coefficients(coefficient_ptr, tokens, num_tokens)
    _store_gradient(
        out_ptr, grad_ptr, a * towards_teacher - b * from_student, a, tokens, num_tokens,
        grad_stride, source, D_M, MASKED, DTYPE,
    )  # fmt: skip
