"""Any causal language model is evaluated, with transformers' own loss as the peer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from megatron_let.checkpoint.convert import to_megatron_checkpoint
from megatron_let.checkpoint.weights import open_weights
from megatron_let.cli.evaluate import main
from megatron_let.evaluation import harness
from megatron_let.evaluation.harness import Result, Settings, evaluate
from megatron_let.evaluation.models import load_model, open_model
from megatron_let.evaluation.perplexity import Perplexity
from megatron_let.evaluation.tasks import tasks_named
from tests.helpers.checkpoints import (
    as_megatron,
    equal,
    save_llama,
    save_model,
    tensors_of,
    with_tokenizer,
)
from tests.helpers.data import write_indexed
from tests.helpers.models import random_model
from tests.helpers.text_data import real_texts, save_sentence_piece, write_input
from tests.helpers.text_data import run as preprocess

pytestmark = pytest.mark.medium

ARCHITECTURES = ("opt", "gpt2", "gpt_neox", "qwen3")


def save(architecture: str, folder: Path) -> Path:
    """Save a random model with a tokenizer of as many tokens as its embedding has rows."""
    if architecture == "qwen3":
        sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64,
                 "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                 "head_dim": 16}  # fmt: skip
        model: Any = Qwen3ForCausalLM(Qwen3Config(**sizes))
    else:
        model = random_model(architecture)
        model.resize_token_embeddings(300)
    model.save_pretrained(folder)
    return with_tokenizer(folder, 300)


def scores(folder: Path, data: Path, *flags: str, length: int = 64) -> dict[str, Any]:
    output = folder.with_name("out.json")
    arguments = ["perplexity", str(folder), "--data-path", str(data), "--seq-length", str(length)]
    assert main([*arguments, "--json", str(output), "--device", "cpu", *flags]) == 0
    (found,) = json.loads(output.read_text())["models"].values()
    return dict(found[0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_perplexity_of_any_architecture_is_that_of_transformers(
    architecture: str, tmp_path: Path
) -> None:
    folder = save(architecture, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    write_indexed(tmp_path / "data", real_texts()[:1], tokenizer)
    ids = [*tokenizer(real_texts()[0]).input_ids, tokenizer.eos_token_id]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.tensor([ids[:65]])
    with torch.no_grad():
        expected = float(model(tokens, labels=tokens).loss)
    found = scores(folder, tmp_path / "data", "--max-tokens", "65")
    assert found["loss"] == pytest.approx(expected, rel=1e-4) and found["tokens"] == 64


@pytest.mark.parametrize("kind", ["gpt2", "damaged", "quantised"])
def test_folder_that_cannot_be_evaluated_is_refused(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save("gpt2", tmp_path / "model")
    write_indexed(tmp_path / "data", real_texts()[:5], AutoTokenizer.from_pretrained(folder))
    config = folder / "config.json"
    if kind == "damaged":
        config.write_text(config.read_text().replace('"n_layer": 3', '"n_layer": 2'))
    if kind == "quantised":
        config.write_text(config.read_text().replace("{", '{"quantization_config": {},', 1))
    arguments = ["perplexity", str(folder), "--data-path", str(tmp_path / "data")]
    assert main([*arguments, "--seq-length", "500", "--device", "cpu"]) == 2
    words = {"gpt2": "--seq-length 128", "damaged": "h.2.", "quantised": "quantization_config"}
    assert words[kind] in capsys.readouterr().err


def test_run_with_a_sentence_piece_model_is_evaluated_and_compared_with_its_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = save_sentence_piece(tmp_path / "tokenizer.model")
    other = save_sentence_piece(tmp_path / "other.model", model_type="unigram")
    source = save_llama(tmp_path / "llama", vocab_size=600)
    to_megatron_checkpoint(open_weights(source, tokenizer), tmp_path / "run")
    for name, model in (("own", tokenizer), ("foreign", other)):
        preprocess([write_input(tmp_path / "t.jsonl", real_texts()[:3])], tmp_path / name, model)
    found = scores(tmp_path / "run", tmp_path / "own_text_document")
    assert found["bytes"] and math.isfinite(found["loss"])
    arguments = ["perplexity", str(tmp_path / "run"), "--device", "cpu", "--data-path"]
    assert main([*arguments, str(tmp_path / "foreign_text_document")]) == 2
    assert "another tokenizer" in capsys.readouterr().err


def test_perplexity_of_a_huge_loss_is_infinite_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = Perplexity("data", 1, 1, 1000.0)
    assert part.per_token == part.per_byte == math.inf
    folder = with_tokenizer(save_llama(tmp_path / "model", vocab_size=600))
    write_indexed(tmp_path / "data", real_texts()[:1], AutoTokenizer.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    model.save_pretrained(folder)
    found = scores(folder, tmp_path / "data", "--max-tokens", "30")
    assert found["loss"] > 709 and found["perplexity_per_token"] is None
    assert "infinite" in capsys.readouterr().err


def test_perplexity_of_a_damaged_model_is_not_a_number_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_tokenizer(save_llama(tmp_path / "model", vocab_size=600))
    write_indexed(tmp_path / "data", real_texts()[:1], AutoTokenizer.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    model.save_pretrained(folder)
    assert scores(folder, tmp_path / "data", "--max-tokens", "30")["perplexity_per_token"] is None
    assert "not a number" in capsys.readouterr().err


def test_result_is_computed_again_for_what_changes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_tokenizer(save_llama(tmp_path / "model", vocab_size=600))
    other = with_tokenizer(tmp_path / "tokenizer", 500)
    calls: list[Any] = []

    scored = Result("sciq", {"acc": 0.5, "acc_stderr": 0.1}, 1, "1", "1")
    monkeypatch.setattr(harness, "_lm_eval_model", lambda w, *_: calls.append(w.tokenizer))
    monkeypatch.setattr(harness, "_score", lambda *_: scored)
    monkeypatch.setattr(harness, "versions", lambda: {"lm-eval": "0"})

    def score(tokenizer: Path | None = None, dtype: str | None = None) -> int:
        model, tasks = open_model(folder, tokenizer), tasks_named(["sciq"])
        evaluate(model, tasks, Settings(dtype=dtype), tmp_path / "cache")
        return len(calls)

    assert [score(), score(), score(other), score(other)] == [1, 1, 2, 2]
    assert [score(dtype="float16"), score()] == [3, 3]
    config = other / "tokenizer_config.json"
    config.write_text(config.read_text().replace("{", '{"add_bos_token": true,', 1))
    assert score(other) == 4


def test_pickled_weights_are_part_of_the_hash(tmp_path: Path) -> None:
    folder = save("gpt2", tmp_path / "model")
    state = load_model(open_model(folder), None, "cpu").state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    first = harness.checkpoint_hash(folder)
    torch.save({name: 2 * tensor for name, tensor in state.items()}, folder / "pytorch_model.bin")
    assert harness.checkpoint_hash(folder) != first


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("qwen3_moe", {"mlp_only_layers": [1]}), ("qwen2", {"tie_word_embeddings": True})],
)
def test_megatron_checkpoint_is_loaded_as_the_exported_model(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    source = save_model(kind, tmp_path / "source", **changes)
    megatron = as_megatron(source, tmp_path / "megatron")
    model = load_model(open_model(megatron), None, "cpu")
    assert equal(model.state_dict(), tensors_of(source))
    assert load_model(open_model(megatron), torch.bfloat16, "cpu").dtype == torch.bfloat16


def test_tasks_take_any_architecture_and_a_sentence_piece_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(
        "lm_eval", reason="lm-eval is missing: bash launch/lib/environment.sh evaluation"
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = save_sentence_piece(tmp_path / "tokenizer.model")
    source = save_llama(tmp_path / "llama", vocab_size=600)
    to_megatron_checkpoint(open_weights(source, tokenizer), tmp_path / "run")
    rows = [{"text": f"One, two, three and again {n} four"} for n in range(4)]
    (tmp_path / "tasks/lambada_openai").mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "tasks/lambada_openai/validation.jsonl").write_text(lines)
    models = [save("gpt2", tmp_path / "gpt2"), tmp_path / "run"]
    arguments = ["tasks", *models, "--data", tmp_path / "tasks", "--output", tmp_path / "out",
                 "--limit", 2, "--device", "cpu", "--tasks", "lambada_openai"]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    found = json.loads((tmp_path / "out/results.json").read_text())["models"]
    assert [model["results"][0]["items"] for model in found] == [2, 2]
