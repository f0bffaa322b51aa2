"""Perplexity over indexed data, compared with a plain computation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_let.checkpoint.weights import open_weights
from megatron_let.cli.evaluate import main
from megatron_let.errors import LETError
from megatron_let.evaluation.models import load_model
from megatron_let.evaluation.perplexity import Perplexity, blend_of, perplexity, total, windows
from tests.helpers.checkpoints import as_deepspeed, as_megatron, save_llama, with_tokenizer
from tests.helpers.data import write_indexed
from tests.helpers.text_data import run as preprocess
from tests.helpers.text_data import save_sentence_piece, write_input

TEXTS = ["Late to early, naïve café 東京.", "def f(x):\n    return x + 1\n", "The end of it all."]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer."""
    return with_tokenizer(save_llama(tmp_path_factory.mktemp("m") / "llama", vocab_size=600))


@pytest.fixture(scope="module")
def data(model: Path) -> Path:
    """Three short documents."""
    prefix = model.with_name("texts")
    write_indexed(prefix, TEXTS, AutoTokenizer.from_pretrained(model))
    return prefix


def test_windows_predict_each_token_but_the_first_once(data: Path, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = [i for text in TEXTS for i in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    for length in (1, 7, 16, len(ids), 10_000):
        cut = list(windows(data, length, None))
        assert np.concatenate([cut[0][:1], *[part[1:] for part in cut]]).tolist() == ids
        assert all(len(part) <= length + 1 for part in cut)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("length", [8, 1000])
def test_loss_equals_plain_loop(length: int, batch_size: int, data: Path, model: Path) -> None:
    llama = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = [i for text in TEXTS for i in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    expected = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, length):
            window = torch.tensor(ids[start : start + length + 1])
            scores = llama(window[None, :-1]).logits[0].double().log_softmax(-1)
            expected -= float(scores.gather(1, window[1:, None]).sum())
    found = perplexity(llama, data, length, model, batch_size)
    assert found.loss == pytest.approx(expected, rel=1e-5)
    assert found.tokens == len(ids) - 1
    assert found.bytes == sum(len(text.encode()) for text in TEXTS)
    assert found.per_token == pytest.approx(math.exp(expected / (len(ids) - 1)), rel=1e-5)
    assert found.per_byte is not None and found.bits_per_byte is not None
    assert 2**found.bits_per_byte == pytest.approx(found.per_byte)


def test_bytes_are_counted_with_a_sentence_piece_tokenizer(model: Path, tmp_path: Path) -> None:
    tokenizer = save_sentence_piece(tmp_path / "tokenizer.model")
    texts = ["Late to early.", "The end of it all."]
    preprocess([write_input(tmp_path / "t.jsonl", texts)], tmp_path / "data", tokenizer)
    llama = AutoModelForCausalLM.from_pretrained(model)
    found = perplexity(llama, tmp_path / "data_text_document", 16, tokenizer)
    assert found.bytes == sum(len(text.encode()) for text in texts)


def test_windows_stop_at_max_tokens(data: Path) -> None:
    (window,) = windows(data, 100, 5)
    assert len(window) == 5


def test_total_sums_tokens_bytes_and_loss() -> None:
    parts = [Perplexity("a", 10, 40, 30.0), Perplexity("b", 30, 60, 50.0)]
    both = total(parts)
    assert (both.tokens, both.bytes, both.loss) == (40, 100, 80.0)
    assert total([*parts, Perplexity("c", 1, None, 1.0)]).per_byte is None


@pytest.mark.parametrize(
    ("items", "names"),
    [(["a", "b"], ["a", "b"]), (["0.3", "a", "0.7", "b"], ["a", "b"]), (["a"], ["a"])],
)
def test_blend_of_returns_prefixes(items: list[str], names: list[str]) -> None:
    assert [str(path) for path in blend_of(items)] == names


def test_blend_with_missing_weight_raises() -> None:
    with pytest.raises(LETError, match="--data-path"):
        blend_of(["a", "b", "0.3", "c"])


def test_command_gives_equal_perplexity_for_every_checkpoint_format(
    model: Path, data: Path, tmp_path: Path
) -> None:
    megatron = as_megatron(model, tmp_path / "megatron")
    (tmp_path / "blend.txt").write_text(f"0.5 {data}\n0.5 {data}\n")
    deepspeed = as_deepspeed(megatron, tmp_path / "deepspeed")
    arguments = ["perplexity", model, megatron, deepspeed, "--seq-length", 16,
                 "--data-args-path", tmp_path / "blend.txt", "--json", tmp_path / "out.json",
                 "--device", "cpu"]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    ours, *theirs = json.loads((tmp_path / "out.json").read_text())["models"].values()
    assert theirs == [ours, ours] and [part["name"] for part in ours] == ["texts", "texts", "all"]
    assert ours[2]["loss"] == pytest.approx(ours[0]["loss"])


@pytest.mark.parametrize("tied", [False, True])
def test_megatron_checkpoint_gives_logits_of_source_model(tied: bool, tmp_path: Path) -> None:
    source = save_llama(tmp_path / "source", tie_word_embeddings=tied)
    megatron = as_megatron(source, tmp_path / "megatron")
    ours = load_model(open_weights(megatron), torch.float32, "cpu")
    theirs = AutoModelForCausalLM.from_pretrained(source)
    tokens = torch.arange(50)[None]
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data-path", "{here}/nowhere"], "nowhere.bin does not exist"),
        (["--data-args-path", "{here}/nowhere"], "does not exist"),
        (["--data-path", "{here}/large"], "another tokenizer"),
        (["--data-path", "{data}", "{here}/nowhere", "{data}"], "nowhere.bin"),
        (["--data-args-path", "{here}/empty.txt"], "empty.txt"),
        (["{here}/missing", "--data-path", "{data}"], "missing"),
        (["--data-path", "{data}", "--tokenizer", "{here}/missing"], "{here}/missing"),
        (["--data-path", "{data}", "--device", "gpu"], "'gpu'"),
        (["--data-path", "{data}", "--device", "cuda"], "no device cuda"),
        (["--data-path", "{data}", "--json", "{here}"], "{here}"),
        (["--data-path", "{data}", "--json", "{here}/empty.txt/p.json"], "empty.txt"),
    ],
)
def test_bad_input_exits_with_error_line_before_a_model_is_loaded(
    flags: list[str], words: str, model: Path, data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("megatron_let.evaluation.models.load_model", None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    (tmp_path / "empty.txt").touch()
    other = with_tokenizer(tmp_path / "tokenizer", 700)
    write_indexed(tmp_path / "large", TEXTS * 40, AutoTokenizer.from_pretrained(other))
    given = [flag.format(here=tmp_path, data=data) for flag in flags]
    assert main(["perplexity", str(model), *given]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("evaluate: error: ") and words.format(here=tmp_path) in line


@pytest.mark.parametrize(("native", "expected"), [(True, None), (False, torch.float32)])
def test_bf16_weights_run_in_fp32_where_the_cpu_emulates_bf16(
    native: bool, expected: torch.dtype | None, tmp_path: Path, model: Path, data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    AutoModelForCausalLM.from_pretrained(model).bfloat16().save_pretrained(tmp_path)
    asked: list[torch.dtype | None] = []

    def record(weights: object, dtype: torch.dtype | None, device: str) -> None:
        asked.append(dtype)
        raise LETError("Recorded.")

    monkeypatch.setattr("megatron_let.evaluation.models.load_model", record)
    monkeypatch.setattr("megatron_let.teacher.precision.cpu_has_bf16", lambda: native)
    assert main(["perplexity", str(tmp_path), "--data-path", str(data), "--device", "cpu"]) == 2
    assert asked == [expected]
