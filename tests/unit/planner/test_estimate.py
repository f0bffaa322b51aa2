"""The planner against measurements of the real model code, and for the recipes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_let.cli import plan
from megatron_let.config.recipes import find_recipe, load_recipe
from megatron_let.errors import LETError
from megatron_let.planner.estimate import (
    Request,
    aligned_layer,
    estimate,
    memory_of_stages,
    stage_costs,
)
from megatron_let.planner.layouts import does_not_divide
from megatron_let.planner.memory import (
    Layout,
    StageMemory,
    activations,
    stage_memory,
    teacher_state,
)
from megatron_let.planner.sizes import GPUS, TEACHERS, TransformerSize, teacher_size
from tests.helpers.runs import ROOT, environment
from tools.benchmark import memory

pytestmark = pytest.mark.medium

GIB = 2**30
SIZE_7B = TransformerSize(32, 4096, 11008, 32, 32, 128, True, 49152)
SIZE_1P4B = TransformerSize(24, 2048, 5461, 32, 32, 64, True, 49152)
RUN_7B = Request(SIZE_7B, TEACHERS["smollm2-1.7b"], 3, 1280, GPUS["a100-80g"])
RUN_1P4B = Request(SIZE_1P4B, TEACHERS["smollm2-135m"], 3, 1280, GPUS["a100-80g"])
RECIPES = sorted(
    ROOT / f"configs/{m}_{s}.yaml" for m in ("baseline", "let") for s in ("1p4b", "3b", "7b")
)

MEASURED = list(csv.DictReader(memory.RESULTS.open(newline="")))


def case_of(row: dict[str, str]) -> memory.Case:
    flags, chunks = tuple(row["flags"].split()), int(row["chunks"])
    return memory.Case(row["recipe"], flags, chunks, gpus=row["gpus"], teacher=row["teacher"])


@pytest.mark.parametrize(
    "row",
    MEASURED,
    ids=lambda row: "-".join((row["recipe"], row["flags"], row["stage"], row["teacher"])),
)
def test_memory_within_5_percent_of_megatron_under_fake_tensors(row: dict[str, str]) -> None:
    _, planned = memory.planned_run(case_of(row))
    predicted = memory.predicted_parts(planned.memory[int(row["stage"])])
    for part, bytes_ in predicted.items():
        assert bytes_ / GIB == pytest.approx(float(row[f"measured_{part}_gib"]), rel=0.05), part


def test_benchmark_csv_has_every_case() -> None:
    asked = {
        (replace(case, stages=(0,)), stage) for case in memory.cases() for stage in case.stages
    }
    assert {(case_of(row), int(row["stage"])) for row in MEASURED} == asked


def test_benchmark_of_a_small_recipe_agrees_with_the_plan(tmp_path: Path) -> None:
    """Four layers of the paper's 1.4B with its teacher, in a subprocess: it patches torch."""
    recipe, path = tmp_path / "small.yaml", tmp_path / "memory.csv"
    paper = (ROOT / "configs" / "let_1p4b.yaml").read_text()
    recipe.write_text(paper.replace("num-layers: 24", "num-layers: 4"))
    command = [sys.executable, "tools/benchmark/memory.py", "--recipes", recipe, "--csv", path]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=environment())
    (row,) = csv.DictReader(path.open(newline=""))
    parameters = 4 * (4 * 2048**2 + 3 * 2048 * 5461 + 2 * 2048) + 2 * 49152 * 2048 + 2048
    assert float(row["measured_params_gib"]) == pytest.approx(2 * parameters / GIB, abs=1e-3)
    assert float(row["measured_teacher_weights_gib"]) == pytest.approx(0.2506, abs=1e-4)
    for part in memory.PARTS:
        assert float(row[f"{part}_ratio"]) == pytest.approx(1, abs=0.05), part


def test_teacher_work_below_the_heads_peak_adds_nothing() -> None:
    layout = Layout(1, 1, 1, 32, 1, 4, 16)
    alone = stage_memory(SIZE_7B, layout, 1280, 0)
    found = estimate(RUN_7B, layout).memory[0]
    assert found.teacher_buffers == teacher_state(TEACHERS["smollm2-1.7b"], layout, 1280)
    assert found.total == alone.total + found.teacher_weights + found.teacher_buffers


def test_teacher_in_fp32_takes_twice_the_memory() -> None:
    flags = ["--config", "let_7b", "--gpus", "32", "--gpu", "a100-80g"]
    (bf16, fp32) = (
        plan.plan_one([*flags, "--let-teacher-dtype", dtype])[1].memory[0].teacher_weights
        for dtype in ("auto", "fp32")
    )
    assert fp32 == 2 * bf16


def test_teacher_share_of_training_flops_equals_documented_value() -> None:
    assert RUN_7B.teacher_share == pytest.approx(0.0825, abs=5e-5)
    assert RUN_1P4B.teacher_share == pytest.approx(0.0350, abs=5e-5)


def test_aligned_layer_under_vpp_has_stage_and_chunk_of_layer() -> None:
    layout = Layout(1, 2, 1, 1, 2, 1, 4)
    found = [aligned_layer(layer, 8, layout) for layer in range(1, 9)]
    assert found == [(0, 0), (0, 0), (1, 0), (1, 0), (0, 1), (0, 1), (1, 1), (1, 1)]


def test_long_batch_adds_one_pass_per_microbatch() -> None:
    exact = Layout(1, 2, 1, 1, 1, 4, 32)
    long = Layout(1, 2, 1, 1, 1, 4, 320)
    short_found, long_found = estimate(RUN_7B, exact), estimate(RUN_7B, long)
    costs = short_found.costs
    # The slowest stage awaits each activation only once its backward has ended.
    per_microbatch = costs.forward[-1] + costs.backward[-1] + costs.transfer
    added = long_found.baseline_seconds - short_found.baseline_seconds
    assert added == pytest.approx(288 * per_microbatch, rel=1e-6)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_paper_recipe_fits_32_a100_with_10_percent_free(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = plan.main(["--config", str(recipe), "--gpus", "32", "--gpu", "a100-80g", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and found["fits"]
    assert max(stage["total"] for stage in found["memory_gib"]) < 0.9 * 80
    assert bool(found["seconds"]) == recipe.stem.startswith("let_")


@pytest.mark.parametrize(
    ("gpus", "gpu", "flags"),
    [("512", "a100-80g", ()), ("1024", "h100-80g", ("--micro-batch-size", "1"))],
)
def test_70b_fits_and_the_teacher_costs_at_most_2_percent(
    gpus: str, gpu: str, flags: tuple[str, ...]
) -> None:
    _, found = plan.plan_one(["--config", "let_70b", "--gpus", gpus, "--gpu", gpu, *flags])
    assert found.fits and found.best_seconds <= 1.02 * found.baseline_seconds


def test_aligned_stage_holds_two_groups_of_states_when_interleaved() -> None:
    """The second group of p microbatches enters chunk 0 before the first one's backward there."""
    layout = Layout(1, 2, 1, 1, 4, 4, 32)
    teacher = TEACHERS["smollm2-1.7b"]
    held = memory_of_stages(RUN_7B, layout, "aligned-stage")[0].teacher_buffers
    all_held = memory_of_stages(RUN_7B, layout, "bubble")[0].teacher_buffers
    assert all_held - held == (32 - 4) * teacher_state(teacher, layout, 1280)
    few = memory_of_stages(replace(RUN_7B, max_prefetch=2), layout, "bubble")[0].teacher_buffers
    assert few == held


def run(*flags: str) -> int:
    recipe = str(ROOT / "configs" / "let_7b.yaml")
    return plan.main(["--config", recipe, "--gpus", "32", "--gpu", "a100-80g", *flags])


def test_layout_that_does_not_fit_returns_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--micro-batch-size", "8") == 1
    assert "does NOT fit" in capsys.readouterr().out


def test_layers_per_virtual_stage_give_the_chunks(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for flags in (("--vpp", "2"), ("--num-layers-per-virtual-pipeline-stage", "4"), ()):
        run("--pp", "4", "--json", *flags)
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] != found[2]
    assert run("--pp", "4", "--num-layers-per-virtual-pipeline-stage", "3") == 2


def test_megatron_and_let_flags_change_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--pp", "4", "--json", "--let-max-prefetch", "8") == 0
    few = json.loads(capsys.readouterr().out)
    assert run("--pp", "4", "--json") == 0
    many = json.loads(capsys.readouterr().out)
    buffers = [found["memory_gib"][0]["teacher_buffers"] for found in (few, many)]
    state = 1280 * 4 * 2048 * 2 / GIB
    assert buffers[1] - buffers[0] == pytest.approx((64 - 8) * state)
    assert many["placement"] == "bubble" and many["ratio"]["bubble"] < few["ratio"]["spread"]


@pytest.mark.parametrize(("name", "layer"), [("middle", 16), ("last", 32), ("5", 5)])
def test_plan_takes_the_aligned_layer_by_name_or_number(name: str, layer: int) -> None:
    recipe = str(ROOT / "configs" / "let_7b.yaml")
    argv = ["--config", recipe, "--gpus", "32", "--gpu", "a100-80g", "--let-layer", name]
    request, _ = plan.plan_one(argv)
    assert request.layer == layer


def test_plot_makes_its_folder_and_writes_an_svg(tmp_path: Path) -> None:
    path = tmp_path / "new" / "stages.svg"
    assert run("--pp", "4", "--plot", str(path)) == 0
    text = path.read_text()
    assert "stage 3" in text or "<svg" in text


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--pp", "3"), ["--gpus 32", "PP 3"]),
        (("--micro-batch-size", "3"), ["--global-batch-size", "--micro-batch-size 3"]),
        (("--pp", "4", "--vpp", "3"), ["32 layers", "PP 4 x 3 chunks"]),
        (("--tp", "8", "--ffn-hidden-size", "11004"), ["--ffn-hidden-size", "11004", "TP 8"]),
        (("--teacher", "/nowhere"), ["/nowhere", "smollm2-135m"]),
        (("--config", "let_8b"), ["let_8b", "let_7b"]),
        (("--config", "let_moe_7b_a1b", "--moe-layer-freq", "2"), ["--moe-layer-freq 1", "2"]),
        (("--config", "let_moe_7b_a1b", "--moe-shared-expert-gate"), ["--moe-shared-expert-gate"]),
        (("--config", "let_moe_7b_a1b", "--expert-model-parallel-size", "6"), ["64 experts", "6"]),
        (
            ("--config", "let_moe_7b_a1b", "--tp", "2"),
            ["--sequence-parallel"],
        ),
        (("--multi-latent-attention",), ["--multi-latent-attention"]),
        (("--mtp-num-layers", "1"), ["--mtp-num-layers 1"]),
        (("--num-layers", "0"), ["--num-layers is 0"]),
        (("--hidden-size", "-4"), ["--hidden-size is -4"]),
        (("--seq-length", "0"), ["--seq-length is 0"]),
        (("--tensor-model-parallel-size", "0"), ["--tensor-model-parallel-size is 0"]),
        (("--efficiency", "0"), ["--efficiency is 0"]),
        (("--efficiency", "1.5"), ["--efficiency is 1.5"]),
        (("--efficiency", "nan"), ["--efficiency is nan"]),
        (("--reserve", "1"), ["--reserve is 1"]),
        (("--reserve", "-0.5"), ["--reserve is -0.5"]),
        (("--let-method", "rkd"), ["--let-method rkd", "measure a few steps"]),
        (("--let-method", "salt", "--sweep"), ["--let-method salt", "measure a few steps"]),
        (("--let-teacher", "/nowhere"), ["/nowhere", "--teacher"]),
        (("--let-stop-step", "-1"), ["--let-stop-step is -1"]),
        (("--let-layer", "0"), ["--let-layer is 0"]),
        (("--let-layer", "33"), ["--let-layer is 33", "32 layers"]),
        (("--let-max-prefetch", "0"), ["--let-max-prefetch is 0"]),
        (("--sweep", "--recompute-granularity", "full"), ["--sweep", "--recompute-granularity"]),
        (("--sweep", "--recompute-num-layers=1"), ["--sweep", "--recompute-num-layers;"]),
        (
            ("--sweep", "--no-use-distributed-optimizer"),
            ["--sweep", "--no-use-distributed-optimizer"],
        ),
        (
            ("--sweep", "--num-layers-per-virtual-pipeline-stage", "2"),
            ["--sweep", "--num-layers-per-virtual-pipeline-stage"],
        ),
        (("--plot", "x.txt"), ["--plot x.txt", ".pdf"]),
        (("--plot", "x"), ["--plot x ", ".png"]),
        (("--plot", "/dev/null/x.svg"), ["/dev/null is a file"]),
        (("--break-even", "x.doc"), ["--break-even x.doc", ".svg"]),
        (("--break-even", "/dev/null/x.svg"), ["/dev/null is a file"]),
        (("--break-even", "x.svg", "--train-iters", "0"), ["--break-even", "--train-iters"]),
        (("--plot", "x.svg", "--let-method", "none"), ["--plot", "no teacher"]),
    ],
)
def test_invalid_request_prints_one_line_and_returns_2(
    flags: tuple[str, ...], named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*flags) == 2
    shown = capsys.readouterr()
    assert all(words in shown.err for words in named) and shown.err.count("\n") == 1
    assert not shown.out


@pytest.mark.parametrize("name", ["gpus", "tp", "micro-batch-size", "vocab-size"])
def test_count_below_1_is_refused_with_its_value(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        run(f"--{name}=-8")
    assert raised.value.code == 2
    assert f"--{name}: '-8'" in capsys.readouterr().err


def test_sweep_ranks_layouts_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", "tiny", "--gpus", "8", "--gpu", "a100-80g", "--sweep"]
    assert plan.main([*flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    speeds = [layout["tokens_per_second"] for layout in found]
    assert len(found) > 5 and all(layout["fits"] for layout in found)
    assert speeds == sorted(speeds, reverse=True)
    assert plan.main(flags) == 0
    assert f"{len(found)} layouts fit a100-80g" in capsys.readouterr().out


@pytest.mark.parametrize("teacher_flag", ["--teacher", "--let-teacher"])
def test_teacher_of_either_flag_is_planned(teacher_flag: str, teacher: Path) -> None:
    argv = ["--config", "tiny", "--gpus", "1", "--gpu", "a100-80g", teacher_flag, str(teacher)]
    request, _ = plan.plan_one(argv)
    assert request.teacher is not None and request.teacher.hidden_size == 48


@pytest.mark.parametrize(
    ("flags", "hidden_size"),
    [
        (("--let-teacher", "HuggingFaceTB/SmolLM2-1.7B"), 2048),
        (("--let-teacher", "facebook/opt-125m@main"), 768),
        (("--let-teacher", "/of/another/machine/SmolLM2-1.7B"), 2048),
        (("--let-teacher", "/nowhere/x.gguf", "--let-method", "none"), None),
    ],
)
def test_teacher_that_is_not_here_is_known_by_its_name(
    flags: tuple[str, ...], hidden_size: int | None
) -> None:
    request, _ = plan.plan_one(["--config", "tiny", "--gpus", "1", "--gpu", "a100-80g", *flags])
    assert (request.teacher and request.teacher.hidden_size) == hidden_size


@pytest.mark.parametrize("name", ["global-batch-size", "micro-batch-size", "num-layers"])
def test_recipe_without_a_size_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    values = load_recipe(find_recipe(Path("tiny")))
    recipe.write_text(yaml.safe_dump({"all": {k: v for k, v in values.items() if k != name}}))
    code = plan.main(["--config", str(recipe), "--gpus", "1", "--gpu", "a100-80g"])
    assert code == 2 and f"--{name} is not set" in capsys.readouterr().err


def test_recipe_has_the_variables_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "mine.yaml"
    values = load_recipe(find_recipe(Path("tiny"))) | {"let-layer": "${MY_LAYER}"}
    recipe.write_text(yaml.safe_dump({"all": values}))
    monkeypatch.setenv("MY_LAYER", "2")
    assert (
        plan.plan_one(["--config", str(recipe), "--gpus", "1", "--gpu", "a100-80g"])[0].layer == 2
    )


@pytest.mark.parametrize(
    "flags",
    [
        ("--num-distributed-optimizer-instances", "4"),
        ("--decoder-first-pipeline-num-layers", "3"),
        ("--microbatch-group-size-per-virtual-pipeline-stage", "16"),
        ("--use-megatron-fsdp",),
        ("--grad-reduce-in-bf16",),
        ("--let-cross-tokenizer",),
    ],
)
def test_flag_whose_memory_or_time_is_not_counted_is_refused(
    flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(["--config", "let_7b", "--gpus", "32", "--gpu", "a100-80g", *flags]) == 2
    assert f"does not count the memory and time of {flags[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ("--microbatch-group-size-per-virtual-pipeline-stage", "2", "--pp", "2", "--vpp", "2"),
        ("--let-method", "none", "--let-cross-tokenizer"),
        ("--let-method", "none", "--let-teacher-layer", "25"),
    ],
)
def test_flag_that_changes_nothing_is_planned(flags: tuple[str, ...]) -> None:
    plan.plan_one(["--config", "let_7b", "--gpus", "32", "--gpu", "a100-80g", *flags])


def test_teacher_in_fp32_runs_at_the_rate_of_fp32() -> None:
    bf16 = replace(RUN_7B, teacher=TEACHERS["smollm2-1.7b"])
    fp32 = replace(RUN_7B, teacher=replace(TEACHERS["smollm2-1.7b"], num_bytes=4))
    layout = Layout(1, 1, 1, 1, 1, 2, 4)
    ratio = stage_costs(fp32, layout).teacher / stage_costs(bf16, layout).teacher
    assert ratio == pytest.approx(312 / 19.5)


def test_teacher_ends_at_the_tapped_layer() -> None:
    argv = ["--config", "let_7b", "--gpus", "32", "--gpu", "a100-80g"]
    request, _ = plan.plan_one([*argv, "--let-teacher-layer", "middle"])
    assert request.teacher is not None and request.teacher.num_layers == 12


@pytest.mark.parametrize(
    ("kind", "settings", "gated"),
    [
        ("llama", {}, True), ("gemma", {"head_dim": 8}, True),
        ("gpt_neox", {"hidden_act": "gelu"}, False),
    ],
)  # fmt: skip
def test_mlp_of_a_teacher(
    kind: str, settings: dict[str, object], gated: bool, tmp_path: Path
) -> None:
    AutoConfig.for_model(
        kind, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **settings
    ).save_pretrained(tmp_path)
    assert teacher_size(str(tmp_path)).gated == gated


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("mixtral", {"num_local_experts": 4}), ("olmoe", {"num_experts": 4}),
     ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 8})],
)  # fmt: skip
def test_teacher_with_experts_has_their_parameters_and_is_not_planned(
    kind: str, settings: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = AutoConfig.for_model(
        kind, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        num_key_value_heads=2, head_dim=8, vocab_size=64, num_experts_per_tok=2, **settings,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    exact, planned = sum(p.numel() for p in model.parameters()), teacher_size(str(tmp_path))
    assert planned.num_params == pytest.approx(exact, rel=0.01)
    argv = ["--config", "tiny", "--gpus", "1", "--gpu", "a100-80g", "--teacher", str(tmp_path)]
    assert plan.main(argv) == 2 and "experts of the teacher" in capsys.readouterr().err


def test_layers_of_one_unit_are_recomputed_at_once() -> None:
    size = replace(SIZE_7B, num_layers=16)
    one, eight = (
        Layout(1, 1, 1, 1, 1, 1, 1, "full", recompute_layers) for recompute_layers in (1, 8)
    )
    difference = activations(size, eight, 128, 0) - activations(size, one, 128, 0)
    none, whole = (Layout(1, 1, 1, 1, 1, 1, 1, "none"), Layout(1, 1, 1, 1, 1, 1, 1, "none"))
    fifteen = replace(size, num_layers=15)
    layer = activations(size, none, 128, 0) - activations(fifteen, whole, 128, 0)
    # 2 checkpoints instead of 16, and 8 layers at once instead of 1.
    assert difference == 7 * layer - 14 * 128 * 2 * size.hidden_size


@pytest.mark.parametrize(("per_chunk", "extra"), [(1, 0.5), (2, 1.0), (16, 1.0)])
def test_recomputed_layers_of_block_are_per_chunk(per_chunk: int, extra: float) -> None:
    request = replace(RUN_7B, student=replace(SIZE_7B, num_layers=16), teacher=None)
    # Four stages of two chunks of two layers.
    none, block = (
        stage_costs(request, Layout(1, 4, 1, 1, 2, 1, 8, kind, per_chunk))
        for kind in ("none", "block")
    )
    assert block.backward[0] == pytest.approx(none.backward[0] + extra * none.forward[0])


def test_two_numbers_of_model_chunks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--config", "tiny", "--gpus", "8", "--gpu", "a100-80g", "--pp", "2", "--vpp", "2"]
    assert plan.main([*argv, "--num-layers-per-virtual-pipeline-stage", "1"]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_teacher_takes_precedence_over_let_teacher() -> None:
    argv = ["--config", "tiny", "--gpus", "1", "--gpu", "a100-80g", "--let-teacher", "/nowhere"]
    request, _ = plan.plan_one([*argv, "--teacher", "opt-125m"])
    assert request.teacher is not None and request.teacher.hidden_size == 768


@pytest.mark.parametrize(
    ("flags", "part", "value"),
    [
        (("--tp", "2"), "tp", 2),
        (("--tensor-model-parallel-size=2",), "tp", 2),
        (("--pp", "2"), "pp", 2),
        (("--pp", "2", "--vpp", "1"), "num_chunks", 1),
        (("--micro-batch-size", "2"), "micro_batch_size", 2),
    ],
)
def test_sweep_keeps_the_layout_flags_of_the_command_line(
    flags: tuple[str, ...], part: str, value: int, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--config", "tiny", "--gpus", "8", "--gpu", "a100-80g", "--sweep", "--json"]
    assert plan.main([*argv, *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["layout"][part] for each in found} == {value}


@pytest.mark.parametrize("picture", ["--plot", "--break-even"])
def test_sweep_in_which_no_layout_fits_returns_1(
    picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.svg"
    argv = ["--config", "let_70b", "--gpus", "8", "--gpu", "a100-40g", "--sweep"]
    assert plan.main([*argv, picture, str(path)]) == 1
    shown = capsys.readouterr()
    assert "no layout divides over 8 a100-40g and fits" in shown.err and not path.exists()
    assert shown.err.count("\n") == 1 and not shown.out


def test_teacher_size_is_read_from_folder_and_unknown_name_raises(teacher: Path) -> None:
    size = teacher_size(str(teacher))
    assert size == TransformerSize(3, 48, 96, 4, 2, 12, True, 256, False)
    with pytest.raises(LETError, match="smollm9"):
        teacher_size("smollm9")


def test_total_is_the_sum_of_the_parts() -> None:
    assert StageMemory(1, 2, 3, 4, 5, 6).total == 21


def test_measured_placements_rank_as_simulated() -> None:
    path = ROOT / "tools" / "benchmark" / "results" / "placement.csv"
    rows = list(csv.DictReader(path.open(newline="")))
    groups = {(row["stages"], row["passes"]) for row in rows}
    for group in groups:
        ratios = {
            row["placement"]: float(row["ratio"])
            for row in rows
            if (row["stages"], row["passes"]) == group
        }
        assert ratios["bubble"] < ratios["spread"] < ratios["aligned-stage"]
        assert ratios["bubble"] - 1 <= (ratios["aligned-stage"] - 1) / 2


@pytest.mark.parametrize(
    ("tp", "pp", "groups", "words"),
    [
        (4, 1, 2, "6 attention heads"),
        (1, 3, 2, "2 layers"),
        (6, 1, 2, "20 MLP units"),
        (3, 1, 2, "2 query groups"),
        (2, 2, 1, None),
    ],
)
def test_size_that_does_not_divide_over_the_layout_is_named(
    tp: int, pp: int, groups: int, words: str | None
) -> None:
    size = TransformerSize(2, 24, 20 if tp != 3 else 21, 6, groups, 4, True, 40)
    found = does_not_divide(Layout(tp, pp, 1, 1, 1, 1, 1), size)
    assert found is None if words is None else found is not None and words in found


def test_hybrid_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", "let_1p4b", "--gpus", "8", "--gpu", "a100-80g"]
    assert plan.main([*flags, "--hybrid-layer-pattern", "*-*-"]) == 2
    assert "--hybrid-layer-pattern *-*-" in capsys.readouterr().err
