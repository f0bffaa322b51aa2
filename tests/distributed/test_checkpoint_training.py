"""A converted checkpoint in a training run, and a trained checkpoint converted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_let.checkpoint.architecture import recipe_settings
from megatron_let.checkpoint.convert import to_hugging_face_folder, to_megatron_checkpoint
from megatron_let.checkpoint.describe import describe
from megatron_let.checkpoint.safetensors_files import SafetensorsFolder
from megatron_let.checkpoint.verify import compare_logits
from megatron_let.checkpoint.weights import open_weights
from megatron_let.cli.convert import main
from tests.helpers.checkpoints import equal, save_llama, save_model, tensors_of
from tests.helpers.data import write_indexed_data
from tests.helpers.runs import ROOT, run_forked, train

pytestmark = pytest.mark.distributed

UNTOUCHED = ("--let-method", "none", "--train-iters", 1, "--lr", 0, "--min-lr", 0,
             "--weight-decay", 0, "--lr-warmup-iters", 0, "--eval-iters", 0, "--save-interval", 1,
             "--vocab-size", 250)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192, "rope_theta": 50000.0}  # fmt: skip
GQA = ("--group-query-attention", "--num-query-groups", 2)
# The model, the recipe's flags for it, the layout and its ranks.
CASES: dict[str, tuple[dict[str, Any], tuple[object, ...], tuple[object, ...], int]] = {
    "tp2, untied, gqa": (
        {},
        GQA,
        ("--tensor-model-parallel-size", 2, "--use-distributed-optimizer"),
        2,
    ),
    "dp2, distributed optimizer": ({}, GQA, ("--use-distributed-optimizer",), 2),
    "pp2, vpp2, tied, mha, llama3": (
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
        (
            "--no-untie-embeddings-and-output-weights",
            "--rotary-base",
            50000,
            "--use-rope-scaling",
            "--rope-scaling-factor",
            32,
        ),
        ("--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1),
        2,
    ),
}


@pytest.fixture(scope="module")
def data_of_250(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of data of the models' 250 tokens."""
    return write_indexed_data(tmp_path_factory.mktemp("data") / "walks", vocab_size=250)


def convert(*arguments: object) -> tuple[int, str]:
    """Run the command in another process; return its exit code and what it printed."""
    return run_forked("megatron_let.cli", "convert", *arguments, folder=ROOT)


@pytest.mark.parametrize("case", CASES)
def test_round_trip_through_a_run_is_bitwise(case: str, tmp_path: Path, data_of_250: Path) -> None:
    changes, flags, layout, ranks = CASES[case]
    source = save_llama(tmp_path / "source", **changes)
    to_megatron_checkpoint(open_weights(source), tmp_path / "converted")
    train(
        tmp_path / "run", *UNTOUCHED, *flags, *layout, "--data-path", data_of_250,
        "--load", tmp_path / "converted", "--save", tmp_path / "saved", ranks=ranks, TEACHER="-",
    )  # fmt: skip
    returned = open_weights(tmp_path / "saved")
    to_hugging_face_folder(returned, tmp_path / "back")
    assert equal(tensors_of(tmp_path / "back"), tensors_of(source))
    assert describe(tmp_path / "saved")["iteration"] == 1


# The model's type, changes to it, the layout and its ranks.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], tuple[object, ...]]] = {
    "tp2, qwen2 tied": (
        "qwen2",
        {"tie_word_embeddings": True, "head_dim": 32},
        ("--tensor-model-parallel-size", 2),
    ),
    "pp2, qwen3": ("qwen3", {}, ("--pipeline-model-parallel-size", 2)),
    "ep2, qwen3_moe with a dense layer": (
        "qwen3_moe",
        {"mlp_only_layers": [1], "norm_topk_prob": False},
        ("--expert-model-parallel-size", 2),
    ),
    "pp2, mixtral": ("mixtral", {}, ("--pipeline-model-parallel-size", 2)),
    "tp2, qwen2_moe": (
        "qwen2_moe",
        {},
        ("--tensor-model-parallel-size", 2, "--sequence-parallel"),
    ),
}


def _flags(settings: dict[str, Any]) -> list[object]:
    """Return a recipe's settings as flags; the recipe of the tests unties the embeddings."""
    tied = "untie-embeddings-and-output-weights" not in settings
    found: list[object] = ["--no-untie-embeddings-and-output-weights"] if tied else []
    for name, value in settings.items():
        found += [f"--{name}"] if value is True else [f"--{name}", value]
    return found


SLOW = ("pp2, mixtral", "tp2, qwen2_moe")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in ARCHITECTURES]
)
def test_run_of_the_printed_recipe_is_the_same_model_in_transformers(
    case: str, tmp_path: Path, data_of_250: Path
) -> None:
    kind, changes, layout = ARCHITECTURES[case]
    source = save_model(kind, tmp_path / "source", **changes)
    weights = open_weights(source)
    to_megatron_checkpoint(weights, tmp_path / "converted")
    train(
        tmp_path / "run", *UNTOUCHED, *_flags(recipe_settings(weights.architecture)), *layout,
        "--data-path", data_of_250, "--load", tmp_path / "converted", "--save", tmp_path / "saved",
        ranks=2, TEACHER="-",
    )  # fmt: skip
    returned = open_weights(tmp_path / "saved")
    to_hugging_face_folder(returned, tmp_path / "back")
    assert equal(tensors_of(tmp_path / "back"), tensors_of(source))
    # The run's own arguments and checkpoint in Megatron's modules.
    found = compare_logits(returned, weights, torch.arange(64)[None])
    assert found.largest_difference < 1e-4


def test_recipe_of_another_model_is_refused(tmp_path: Path, data: Path) -> None:
    source = save_llama(tmp_path / "source")
    to_megatron_checkpoint(open_weights(source), tmp_path / "converted")
    run = train(
        tmp_path / "run", *UNTOUCHED, *GQA, "--rotary-base", 20000, "--data-path", data,
        "--load", tmp_path / "converted", check=False, TEACHER="-",
    )  # fmt: skip
    assert run.returncode != 0
    assert "--rotary-base is 20000 in this run and 10000 in the checkpoint" in run.error


def test_trained_student_is_the_same_model_in_transformers(tmp_path: Path, weights: Path) -> None:
    exported = tmp_path / "exported"
    code, log = convert("megatron-to-hf", "--input", weights, "--output", exported)
    assert code == 0, log
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert model.config.vocab_size == 256
    # Megatron's GPTModel and loader against transformers.
    code, log = convert("verify", weights, exported)
    assert code == 0, log
    assert "NOT" not in log and "same model" in log and "same top token at 100.00%" in log
    _swap_gate_and_up(exported)
    code, log = convert("verify", weights, exported)
    assert code == 1, log
    assert "NOT the same model" in log


def _swap_gate_and_up(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    gate, up = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_inspect_describes_a_run(
    weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The command hides the GPUs of its process.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["inspect", str(weights), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["iteration"] == 20 and found["layout"] == dict.fromkeys(
        ("TP", "PP", "VPP", "CP", "DP"), 1
    )
    assert found["let"]["let_weight"] == 20 and found["not_of_a_gpt_model"] == []
    assert found["optimizer_tensors"] > 0 and found["dtypes"] == ["float32"]
    assert main(["inspect", str(weights)]) == 0
    assert "teacher: none" in capsys.readouterr().out


def test_export_in_bf16_rounds_the_weights(tmp_path: Path, weights: Path) -> None:
    to_hugging_face_folder(open_weights(weights), tmp_path / "bf16", dtype=torch.bfloat16)
    to_hugging_face_folder(open_weights(weights), tmp_path / "fp32")
    rounded, exact = SafetensorsFolder(tmp_path / "bf16"), SafetensorsFolder(tmp_path / "fp32")
    for name in exact.names():
        assert torch.equal(rounded.read(name), exact.read(name).bfloat16())
