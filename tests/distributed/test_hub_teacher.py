"""A teacher from the Hugging Face Hub through the training entry, with a local hub server."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_let.data.indexed import write_indexed
from tests.helpers.checkpoints import save_llama, with_tokenizer
from tests.helpers.hub_server import HubServer
from tests.helpers.runs import Run, largest_difference, train
from tests.helpers.text_data import real_texts

pytestmark = pytest.mark.distributed

ID = "small/llama"


def run(folder: Path, data: Path, teacher: str | Path, **variables: str) -> Run:
    """Train on two ranks with the teacher's tokenizer, as the recipes do."""
    return train(
        folder, "--data-path", data, "--train-iters", 3, "--eval-iters", 0, "--let-weight", 1.0,
        "--pipeline-model-parallel-size", 2, "--let-teacher", teacher,
        "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", teacher,
        ranks=2, TEACHER="unused", **variables,
    )  # fmt: skip


def test_hub_id_gives_metrics_of_folder(tmp_path: Path) -> None:
    teacher = save_llama(tmp_path / "llama", vocab_size=640, max_position_embeddings=128)
    with_tokenizer(teacher)
    data = tmp_path / "data"
    write_indexed(data, real_texts(60_000), AutoTokenizer.from_pretrained(teacher))
    expected = run(tmp_path / "folder", data, teacher)
    with HubServer() as hub:
        commit = hub.commit(ID, teacher)
        variables = hub.environment(tmp_path / "cache")
        online = run(tmp_path / "online", data, ID, **variables)
    # The server is down: the pinned run reads the local cache.
    pinned = run(tmp_path / "pinned", data, f"{ID}@{commit}", **variables)
    downloads = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert hub.downloads() == downloads
    for found in (online, pinned):
        assert found.log.count(f"LET: the teacher is {ID}@{commit}") == 1
        for key in ("lm_loss", "let_cosine", "grad_norm"):
            assert largest_difference(found, expected, key) == 0, key
