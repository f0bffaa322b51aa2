"""The nine tasks, their cache and reports, and lm-eval itself if it is installed."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_let.cli.evaluate import main
from megatron_let.errors import LETError
from megatron_let.evaluation import harness
from megatron_let.evaluation.harness import Result, Settings, evaluate
from megatron_let.evaluation.models import (
    check_run_folder,
    checkpoint_hash,
    finished_checkpoints,
    new_checkpoints,
)
from megatron_let.evaluation.table import (
    Row,
    csv_rows,
    plot_average,
    read_results_json,
    write_results_json,
)
from megatron_let.evaluation.tasks import TASKS, local_data, tasks_named
from tests.helpers.checkpoints import as_deepspeed, as_megatron, save_llama, with_tokenizer

pytestmark = pytest.mark.medium

QUESTIONS = {
    "arc_easy": [
        {"question": f"What comes after {n}?", "answerKey": "B",
         "choices": {"text": [str(n), str(n + 1), "nothing"], "label": ["A", "B", "C"]}}
        for n in range(12)
    ],
    "lambada_openai": [{"text": f"One, two, three and again {n} four"} for n in range(12)],
    "boolq": [
        {"passage": "Water is wet.", "question": f"is water wet {n}", "label": n % 2}
        for n in range(12)
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer and 512 positions."""
    folder = tmp_path_factory.mktemp("evaluated") / "llama"
    return with_tokenizer(save_llama(folder, vocab_size=600, max_position_embeddings=512))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks with a few questions each."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in QUESTIONS.items():
        (folder / name).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name / "validation.jsonl").write_text(lines)
    return folder


def result(task: str, percent: float, error: float = 2.0) -> Result:
    scores = {"acc": percent / 100, "acc_stderr": error / 100}
    other = {"acc_norm": percent / 200, "acc_norm_stderr": error / 100}
    return Result(task, scores | other, 4, "1.0", "0110")


def row(name: str, tokens: int | None, percent: float) -> Row:
    return Row(name, tokens, tuple(result(task.name, percent) for task in TASKS))


def test_tasks_are_the_papers_nine_in_order() -> None:
    columns = ["ARC-c", "ARC-e", "HS", "LAMB", "OBQA", "PIQA", "SciQ", "Wino.", "BoolQ"]
    assert [task.column for task in TASKS] == columns
    assert [task.name for task in TASKS if task.metric == "acc_norm"] == ["openbookqa"]


def test_average_uses_metric_of_each_task() -> None:
    # Eight tasks at 40, OpenBookQA at half of it because of acc_norm; all errors 2.
    average, error = row("m", None, 40.0).average(TASKS)
    assert average == pytest.approx((8 * 40 + 20) / 9)
    assert error == pytest.approx(2.0 / math.sqrt(9))


def test_csv_rows_have_both_accuracies() -> None:
    lines = csv_rows([row("m", 10, 40.0)], TASKS)
    assert len(lines) == 2 * 9 + 1 and lines[-1]["task"] == "average"
    found = [line for line in lines if line["task"] == "openbookqa"]
    assert [(line["metric"], line["percent"]) for line in found] == [("acc", 40), ("acc_norm", 20)]


def test_plot_is_written_for_two_models_with_token_counts(tmp_path: Path) -> None:
    path = tmp_path / "average.png"
    assert not plot_average(path, [row("a", None, 30.0), row("b", 5, 30.0)], TASKS)
    assert not path.exists()
    rows = [row("run/iter_0000010", 10, 30.0), row("run/iter_0000020", 20, 40.0)]
    assert plot_average(path, rows, TASKS) and path.read_bytes()[:4] == b"\x89PNG"


def test_results_json_has_answers_and_source(tmp_path: Path) -> None:
    write_results_json(tmp_path / "r.json", [row("a", 7, 30.0)], TASKS, {"command": "c"})
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["models"][0]["results"][0]["answers"] == "0110" and found["command"] == "c"
    assert read_results_json(tmp_path / "r.json") == [row("a", 7, 30.0)]


def test_task_named_twice_is_used_once() -> None:
    assert [task.name for task in tasks_named(["sciq", "piqa", "sciq"])] == ["sciq", "piqa"]


def test_unknown_task_or_missing_data_raises(tmp_path: Path) -> None:
    with pytest.raises(LETError, match="'mmlu'"):
        tasks_named(["mmlu"])
    with pytest.raises(LETError, match="arc_challenge/validation"):
        local_data(TASKS[0], tmp_path)


@pytest.mark.parametrize(
    ("command", "flag", "value"),
    [
        ("tasks", "--batch-size", "0"),
        ("tasks", "--batch-size", "many"),
        ("tasks", "--limit", "-1"),
        ("tasks", "--num-fewshot", "-1"),
        *(("tasks", "--interval", value) for value in ("0", "-1", "nan", "inf", "soon")),
        ("perplexity", "--batch-size", "0"),
        ("perplexity", "--seq-length", "1.5"),
        ("perplexity", "--max-tokens", "0"),
    ],
)
def test_impossible_count_is_refused_with_its_value(
    command: str, flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data-path", "none"] if command == "perplexity" else []
    with pytest.raises(SystemExit) as raised:
        main([command, "none", *data, f"{flag}={value}"])
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert flag in error and repr(value) in error


def test_local_data_replaces_splits_of_hub(data: Path) -> None:
    (task,) = tasks_named(["arc_easy"])
    found = local_data(task, data)
    assert found["dataset_path"] == "json"
    assert found["validation_split"] == "validation"
    assert found["training_split"] is None and found["test_split"] is None


def test_checkpoint_hash_depends_on_content_not_on_path(model: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    assert checkpoint_hash(moved) == checkpoint_hash(model)
    changed = save_llama(tmp_path / "changed", vocab_size=600, rms_norm_eps=1e-6)
    assert checkpoint_hash(changed) != checkpoint_hash(model)
    megatron = as_megatron(model, tmp_path / "megatron")
    again = as_megatron(model, tmp_path / "again")
    assert checkpoint_hash(megatron) == checkpoint_hash(megatron / "release")
    assert checkpoint_hash(megatron) != checkpoint_hash(again)


def test_hash_and_watch_of_deepspeed_checkpoints(model: Path, tmp_path: Path) -> None:
    megatron = as_megatron(model, tmp_path / "megatron")
    first, second = (as_deepspeed(megatron, tmp_path / f"iter_000001{n}") for n in range(2))
    assert checkpoint_hash(first) == checkpoint_hash(second)
    as_deepspeed(megatron, second, scale=2.0)
    assert checkpoint_hash(first) != checkpoint_hash(second)
    (tmp_path / "iter_0000010_universal" / "zero").mkdir(parents=True)
    assert finished_checkpoints(tmp_path) == [first, second]


def test_evaluate_computes_each_result_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_let.checkpoint.weights import open_weights

    asked: list[list[str]] = []

    def score(model: Any, task: Any, *rest: Any) -> Result:
        asked[-1].append(task.name)
        return result(task.name, 50.0)

    monkeypatch.setattr(harness, "_lm_eval_model", lambda *_: asked.append([]))
    monkeypatch.setattr(harness, "_score", score)
    monkeypatch.setattr(harness, "versions", lambda: {"lm-eval": "0"})
    weights = open_weights(model)
    two = tasks_named(["arc_easy", "boolq"])
    first = evaluate(weights, two, Settings(), tmp_path)
    assert evaluate(weights, two, Settings(), tmp_path) == first
    evaluate(weights, tasks_named(["arc_easy", "sciq"]), Settings(), tmp_path)
    evaluate(weights, two, Settings(num_fewshot=0), tmp_path)
    # A score of other batches was computed in another way.
    evaluate(weights, two, Settings(), tmp_path, batch_size="8")
    both = ["arc_easy", "boolq"]
    assert asked == [both, ["sciq"], both, both]


def test_new_checkpoints_yields_complete_ones_until_done(tmp_path: Path) -> None:
    def add(name: str, *files: str) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        for file in files:
            (tmp_path / name / file).touch()

    add("iter_0000010", ".metadata", "metadata.json")
    add("iter_0000020", "__0_0.distcp")
    add("other")
    watch = new_checkpoints(tmp_path, 0.0)
    assert [path.name for path in next(watch)] == ["iter_0000010"]
    add("iter_0000020", ".metadata", "metadata.json")
    (tmp_path / "DONE").touch()
    assert [path.name for path in next(watch)] == ["iter_0000010", "iter_0000020"]
    assert list(watch) == []
    assert len(finished_checkpoints(tmp_path)) == 2


def test_new_checkpoints_of_finished_run_without_checkpoint_raises(tmp_path: Path) -> None:
    (tmp_path / "DONE").touch()
    with pytest.raises(LETError, match=str(tmp_path)):
        next(new_checkpoints(tmp_path, 0.0))


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ("config.json", "{here}"),
        ("checkpoints/iter_0000010/.metadata", "{here}/checkpoints"),
        ("metadata.json", "{here}"),
        (None, "{here}"),
    ],
)
def test_folder_without_iterations_cannot_be_watched(
    entry: str | None, named: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    if entry is not None:
        (run / entry).parent.mkdir(parents=True)
        (run / entry).write_text('{"sharded_backend": "torch_dist"}')
    with pytest.raises(LETError, match=named.format(here=run)):
        check_run_folder(run)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that `evaluate` was called with; it returns 50 % for each task."""
    folders: list[str] = []

    def scores(weights: Any, tasks: Any, *_: Any) -> list[Result]:
        folders.append(weights.folder.name)
        return [result(task.name, 50.0) for task in tasks]

    monkeypatch.setattr(harness, "check_installed", lambda: None)
    monkeypatch.setattr(harness, "versions", lambda: {"lm-eval": "0"})
    monkeypatch.setattr(harness, "evaluate", scores)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folders


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["{here}/missing"], "missing"),
        (["{here}/no_tokenizer"], "no_tokenizer"),
        (["--output", "{here}/file"], "{here}/file"),
        (["--output", "{here}/other"], "other/results.json"),
        (["--data", "{data}", "--tasks", "boolq", "sciq"], "sciq/validation.jsonl"),
        (["--tokenizer", "{here}/missing"], "missing"),
        (["--device", "gpu"], "'gpu'"),
        (["--interval", "5"], "--interval"),
        (["{here}", "--watch"], "{here}"),
        (["--watch"], "Hugging Face"),
    ],
)
def test_bad_input_exits_with_error_line_before_a_model_is_scored(
    flags: list[str], words: str, model: Path, data: Path, tmp_path: Path, scored: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    save_llama(tmp_path / "no_tokenizer", vocab_size=600)
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/results.json").write_text("[]")
    given = [flag.format(here=tmp_path, data=data) for flag in flags]
    output = [] if "--output" in given else ["--output", str(tmp_path / "out")]
    assert main(["tasks", str(model), *given, *output]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("evaluate: error: ") and words.format(here=tmp_path) in line
    assert not scored and not (tmp_path / "out").exists()


def test_later_evaluation_keeps_rows_of_other_models_with_equal_settings(
    model: Path, tmp_path: Path, scored: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    second = Path(shutil.copytree(model, tmp_path / "second"))

    def models_after(*arguments: object) -> list[str]:
        flags = ["--output", tmp_path, "--device", "cpu"]
        assert main([str(a) for a in ("tasks", *arguments, *flags)]) == 0
        with (tmp_path / "results.csv").open() as file:
            names = dict.fromkeys(line["model"] for line in csv.DictReader(file))
        assert list(names) == [row.model for row in read_results_json(tmp_path / "results.json")]
        return [Path(name).name for name in names]

    assert models_after(model) == [model.name]
    assert models_after(second) == [model.name, "second"]
    assert models_after(model) == ["second", model.name]
    assert "removed" not in capsys.readouterr().err
    assert models_after(second, "--num-fewshot", 0) == ["second"]
    assert str(model) in capsys.readouterr().err
    assert models_after(model, "--tasks", "piqa") == [model.name]
    assert models_after(second, "--tasks", "piqa", "--dtype", "float16") == ["second"]
    assert models_after(model, "--tasks", "piqa", "--batch-size", 3) == [model.name]
    assert scored == [*[model.name, "second"] * 3, model.name]


def test_watch_says_that_it_waits_for_the_first_checkpoint(
    model: Path, tmp_path: Path, scored: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    run.mkdir()

    def train(seconds: float) -> None:
        assert seconds == 7.5
        as_deepspeed(as_megatron(model, tmp_path / "megatron"), run / "iter_0000010")
        (run / "DONE").touch()

    monkeypatch.setattr("megatron_let.evaluation.models.time.sleep", train)
    flags = ["--watch", "--interval", "7.5", "--device", "cpu", "--output", str(tmp_path / "out")]
    assert main(["tasks", str(run), *flags]) == 0
    assert capsys.readouterr().err.count("waiting for the first checkpoint") == 1
    assert scored == ["iter_0000010"]


def test_local_data_sets_offline_mode_before_it_is_read(tmp_path: Path) -> None:
    code = (
        "import sys; from megatron_let.cli.evaluate import main; main(sys.argv[1:]);"
        " import datasets, huggingface_hub.constants as hub;"
        " print(hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)"
    )
    pytest.importorskip(
        "datasets", reason="datasets is missing: bash launch/lib/environment.sh evaluation"
    )
    environment = {k: v for k, v in os.environ.items() if "OFFLINE" not in k}
    call = [sys.executable, "-c", code, "tasks", "none", "--data", str(tmp_path)]
    found = subprocess.run(call, env=environment, capture_output=True, text=True)
    assert found.stdout.split() == ["True", "True"], found.stderr


def test_lm_eval_gives_equal_scores_for_every_checkpoint_format(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(
        "lm_eval", reason="lm-eval is missing: bash launch/lib/environment.sh evaluation"
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    megatron = as_megatron(model, tmp_path / "megatron")
    deepspeed = as_deepspeed(megatron, tmp_path / "deepspeed")
    arguments = ["tasks", model, megatron, deepspeed, "--data", data, "--output", tmp_path / "out",
                 "--limit", 6, "--device", "cpu", "--tasks", *QUESTIONS]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    found = json.loads((tmp_path / "out/results.json").read_text())
    ours, *theirs = (models["results"] for models in found["models"])
    assert theirs == [ours, ours] and [r["items"] for r in ours] == [6, 6, 6]
    assert all(0 <= r["scores"]["acc"] <= 1 for r in ours)
    assert found["num_fewshot"] == "1" and found["lm-eval"]
    with (tmp_path / "out/results.csv").open() as file:
        assert {line["task"] for line in csv.DictReader(file)} == {*QUESTIONS, "average"}
    # The second call reads the cache only.
    monkeypatch.setattr(harness, "_lm_eval_model", None)
    assert main([str(argument) for argument in arguments]) == 0
