"""Write a run's tokenizer into a Hugging Face folder, and compare what was written with it."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from megatron_let.errors import LETError
from megatron_let.files.atomic import write_json
from megatron_let.teacher.hub import TOKENIZER_FILES
from megatron_let.teacher.tokenizer import (
    Encode,
    encoder,
    first_different_text,
    read_sentence_piece,
    read_tokenizer,
)

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_tokenizer(tokenizer: Path, folder: Path) -> Any:
    """Write a tokenizer into a folder that has a `config.json`; return it as loaded from there.

    Args:
        tokenizer: folder of a Hugging Face tokenizer, or a SentencePiece `.model` file.

    Raises:
        LETError: transformers gives other ids for the written files than the tokenizer.
    """
    if tokenizer.is_file():
        shutil.copy(tokenizer, folder / "tokenizer.model")
        convert_sentence_piece(tokenizer).save_pretrained(folder)
        # transformers 5 writes a class that transformers 4 does not have.
        config = folder / "tokenizer_config.json"
        name = {"tokenizer_class": "PreTrainedTokenizerFast"}
        write_json(config, json.loads(config.read_text()) | name)
        return _checked(folder, tokenizer, encoder(tokenizer))
    for pattern in TOKENIZER_FILES:
        for file in tokenizer.glob(pattern):
            shutil.copy(file, folder / file.name)
    try:
        return _checked(folder, tokenizer, encoder(tokenizer))
    except LETError:
        # The files alone may mean another tokenizer beside this config.json.
        read_tokenizer(tokenizer).save_pretrained(folder)
        return _checked(folder, tokenizer, encoder(tokenizer))


def hugging_face_tokenizer(tokenizer: Path) -> Any:
    """Load a folder or SentencePiece `.model` file as a tokenizer of transformers.

    Raises:
        LETError: transformers gives other ids than the `.model` file.
    """
    if tokenizer.is_dir():
        return read_tokenizer(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text("{}")
        return write_tokenizer(tokenizer, Path(folder))


def tokenizer_hash(tokenizer: Path | None) -> str:
    """Return a hash of a tokenizer's files, and of the config that selects its class."""
    digest = hashlib.sha256()
    files: list[Path] = []
    if tokenizer is not None and tokenizer.is_file():
        files = [tokenizer]
    elif tokenizer is not None:
        patterns = (*TOKENIZER_FILES, "config.json")
        files = sorted({file for pattern in patterns for file in tokenizer.glob(pattern)})
    for file in files:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def generation_settings(tokenizer: Path, loaded: Any) -> dict[str, Any]:
    """Return the content of `generation_config.json`: token ids, and how to sample.

    BOS and EOS are the tokenizer's own. A list of end tokens that has the tokenizer's among them is
    taken from its folder in transformers' order: `generation_config.json`, then `config.json`. The
    other settings are those of the folder's `generation_config.json`.

    Args:
        tokenizer: folder or `.model` file.
    """
    files = {name: tokenizer / name for name in ("generation_config.json", "config.json")}
    found = {n: json.loads(path.read_text()) for n, path in files.items() if path.is_file()}
    ids = {name: value for name in SPECIAL_TOKENS if (value := getattr(loaded, name)) is not None}
    ends = next(
        (c["eos_token_id"] for c in found.values() if c.get("eos_token_id") is not None), None
    )
    if isinstance(ends, list) and loaded.eos_token_id in ends:
        ids["eos_token_id"] = ends
    theirs = found.get("generation_config.json", {})
    if theirs.get("pad_token_id") is not None:
        ids["pad_token_id"] = theirs["pad_token_id"]
    return theirs | ids


def _checked(folder: Path, tokenizer: Path, encode: Encode) -> Any:
    text = first_different_text(encode, encoder(folder))
    if text is not None:
        raise LETError(
            f"The tokenizer {tokenizer} cannot be exported: transformers splits {text!r}"
            " differently from it; give the folder of an equal Hugging Face tokenizer as"
            " --tokenizer."
        )
    return read_tokenizer(folder)


def convert_sentence_piece(file: Path) -> PreTrainedTokenizerFast:
    """Convert a SentencePiece model to a tokenizer of transformers.

    transformers 5 has a converter for each of its architectures and none that follows the file.
    A converted tokenizer adds no special tokens, like Megatron's SentencePieceTokenizer.

    Raises:
        LETError: the model is neither BPE nor unigram.
    """
    from sentencepiece import sentencepiece_model_pb2 as messages

    processor = read_sentence_piece(file)
    proto = messages.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(file.read_bytes())
    tokenizer = Tokenizer(_model(proto, file))
    for kind, special in ((4, False), (3, True)):  # user-defined and control pieces
        pieces = [p.piece for p in proto.pieces if p.type == kind]
        tokenizer.add_tokens([AddedToken(p, normalized=False, special=special) for p in pieces])
    tokenizer.normalizer = normalizers.Sequence(_normalizers(proto.normalizer_spec))
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        parts.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(parts)
    ids = {name: getattr(processor, f"{name}_id")() for name in ("unk", "bos", "eos", "pad")}
    special_tokens = {f"{k}_token": processor.id_to_piece(v) for k, v in ids.items() if v >= 0}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special_tokens
    )


def _model(proto: Any, file: Path) -> Any:
    trainer, scores = proto.trainer_spec, {p.piece: p.score for p in proto.pieces}
    if trainer.model_type == trainer.UNIGRAM:
        return models.Unigram(list(scores.items()), trainer.unk_id, trainer.byte_fallback)
    if trainer.model_type != trainer.BPE:
        raise LETError(
            f"The SentencePiece model {file} is neither BPE nor unigram, the two kinds that"
            " transformers has; give a folder as --tokenizer."
        )
    vocabulary = {piece: index for index, piece in enumerate(scores)}
    return models.BPE(
        vocabulary,
        generate_merges(vocabulary, scores),
        unk_token=trainer.unk_piece,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )


def _normalizers(spec: Any) -> list[Any]:
    """Return the steps of SentencePiece's normalizer, in its order."""
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    steps.append(normalizers.Replace(" ", "▁"))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"▁+\z"), ""))
    return steps
