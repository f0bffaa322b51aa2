"""A teacher from the Hugging Face Hub through the training entry, with a local hub server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

from megatron_let.files.names import RUN
from tests.helpers.checkpoints import save_llama, with_tokenizer
from tests.helpers.data import write_indexed
from tests.helpers.hub_server import HubServer
from tests.helpers.runs import Run, largest_difference, train
from tests.helpers.text_data import real_texts

pytestmark = pytest.mark.distributed

ID = "small/llama"


def run(
    folder: Path,
    data: Path,
    teacher: str | Path,
    *flags: str | Path | int,
    check: bool = True,
    module: str = "megatron_let.pretrain",
    **variables: str,
) -> Run:
    """Train on two ranks with the teacher's tokenizer, as the recipes do."""
    return train(
        folder, "--data-path", data, "--train-iters", 3, "--eval-iters", 0, "--let-weight", 1.0,
        "--pipeline-model-parallel-size", 2, "--let-teacher", teacher,
        "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", teacher, *flags,
        ranks=2, check=check, module=module, TEACHER="unused", **variables,
    )  # fmt: skip


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    folder = save_llama(tmp_path / "llama", vocab_size=640, max_position_embeddings=128)
    with_tokenizer(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path, teacher: Path) -> Path:
    write_indexed(tmp_path / "data", real_texts(60_000), AutoTokenizer.from_pretrained(teacher))
    return tmp_path / "data"


def move_main(hub: HubServer, teacher: Path) -> str:
    """Commit a changed config to the branch main; return the commit."""
    changed = shutil.copytree(teacher, teacher.with_name("changed"))
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"pad_token_id": 1}))
    return hub.commit(ID, changed)


def test_hub_id_gives_metrics_of_folder(tmp_path: Path, teacher: Path, data: Path) -> None:
    expected = run(tmp_path / "folder", data, teacher)
    with HubServer() as hub:
        commit = hub.commit(ID, teacher)
        variables = hub.environment(tmp_path / "cache")
        online = run(tmp_path / "online", data, ID, **variables)
    # The server is down: the pinned run reads the local cache.
    pinned = run(tmp_path / "pinned", data, f"{ID}@{commit}", **variables)
    downloads = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert hub.downloads() == downloads
    for found in (online, pinned):
        assert found.log.count(f"LET: the teacher is {ID}@{commit}") == 1
        for key in ("lm_loss", "let_cosine", "grad_norm"):
            assert largest_difference(found, expected, key) == 0, key


def test_resume_past_stop_step_on_new_node_keeps_commit_and_needs_no_weights(
    tmp_path: Path, teacher: Path, data: Path
) -> None:
    save = tmp_path / "save"
    flags = ("--save", save, "--load", save, "--save-interval", 3, "--let-stop-step", 2)
    with HubServer() as hub:
        first = hub.commit(ID, teacher)
        run(tmp_path / "run", data, ID, *flags, **hub.environment(tmp_path / "cache"))
        stored = json.loads((save / RUN).read_text())
        move_main(hub, teacher)
        hub.requests.clear()
        resumed = run(
            tmp_path / "run", data, ID, *flags, "--train-iters", 4,
            "--override-opt-param-scheduler",
            **hub.environment(tmp_path / "another"),
        )  # fmt: skip
        downloads = hub.downloads()
    assert stored["let_teacher"] == stored["tokenizer_model"] == f"{ID}@{first}"
    assert resumed.steps[-1]["iteration"] == 4
    assert downloads == [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_baseline_takes_tokenizer_of_revision(tmp_path: Path, teacher: Path, data: Path) -> None:
    with HubServer() as hub:
        first = hub.commit(ID, teacher)
        move_main(hub, teacher)
        run(
            tmp_path / "run", data, f"{ID}@{first}", "--let-method", "none",
            **hub.environment(tmp_path / "cache"),
        )  # fmt: skip
        assert hub.downloads() == [
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ]


def test_different_commits_on_nodes_raise_error(tmp_path: Path, teacher: Path, data: Path) -> None:
    with HubServer() as hub:
        variables = hub.environment(tmp_path / "cache")
        commits = [hub.commit(ID, teacher)]
        snapshot_download(ID, cache_dir=f"{variables['HF_HUB_CACHE']}0", endpoint=hub.url)
        commits.append(move_main(hub, teacher))
        snapshot_download(ID, cache_dir=f"{variables['HF_HUB_CACHE']}1", endpoint=hub.url)
    # The server is down: each rank takes the commit that its cache has.
    failed = run(
        tmp_path / "run", data, ID, check=False, module="tests.helpers.cache_per_rank", **variables
    )
    assert failed.returncode != 0 and failed.log.count("megatron_let: error") == 1
    assert all(f"{ID}@{commit}" in failed.error for commit in commits)
