"""Architectures whose layers, names or limits differ from Llama's, compared with transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    MptConfig,
    MptForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedModel,
    SiglipVisionConfig,
)

from megatron_let.config.let_config import LETConfig
from megatron_let.errors import LETError
from megatron_let.teacher.inspect import inspect_teacher
from megatron_let.teacher.model import Teacher, load_teacher
from tests.helpers.models import NUM_LAYERS, save_teacher

pytestmark = pytest.mark.medium

CPU = torch.device("cpu")
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
         "intermediate_size": 64, "max_position_embeddings": 48}  # fmt: skip


def gpt1() -> PreTrainedModel:
    """Its layers return lists."""
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 48}
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(**sizes))


def multimodal_gemma3() -> PreTrainedModel:
    """Its vision tower has as many layers as its decoder."""
    text = Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=8)
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


def bert_decoder() -> PreTrainedModel:
    """transformers' base model has a pooler, which the files have not."""
    return BertLMHeadModel(BertConfig(**SIZES, is_decoder=True))


def mpt() -> PreTrainedModel:
    """Its longest sequence is `max_seq_len`."""
    sizes = {"vocab_size": 64, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 48}
    return MptForCausalLM(MptConfig(**sizes))


@pytest.fixture(
    scope="module",
    params=[gpt1, multimodal_gemma3, bert_decoder, mpt],
    ids=lambda build: build.__name__,
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("architecture")
    request.param().save_pretrained(path)
    return path


def load(folder: Path, layer: str) -> Teacher:
    config = LETConfig("let", folder, teacher_layer=layer, teacher_dtype="fp32")
    return load_teacher(inspect_teacher(folder), config, CPU)


@pytest.mark.parametrize("layer", ["1", "2", "last"])
def test_tapped_state_is_that_of_transformers(layer: str, folder: Path) -> None:
    tokens = torch.randint(64, (2, 20), generator=torch.manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        states = model(input_ids=tokens, output_hidden_states=True).hidden_states
    expected = states[-1] if layer == "last" else states[int(layer)]
    torch.testing.assert_close(load(folder, layer).hidden_state(tokens), expected)


def test_longest_sequence_is_read_from_the_config(folder: Path) -> None:
    assert inspect_teacher(folder).max_positions == 48


def test_layer_without_a_state_per_token_is_refused(tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(save_teacher(tmp_path), dtype=torch.float32)
    model.layers[-1].register_forward_hook(lambda layer, inputs, output: output.mean(1))
    with pytest.raises(LETError, match="LlamaModel"):
        Teacher(model, NUM_LAYERS, NUM_LAYERS, final_norm=False)
