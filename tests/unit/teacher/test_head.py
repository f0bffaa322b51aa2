"""The sharded output layer of a teacher, compared with the model's logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
)

from megatron_let.config.let_config import LETConfig
from megatron_let.errors import LETError
from megatron_let.teacher.head import load_teacher_with_head
from megatron_let.teacher.inspect import inspect_teacher
from tests.helpers.models import VOCAB_SIZE, save_teacher

CPU = torch.device("cpu")


def config(folder: Path) -> LETConfig:
    return LETConfig("rkd", folder, teacher_dtype="fp32")


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt_neox", "gpt2"])
def test_concatenated_shards_give_logits_of_model(architecture: str, tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / architecture, architecture)
    tokens = torch.randint(VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = model(input_ids=tokens).logits
        parts = []
        # Three uneven shards; the last one exceeds the teacher's vocabulary.
        for part in (range(0, 100), range(100, 200), range(200, 300)):
            teacher, head = load_teacher_with_head(
                inspect_teacher(folder), config(folder), CPU, part
            )
            parts.append(head(teacher.hidden_state(tokens)))
    assert [p.shape[-1] for p in parts] == [100, 100, VOCAB_SIZE - 200]
    torch.testing.assert_close(torch.cat(parts, -1), expected, rtol=1e-4, atol=1e-4)


def test_shard_beyond_vocabulary_of_teacher_is_empty(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "llama")
    part = range(300, 400)
    teacher, head = load_teacher_with_head(inspect_teacher(folder), config(folder), CPU, part)
    assert head(teacher.hidden_state(torch.zeros(1, 4, dtype=torch.int64))).shape == (1, 4, 0)


@pytest.mark.parametrize(("architecture", "tied"), [("gpt2", True), ("llama", False)])
def test_untied_head_keeps_only_its_shard(architecture: str, tied: bool, tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / architecture, architecture)
    part = range(64, 128)
    teacher, head = load_teacher_with_head(inspect_teacher(folder), config(folder), CPU, part)
    embedding = teacher._model.get_input_embeddings().weight
    shared = head.weight.untyped_storage().data_ptr() == embedding.untyped_storage().data_ptr()
    assert shared == tied
    rows = VOCAB_SIZE if tied else len(part)
    assert head.weight.untyped_storage().nbytes() == rows * 48 * 4
    assert not head.weight.requires_grad


def test_teacher_with_scaled_logits_raises(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    CohereForCausalLM(
        CohereConfig(vocab_size=VOCAB_SIZE, logit_scale=0.1, **sizes, **heads)
    ).save_pretrained(tmp_path)
    with pytest.raises(LETError, match="--let-method let"):
        load_teacher_with_head(inspect_teacher(tmp_path), config(tmp_path), CPU, range(64))


@pytest.mark.parametrize("cap", [30.0, 1000.0])
def test_teacher_with_capped_logits_raises(cap: float, tmp_path: Path) -> None:
    """The logits of a random model are far below the cap."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    settings = Gemma2Config(**sizes, **heads, final_logit_softcapping=cap)
    folder = tmp_path / "gemma2"
    Gemma2ForCausalLM(settings).save_pretrained(folder)
    with pytest.raises(LETError, match="caps its logits"):
        load_teacher_with_head(inspect_teacher(folder), config(folder), CPU, range(64))
