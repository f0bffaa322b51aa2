"""An output folder belongs to one run: another run raises an error and writes nothing."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_let.config.let_config import LETConfig
from megatron_let.errors import LETError
from megatron_let.files.names import RUN, TRACKER
from megatron_let.run import output_folder
from megatron_let.run.output_folder import (
    claim,
    identity,
    pin_hub_ids,
    resolve_teacher_dtype,
)
from megatron_let.teacher import precision

LET = LETConfig("let", Path("/models/small"))
OLD, NEW = "0" * 40, "1" * 40


def run_args(save: Path | None, **values: Any) -> argparse.Namespace:
    common: dict[str, Any] = {
        "save": str(save) if save else None,
        "load": str(save) if save else None,
        "finetune": False,
        "let_metrics_path": None,
        "num_layers": 4,
        "hidden_size": 64,
        "seq_length": 64,
        "seed": 1234,
        "data_path": ["/data/pile"],
        "tokenizer_model": "/models/small",
        "global_batch_size": 8,
        "train_iters": 10,
        "tensor_model_parallel_size": 1,
        "lr": 1e-3,
        "ckpt_step": None,
        "skip_train": False,
        "split": "90,10,0",
    }
    return argparse.Namespace(**common | values)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_refused(folder: Path, args: argparse.Namespace, config: LETConfig, match: str) -> None:
    before = contents(folder)
    with pytest.raises(LETError, match=match) as error:
        claim(args, config)
    message = str(error.value)
    assert "\n" not in message and message.endswith("."), message
    assert contents(folder) == before


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """Folder of a LET run with a checkpoint at iteration 5."""
    save = tmp_path / "run"
    claim(run_args(save), LET)
    (save / TRACKER).write_text("5")
    (save / "iter_0000005").mkdir()
    (save / "iter_0000005" / "weights").write_bytes(b"weights")
    return save


def test_new_folder_gets_the_identity(tmp_path: Path) -> None:
    args = run_args(tmp_path / "deep" / "run")
    claim(args, LET)
    signature = json.loads((tmp_path / "deep/run" / RUN).read_text())
    assert signature.pop("settings").keys() >= {"lr", "global_batch_size", "train_iters"}
    assert signature == identity(args, LET) | {"let_metrics_path": None}
    assert list(contents(tmp_path)) == ["deep/run/" + RUN]


def test_same_run_continues(trained: Path) -> None:
    before = contents(trained)
    claim(run_args(trained), LET)
    assert contents(trained) == before


@pytest.mark.parametrize(
    "changed",
    [
        {"train_iters": 20},
        {"global_batch_size": 16},
        {"tensor_model_parallel_size": 2},
        {"lr": 5e-4},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_steps_batch_and_layout_may_change_on_resume(
    trained: Path, changed: dict[str, Any]
) -> None:
    claim(run_args(trained, **changed), LET)


def test_stages_of_a_hybrid_model_may_change_on_resume(tmp_path: Path) -> None:
    for pattern in ("*-*-", "*-|*-"):
        args = run_args(tmp_path, hybrid_layer_pattern=pattern)
        claim(args, LET)
        (tmp_path / TRACKER).write_text("5")
    args.hybrid_layer_pattern = "*-M-"
    assert_refused(tmp_path, args, LET, "--hybrid-layer-pattern")


def test_teacher_may_move_to_another_disk(trained: Path) -> None:
    claim(run_args(trained), LETConfig("let", Path("/another/disk/small")))


@pytest.mark.parametrize(
    ("args", "config", "expected"),
    [
        ({"num_layers": 6}, LET, "--num-layers is 4 there and 6 here"),
        ({"hybrid_layer_pattern": "*-*-"}, LET, r"--hybrid-layer-pattern is None there and \*-"),
        ({"seed": 1}, LET, "--seed is 1234 there and 1 here"),
        ({"split": "99,1,0"}, LET, "--split is 90,10,0 there and 99,1,0 here"),
        ({"reset_attention_mask": True}, LET, "--reset-attention-mask is None there and True here"),
        ({"data_path": ["/other"]}, LET, "--data-path is .* there and .*other.* here"),
        ({}, LETConfig("let", Path("/models/small"), weight=0.2), "--let-weight is 0.1 there"),
        ({}, LETConfig("let", Path("/models/large")), "--let-teacher is small there and large"),
        ({}, LETConfig(), "--let-method is let there and none here"),
    ],
)
def test_folder_of_another_run_raises_error_naming_flag(
    trained: Path, args: dict[str, Any], config: LETConfig, expected: str
) -> None:
    assert_refused(trained, run_args(trained, **args), config, expected)


def test_older_run_without_the_split_among_its_settings_continues(trained: Path) -> None:
    stored = json.loads((trained / RUN).read_text())
    stored["settings"]["split"] = stored.pop("split")
    (trained / RUN).write_text(json.dumps(stored))
    assert_refused(trained, run_args(trained, split="99,1,0"), LET, "--split")
    claim(run_args(trained), LET)


@pytest.mark.parametrize("file", ["metadata.json", "deepspeed.json"])
def test_copy_without_its_tracker_is_refused(file: str, trained: Path) -> None:
    (trained / TRACKER).unlink()
    # An interrupted save left no whole checkpoint.
    claim(run_args(trained), LET)
    (trained / f"iter_0000005/{file}").touch()
    (trained / "iter_0000009_old").mkdir()
    (trained / f"iter_0000009_old/{file}").touch()
    assert_refused(trained, run_args(trained), LET, f"no {TRACKER}.*write 5")
    claim(run_args(trained, ckpt_step=5), LET)
    for other in ({"load": "/elsewhere"}, {"load": None}, {"finetune": True}):
        assert_refused(trained, run_args(trained, ckpt_step=5, **other), LET, f"no {TRACKER}")


def test_evaluation_only_writes_nothing(trained: Path) -> None:
    before = contents(trained)
    claim(run_args(trained, skip_train=True, lr=5e-4), LET)
    assert contents(trained) == before
    assert_refused(trained, run_args(trained, skip_train=True, seed=1), LET, "--seed")


def test_let_in_folder_of_a_baseline_raises_error(tmp_path: Path) -> None:
    claim(run_args(tmp_path), LETConfig())
    (tmp_path / TRACKER).write_text("5")
    assert_refused(tmp_path, run_args(tmp_path), LET, "--let-method is none")


@pytest.mark.parametrize("value", [False, True])
def test_unknown_setting_of_another_version_is_ignored_and_named(
    trained: Path, value: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = json.loads((trained / RUN).read_text())
    (trained / RUN).write_text(json.dumps(stored | {"let_removed_flag": value}))
    claim(run_args(trained), LET)
    assert ("--let-removed-flag True" in capsys.readouterr().out) == value


def test_flag_that_an_older_version_lacked_counts_as_its_default(trained: Path) -> None:
    stored = json.loads((trained / RUN).read_text())
    del stored["let_projection"]
    (trained / RUN).write_text(json.dumps(stored))
    assert_refused(
        trained,
        run_args(trained),
        dataclasses.replace(LET, projection="learned"),
        "--let-projection",
    )
    claim(run_args(trained), LET)


@pytest.mark.parametrize(
    "how", [{"placement": "spread"}, {"max_prefetch": 2}, {"compile": True}], ids=str
)
def test_setting_that_changes_no_number_may_change(trained: Path, how: dict[str, Any]) -> None:
    how = {"teacher_" + k if k == "compile" else k: v for k, v in how.items()}
    claim(run_args(trained), dataclasses.replace(LET, **how))
    claim(run_args(trained), LET)


def run_with_files(root: Path) -> tuple[Path, argparse.Namespace]:
    """Return the folder and the arguments of a run whose data and tokenizer are in `root`."""
    save, tokenizer = root / "run" / "checkpoints", root / "tokenizer"
    return save, run_args(
        save, let_metrics_path=root / "run" / "metrics.jsonl", tokenizer_model=str(tokenizer),
        data_path=["0.5", str(root / "data" / "pile"), "0.5", str(root / "data" / "code")],
    )  # fmt: skip


@pytest.fixture
def run_root(tmp_path: Path) -> Path:
    """Folder with a run that took five steps, its data and its tokenizer."""
    root = tmp_path / "root"
    for name, content in {
        "data/pile.bin": b"1234", "data/code.bin": b"5678", "tokenizer/tokenizer.json": b"{}",
    }.items():  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    save, args = run_with_files(root)
    claim(args, LET)
    (save / TRACKER).write_text("5")
    args.let_metrics_path.write_text('{"iteration": 5, "lm_loss": 5.0}\n')
    return root


def test_run_that_was_moved_or_copied_continues(run_root: Path, tmp_path: Path) -> None:
    shutil.copytree(run_root, tmp_path / "copied")
    claim(run_with_files(tmp_path / "copied")[1], LET)
    run_root.rename(tmp_path / "moved")
    claim(run_with_files(tmp_path / "moved")[1], LET)
    stored = (tmp_path / "moved/run/checkpoints" / RUN).read_text()
    assert str(tmp_path) not in stored


@pytest.mark.parametrize("name", ["data/code.bin", "tokenizer/tokenizer.json"])
def test_other_content_under_the_same_name_raises_error(run_root: Path, name: str) -> None:
    (run_root / name).write_bytes(b"other")
    flag = "--data-path" if "data" in name else "--tokenizer-model"
    assert_refused(run_root, run_with_files(run_root)[1], LET, flag)


def save_teacher(folder: Path, content: bytes) -> LETConfig:
    """Write a folder whose one weight file ends in `content`, and return the settings for it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(3 * 2**20) + content)
    return LETConfig("let", folder)


def test_another_teacher_of_the_same_name_raises_error(tmp_path: Path) -> None:
    first, other = (save_teacher(tmp_path / name / "final", name.encode()) for name in "ab")
    run = tmp_path / "run"
    claim(run_args(run), first)
    (run / TRACKER).write_text("5")
    shutil.copytree(tmp_path / "a", tmp_path / "copied")
    claim(run_args(run), LETConfig("let", tmp_path / "copied/final"))
    assert_refused(run, run_args(run), other, "--let-teacher is final#.* there and final#.* here")
    # A run past --let-stop-step needs no teacher.
    claim(run_args(run), LETConfig("let", tmp_path / "deleted/final"))


def test_run_of_an_older_version_with_a_teachers_name_continues(tmp_path: Path) -> None:
    teacher, run = save_teacher(tmp_path / "final", b"a"), tmp_path / "run"
    claim(run_args(run), teacher)
    (run / TRACKER).write_text("5")
    stored = json.loads((run / RUN).read_text())
    assert stored["let_teacher"].startswith("final#")
    (run / RUN).write_text(json.dumps(stored | {"let_teacher": "final"}))
    claim(run_args(run), teacher)
    (run / RUN).write_text(json.dumps(stored | {"let_teacher": "first"}))
    assert_refused(run, run_args(run), teacher, "--let-teacher is first there")


def test_run_of_an_older_version_with_paths_continues_where_it_was_moved(
    run_root: Path, tmp_path: Path
) -> None:
    path = run_root / "run/checkpoints" / RUN
    old = {
        "tokenizer_model": "/old/tokenizer", "data_path": ["0.5", "/old/pile", "0.5", "/old/code"],
        "let_metrics_path": "/old/run/metrics.jsonl", "let_placement": "auto",
    }  # fmt: skip
    path.write_text(json.dumps(json.loads(path.read_text()) | old))
    claim(run_with_files(run_root)[1], LET)


@pytest.mark.parametrize("load", [None, "/somewhere/else"])
def test_trained_folder_without_load_raises_error(trained: Path, load: str | None) -> None:
    args = run_args(trained, load=load)
    assert_refused(trained, args, LET, f"iteration 5; add --load {trained}")


def test_finetuning_into_the_loaded_folder_raises_error(trained: Path) -> None:
    assert_refused(trained, run_args(trained, finetune=True), LET, "at iteration 5")


def test_folder_of_stock_megatron_without_load_raises_error(tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_text("7")
    assert_refused(tmp_path, run_args(tmp_path, load=None), LET, "at iteration 7")
    claim(run_args(tmp_path), LET)


def test_same_folder_by_another_path_continues(trained: Path) -> None:
    claim(run_args(trained, load=f"{trained}/../{trained.name}/"), LET)


def test_run_without_a_step_may_change_its_settings(tmp_path: Path) -> None:
    """It failed after claim(): data too short, no such layer, out of memory."""
    claim(run_args(tmp_path, data_path=["/typo"]), LET)
    claim(run_args(tmp_path, data_path=["/data/pile"]), LET)


# Models


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Commit of each revision of every repository; a test moves a branch by setting it."""
    commits = {"main": OLD, "v1": OLD}
    resolve = lambda repository, revision: commits.get(revision, revision)  # noqa: E731
    monkeypatch.setattr(output_folder, "resolve_commit", resolve)
    return commits


def start_with(save: Path, teacher: str, tokenizer: str | None = None, **values: Any) -> list[str]:
    """Start or resume a run as the entry does; return the pinned teacher and tokenizer."""
    args = run_args(
        save, let_teacher=Path(teacher), let_method="let", tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=tokenizer or teacher, **values,
    )  # fmt: skip
    pin_hub_ids(args)
    pinned = [str(args.let_teacher), args.tokenizer_model]
    repository, _, commit = args.tokenizer_model.partition("@")
    if commit:
        name = repository.replace("/", "--")
        args.tokenizer_model = f"{save}/cache/models--{name}/snapshots/{commit}"
    claim(args, LETConfig("let", args.let_teacher))
    (save / TRACKER).write_text("5")
    return pinned


@pytest.mark.parametrize("given", ["alice/model", "alice/model@main", "alice/model@v1"])
def test_resumed_run_keeps_commit_of_first_start(
    tmp_path: Path, hub: dict[str, str], given: str
) -> None:
    assert start_with(tmp_path, given) == [f"alice/model@{OLD}"] * 2
    stored = json.loads((tmp_path / RUN).read_text())
    assert stored["let_teacher"] == stored["tokenizer_model"] == f"alice/model@{OLD}"
    hub |= {"main": NEW, "v1": NEW}
    assert start_with(tmp_path, given) == [f"alice/model@{OLD}"] * 2
    assert start_with(tmp_path, f"alice/model@{OLD}") == [f"alice/model@{OLD}"] * 2


def test_run_that_loads_another_folder_keeps_its_commit(
    tmp_path: Path, hub: dict[str, str]
) -> None:
    start_with(tmp_path / "first", "alice/model")
    hub["main"] = NEW
    load = str(tmp_path / "first")
    args = run_args(tmp_path / "second", load=load, let_teacher=Path("alice/model"),
                    let_method="let", tokenizer_type="NullTokenizer")  # fmt: skip
    assert str(pin_hub_ids(args).let_teacher) == f"alice/model@{OLD}"


@pytest.mark.parametrize("given", ["alice/model@v2", f"alice/model@{NEW}", "bob/model"])
def test_resume_with_another_revision_or_repository_raises_error(
    tmp_path: Path, hub: dict[str, str], given: str
) -> None:
    start_with(tmp_path, "alice/model", tokenizer="/tokenizer")
    hub["v2"] = NEW
    with pytest.raises(LETError, match="--let-teacher is") as error:
        start_with(tmp_path, given, tokenizer="/tokenizer")
    here = "bob/model" if given == "bob/model" else f"alice/model@{NEW}"
    assert f"alice/model@{OLD} there" in str(error.value) and here in str(error.value)


@pytest.mark.parametrize("given", ["alice/model", "alice/model@v1", "alice/model@refs/pr/3"])
def test_run_of_older_version_with_hub_id_continues(
    tmp_path: Path, hub: dict[str, str], given: str
) -> None:
    hub["refs/pr/3"] = OLD
    start_with(tmp_path, given)
    stored = json.loads((tmp_path / RUN).read_text())
    del stored["let_hub_ids"]
    stored["let_teacher"] = Path(given).name
    stored["tokenizer_model"] = f"/other/cache/models--alice--model/snapshots/{OLD}"
    (tmp_path / RUN).write_text(json.dumps(stored))
    hub["main"] = NEW
    assert start_with(tmp_path, given)[0] == f"alice/model@{OLD}"


def test_baseline_pins_its_tokenizer(tmp_path: Path, hub: dict[str, str]) -> None:
    args = run_args(
        tmp_path, let_teacher=Path("alice/unused"), let_method="none",
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model="alice/model@v1",
    )  # fmt: skip
    pin_hub_ids(args)
    assert args.tokenizer_model == f"alice/model@{OLD}" and args.let_teacher == Path("alice/unused")


def test_paths_of_one_folder_are_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    start_with(tmp_path / "run", f"{tmp_path}/model")
    for same in (f"{tmp_path}/model/", "../model", "."):
        start_with(tmp_path / "run", same)


# Metrics


def test_metrics_of_another_run_raise_error(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"iteration": 1, "lm_loss": 5.0}\n')
    for save in (None, tmp_path / "new"):
        args = run_args(save, let_metrics_path=metrics)
        assert_refused(tmp_path, args, LET, r"metrics\.jsonl .* --let-metrics-path")


@pytest.mark.parametrize("name", [".", "file/metrics.jsonl"])
def test_metrics_file_that_cannot_be_written_raises_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    args = run_args(tmp_path / "run", let_metrics_path=tmp_path / name)
    assert_refused(tmp_path, args, LET, "--let-metrics-path .* cannot be written")


def test_metrics_are_appended_when_the_run_continues(trained: Path) -> None:
    metrics = trained / "metrics.jsonl"
    args = run_args(trained, let_metrics_path=metrics)
    claim(args, LET)
    metrics.write_text('{"iteration": 5, "lm_loss": 5.0}\n')
    claim(args, LET)


def test_continued_run_with_another_runs_metrics_raises_error(
    trained: Path, tmp_path: Path
) -> None:
    claim(run_args(trained, let_metrics_path=trained / "metrics.jsonl"), LET)
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text('{"iteration": 1, "lm_loss": 5.0}\n')
    args = run_args(trained, let_metrics_path=theirs)
    assert_refused(tmp_path, args, LET, r"theirs\.jsonl .* --let-metrics-path")


def test_empty_or_new_metrics_file_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    claim(run_args(None, let_metrics_path=tmp_path / "empty.jsonl"), LET)
    claim(run_args(None, let_metrics_path=tmp_path / "deep" / "new.jsonl"), LET)


def test_claim_without_save_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    claim(run_args(None), LET)
    assert not list(tmp_path.iterdir())


def start_with_dtype(save: Path | None, dtype: str | None, method: str = "let") -> Any:
    """Claim the folder with a value of `--let-teacher-dtype`; return the resolved one."""
    args = run_args(save, let_method=method, let_teacher_dtype=dtype)
    resolve_teacher_dtype(args)
    if save is not None:
        config = LETConfig("let", Path("/models/small"), teacher_dtype=args.let_teacher_dtype)
        claim(args, config)
        (save / TRACKER).write_text("5")
    return args.let_teacher_dtype


@pytest.mark.parametrize("auto", [None, "auto"])
@pytest.mark.parametrize(("first", "moved"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_resume_on_another_machine_keeps_the_teachers_dtype(
    auto: str | None, first: str, moved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "default_dtype", lambda: (first, "here"))
    assert start_with_dtype(tmp_path, auto) == first
    assert json.loads((tmp_path / RUN).read_text())["let_teacher_dtype"] == first
    monkeypatch.setattr(precision, "default_dtype", lambda: (moved, "there"))
    assert start_with_dtype(tmp_path, auto) == first
    assert start_with_dtype(tmp_path, first) == first
    with pytest.raises(LETError, match=f"--let-teacher-dtype is {first} there and {moved} here"):
        start_with_dtype(tmp_path, moved)


def test_dtype_of_a_method_without_teacher_stays_unset() -> None:
    assert start_with_dtype(None, None, method="none") is None


def test_settings_changed_on_resume_are_recorded_in_the_metrics(run_root: Path) -> None:
    args = run_with_files(run_root)[1]
    claim(args, LET)
    assert len(args.let_metrics_path.read_text().splitlines()) == 1
    args.lr, args.train_iters, args.tensor_model_parallel_size = 2e-3, 20, 2
    for _ in range(2):
        claim(args, LET)
    rows = [json.loads(line) for line in args.let_metrics_path.read_text().splitlines()]
    changed = {
        "train_iters": [10, 20],
        "lr": [1e-3, 2e-3],
        # It changes the seconds.
        "tensor_model_parallel_size": [1, 2],
    }
    assert rows[1:] == [{"iteration": 5, "changed": changed}]


@pytest.mark.parametrize("name", ["data_args_path", "per_split_data_args_path"])
def test_other_data_in_a_file_of_data_sets_is_another_run(name: str, tmp_path: Path) -> None:
    for data in ("pile", "books"):
        (tmp_path / f"{data}.bin").write_bytes(data.encode())
        (tmp_path / data).write_text(f'{{"train": ["0.5", "{tmp_path / data}"]}}')
    run = tmp_path / "run"
    claim(run_args(run, data_path=None, **{name: str(tmp_path / "pile")}), LET)
    (run / TRACKER).write_text("5")
    other = run_args(run, data_path=None, **{name: str(tmp_path / "books")})
    assert_refused(run, other, LET, name.replace("_", "-"))
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(tmp_path / "pile.bin", moved / "pile.bin")
    (moved / "list").write_text(f'{{"train": ["0.5", "{moved / "pile"}"]}}')
    claim(run_args(run, data_path=None, **{name: str(moved / "list")}), LET)


def test_run_of_a_version_that_did_not_store_its_data_list_continues(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("0.5 /data/pile")
    run = tmp_path / "run"
    args = run_args(run, data_path=None, data_args_path=str(tmp_path / "list"))
    claim(args, LET)
    (run / TRACKER).write_text("5")
    stored = json.loads((run / RUN).read_text())
    del stored["data_args_path"]
    (run / RUN).write_text(json.dumps(stored))
    claim(args, LET)
