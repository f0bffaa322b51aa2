"""Score all continuations of a context with one forward pass over the context, on a CPU.

lm-eval's `HFLM` runs the context once per continuation and computes logits for all of its tokens.
"""

import inspect
import itertools
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# ((context, continuation) as text, token ids of the context, token ids of the continuation).
Request = tuple[tuple[str, str], list[int], list[int]]
# (log-likelihood, whether greedy decoding gives the continuation).
Answer = tuple[float, bool]
# Continuations in one batch, which bounds the memory if very many have the same context.
_BATCH = 16
_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)
# Values of `rope_type`.
_LENGTH_DEPENDENT = ("longrope", "dynamic")


class SharedContextLM(HFLM):
    """lm-eval's `HFLM` with one key-value cache for all continuations of a context."""

    def _loglikelihood_tokens(
        self,
        requests: list[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, _) in enumerate(requests):
            groups.setdefault(tuple(context), []).append(index)
        answers: dict[int, Answer] = {}
        for context, group in tqdm(groups.items(), disable=disable_tqdm, desc="Contexts"):
            for batch in itertools.batched(group, _BATCH):
                chosen = [requests[index] for index in batch]
                if self._can_share(chosen):
                    found = self._score(list(context), [ids for _, _, ids in chosen])
                else:
                    found = super()._loglikelihood_tokens(chosen, True, override_bs)
                answers |= dict(zip(batch, found, strict=True))
        return [answers[index] for index in range(len(requests))]

    def _can_share(self, requests: list[Request]) -> bool:
        """Return False if lm-eval would truncate a request, or refuse one without tokens."""
        return all(
            context and ids and len(context) + len(ids) <= self.max_length + 1
            for _, context, ids in requests
        )

    @torch.inference_mode()
    def _score(self, context: list[int], continuations: list[list[int]]) -> list[Answer]:
        first = self.model(self._ids([context]), use_cache=True, logits_to_keep=1)
        logits = first.logits[:, -1:].expand(len(continuations), -1, -1)
        # The last token of a continuation is predicted, but predicts nothing.
        inputs = self._ids([continuation[:-1] for continuation in continuations])
        if inputs.shape[1]:
            first.past_key_values.batch_repeat_interleave(len(continuations))
            cache = first.past_key_values
            rest = self.model(inputs, past_key_values=cache, use_cache=True)
            logits = torch.cat((logits, rest.logits), dim=1)
        return [self._answer(*pair) for pair in zip(logits, continuations, strict=True)]

    def _answer(self, logits: torch.Tensor, continuation: list[int]) -> Answer:
        """Return the answer from logits (S, V), of which the last ones may be of padding."""
        logits = logits[: len(continuation)]
        target = torch.tensor(continuation, device=logits.device)
        chosen = log_softmax(logits, dim=-1, dtype=self.softmax_dtype).gather(1, target[:, None])
        return float(chosen.sum()), bool((logits.argmax(dim=-1) == target).all())

    def _ids(self, rows: list[list[int]]) -> torch.Tensor:
        """Return token ids (B, S), padded on the right, where causal attention does not see it."""
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        return pad_sequence(tensors, batch_first=True).to(self.device)


def can_share_context(model: Any) -> bool:
    """Return whether a transformers model gives the same logits in two passes as in one.

    It may keep only keys and values, and their rotation may not depend on the length of the input.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return False
    if any(kind in str(getattr(model.config, "rope_parameters", "")) for kind in _LENGTH_DEPENDENT):
        return False
    ids = torch.arange(8, device=model.device)[None]
    with torch.inference_mode():
        first = model(ids[:, :4], use_cache=True)
        cache = getattr(first, "past_key_values", None)
        if type(cache) is not DynamicCache or any(type(x) not in _PLAIN for x in cache.layers):
            return False
        second = model(ids[:, 4:], past_key_values=cache, use_cache=True).logits
        whole = model(ids).logits[:, 4:]
    return bool((second - whole).abs().max() <= 0.05 * whole.abs().max())
