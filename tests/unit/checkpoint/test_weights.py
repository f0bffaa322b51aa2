"""Folders that contradict themselves are read as transformers reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_let.checkpoint.model_types import to_hugging_face
from megatron_let.checkpoint.weights import open_weights
from megatron_let.cli.convert import main
from tests.helpers.checkpoints import as_megatron, equal, save_llama, tensors_of

HEAD = "lm_head.weight"


@pytest.fixture(autouse=True)
def keep_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command hides the GPUs of its process."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def with_tensor(folder: Path, name: str, tensor: torch.Tensor) -> Path:
    """Add a tensor to the weight file of a folder."""
    file = folder / "model.safetensors"
    save_file(load_file(file) | {name: tensor}, file, metadata={"format": "pt"})
    return folder


def tied_with_head(folder: Path) -> Path:
    """Save a model whose config ties the embeddings, with an output layer of its own."""
    save_llama(folder, tie_word_embeddings=True)
    return with_tensor(folder, HEAD, torch.randn(250, 64, generator=torch.manual_seed(1)))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(40)[None]).logits
    return found


def test_file_beside_a_stale_index_is_read_as_by_transformers(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model", shard_bytes=40_000, rms_norm_eps=1e-3)
    stale = tensors_of(folder)
    new = {name: tensor + 1.0 for name, tensor in stale.items()}
    save_file(new, folder / "model.safetensors", metadata={"format": "pt"})
    assert equal(tensors_of(folder), new)
    weights = open_weights(folder)
    assert all(torch.equal(weights.read(name), new[name]) for name in new)


def test_folder_of_two_types_keeps_the_wider_one(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name].bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    weights = open_weights(folder)
    assert weights.dtype == torch.float32
    kept = open_weights(as_megatron(folder, tmp_path / "megatron"))
    last = "model.norm.weight"
    assert torch.equal(kept.read(last), tensors[last]) and kept.dtype == torch.float32


def test_output_layer_of_its_own_is_kept_in_spite_of_the_config(tmp_path: Path) -> None:
    folder = tied_with_head(tmp_path / "model")
    theirs = logits(AutoModelForCausalLM.from_pretrained(folder))
    weights = open_weights(as_megatron(folder, tmp_path / "megatron"))
    ours = LlamaForCausalLM(LlamaConfig(**to_hugging_face(weights.architecture, "float32")))
    state = {name: weights.read(name) for name in ours.state_dict()}
    ours.load_state_dict(state)
    assert torch.equal(logits(ours), theirs)


def test_equal_copy_of_a_tied_embedding_is_no_output_layer(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model", tie_word_embeddings=True)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert open_weights(with_tensor(folder, HEAD, embedding.clone())).architecture.tied


@pytest.mark.parametrize(
    ("second", "code"), [(torch.ones(3), 0), (torch.zeros(3), 1), (torch.ones(4), 1), (None, 1)]
)
def test_verify_compares_tensors_outside_the_architecture(
    second: torch.Tensor | None, code: int, tmp_path: Path
) -> None:
    folders = [save_llama(tmp_path / name) for name in ("a", "b")]
    for folder, tensor in zip(folders, (torch.ones(3), second), strict=True):
        if tensor is not None:
            with_tensor(folder, "model.extra", tensor)
    assert main(["verify", *map(str, folders), "--weights-only"]) == code


def test_verify_finds_a_different_output_layer_under_a_tied_config(tmp_path: Path) -> None:
    one, other = tied_with_head(tmp_path / "a"), tied_with_head(tmp_path / "b")
    assert main(["verify", str(one), str(other), "--weights-only"]) == 0
    with_tensor(other, HEAD, torch.zeros(250, 64))
    assert main(["verify", str(one), str(other), "--weights-only"]) == 1
