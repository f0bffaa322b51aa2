"""A preprocessing run killed at any moment goes on, and ends with the bytes of one never killed."""

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
    save_hugging_face_tokenizer,
    write_input,
)

SUBSETS = ("Github", "Books3", "Wikipedia (en)")
OPTIONS: dict[str, Any] = {"block_bytes": 10_000, "per_subset": True, "split": (8, 1, 1)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hugging_face_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, texts = tmp_path_factory.mktemp("in"), real_texts(120_000)
    names = ("a.jsonl", "b.jsonl.zst", "c.jsonl.gz", "d.parquet")
    files = [write_input(folder / n, texts[i::4], SUBSETS) for i, n in enumerate(names)]
    with files[0].open("ab") as file:
        file.write(b'{"text": "cut sho')
    return files


@pytest.fixture(scope="module")
def expected(
    inputs: list[Path], tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("expected")
    run(inputs, folder / "out", tokenizer, **OPTIONS)
    return files_of(folder)


def start(inputs: list[Path], prefix: Path, tokenizer: Path, workers: int) -> Any:
    """The run in a process group of its own, forked so that nothing is imported again."""

    def target() -> None:
        os.setsid()
        run(inputs, prefix, tokenizer, workers=workers, **OPTIONS)

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_runs_end_with_the_same_bytes(
    kills: int, inputs: list[Path], tokenizer: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    begun = time.monotonic()
    whole = start(inputs, tmp_path / "whole" / "out", tokenizer, 2)
    whole.join()
    assert whole.exitcode == 0
    duration = time.monotonic() - begun
    rng = random.Random()
    seed = rng.randrange(2**32)
    rng.seed(seed)
    killed, attempt = 0, 0
    while killed < kills:
        folder = tmp_path / f"killed{attempt}"
        folder.mkdir()
        attempt += 1
        # A few kills of one run, each at a random moment, then the end.
        for _ in range(rng.randrange(1, 5)):
            process = start(inputs, folder / "out", tokenizer, rng.choice((1, 2, 3)))
            time.sleep(rng.uniform(0, 1.2 * duration))
            if process.exitcode is None:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:  # it has no group of its own yet, and no workers
                    process.kill()
                killed += 1
            process.join()
        last = start(inputs, folder / "out", tokenizer, rng.choice((1, 2)))
        last.join()
        assert last.exitcode == 0, f"seed {seed}"
        assert files_of(folder) == expected, f"seed {seed}"
        assert not (folder / "out.work").exists()


@pytest.mark.parametrize("stage", ["replace_from_partial", "write_side_file", "rmtree"])
def test_killed_while_merging(
    stage: str,
    inputs: list[Path],
    tokenizer: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    target = (
        "megatron_let.data.merge."
        if stage == "replace_from_partial"
        else "megatron_let.data.preprocess."
    )
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(target + ("shutil." if stage == "rmtree" else "") + stage, killed)
        run(inputs, tmp_path / "out", tokenizer, **OPTIONS)
    run(inputs, tmp_path / "out", tokenizer, **OPTIONS)
    assert files_of(tmp_path) == expected


def test_workers_do_not_outlive_their_parent(
    inputs: list[Path], tokenizer: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    process = start(inputs, tmp_path / "out", tokenizer, 2)
    while not list(tmp_path.glob("out.work/*.bin")) and process.exitcode is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    # The lock is free as soon as the workers are gone.
    run(inputs, tmp_path / "out", tokenizer, **OPTIONS)
    assert files_of(tmp_path) == expected


def test_a_dead_worker_is_named(
    inputs: list[Path], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch, pytest.raises(LETError, match="died with exit code -9"):
        patch.setattr("megatron_let.data.shards.ShardWriter.__call__", die)
        run(inputs, tmp_path / "out", tokenizer, **OPTIONS)


def test_two_runs_of_one_output_are_refused(
    inputs: list[Path], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start(inputs, tmp_path / "out", tokenizer, 1)
    while not list(tmp_path.glob("out.work/*.bin")) and process.exitcode is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr("megatron_let.data.preprocess._LOCK_SECONDS", 0.2)
    try:
        with pytest.raises(LETError, match="Another run is writing"):
            run(inputs, tmp_path / "out", tokenizer, **OPTIONS)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
