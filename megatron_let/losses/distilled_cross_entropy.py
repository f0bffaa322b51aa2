"""Cross entropy against data and teacher, over logits split by vocabulary.

    loss = (1 - w) * CE(label) + w * CE(softmax(teacher logits / temperature))
         = logsumexp(z) - (1 - w) * z[label] - w * sum_i p_i z_i

The student's logits `z` are the model's, `[s, b, V / tp]`. The teacher's are computed from its
hidden state in chunks of tokens, in the forward and again in the backward, each rank computing its
part of the vocabulary. Ranks exchange a few numbers per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, ReduceOp

# Elements of a chunk's logits: 64 MiB in fp32, of which a few are alive at a time.
_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class SoftTargets:
    """The teacher's distribution and its share of the targets.

    Attributes:
        head: teacher's hidden state `[c, d_T]` -> its logits `[c, rows]` on this rank's part of the
            vocabulary; `rows` may be fewer than the student's, whose last rows are padding.
        vocabulary_start: first token id of this rank's part.
        weight: w.
        temperature: divides the teacher's logits.
        top_k: keep the teacher's top-k logits per token; 0 keeps all.
        group: tensor-parallel ranks.
    """

    head: Callable[[Tensor], Tensor]
    vocabulary_start: int
    weight: float
    temperature: float
    top_k: int
    group: ProcessGroup

    def teacher_logits(self, hidden: Tensor, threshold: Tensor | None) -> Tensor:
        """Return `[c, rows]` in fp32, divided by the temperature; -inf below the threshold.

        Args:
            hidden: teacher's hidden state, `[c, d_T]`.
            threshold: smallest logit that is kept per token, `[c]`; None keeps all.
        """
        logits = self.head(hidden).float() / self.temperature
        if threshold is not None:
            logits = logits.masked_fill(logits < threshold[:, None], -torch.inf)
        return logits


def _chunks(logits: Tensor) -> list[slice]:
    tokens = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    return [slice(start, start + tokens) for start in range(0, len(logits), tokens)]


def _all_reduce(tensor: Tensor, operation: Any, group: ProcessGroup) -> Tensor:
    if group.size() > 1:
        torch.distributed.all_reduce(tensor, op=operation, group=group)
    return tensor


def _thresholds(logits: Tensor, hidden: Tensor, targets: SoftTargets) -> Tensor | None:
    """Return the teacher's k-th largest logit per token over all ranks, `[N]`."""
    if targets.top_k == 0:
        return None
    largest = logits.new_full((len(logits), targets.top_k), -torch.inf, dtype=torch.float32)
    for c in _chunks(logits):
        local = targets.teacher_logits(hidden[c], None)
        kept = min(targets.top_k, local.shape[1])
        largest[c, :kept] = local.topk(kept).values
    parts = [torch.empty_like(largest) for _ in range(targets.group.size())]
    if len(parts) > 1:
        torch.distributed.all_gather(parts, largest, group=targets.group)
        largest = torch.cat(parts, dim=1)
    return largest.topk(targets.top_k).values[:, -1]


def _maximum(logits: Tensor) -> Tensor:
    """Return the maximum per row; finite for empty or -inf rows, so that differences are too."""
    if logits.shape[1] == 0:
        return logits.new_full((len(logits),), torch.finfo(logits.dtype).min)
    return logits.amax(-1).clamp_min(torch.finfo(logits.dtype).min)


def _local_label(labels: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Return each token's label as a local index, and whether this rank holds it."""
    local = labels - start
    is_local = (local >= 0) & (local < size)
    return local.masked_fill(~is_local, 0)[:, None], is_local


def _local_statistics(
    logits: Tensor, labels: Tensor, hidden: Tensor, threshold: Tensor | None, targets: SoftTargets
) -> tuple[Tensor, Tensor]:
    """Return maxima `[2, c]` of student and teacher, and sums `[4, c]` relative to them.

    The sums are those of the student's exponentials, of the teacher's, of the teacher's times the
    student's logits, and the label's logit.
    """
    z = logits.float()
    t = targets.teacher_logits(hidden, threshold)
    maxima = torch.stack((_maximum(z), _maximum(t)))
    p = (t - maxima[1, :, None]).exp_()
    label, is_local = _local_label(labels, targets.vocabulary_start, z.shape[1])
    sums = torch.stack(
        (
            (z - maxima[0, :, None]).exp_().sum(-1),
            p.sum(-1),
            p.mul_(z[:, : t.shape[1]]).sum(-1),
            z.gather(1, label).squeeze(1).masked_fill(~is_local, 0),
        )
    )
    return maxima, sums


class _DistilledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, hidden: Tensor, targets: SoftTargets
    ) -> tuple[Tensor, Tensor]:
        threshold = _thresholds(logits, hidden, targets)
        maxima = logits.new_empty((2, len(logits)), dtype=torch.float32)
        sums = logits.new_empty((4, len(logits)), dtype=torch.float32)
        for c in _chunks(logits):
            of_chunk = None if threshold is None else threshold[c]
            maxima[:, c], sums[:, c] = _local_statistics(
                logits[c], labels[c], hidden[c], of_chunk, targets
            )
        overall = _all_reduce(maxima.clone(), ReduceOp.MAX, targets.group)
        factor = (maxima - overall).exp_()
        sums[0] *= factor[0]
        sums[1:3] *= factor[1]
        _all_reduce(sums, ReduceOp.SUM, targets.group)
        normalizers = overall + sums[:2].log()
        hard, soft = normalizers[0] - sums[3], normalizers[0] - sums[2] / sums[1]
        ctx.save_for_backward(logits, labels, hidden, normalizers, threshold)
        ctx.targets = targets
        ctx.mark_non_differentiable(soft)
        return hard, soft

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hard: Tensor, grad_soft: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels, hidden, normalizers, threshold = ctx.saved_tensors
        targets, result = ctx.targets, torch.empty_like(logits)
        for c in _chunks(logits):
            of_chunk = None if threshold is None else threshold[c]
            t = targets.teacher_logits(hidden[c], of_chunk)
            p = t.sub_(normalizers[1, c, None]).exp_()
            gradient = (logits[c].float() - normalizers[0, c, None]).exp_()
            gradient[:, : p.shape[1]] -= p.mul_(targets.weight)
            label, is_local = _local_label(labels[c], targets.vocabulary_start, logits.shape[1])
            gradient.scatter_add_(
                1, label, is_local[:, None] * gradient.new_tensor(targets.weight - 1)
            )
            result[c] = gradient.mul_(grad_hard[c, None])
        return result, None, None, None


def distilled_cross_entropy(
    logits: Tensor, labels: Tensor, hidden: Tensor, targets: SoftTargets
) -> tuple[Tensor, Tensor]:
    """Return the cross entropy on the data, with the gradient of the mixed loss.

    The teacher enters through the gradient only, so that every method reports and checks the same
    loss.

    Args:
        logits: the student's, `[s, b, V / tp]`, bf16, fp16 or fp32.
        labels: token ids, `[s, b]`.
        hidden: the teacher's last hidden state, `[s, b, d_T]`.

    Returns:
        CE(label) `[s, b]` in fp32, whose gradient is that of `(1 - w) CE(label) + w CE(teacher)`;
        and CE(teacher) `[s, b]`, with no gradient.
    """
    hard, soft = _DistilledCrossEntropy.apply(
        logits.flatten(0, 1), labels.flatten(), hidden.flatten(0, 1), targets
    )
    return hard.view(labels.shape), soft.view(labels.shape)
