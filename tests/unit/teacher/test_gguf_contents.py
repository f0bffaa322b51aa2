"""GGUF files: what transformers does not read is rebuilt, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers
from transformers import AutoModelForCausalLM

from megatron_let.errors import LETError
from megatron_let.teacher import gguf
from megatron_let.teacher.gguf import convert_gguf
from megatron_let.teacher.tokenizer import read_tokenizer
from tests.helpers.checkpoints import save_llama
from tests.helpers.gguf_file import save_gguf

pytestmark = pytest.mark.medium

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
FACTORS = "rope_freqs.weight"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEGATRON_LET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def llama(folder: Path, **changes: Any) -> Any:
    """Return a random Llama in bf16, the type of a converted folder."""
    sizes = {"num_hidden_layers": 2, "head_dim": 32, "max_position_embeddings": 2048}
    saved = save_llama(folder, **(sizes | changes))
    return AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)


def rope_factors(model: Any) -> torch.Tensor:
    """Return what llama.cpp's converter stores: the unscaled frequencies over the scaled ones."""
    scaled = model.model.rotary_emb.inv_freq.double()
    plain = 500000.0 ** -(torch.arange(0, 2 * len(scaled), 2).double() / (2 * len(scaled)))
    return (plain / scaled).float()


def refused(file: Path) -> str:
    with pytest.raises(LETError) as error:
        convert_gguf(file)
    assert str(file) in str(error.value) and str(error.value).endswith(".")
    assert not list(file.parent.glob("cache/teachers/*/config.json"))
    return str(error.value)


@pytest.mark.parametrize("tied", [False, True])
def test_llama3_scaling_is_rebuilt_from_its_factors(tied: bool, tmp_path: Path) -> None:
    model = llama(tmp_path / "model", rope_parameters=LLAMA3, tie_word_embeddings=tied)
    file = save_gguf(tmp_path / "m.gguf", model, tensors={FACTORS: rope_factors(model)})
    ours = AutoModelForCausalLM.from_pretrained(convert_gguf(file), dtype=torch.bfloat16)
    tokens = torch.randint(250, (1, 1500), generator=torch.manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, model(tokens).logits)
    assert ours.config.rope_parameters["factor"] == pytest.approx(8.0)


def test_rope_factors_of_another_scaling_are_refused(tmp_path: Path) -> None:
    model = llama(tmp_path / "model", rope_parameters=LLAMA3)
    factors = rope_factors(model) * torch.linspace(1.0, 1.2, 16)
    assert FACTORS in refused(save_gguf(tmp_path / "m.gguf", model, tensors={FACTORS: factors}))


def test_tensor_that_the_model_has_not_is_refused(tmp_path: Path) -> None:
    extra = {"blk.0.attn_q_norm.weight": torch.ones(32)}
    file = save_gguf(tmp_path / "m.gguf", llama(tmp_path / "model"), tensors=extra)
    assert "blk.0.attn_q_norm.weight" in refused(file)


def test_first_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    """transformers would leave the weights of the other parts random."""
    missing = "model.layers.1.mlp.up_proj.weight"
    file = save_gguf(tmp_path / "m.gguf", llama(tmp_path / "model"), without=missing)
    assert "split" in refused(file)


@pytest.mark.parametrize(
    ("name", "value"),
    [("rope.scaling.type", "yarn"), ("rope.scaling.factor", 4.0), ("logit_scale", 0.5),
     ("final_logit_softcapping", 30.0), ("a_setting_of_tomorrow", 1.0)],
)  # fmt: skip
def test_metadata_that_transformers_skips_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    file = save_gguf(tmp_path / "m.gguf", llama(tmp_path / "model"), {name: value})
    assert f"llama.{name}" in refused(file)


def test_metadata_without_effect_is_accepted(tmp_path: Path) -> None:
    neutral = {"rope.scaling.type": "none", "rope.scaling.factor": 1.0, "logit_scale": 0.0}
    file = save_gguf(tmp_path / "m.gguf", llama(tmp_path / "model"), neutral)
    assert (convert_gguf(file) / "config.json").is_file()


def test_content_is_read_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, reads = tmp_path / "m.gguf", []
    content_hash = gguf._hash
    monkeypatch.setattr(gguf, "_hash", lambda file: reads.append(file) or content_hash(file))
    file.write_bytes(b"one")
    digests = [gguf._digest(file), gguf._digest(file)]
    file.write_bytes(b"two")
    digests.append(gguf._digest(file))
    assert digests[0] == digests[1] != digests[2] and len(reads) == 2
    (tmp_path / "a file").touch()
    monkeypatch.setenv("MEGATRON_LET_CACHE", str(tmp_path / "a file/cache"))
    assert gguf._digest(file) == digests[2] and len(reads) == 3


def test_tokenizer_that_changes_when_it_is_saved_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = save_gguf(tmp_path / "m.gguf", llama(tmp_path / "model"))

    def changed(folder: Path) -> Any:
        tokenizer = read_tokenizer(folder)
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "\n")
        return tokenizer

    monkeypatch.setattr(gguf, "read_tokenizer", changed)
    assert "splits" in refused(file)
