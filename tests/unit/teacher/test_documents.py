"""The teacher reads each document of a row as if it were alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
from transformers import AutoConfig, AutoModel

from megatron_let.errors import LETError
from megatron_let.teacher.attention import ARCHITECTURES, use_unmasked_attention
from megatron_let.teacher.documents import Documents
from megatron_let.teacher.model import Teacher
from tests.helpers.compiling import dynamo_enabled
from tests.helpers.host_reads import HostReads
from tests.unit.teacher.test_attention import SIZES, TOKENS, WINDOWS, build

EOD = 2
BOTH = Documents(EOD, reset_positions=True, reset_attention=True)
# Rows of 32 tokens with borders inside, at their beginning and at their end.
ENDS = ((5, 6, 20), (0, 14, 31))


def rows() -> torch.Tensor:
    tokens = TOKENS.masked_fill(TOKENS == EOD, 3)
    for row, ends in enumerate(ENDS):
        tokens[row, list(ends)] = EOD
    return tokens


def teacher_of(
    architecture: str,
    documents: Documents | None,
    dtype: torch.dtype = torch.float32,
    **values: Any,
) -> Teacher:
    model = build(architecture, **values).to(dtype)
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
        lengths = [b - a for a, b in pairwise(starts) if b > a]
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
    restarted = Documents(EOD, True, False)
    state = teacher_of(architecture, restarted, **values).hidden_state(tokens)
    expected = alone._run(input_ids=tokens, use_cache=False, **restarted.inputs(tokens))
    assert torch.equal(state, expected.last_hidden_state)
    # Each flag alone does something else, and neither does nothing.
    whole = alone.hidden_state(tokens)
    for documents in (Documents(EOD, True, False), Documents(EOD, False, True)):
        state = teacher_of(architecture, documents, **values).hidden_state(tokens)
        assert not torch.allclose(state, whole, atol=1e-2)


@pytest.mark.parametrize(("positions", "attention"), [(True, True), (True, False), (False, True)])
def test_borders_are_those_of_megatrons_data_set(positions: bool, attention: bool) -> None:
    tokens = rows()
    found = Documents(EOD, positions, attention).inputs(tokens)
    numbers = found["attention_mask"].cumsum(1)
    for row, ids, number in zip(tokens, found["position_ids"], numbers, strict=True):
        mask, _, expected = _get_ltor_masks_and_position_ids(
            row, EOD, positions, attention, False, True
        )
        assert torch.equal(ids, expected)
        same = number[:, None] == number[None, :]
        if not attention:
            assert found["attention_mask"].all()
            same = torch.ones_like(same)
        assert torch.equal(same.tril(), ~mask[0])


def test_compiled_teacher_reads_documents() -> None:
    tokens, teacher = rows(), teacher_of("llama", BOTH)
    expected = teacher.hidden_state(tokens)
    with dynamo_enabled():
        teacher._model.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(teacher.hidden_state(tokens), expected)


@pytest.mark.parametrize("architecture", ["bloom", "falcon"])
def test_architecture_without_known_masks_is_refused(architecture: str) -> None:
    model = AutoModel.from_config(AutoConfig.for_model(architecture, **SIZES))
    with pytest.raises(LETError, match=r"use one of gemma, .*--reset-attention-mask"):
        Teacher(model, 2, 2, True, BOTH)


@pytest.mark.parametrize("ignored", ["position_ids", "attention_mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_that_ignores_an_input_is_refused(
    ignored: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(self: Documents, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        whole = replace(self, eod=-1)
        return inputs(self, tokens) | {ignored: inputs(whole, tokens)[ignored]}

    inputs = Documents.inputs
    teacher_of("gpt2", Documents(EOD, True, False), dtype=dtype)
    monkeypatch.setattr(Documents, "inputs", without)
    with pytest.raises(LETError, match="GPT2Model does not restart in each document"):
        teacher_of("gpt2", Documents(EOD, True, False), dtype=dtype)
