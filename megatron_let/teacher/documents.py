"""Documents within a teacher's row: positions and attention restart as in the student's data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Documents:
    """Borders of documents, found from the tokens as Megatron's data set finds them.

    Attributes:
        eod: token that ends a document; the next one belongs to another.
        reset_positions: positions restart in each document (`--reset-position-ids`).
        reset_attention: no token attends to another document (`--reset-attention-mask`).
    """

    eod: int
    reset_positions: bool
    reset_attention: bool

    def inputs(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return transformers' `position_ids` and `attention_mask` of tokens, all `[b, s]`.

        The rule is that of Megatron's `_get_ltor_masks_and_position_ids`. With `reset_attention` it
        is the mask that `use_document_attention` reads, true at each token that begins a document;
        else ones, for a row without padding.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        starts = F.pad(tokens[:, :-1] == self.eod, (1, 0), value=True)
        mask = starts if self.reset_attention else torch.ones_like(tokens)
        if self.reset_positions:
            positions = positions - (positions * starts).cummax(dim=1).values
        return {"position_ids": positions, "attention_mask": mask}
