"""Attention without masks gives transformers' states and waits for no device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

from megatron_let.teacher.attention import ARCHITECTURES, UNMASKED, use_unmasked_attention
from megatron_let.teacher.model import Teacher
from tests.helpers.compiling import dynamo_enabled
from tests.helpers.host_reads import HostReads

SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "vocab_size": 128, "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 1,
    "eos_token_id": 2, "num_key_value_heads": 2,
}  # fmt: skip
OWN_SIZES: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 16},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "mistral": {"sliding_window": None},
}
# Settings with which some layers see less than the whole row of 32 tokens.
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "phi3": {"sliding_window": 8},
    "qwen2": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    "smollm3": {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
    "starcoder2": {"sliding_window": 8},
}
TOKENS = torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(0))


def build(architecture: str, **values: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **SIZES | OWN_SIZES.get(architecture, {}) | values)
    return AutoModel.from_config(config, attn_implementation="sdpa").eval()


def teacher_of(model: PreTrainedModel) -> Teacher:
    return Teacher(model, num_layers=2, tap=2, final_norm=True)


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Whether each call of SDPA had a mask, and its `is_causal`."""
    calls: list[tuple[bool, bool]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append((kwargs["attn_mask"] is not None, kwargs["is_causal"]))
        return attend(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    return calls


@torch.no_grad()
def of_transformers(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).last_hidden_state


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_state_is_bitwise_that_of_transformers_without_reading_the_device(
    architecture: str, masks: list[tuple[bool, bool]]
) -> None:
    model = build(architecture)
    expected = of_transformers(model)
    use_unmasked_attention(model)
    teacher = teacher_of(model)
    masks.clear()
    with HostReads() as reads:
        state = teacher.hidden_state(TOKENS)
    assert torch.equal(state, expected)
    assert masks == [(False, True)] * 2
    assert not reads.found


@pytest.mark.parametrize("architecture", sorted(WINDOWS))
def test_layer_with_a_window_keeps_its_mask(
    architecture: str, masks: list[tuple[bool, bool]]
) -> None:
    model = build(architecture, **WINDOWS[architecture])
    expected = of_transformers(model)
    with_mask = list(masks)
    assert (True, False) in with_mask, "no layer has a window"
    use_unmasked_attention(model)
    teacher = teacher_of(model)
    masks.clear()
    assert torch.equal(teacher.hidden_state(TOKENS), expected)
    assert masks == with_mask


def test_window_longer_than_the_row_needs_no_mask(masks: list[tuple[bool, bool]]) -> None:
    model = build("mistral", sliding_window=33)
    expected = of_transformers(model)
    use_unmasked_attention(model)
    teacher = teacher_of(model)
    masks.clear()
    assert torch.equal(teacher.hidden_state(TOKENS), expected)
    assert masks == [(False, True)] * 2


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_compiled_model_calls_causal_attention_without_a_mask(architecture: str) -> None:
    calls: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        attend = torch.nn.functional.scaled_dot_product_attention
        calls.extend(node.kwargs for node in graph.graph.nodes if node.target is attend)
        return graph.forward

    model = build(architecture)
    expected = of_transformers(model)
    use_unmasked_attention(model)
    teacher = teacher_of(model)
    with dynamo_enabled():
        model.compile(backend=backend)
        assert torch.equal(teacher.hidden_state(TOKENS), expected)
    assert [(call["attn_mask"], call["is_causal"]) for call in calls] == [(None, True)] * 2


@pytest.mark.parametrize(("architecture", "attention"), [("falcon", "sdpa"), ("llama", "eager")])
def test_other_architecture_or_attention_is_left_alone(architecture: str, attention: str) -> None:
    config = AutoConfig.for_model(architecture, **SIZES)
    model = AutoModel.from_config(config, attn_implementation=attention)
    use_unmasked_attention(model)
    assert model.config._attn_implementation == attention != UNMASKED
