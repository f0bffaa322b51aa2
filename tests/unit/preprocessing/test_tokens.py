"""Token for token: 2,000 documents of real tokenizers, ids beyond the count, and Ray."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from megatron_let.data.text_tokenizer import load_text_tokenizer, token_bytes
from megatron_let.errors import LETError
from megatron_let.preprocessing.merge import DatasetBuilder
from tests.helpers.data import write_indexed
from tests.helpers.text_data import (
    documents_of,
    files_of,
    real_texts,
    run,
    write_input,
)

pytestmark = pytest.mark.medium

PARTS = (
    "Größe, año, Łódź, e\u0301, naïve café ",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 ",
    "line\r\nline\r\n\r\n", "東京タワー 한국어 ไทย ", "русский עברית العربية ",
    "\t\tindented\n  two\n",
    " ", "12345 67.8e-9 ", "\u00a0\u2003\ufeff\u2028", "<|endoftext|>", "</s>", "\0", "it's ",
)  # fmt: skip


def documents(count: int = 2000) -> list[str]:
    """Return texts with accents, emoji, white space of all kinds, special tokens, long lines."""
    rng = random.Random(0)
    pieces = [text[:300] for text in real_texts()]
    texts = [
        "".join(rng.choice(rng.choice((PARTS, pieces))) for _ in range(rng.randint(1, 8)))
        for _ in range(count - 2)
    ]
    return [*texts, "word " * 100_000, "x" * 50_000]


@pytest.mark.parametrize("kind", ["hugging_face", "sentence_piece"])
def test_two_thousand_documents_have_the_tokenizers_ids(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tokenizer, texts = request.getfixturevalue(kind), documents()
    inputs = [write_input(tmp_path / f"{part}.jsonl.gz", texts[part::4]) for part in range(4)]
    report = run(inputs, tmp_path / "out", tokenizer, workers=2)
    if tokenizer.is_dir():
        loaded = AutoTokenizer.from_pretrained(tokenizer)
        ids = {t: loaded(t, add_special_tokens=False).input_ids for t in texts}
        end = loaded.eos_token_id
    else:
        processor = SentencePieceProcessor(model_file=str(tokenizer))
        ids = {t: processor.encode(t) for t in texts}
        end = processor.eos_id()
    order = [text for part in range(4) for text in texts[part::4]]
    expected = [[*ids[text], end] for text in order if ids[text]]
    assert documents_of(tmp_path / "out_text_document") == expected
    assert report["documents_in"] == len(texts)
    assert report["rejected"].get("empty", 0) == len(texts) - len(expected)


def test_id_beyond_the_count_is_stored(hugging_face: Path, tmp_path: Path) -> None:
    """A vocabulary with a gap: fewer than 65,500 tokens, one of which has id 70000."""
    folder = tmp_path / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(hugging_face)
    tokenizer.save_pretrained(folder)
    text = (folder / "tokenizer.json").read_text()
    last = max(tokenizer.get_vocab().values())
    [token] = [t for t, i in tokenizer.get_vocab().items() if i == last]
    spelled = tokenizer.convert_tokens_to_string([token])
    (folder / "tokenizer.json").write_text(text.replace(f": {last}", ": 70000"))
    source = write_input(tmp_path / "in.jsonl", [spelled])
    report = run([source], tmp_path / "out", folder)
    assert report["dtype"] == "int32"
    [[first, _]] = documents_of(tmp_path / "out_text_document")
    assert first == 70000
    write_indexed(tmp_path / "memory", [spelled], AutoTokenizer.from_pretrained(folder))
    assert documents_of(tmp_path / "memory") == [[first, tokenizer.eos_token_id]]


@pytest.mark.parametrize("largest", [100, 65_498, 65_499, 65_500, 70_000])
def test_size_of_an_id_is_megatrons(largest: int, hugging_face: Path) -> None:
    tokenizer = load_text_tokenizer("HuggingFaceTokenizer", hugging_face)
    tokenizer.largest_id = largest
    assert token_bytes(tokenizer) == DType.size(DType.optimal_dtype(largest + 1))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_merged_parts_are_megatrons_bytes(dtype: type, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    tokens = [generator.integers(0, 60_000, size=n).astype(dtype) for n in (1, 7, 3, 500)]
    for name, part in (("whole", tokens), ("first", tokens[:3]), ("second", tokens[3:])):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=dtype)
        for document in part:
            builder.add_document(document, [len(document)])
        builder.finalize(str(tmp_path / f"{name}.idx"))
    ours = DatasetBuilder(str(tmp_path / "ours.bin"), dtype=dtype)
    ours.add_index(str(tmp_path / "first"))
    ours.add_index(str(tmp_path / "second"))
    ours.finalize(str(tmp_path / "ours.idx"))
    for suffix in (".bin", ".idx"):
        whole = (tmp_path / f"whole{suffix}").read_bytes()
        assert (tmp_path / f"ours{suffix}").read_bytes() == whole


def test_ray_with_two_workers_writes_a_local_runs_bytes(hugging_face: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is missing: pip install '.[ray]'")
    inputs = [write_input(tmp_path / f"{i}.jsonl", real_texts()[i::3], "ab") for i in range(3)]

    def on(executor: str) -> None:
        run(
            inputs, tmp_path / executor / "out", hugging_face, executor=executor, workers=2,
            split=(8, 1, 1),
        )  # fmt: skip

    on("local")
    try:
        on("ray")
    except LETError as error:
        # On a busy machine Ray may give up after its 30 s to start; repeating continues.
        assert "Ray did not start" in str(error)
        on("ray")
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")
