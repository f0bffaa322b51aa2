"""A preprocessing run killed at any moment continues and ends with the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_let.errors import LETError
from tests.helpers.text_data import (
    files_of,
    real_texts,
    run,
    write_input,
)

pytestmark = pytest.mark.medium

SUBSETS = ("Github", "Books3", "Wikipedia (en)")
OPTIONS: dict[str, Any] = {"per_subset": True, "split": (8, 1, 1)}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, texts = tmp_path_factory.mktemp("in"), real_texts()[:40]
    names = ("a.jsonl", "b.jsonl.zst", "c.jsonl.gz", "d.parquet")
    files = [write_input(folder / n, texts[i::4], SUBSETS) for i, n in enumerate(names)]
    with files[0].open("ab") as file:
        file.write(b'{"text": "cut sho')
    return files


@pytest.fixture(scope="module")
def expected(
    inputs: list[Path], hugging_face: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("expected")
    run(inputs, folder / "out", hugging_face, **OPTIONS)
    return files_of(folder)


def start(inputs: list[Path], prefix: Path, hugging_face: Path, workers: int) -> Any:
    """Start a run in its own process group, forked so that nothing is imported again."""

    def target() -> None:
        os.setsid()
        run(inputs, prefix, hugging_face, workers=workers, **OPTIONS)

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_run_killed_at_random_moments_ends_with_the_same_bytes(
    kills: int, inputs: list[Path], hugging_face: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    begun = time.monotonic()
    whole = start(inputs, tmp_path / "whole" / "out", hugging_face, 2)
    whole.join()
    assert whole.exitcode == 0
    duration = time.monotonic() - begun
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    killed, attempt = 0, 0
    while killed < kills:
        folder = tmp_path / f"killed{attempt}"
        folder.mkdir()
        attempt += 1
        # Kill one run a few times, each at a random moment, then let it finish.
        for _ in range(rng.randrange(1, 5)):
            process = start(inputs, folder / "out", hugging_face, rng.choice((1, 2, 3)))
            time.sleep(rng.uniform(0, 1.2 * duration))
            if process.exitcode is None:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:  # it has no process group yet, and no workers
                    process.kill()
                killed += 1
            process.join()
        last = start(inputs, folder / "out", hugging_face, rng.choice((1, 2)))
        last.join()
        assert last.exitcode == 0
        assert files_of(folder) == expected
        assert not (folder / "out.work").exists()


def killed(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "stage", ["merge.DatasetBuilder.finalize", "merge.write_sidecar_file", "run.shutil.rmtree"]
)
def test_run_killed_while_merging_ends_with_the_same_bytes(
    stage: str,
    inputs: list[Path],
    hugging_face: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"megatron_let.preprocessing.{stage}", killed)
        run(inputs, tmp_path / "out", hugging_face, **OPTIONS)
    run(inputs, tmp_path / "out", hugging_face, **OPTIONS)
    assert files_of(tmp_path) == expected


def test_workers_do_not_outlive_their_parent(
    inputs: list[Path], hugging_face: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    process = start(inputs, tmp_path / "out", hugging_face, 2)
    while not list(tmp_path.glob("out.work/*.bin")) and process.exitcode is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    # The lock is released when the workers end.
    run(inputs, tmp_path / "out", hugging_face, **OPTIONS)
    assert files_of(tmp_path) == expected


def test_dead_worker_is_reported_with_its_exit_code(
    inputs: list[Path], hugging_face: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch, pytest.raises(LETError, match="exit code -9"):
        patch.setattr("megatron_let.preprocessing.shards._Shard.add_file", die)
        run(inputs, tmp_path / "out", hugging_face, **OPTIONS)


def test_second_run_of_one_output_raises(
    inputs: list[Path], hugging_face: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start(inputs, tmp_path / "out", hugging_face, 1)
    while not list(tmp_path.glob("out.work/*.bin")) and process.exitcode is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr("megatron_let.preprocessing.run._LOCK_SECONDS", 0.2)
    try:
        with pytest.raises(LETError, match="Another run is writing"):
            run(inputs, tmp_path / "out", hugging_face, **OPTIONS)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()


def test_another_run_starts_over_if_nothing_was_written(
    inputs: list[Path], hugging_face: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.raises(LETError, match="--json-keys"):
        run(inputs, tmp_path / "out", hugging_face, json_keys=("content",), **OPTIONS)
    assert list((tmp_path / "out.work").glob("0*.json"))
    run(inputs, tmp_path / "out", hugging_face, **OPTIONS)
    assert files_of(tmp_path) == expected


def test_another_run_is_refused_and_overwritten_on_request(
    inputs: list[Path],
    hugging_face: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {**OPTIONS, "split": None, "append_eod": False}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("megatron_let.preprocessing.merge.merge", killed)
        run(inputs, tmp_path / "out", hugging_face, **options)
    # Unfinished, then finished: both are another run's.
    for _ in range(2):
        with pytest.raises(LETError, match="--overwrite"):
            run(inputs, tmp_path / "out", hugging_face, **OPTIONS)
        run(inputs, tmp_path / "out", hugging_face, **options)
    assert (tmp_path / "out_text_Books3_document.bin").is_file()
    run(inputs, tmp_path / "out", hugging_face, overwrite=True, **OPTIONS)
    assert not (tmp_path / "out_text_Books3_document.bin").exists()
    assert files_of(tmp_path) == expected
