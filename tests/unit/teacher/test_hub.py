"""Teachers from the Hugging Face Hub, against a local server of its protocol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_let.teacher.hub import parse_hub_id, snapshot_id
from megatron_let.teacher.inspect import inspect_teacher, resolve_teacher
from tests.helpers.hub_server import HubServer
from tests.helpers.models import save_teacher
from tests.helpers.runs import ROOT

pytestmark = pytest.mark.medium

ID = "small/llama"
NEEDED = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
NOT_NEEDED = ["README.md", "flax_model.msgpack", "modeling_llama.py", "onnx/model.onnx",
              "pytorch_model.bin", "tf_model.h5", "training_args.bin"]  # fmt: skip
# huggingface_hub reads its variables when it is imported, so each case has its own process.
PROGRAM = """
import sys
from megatron_let.errors import LETError
from megatron_let.teacher.hub import download_model, parse_hub_id
try:
    print(download_model(*parse_hub_id(sys.argv[1]), weights=sys.argv[2:] == []))
except LETError as error:
    sys.exit(f"LETError: {error}")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with the files of a typical repository around it."""
    folder = save_teacher(tmp_path_factory.mktemp("repository"))
    (folder / "generation_config.json").unlink()
    for name in (*NEEDED[2:], *NOT_NEEDED):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{{}} {name}")
    return folder


@pytest.fixture
def hub(model: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.commit(ID, model)
        yield server


def start(hub: HubServer, cache: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    given = {**os.environ, "PYTHONPATH": str(ROOT), **hub.environment(cache, **variables)}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=given, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def download(hub: HubServer, cache: Path, *arguments: str, **variables: str) -> tuple[Path, str]:
    """Return the snapshot folder and the line that names the commit."""
    process = start(hub, cache, *arguments, **variables)
    out, err = process.communicate()
    assert process.returncode == 0, err
    *log, folder = out.splitlines()
    return Path(folder), "\n".join(log)


def refused(hub: HubServer, cache: Path, teacher: str, **variables: str) -> str:
    process = start(hub, cache, teacher, **variables)
    _, err = process.communicate()
    message = err.strip().splitlines()[-1]
    assert process.returncode == 1 and message.startswith("LETError: "), err
    assert message.endswith(".") and teacher.partition("@")[0] in message, message
    return message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HuggingFaceTB/SmolLM2-135M", ("HuggingFaceTB/SmolLM2-135M", "main")),
        ("a/b@v1.0", ("a/b", "v1.0")),
        ("a/b@refs/pr/3", ("a/b", "refs/pr/3")),
        (str(Path("a/b@v1.0")), ("a/b", "v1.0")),
        *((text, None) for text in ("a", "/a/b", "/a", "a/b/c", "../b", "~/b", "a b/c", "a/b..c")),
    ],
)
def test_hub_id_is_recognised_by_its_form(text: str, expected: tuple[str, str] | None) -> None:
    assert parse_hub_id(text) == expected


def test_existing_path_wins_over_hub_id(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model, tmp_path / ID)
    monkeypatch.chdir(tmp_path)
    assert resolve_teacher(ID) == Path(ID)


def test_download_fetches_only_needed_files_and_names_commit(
    hub: HubServer, tmp_path: Path, model: Path
) -> None:
    folder, log = download(hub, tmp_path, ID)
    commit = hub.commit(ID, model)
    assert log == f"LET: the teacher is {ID}@{commit}" and folder.name == commit
    assert hub.downloads() == NEEDED
    for name in NEEDED:
        assert (folder / name).read_bytes() == (model / name).read_bytes()
    assert inspect_teacher(folder).hidden_size == inspect_teacher(model).hidden_size


def test_pinned_revision_is_used_after_main_moves(
    hub: HubServer, tmp_path: Path, model: Path
) -> None:
    first = hub.commit(ID, model)
    changed = shutil.copytree(model, tmp_path / "changed")
    (changed / "tokenizer.json").write_text("{}")
    second = hub.commit(ID, changed)
    hub.commit(ID, model, branch="v1")
    assert download(hub, tmp_path, f"{ID}@{first}")[0].name == first
    assert download(hub, tmp_path, f"{ID}@v1")[0].name == first
    assert download(hub, tmp_path, ID)[0].name == second


def test_repository_without_safetensors_gives_bin_shards(
    hub: HubServer, tmp_path: Path, model: Path
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    shards = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    for shard in (*shards, "training_args.bin"):
        (folder / shard).write_text(shard)
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    hub.commit("small/bin", folder)
    download(hub, tmp_path, "small/bin")
    assert hub.downloads() == ["config.json", *shards, "pytorch_model.bin.index.json"]


@pytest.mark.parametrize("reachable", [False, True], ids=["no network", "HF_HUB_OFFLINE"])
def test_second_process_uses_cache_without_network(
    hub: HubServer, tmp_path: Path, reachable: bool
) -> None:
    folder, _ = download(hub, tmp_path, ID)
    before = len(hub.requests)
    offline = {"HF_HUB_OFFLINE": "1"} if reachable else {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert download(hub, tmp_path, ID, **offline)[0] == folder
    assert download(hub, tmp_path, f"{ID}@{folder.name}", **offline)[0] == folder
    assert len(hub.requests) == before


def test_four_processes_download_each_file_once(hub: HubServer, tmp_path: Path) -> None:
    ranks = [start(hub, tmp_path, ID, RANK=str(rank)) for rank in range(4)]
    outputs = [rank.communicate() for rank in ranks]
    assert not any(rank.returncode for rank in ranks), outputs
    assert len({out.splitlines()[-1] for out, _ in outputs}) == 1
    assert [out.count("LET: the teacher is") for out, _ in outputs] == [1, 0, 0, 0]
    assert hub.downloads() == NEEDED


def test_incomplete_snapshot_is_completed_online_and_refused_offline(
    hub: HubServer, tmp_path: Path
) -> None:
    folder, _ = download(hub, tmp_path, ID)
    weights = folder / "model.safetensors"
    weights.resolve().unlink()
    weights.unlink()
    assert "nor in the local cache" in refused(hub, tmp_path, ID, HF_HUB_OFFLINE="1")
    assert download(hub, tmp_path, ID)[0] == folder and weights.is_file()


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ("small/none", ["nor a public model on", "HF_TOKEN"]),
        (f"{ID}@v9", ["no revision v9"]),
        ("small/gated", ["gated", "HF_TOKEN", "/small/gated"]),
        ("small/broken", ["500", "check the network, or give a model folder"]),
    ],
)
def test_hub_error_is_one_sentence(
    hub: HubServer, tmp_path: Path, model: Path, teacher: str, words: list[str]
) -> None:
    hub.commit("small/gated", model)
    hub.gated.add("small/gated")
    hub.broken.add("small/broken")
    message = refused(hub, tmp_path, teacher)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be downloaded from http://127.0.0.1:9"),
    ],
)
def test_no_network_and_no_cache_is_one_sentence(
    hub: HubServer, tmp_path: Path, variables: dict[str, str], words: str
) -> None:
    assert words in refused(hub, tmp_path, ID, **variables)


def test_silent_hub_is_given_up_and_cache_is_used(hub: HubServer, tmp_path: Path) -> None:
    folder, _ = download(hub, tmp_path, ID)
    before = len(hub.requests)
    hub.silent = True
    assert download(hub, tmp_path, f"{ID}@{folder.name}")[0] == folder
    assert len(hub.requests) == before
    ranks = [start(hub, tmp_path, ID, RANK=str(rank)) for rank in range(2)]
    missing = start(hub, tmp_path / "empty", ID)
    for rank in ranks:
        out, err = rank.communicate(timeout=60)
        assert rank.returncode == 0 and out.splitlines()[-1] == str(folder), err
    _, err = missing.communicate(timeout=60)
    assert "LETError" in err and "check the network" in err
    # One request per node.
    assert len(hub.requests) == before + 2


def test_tokenizer_is_downloaded_without_weights_and_weights_later(
    hub: HubServer, tmp_path: Path
) -> None:
    folder, log = download(hub, tmp_path, ID, "tokenizer")
    assert log == "" and not (folder / "model.safetensors").exists()
    assert hub.downloads() == [name for name in NEEDED if name != "model.safetensors"]
    assert (
        download(hub, tmp_path, f"{ID}@{folder.name}", "tokenizer", HF_HUB_OFFLINE="1")[0] == folder
    )
    assert "nor in the local cache" in refused(hub, tmp_path, ID, HF_HUB_OFFLINE="1")
    assert download(hub, tmp_path, ID)[0] == folder
    assert hub.downloads() == NEEDED


def test_cached_folder_without_tokenizer_is_incomplete(hub: HubServer, tmp_path: Path) -> None:
    folder, _ = download(hub, tmp_path, ID)
    pinned = f"{ID}@{folder.name}"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).resolve().unlink()
        (folder / name).unlink()
    assert "nor in the local cache" in refused(hub, tmp_path, pinned, HF_HUB_OFFLINE="1")
    assert download(hub, tmp_path, pinned)[0] == folder and (folder / "tokenizer.json").is_file()


def test_cached_shards_without_index_are_incomplete(
    hub: HubServer, tmp_path: Path, model: Path
) -> None:
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    for name in ("config.json", *NEEDED[2:]):
        shutil.copy(model / name, sharded)
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for shard in shards:
        (sharded / shard).write_text(shard)
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    commit = hub.commit("small/shards", sharded)
    folder, _ = download(hub, tmp_path, "small/shards")
    index_file = folder / "model.safetensors.index.json"
    index_file.unlink()
    pinned = f"small/shards@{commit}"
    assert "nor in the local cache" in refused(hub, tmp_path, pinned, HF_HUB_OFFLINE="1")
    assert download(hub, tmp_path, pinned)[0] == folder and index_file.is_file()


@pytest.mark.parametrize("pinned", [False, True])
def test_complete_cache_needs_no_writable_folder(
    hub: HubServer, tmp_path: Path, pinned: bool
) -> None:
    folder, _ = download(hub, tmp_path, ID)
    locks = folder.parents[2] / ".locks"
    shutil.rmtree(locks)
    locks.touch()
    teacher = f"{ID}@{folder.name}" if pinned else ID
    nowhere = {"HOME": "/proc/none", "MEGATRON_LET_CACHE": "/proc/none"}
    assert download(hub, tmp_path, teacher, **nowhere)[0] == folder


def test_folder_that_cannot_be_created_is_one_sentence(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "huggingface").touch()
    process = start(hub, tmp_path, ID)
    _, err = process.communicate()
    message = err.strip().splitlines()[-1]
    assert message.startswith("LETError: The cache folder") and "HF_HOME" in message, err


def test_snapshot_id_names_repository_and_commit() -> None:
    commit = "0123456789" * 4
    assert snapshot_id(f"/cache/models--a-b--c.d/snapshots/{commit}/") == f"a-b/c.d@{commit}"
    assert snapshot_id("/models/small") is None
