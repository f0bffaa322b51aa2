"""Indexed data reads back as written; the environment's text; the check of a run's data."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_let.data import environment_text
from megatron_let.data.gpt import check_data
from megatron_let.data.indexed import write_indexed
from megatron_let.errors import LETError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer of single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {"<end>": 0} | {character: i + 1 for i, character in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def files(folder: Path) -> set[str]:
    """Names of indexed files that look complete."""
    return {path.name for path in folder.iterdir() if path.suffix in (".bin", ".idx")}


def read(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


texts = st.lists(st.text(max_size=60), max_size=6).filter(lambda documents: any(documents))


@settings(max_examples=40, deadline=None)
@given(documents=texts)
def test_written_documents_read_back_unchanged(
    documents: list[str], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    prefix = tmp_path_factory.mktemp("indexed") / "text"
    counts = write_indexed(prefix, documents, tokenizer)
    written = [text for text in documents if text]
    found = read(prefix)
    assert [tokenizer.decode(tokens[:-1]) for tokens in found] == written
    assert all(tokens[-1] == 0 and 0 not in tokens[:-1] for tokens in found)
    assert counts.documents == len(written)
    assert counts.tokens == sum(map(len, found))
    assert counts.text_bytes == sum(len(text.encode()) for text in written)


def test_each_text_is_one_megatron_document(tmp_path: Path, tokenizer: Any) -> None:
    write_indexed(tmp_path / "text", ["one", "", "three"], tokenizer)
    dataset = IndexedDataset(str(tmp_path / "text"))
    assert dataset.document_indices.tolist() == [0, 1, 2]
    assert dataset.sequence_lengths.tolist() == [4, 6]


def test_token_ids_beyond_16_bits_are_kept(tmp_path: Path) -> None:
    words = {"<end>": 0} | {str(number): number for number in range(1, 70_000)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    large = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    write_indexed(tmp_path / "text", ["1 65535 65536 69999"], large)
    assert read(tmp_path / "text") == [[1, 65535, 65536, 69999, 0]]
    assert IndexedDataset(str(tmp_path / "text")).index.dtype == np.int32


def test_finished_write_leaves_no_temporary_file(tmp_path: Path, tokenizer: Any) -> None:
    write_indexed(tmp_path / "deep" / "text.v1", ["one"], tokenizer)
    assert files(tmp_path / "deep") == {"text.v1.bin", "text.v1.idx"}
    assert not list(tmp_path.rglob("*partial*"))


def test_interrupted_write_keeps_existing_files(tmp_path: Path, tokenizer: Any) -> None:
    def interrupted() -> Iterator[str]:
        yield "new"
        raise KeyboardInterrupt

    prefix = tmp_path / "text"
    write_indexed(prefix, ["old"], tokenizer)
    before = {name: (tmp_path / name).read_bytes() for name in ("text.bin", "text.idx")}
    with pytest.raises(KeyboardInterrupt):
        write_indexed(prefix, interrupted(), tokenizer)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_interrupted_write_leaves_no_file(tmp_path: Path, tokenizer: Any) -> None:
    def interrupted() -> Iterator[str]:
        yield "new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_indexed(tmp_path / "text", interrupted(), tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("documents", [[], ["", ""]], ids=["no document", "empty documents"])
def test_empty_text_raises_and_writes_nothing(
    documents: list[str], tmp_path: Path, tokenizer: Any
) -> None:
    """Megatron cannot open an empty .bin file."""
    with pytest.raises(LETError, match="text"):
        write_indexed(tmp_path / "text", documents, tokenizer)
    assert files(tmp_path) == set()


# The environment's own text


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """An environment of two folders."""
    paths = {"stdlib": tmp_path / "stdlib", "purelib": tmp_path / "purelib"}
    for path in paths.values():
        path.mkdir()
    monkeypatch.setattr(environment_text.sysconfig, "get_path", lambda name: str(paths[name]))
    return paths


def text_of(name: str, size: int = 2_000) -> str:
    return (f"# {name}\n" * size)[:size]


def test_environment_text_reads_each_file_of_both_folders_once(roots: dict[str, Path]) -> None:
    kept = {name: text_of(name) for name in ("a.py", "b.md", "c.rst", "d.txt")}
    for name, text in kept.items():
        (roots["stdlib"] / name).write_text(text)
    (roots["purelib"] / "package").mkdir()
    (roots["purelib"] / "package" / "copy.py").write_text(kept["a.py"])
    (roots["purelib"] / "small.py").write_text("x")
    (roots["purelib"] / "large.py").write_text(text_of("large", 100_001))
    (roots["purelib"] / "binary.so").write_text(text_of("binary"))
    (roots["purelib"] / "latin.py").write_bytes(b"# caf\xe9\n" * 300)
    assert sorted(environment_text.environment_text(10**6)) == sorted(kept.values())


def test_environment_text_order_does_not_depend_on_location(
    roots: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abcdefgh":
        (roots["purelib"] / f"{name}.py").write_text(text_of(name))
    first = list(environment_text.environment_text(10**6))
    roots["purelib"] = roots["purelib"].rename(tmp_path / "a-moved-environment")
    assert list(environment_text.environment_text(10**6)) == first
    assert first != sorted(first), "packages are mixed"


@pytest.mark.parametrize(("budget", "expected"), [(0, 0), (1, 1), (2_000, 1), (2_001, 2)])
def test_text_stops_at_budget(roots: dict[str, Path], budget: int, expected: int) -> None:
    for name in "abcd":
        (roots["purelib"] / f"{name}.py").write_text(text_of(name))
    assert len(list(environment_text.environment_text(budget))) == expected


def test_environment_text_skips_folders_and_dangling_links(roots: dict[str, Path]) -> None:
    (roots["purelib"] / "a.py").write_text(text_of("a"))
    (roots["purelib"] / "dangling.py").symlink_to("nowhere.py")
    folder = roots["purelib"] / "folder.py"
    folder.mkdir()
    for i in range(100):
        # A folder's size grows with its entries, so that it looks like a file of 1 kB.
        (folder / f"{i}-{'x' * 60}").touch()
    assert list(environment_text.environment_text(10**6)) == [text_of("a")]


# The check of a run's data


def data_args(**values: Any) -> argparse.Namespace:
    common: dict[str, Any] = dict.fromkeys(
        ["data_path", "data_args_path", "per_split_data_args_path", "train_data_path",
         "valid_data_path", "test_data_path"]
    )  # fmt: skip
    run = {"mock_data": False, "split": "1,0,0", "eval_iters": 1, "seq_length": 1}
    return argparse.Namespace(**common | run | values)


@pytest.fixture
def prefix(tmp_path: Path, tokenizer: Any) -> str:
    write_indexed(tmp_path / "text", ["one"], tokenizer)
    return str(tmp_path / "text")


def test_existing_data_passes(prefix: str) -> None:
    check_data(data_args(data_path=[prefix]))
    check_data(data_args(data_path=["0.3", prefix, "0.7", prefix]))
    check_data(data_args(train_data_path=[prefix], valid_data_path=[prefix]))
    check_data(data_args(mock_data=True))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"seq_length": 8}, r"The train split of .* has \d tokens, less than one"),
        ({"split": "1,1,0"}, "The .* split of .* has 0 tokens"),
        ({"split": "9,1,0", "eval_iters": 0}, "The validation split of .* has 0 tokens"),
        ({"split": "0,1,0", "eval_iters": 0, "seq_length": 8}, None),
    ],
)
def test_split_shorter_than_a_sequence_raises(
    values: dict[str, Any], expected: str | None, prefix: str
) -> None:
    args = data_args(data_path=[prefix], **values)
    if expected is None:
        check_data(args)
        return
    with pytest.raises(LETError, match=expected):
        check_data(args)


@pytest.mark.parametrize("where", ["data_path", "train_data_path", "valid_data_path"])
def test_missing_data_file_is_named(where: str, prefix: str) -> None:
    named = {"train_data_path": [prefix]} | {where: ["/no/data"]}
    if where == "data_path":
        named = {where: ["0.5", prefix, "0.5", "/no/data"]}
    with pytest.raises(LETError, match=r"The data file /no/data\.bin does not exist"):
        check_data(data_args(**named))


def test_missing_index_is_named(prefix: str) -> None:
    Path(prefix + ".idx").unlink()
    with pytest.raises(LETError, match=r"text\.idx does not exist"):
        check_data(data_args(data_path=[prefix]))


def test_run_without_data_raises() -> None:
    with pytest.raises(LETError, match="--data-path"):
        check_data(data_args())
