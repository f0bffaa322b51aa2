"""The teacher reads each document of a row as if it were alone."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

from megatron_let.errors import LETError
from megatron_let.teacher.attention import ARCHITECTURES, use_unmasked_attention
from megatron_let.teacher.documents import Documents
from megatron_let.teacher.model import Teacher
from tests.helpers.compiling import dynamo_enabled
from tests.helpers.host_reads import HostReads
from tests.unit.teacher.test_attention import TOKENS, WINDOWS, build

EOD = 2
BOTH = Documents(EOD, reset_positions=True, reset_attention=True)
# Rows of 32 tokens with borders inside, at their beginning and at their end.
ENDS = ((5, 6, 20), (0, 14, 31))


def rows() -> torch.Tensor:
    tokens = TOKENS.masked_fill(TOKENS == EOD, 3)
    for row, ends in enumerate(ENDS):
        tokens[row, list(ends)] = EOD
    return tokens


def teacher_of(architecture: str, documents: Documents | None, **values: Any) -> Teacher:
    model = build(architecture, **values)
    with torch.no_grad():
        # At their initial size attention changes a state by less than the tolerance.
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    use_unmasked_attention(model)
    return Teacher(model, 2, 2, True, documents)


def each_alone(teacher: Teacher, tokens: torch.Tensor) -> torch.Tensor:
    states = []
    for row, ends in zip(tokens, ENDS, strict=True):
        starts = [0, *(end + 1 for end in ends), len(row)]
        lengths = [b - a for a, b in zip(starts, starts[1:], strict=False) if b > a]
        states.append(torch.cat([teacher.hidden_state(d[None])[0] for d in row.split(lengths)]))
    return torch.stack(states)


@pytest.mark.parametrize(
    ("architecture", "values"),
    [*((name, {}) for name in sorted(ARCHITECTURES)), *WINDOWS.items()],
    ids=lambda value: value if isinstance(value, str) else "window" if value else "",
)
def test_packed_states_are_those_of_each_document_alone(
    architecture: str, values: dict[str, Any]
) -> None:
    tokens, alone = rows(), teacher_of(architecture, None, **values)
    teacher = teacher_of(architecture, BOTH, **values)
    with HostReads() as reads:
        state = teacher.hidden_state(tokens)
    assert not reads.found
    torch.testing.assert_close(state, each_alone(alone, tokens), atol=2e-5, rtol=2e-5)
    # Each flag alone does something else, and neither does nothing.
    whole = alone.hidden_state(tokens)
    for documents in (Documents(EOD, True, False), Documents(EOD, False, True)):
        state = teacher_of(architecture, documents, **values).hidden_state(tokens)
        assert not torch.allclose(state, whole, atol=1e-2)
