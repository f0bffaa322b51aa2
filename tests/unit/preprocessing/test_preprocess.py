"""Preprocessing: the tokenizer's documents, for any format and number of workers."""

from __future__ import annotations

import functools
import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.tokenizers import MegatronTokenizer
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from megatron_let.cli.preprocess import main
from megatron_let.data.text_tokenizer import load_text_tokenizer
from megatron_let.errors import LETError
from megatron_let.preprocessing.job import draw_split
from megatron_let.preprocessing.merge import blend_weights
from tests.helpers.text_data import (
    documents_of,
    files_of,
    real_texts,
    run,
    write_input,
)

pytestmark = pytest.mark.medium

FORMATS = ("jsonl", "jsonl.zst", "jsonl.gz", "parquet")
SUBSETS = ("Github", "Books3", "Wikipedia (en)")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return real_texts()[:60]


@functools.cache
def direct_ids(tokenizer: Path, text: str) -> list[int]:
    """Return the ids from the library, one document at a time."""
    if tokenizer.is_dir():
        loaded = AutoTokenizer.from_pretrained(tokenizer)
        return [*loaded(text, add_special_tokens=False).input_ids, loaded.eos_token_id]
    processor = SentencePieceProcessor(model_file=str(tokenizer))
    return [*processor.encode(text), processor.eos_id()]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kind", ["hugging_face", "sentence_piece"])
def test_documents_have_the_tokenizers_ids(
    kind: str, suffix: str, texts: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    source = write_input(tmp_path / f"in.{suffix}", texts)
    report = run([source], tmp_path / "out", tokenizer)
    documents = documents_of(tmp_path / "out_text_document")
    assert documents == [direct_ids(tokenizer, text) for text in texts]
    assert report["documents_in"] == report["written"]["documents"] == len(texts)
    assert report["written"]["tokens"] == sum(map(len, documents))
    assert report["written"]["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert report["dtype"] == "uint16"


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.lists(st.text(max_size=60), min_size=1, max_size=12),
    suffix=st.sampled_from(FORMATS),
)
def test_any_documents_are_written_once_and_in_order(
    texts: list[str],
    suffix: str,
    hugging_face: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("property")
    loaded = AutoTokenizer.from_pretrained(hugging_face)
    ids = [loaded(text, add_special_tokens=False).input_ids for text in texts]
    expected = [[*document, loaded.eos_token_id] for document in ids if document]
    source = write_input(folder / f"in.{suffix}", texts)
    if not expected:
        with pytest.raises(LETError, match="No document was written"):
            run([source], folder / "out", hugging_face)
        return
    report = run([source], folder / "out", hugging_face)
    assert documents_of(folder / "out_text_document") == expected
    assert report["documents_in"] == len(texts)
    assert report["rejected"].get("empty", 0) == len(texts) - len(expected)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(texts=st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=12))
def test_sentence_piece_ids_equal_the_library_on_any_text(
    texts: list[str], sentence_piece: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ours = load_text_tokenizer("SentencePieceTokenizer", sentence_piece).encode(texts)
    processor = SentencePieceProcessor(model_file=str(sentence_piece))
    assert ours == [processor.encode(text) for text in texts]


def test_bytes_do_not_depend_on_the_number_of_workers(
    texts: list[str], hugging_face: Path, tmp_path: Path
) -> None:
    inputs = [write_input(tmp_path / f"{i}.{f}", texts, SUBSETS) for i, f in enumerate(FORMATS)]
    (tmp_path / "e.txt").write_text(texts[0])
    inputs.append(tmp_path / "e.txt")
    results = []
    for workers in (1, 3):
        folder = tmp_path / f"w{workers}"
        run(inputs, folder / "out", hugging_face, workers=workers)
        results.append(files_of(folder))
    assert results[0] == results[1]
    assert len(documents_of(tmp_path / "w1/out_text_document")) == 4 * len(texts) + 1


def test_text_files_globs_and_folders_are_read_once(hugging_face: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "deep/c.txt"):
        (folder / name).write_text(f"text of {name}\n")
    (folder / "README").write_text("not an input")
    (folder / "manifest.json").write_text("{}")
    # The output of an earlier run, inside its input.
    (folder / "out.rejected.jsonl").write_text('{"reason": "empty"}\n')
    report = run([folder], tmp_path / "all", hugging_face)
    ignored = [Path(p).name for p in report["ignored_files"]]
    assert ignored == ["README", "manifest.json", "out.rejected.jsonl"]
    names = ["a.txt", "b.txt", "deep/c.txt"]
    expected = [direct_ids(hugging_face, f"text of {name}\n") for name in names]
    assert documents_of(tmp_path / "all_text_document") == expected
    # A file that matches two patterns is read once.
    run([folder / "*.txt", folder / "a.txt"], tmp_path / "glob", hugging_face)
    assert documents_of(tmp_path / "glob_text_document") == expected[:2]


def test_each_key_makes_a_data_set(hugging_face: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a b", "title": "T"}\n{"text": "c d"}\n')
    report = run([source], tmp_path / "out", hugging_face, json_keys=("text", "title"))
    assert len(documents_of(tmp_path / "out_text_document")) == 2
    assert documents_of(tmp_path / "out_title_document") == [direct_ids(hugging_face, "T")]
    assert (report["documents_in"], report["rejected"]) == (4, {"missing_key": 1})


def test_no_append_eod_omits_end_of_document(hugging_face: Path, tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl", ["one two"])
    run([source], tmp_path / "out", hugging_face, append_eod=False)
    [document] = documents_of(tmp_path / "out_text_document")
    assert document == direct_ids(hugging_face, "one two")[:-1]


@pytest.mark.parametrize("suffix", FORMATS)
def test_subsets_are_filtered_and_counted(
    suffix: str, texts: list[str], hugging_face: Path, tmp_path: Path
) -> None:
    source = write_input(tmp_path / f"in.{suffix}", texts[:30], SUBSETS)
    report = run([source], tmp_path / "out", hugging_face, exclude_subsets=("Books3",))
    kept = [text for i, text in enumerate(texts[:30]) if i % 3 != 1]
    expected = [direct_ids(hugging_face, text) for text in kept]
    assert documents_of(tmp_path / "out_text_document") == expected
    assert report["filtered"] == {"Books3": 10}
    assert {n: s["documents"] for n, s in report["subsets"].items()} == {
        "Github": 10,
        "Wikipedia (en)": 10,
    }
    only = run([source], tmp_path / "only", hugging_face, include_subsets=("Books3",))
    assert only["written"]["documents"] == 10


def test_subset_blend_is_read_by_megatron(
    texts: list[str], hugging_face: Path, tmp_path: Path
) -> None:
    source = write_input(tmp_path / "in.jsonl", texts, SUBSETS)
    report = run(
        [source], tmp_path / "out", hugging_face, per_subset=True,
        subset_weights={"Github": 3.0, "Books3": 0.0},
    )  # fmt: skip
    for index, name in enumerate(("Github", "Books3", "Wikipedia__en")):
        expected = [direct_ids(hugging_face, text) for text in texts[index::3]]
        assert documents_of(tmp_path / f"out_text_{name}_document") == expected
    weights, prefixes = megatron_blend(data_args_path=report["data_args"])[0]
    github, wikipedia = (report["subsets"][n]["tokens"] for n in ("Github", "Wikipedia (en)"))
    assert [Path(p).name for p in weights] == [
        "out_text_Github_document",
        "out_text_Wikipedia__en_document",
    ]
    total = 3 * github + wikipedia
    np.testing.assert_allclose(prefixes, [3 * github / total, wikipedia / total], atol=1e-7)


def test_unknown_subset_weight_raises(hugging_face: Path, tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl", ["a", "b", "c"], SUBSETS)
    options: dict[str, Any] = {"per_subset": True, "include_subsets": ("Github", "Gihtub")}
    with pytest.raises(LETError, match="--subset-weights has 'Gihtub'"):
        run([source], tmp_path / "out", hugging_face, subset_weights={"Gihtub": 2.0}, **options)
    with pytest.raises(LETError, match="--subset-weights"):
        run([source], tmp_path / "out", hugging_face, subset_weights={"Github": 0.0}, **options)
    report = run([source], tmp_path / "out", hugging_face, subset_weights={"Github": 2}, **options)
    assert report["subsets_not_found"] == ["Gihtub"]
    with pytest.raises(LETError, match="its subset_weights differs"):
        run([source], tmp_path / "out", hugging_face, **options)


def test_splits_are_disjoint_and_read_by_megatron(
    texts: list[str], hugging_face: Path, tmp_path: Path
) -> None:
    source = write_input(tmp_path / "in.jsonl", texts, SUBSETS)
    report = run(
        [source], tmp_path / "out", hugging_face, split=(6, 2, 2), per_subset=True,
    )  # fmt: skip
    per_split = megatron_blend(per_split_data_args_path=report["data_args"])[1]
    found = []
    for name, blend in zip(("train", "valid", "test"), per_split, strict=True):
        ours = [d for prefix in blend[0] for d in documents_of(prefix)]
        expected = [t for t in texts if draw_split(t, (6, 2, 2)) == name]
        key = lambda d: tuple(d)  # noqa: E731
        assert sorted(ours, key=key) == sorted(
            (direct_ids(hugging_face, t) for t in expected), key=key
        )
        found.append(len(ours))
    assert sum(found) == len(texts)
    assert found[0] > found[1] > 0 and found[2] > 0


def test_finished_run_is_kept_and_changed_options_raise(hugging_face: Path, tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl", ["one", "two"])
    prefix = tmp_path / "sub" / "out"
    first = run([source], prefix, hugging_face)
    before = {p: p.stat().st_mtime_ns for p in prefix.parent.iterdir()}
    assert run([source], prefix, hugging_face) == first
    assert {p: p.stat().st_mtime_ns for p in prefix.parent.iterdir()} == before
    with pytest.raises(LETError, match="its selection differs"):
        run([source], prefix, hugging_face, append_eod=False)
    write_input(source, ["one", "twx"])
    with pytest.raises(LETError, match="its input differs"):
        run([source], prefix, hugging_face)


def test_eod_and_vocabulary_size_are_megatrons(hugging_face: Path, sentence_piece: Path) -> None:
    for library, kind, path in (
        ("huggingface", "HuggingFaceTokenizer", hugging_face),
        ("sentencepiece", "SentencePieceTokenizer", sentence_piece),
    ):
        theirs = MegatronTokenizer.from_pretrained(
            tokenizer_path=str(path), metadata_path={"library": library}
        )
        ours = load_text_tokenizer(kind, path)
        assert (ours.vocab_size, ours.eod) == (theirs.vocab_size, theirs.eos_id)


@settings(max_examples=200, deadline=None)
@given(text=st.text(), weights=st.tuples(*[st.floats(0, 100)] * 3).filter(lambda w: sum(w) > 0))
def test_drawn_split_has_a_positive_weight(text: str, weights: tuple[float, float, float]) -> None:
    assert (
        dict(zip(("train", "valid", "test"), weights, strict=True))[
            draw_split(text.encode(errors="replace").decode(), weights)
        ]
        > 0
    )


def test_blend_weights_scale_shares_and_sum_to_one() -> None:
    assert blend_weights({"a": 30, "b": 10, "c": 5}, {"b": 2, "c": 0}) == {"a": 0.6, "b": 0.4}


def test_command_line_reads_subset_file(hugging_face: Path, tmp_path: Path, capsys: Any) -> None:
    source = write_input(tmp_path / "in.jsonl", ["a b", "c", ""], SUBSETS)
    subsets = tmp_path / "keep.txt"
    subsets.write_text("# kept\nGithub\nBooks3  # for a test\n")
    code = main(
        ["--input", str(source), "--output-prefix", str(tmp_path / "out"), "--tokenizer-model",
         str(hugging_face), "--include-subsets", str(subsets), "--workers", "1"]
    )  # fmt: skip
    assert code == 0
    assert "3 documents in, 2 out" in capsys.readouterr().err
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["filtered"] == {"Wikipedia (en)": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "1,2"], "--split is '1,2'"),
        (["--split=-1,2,3"], "--split is -1,2,3"),
        (["--split", "989,10,nan"], "--split is 989,10,nan"),
        (["--split", "nan,10,1"], "--split is nan,10,1"),
        (["--split", "989,10,inf"], "--split is 989,10,inf"),
        (["--include-subsets", ""], "--include-subsets has '', which names no subset"),
        (["--include-subsets", "a", "lsit.txt"], "--include-subsets has 'lsit.txt', which is not"),
        (["--exclude-subsets", "./lists/exclude"], "has './lists/exclude', which is not a file"),
        (["--workers", "0"], "--workers is 0"),
        (["--subset-weights", "a=2"], "--subset-weights needs --per-subset"),
        (["--per-subset", "--subset-weights", "a"], "--subset-weights has 'a'"),
        (["--include-subsets", "a", "--exclude-subsets", "a"], "'a' is in --include-subsets"),
        (["--json-keys", "text", "title", "--per-subset"], "--json-keys has 2"),
        (["--input", "nothing.jsonl"], "--input nothing.jsonl"),
        (["--input", "/dev/null"], "--input /dev/null"),
        (["--tokenizer-model", "none"], "The tokenizer none does not exist"),
        (["--tokenizer-type", "SentencePieceTokenizer"], "SentencePiece model"),
    ],
)
def test_invalid_flags_are_a_usage_error(
    arguments: list[str], message: str, hugging_face: Path, tmp_path: Path, capsys: Any
) -> None:
    source = write_input(tmp_path / "in.jsonl", ["a b"])
    code = main(
        ["--input", str(source), "--output-prefix", str(tmp_path / "out"), "--tokenizer-model",
         str(hugging_face), *arguments]
    )  # fmt: skip
    assert code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("content", ["", "# Github\n\n"])
def test_subset_file_without_a_name_is_refused(
    content: str, hugging_face: Path, tmp_path: Path, capsys: Any
) -> None:
    subsets = tmp_path / "keep.txt"
    subsets.write_text(content)
    code = main(
        ["--input", "in.jsonl", "--output-prefix", str(tmp_path / "out"), "--tokenizer-model",
         str(hugging_face), "--include-subsets", str(subsets)]
    )  # fmt: skip
    assert code == 2
    assert "keep.txt', which names no subset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "kept"), [("C#", {"C#"}), ("# all\nC# # a comment\n#F\n  C\n", {"C", "C#"})]
)
def test_subset_names_may_have_a_hash(
    given: str, kept: set[str], hugging_face: Path, tmp_path: Path
) -> None:
    source = write_input(
        tmp_path / "in.jsonl", ["a", "b", "c", "d"], ("C", "C#", "F#", "a comment")
    )
    if "\n" in given:
        (tmp_path / "keep.txt").write_text(given)
        given = str(tmp_path / "keep.txt")
    code = main(
        ["--input", str(source), "--output-prefix", str(tmp_path / "out"), "--tokenizer-model",
         str(hugging_face), "--include-subsets", given]
    )  # fmt: skip
    assert code == 0
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert set(report["subsets"]) == kept


def test_subset_names_may_have_a_slash(hugging_face: Path, tmp_path: Path, capsys: Any) -> None:
    names = ("a/b", "USPTO Backgrounds", "Wikipedia (en)", "Pile-CC")
    source = write_input(tmp_path / "in.jsonl", ["a", "b", "c", "d"], names)
    code = main(
        ["--input", str(source), "--output-prefix", str(tmp_path / "out"), "--tokenizer-model",
         str(hugging_face), "--include-subsets", *names[:3], "--workers", "1"]
    )  # fmt: skip
    assert code == 0
    assert "4 documents in, 3 out" in capsys.readouterr().err


def test_overwrite_of_a_copy_keeps_the_original(hugging_face: Path, tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl", ["one", "two"])
    run([source], tmp_path / "original/out", hugging_face)
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    before = files_of(tmp_path / "original")
    run([source], tmp_path / "copy/out", hugging_face, append_eod=False, overwrite=True)
    assert files_of(tmp_path / "original") == before
    assert len(documents_of(tmp_path / "copy/out_text_document")[0]) == 1


def test_input_in_the_folder_of_shards_is_refused(hugging_face: Path, tmp_path: Path) -> None:
    (tmp_path / "out.work").mkdir()
    source = write_input(tmp_path / "out.work/in.jsonl", ["one"])
    with pytest.raises(LETError, match="contains the input"):
        run([source], tmp_path / "out", hugging_face, overwrite=True)
    assert source.exists()


def megatron_blend(**paths: Any) -> Any:
    """Return the blend that Megatron reads from a data-args file."""
    from megatron.training.utils import get_blend_and_blend_per_split

    none = dict.fromkeys(
        ("data_path", "data_args_path", "train_data_path", "valid_data_path", "test_data_path",
         "per_split_data_args_path")
    )  # fmt: skip
    return get_blend_and_blend_per_split(Namespace(**(none | paths)))
