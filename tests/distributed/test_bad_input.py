"""Bad input through the real entry: one sentence, exit code 2, and no file overwritten.

Here are the checks that need the running entry, and one case per kind of check that does not; all
other cases are in the unit tests of those checks.

Starting Python with torch and Megatron takes ten times as long as refusing a run. So one process,
which has imported both, forks for each rank of each case, and each fork calls the entry's `main()`.
The cases in which the other ranks have to be ended follow at the end.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_let.files.names import TRACKER
from tests.helpers.data import write_indexed_data
from tests.helpers.forks import exit_codes_in_forks
from tests.helpers.models import MAX_POSITIONS, NUM_LAYERS, VOCAB_SIZE, save_teacher
from tests.helpers.runs import ROOT, free_port, run_forked, train

pytestmark = pytest.mark.distributed

# Limits against a hang: a rank that is left alone waits ten minutes in a collective.
CASE_SECONDS = 120
RUN_SECONDS = 240
NAN_TOKEN = 201
STUDENT_TOKENIZER = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "{words}")
RKD = ("--let-method", "rkd")
SAVE_EACH_STEP = ("--save-interval", 1)
ONE_NAN = ("--let-teacher", "{nan_token}", "--data-path", "{nan_in_one}", "--split", "100,0,0",
           "--eval-iters", 0, *SAVE_EACH_STEP)  # fmt: skip

Case = tuple[tuple[str | int | float, ...], tuple[str, ...]]

# case -> (flags after the tiny recipe, what the sentence names); {name} is a path of `broken`.
REFUSED: dict[str, Case] = {
    # The teacher
    "teacher missing": (("--let-teacher", "{nowhere}"), ("{nowhere}",)),
    "teacher lacks a weight": (("--let-teacher", "{no_layer}"), ("{no_layer}", "layers.3")),
    "other tokenizer": (
        ("--let-teacher", "{other_tokenizer}", *STUDENT_TOKENIZER),
        ("token 5", "'five'", "'FIVE'"),
    ),
    "tokenizer larger than the teacher": (
        ("--vocab-size", VOCAB_SIZE + 1),
        (f"{VOCAB_SIZE + 1}", f"{VOCAB_SIZE}"),
    ),
    "data beyond the teacher's tokens": (
        ("--data-path", "{large_ids}"),
        ("300", f"{VOCAB_SIZE}"),
    ),
    "sequence too long": (
        ("--seq-length", 2 * MAX_POSITIONS, "--max-position-embeddings", 2 * MAX_POSITIONS),
        (f"--seq-length is {2 * MAX_POSITIONS}", f"{MAX_POSITIONS} positions"),
    ),
    # The flags
    "stop step 0": (("--let-stop-step", 0), ("--let-stop-step is 0",)),
    "CUDA graphs of a step": (
        ("--cuda-graph-impl", "full_iteration"),
        ("--cuda-graph-impl full_iteration",),
    ),
    "LayerNorm": (("--normalization", "LayerNorm"), ("--normalization LayerNorm",)),
    "flag without effect": (
        ("--rampup-batch-size", 2, 2, 32),
        ("--rampup-batch-size 2 2 32", "--step-batch-size-schedule"),
    ),
    "model of other layers": (("--softmax-type", "learnable"), ("--softmax-type learnable needs",)),
    "nothing to load": (("--load", "{nowhere}", "--finetune"), ("--load {nowhere}",)),
    "more steps without saying how": (
        ("--save", "{let_run}", "--load", "{let_run}", "--train-iters", 20),
        ("--train-iters is 20", "--override-opt-param-scheduler"),
    ),
    "other model in the checkpoint": (
        ("--pretrained-checkpoint", "{let_run}", "--rotary-base", 500000),
        ("--rotary-base is 500000", "10000"),
    ),
    "what Megatron asserts": (
        ("--num-layers", 5, "--num-layers-per-virtual-pipeline-stage", 2),
        ("The run cannot start: ", "error-rank0.log"),
    ),
    "unknown setting": (("--config", "{misspelt}"), ("let-wieght", "let-weight?")),
    "guard without metrics of a baseline": (
        ("--let-guard", "--let-guard-baseline", "{nowhere}"),
        ("--let-guard-baseline {nowhere}",),
    ),
    # The data
    "data empty": (("--data-path", "{empty_data}"), ("{empty_data}",)),
    "data of three tokens": (("--data-path", "{three_tokens}"), ("{three_tokens}", "--split")),
    # The teacher's numbers
    "NaN in a layer": (
        ("--let-teacher", "{nan_layer}", *SAVE_EACH_STEP),
        ("{nan_layer}", "NaN", "microbatch 0 of step 1"),
    ),
    "Inf in a layer": (
        ("--let-teacher", "{inf_layer}", *SAVE_EACH_STEP),
        ("{inf_layer}", "Inf", "microbatch 0 of step 1"),
    ),
    "NaN in RKD's teacher": (
        (*RKD, "--let-teacher", "{nan_layer}", *SAVE_EACH_STEP),
        ("{nan_layer}", "NaN", "microbatch 0 of step 1"),
    ),
    # The output
    "folder of another seed": (
        ("--save", "{let_run}", "--load", "{let_run}", "--train-iters", 5, "--seed", 7),
        ("{let_run}", "--seed is 1234 there and 7 here"),
    ),
    "folder started over": (("--save", "{let_run}"), ("iteration 5", "--load {let_run}")),
    "metrics of another run": (
        ("--let-metrics-path", "{other_metrics}"),
        ("{other_metrics}", "--let-metrics-path"),
    ),
}  # fmt: skip

WEIGHT_MISSING = ("weight missing, pp2", "weight missing, RKD, pp2")
PP2 = ("--pipeline-model-parallel-size", 2)
# The same on two ranks, which all end by themselves.
REFUSED_ON_TWO_RANKS: dict[str, Case] = {
    "teacher cut short": (("--let-teacher", "{cut}"), ("{cut}", "999 bytes")),
    # The second stage alone has the teacher.
    "weight missing, pp2": (
        ("--let-teacher", "{no_weight}", *PP2, "--let-placement", "aligned-stage"),
        ("{no_weight}", "has no weight for layers.1"),
    ),
    "weight missing, RKD, pp2": (
        (*RKD, "--let-teacher", "{no_weight}", *PP2),
        ("{no_weight}", "has no weight for model.layers.1"),
    ),
    # One replica alone reads the token.
    "NaN of one token, dp2": (ONE_NAN, ("{nan_token}", "NaN")),
    "NaN of one token, pp2": (
        (*ONE_NAN, *PP2),
        ("{nan_token}", "NaN"),
    ),
}

# Other runs, which the entry makes before the cases.
PREPARED: dict[str, Case] = {"let_run": (("--save", "{let_run}", "--train-iters", 5), ())}

# case -> (flags, what the warning names); the run continues.
WARNED: dict[str, Case] = {
    "teacher that hurts the student": (
        ("--let-guard", "--let-guard-baseline", "{low_losses}"),
        ("LET: warning: the held-out loss",),
    ),
    "flags without a method": (
        ("--let-method", "none"),
        ("--let-layer, --let-stop-step, --let-teacher, --let-teacher-dtype, --let-weight",),
    ),
}


# Broken input


def copy_teacher(teacher: Path, folder: Path, **config: Any) -> Path:
    shutil.copytree(teacher, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def write_non_finite(teacher: Path, folder: Path, key: str, row: int, value: float) -> Path:
    """Copy a teacher and set one row of a weight to NaN or Inf."""
    copy_teacher(teacher, folder)
    weights = load_file(folder / "model.safetensors")
    weights[key][row] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_words(folder: Path, *words: str) -> Path:
    vocabulary = {word: index for index, word in enumerate(("<unk>", "<end>", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def write_tokens(prefix: Path, *documents: Any) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(torch.as_tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def write_one_nan_token(prefix: Path) -> Path:
    """Write the sequences of ten steps; one of them has a NAN_TOKEN."""
    tokens = np.random.default_rng(0).integers(0, NAN_TOKEN, size=80 * 64 + 1)
    tokens[20 * 64 + 30] = NAN_TOKEN
    return write_tokens(prefix, tokens)


def without_weight(teacher: Path, folder: Path, name: str) -> Path:
    """Copy a teacher without one of its tensors; the file itself is whole."""
    file = copy_teacher(teacher, folder) / "model.safetensors"
    state = load_file(file)
    del state[name]
    save_file(state, file, {"format": "pt"})
    return folder


def write_stock_run(folder: Path, iteration: int) -> Path:
    """Write the folder of a stock run: Megatron's tracker and a checkpoint, no run.json."""
    (folder / f"iter_{iteration:07}").mkdir(parents=True)
    (folder / f"iter_{iteration:07}" / "__0_0.distcp").write_bytes(b"weights")
    (folder / TRACKER).write_text(str(iteration))
    return folder


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("broken")
    teacher = save_teacher(root / "teacher")
    down_proj, embedding = "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"
    things = {
        "nowhere": root / "nowhere",
        "teacher": teacher,
        "data": write_indexed_data(root / "walks"),
        "cut": copy_teacher(teacher, root / "cut"),
        "no_layer": copy_teacher(teacher, root / "no_layer", num_hidden_layers=NUM_LAYERS + 1),
        "words": save_words(root / "words", "two", "three", "four", "five"),
        "other_tokenizer": copy_teacher(teacher, root / "other_tokenizer"),
        "large_ids": write_tokens(root / "large_ids", *[[300] * 900] * 20),
        "empty_data": write_tokens(root / "empty_data"),
        "three_tokens": write_tokens(root / "three_tokens", *[[1, 2, 3]] * 10),
        "nan_in_one": write_one_nan_token(root / "nan_in_one"),
        "nan_layer": write_non_finite(teacher, root / "nan_layer", down_proj, 0, np.nan),
        "inf_layer": write_non_finite(teacher, root / "inf_layer", down_proj, 0, np.inf),
        "nan_token": write_non_finite(teacher, root / "nan_token", embedding, NAN_TOKEN, np.nan),
        "no_weight": without_weight(teacher, root / "no_weight", down_proj),
        "stock_run": write_stock_run(root / "stock_run", 7),
        "let_run": root / "let_run",
        "other_metrics": root / "other_metrics.jsonl",
        "low_losses": root / "low_losses.jsonl",
        "misspelt": root / "misspelt.yaml",
    }
    os.truncate(things["cut"] / "model.safetensors", 999)
    save_words(things["other_tokenizer"], "two", "three", "four", "FIVE")
    things["other_metrics"].write_text('{"iteration": 1, "lm_loss": 5.0}\n')
    things["low_losses"].write_text(
        "".join(f'{{"iteration": {step}, "valid_loss": 1.0}}\n' for step in (5, 10))
    )
    things["misspelt"].write_text("let:\n  let-wieght: 0.1\n")
    return things


# One process, forked for each rank of each case


@dataclass(frozen=True)
class Outcome:
    """Result of one case.

    Attributes:
        codes: exit code of each rank; negative for a signal, as in subprocess.
        log: output of all ranks.
        before: digests of the other runs' files before the cases.
    """

    codes: list[int]
    log: str
    folder: Path
    before: dict[str, str]


def sentences(log: str) -> list[str]:
    """Return what follows `megatron_let: error (rank N):` in each such line."""
    return re.findall(r"^megatron_let: error \(rank \d+\): (.*)$", log, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    broken: dict[str, Path],
) -> dict[str, Outcome]:
    """Outcomes of the cases that this session has selected."""
    root = tmp_path_factory.mktemp("cases")
    selected = {
        item.callspec.params["name"]
        for item in request.session.items
        if "outcomes" in getattr(item, "fixturenames", ())
    }
    tables = REFUSED | REFUSED_ON_TWO_RANKS | WARNED
    flags = PREPARED | {name: tables[name] for name in tables if name in selected}
    cases = {}
    for index, name in enumerate(flags):
        folder = root / str(index)
        folder.mkdir()
        ranks = 2 if name in REFUSED_ON_TWO_RANKS else 1
        argv = arguments(folder, broken, flags[name][0])
        cases[name] = {"argv": argv, "folder": str(folder), "ranks": ranks}
    (root / "cases.json").write_text(json.dumps({"cases": cases, "others": others(broken)}))
    # A fork cannot use CUDA; these errors do not depend on the device.
    variables = {
        "TEACHER": str(broken["teacher"]), "OUTPUT": str(root / "out"), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    code, log = run_forked(
        "tests.distributed.test_bad_input", root / "cases.json",
        folder=root, seconds=3600, **variables,
    )  # fmt: skip
    assert code == 0, log
    found = json.loads((root / "found.json").read_text())
    assert all(found["codes"][name] == [0] for name in PREPARED)
    return {
        name: Outcome(
            found["codes"][name],
            "".join(path.read_text() for path in sorted(root.glob(f"{index}.*.log"))),
            root / str(index),
            found["before"],
        )
        for index, name in enumerate(cases)
    }


def arguments(folder: Path, broken: dict[str, Path], flags: tuple[Any, ...]) -> list[str]:
    """Return the tiny recipe on good data into `folder`, and the flags of the case."""
    common = {
        "--config": str(ROOT / "configs/tiny.yaml"),
        "--data-path": str(broken["data"]),
        "--save": str(folder / "checkpoints"),
        "--let-metrics-path": str(folder / "metrics.jsonl"),
    }
    ours = [text for pair in common.items() if pair[0] not in flags for text in pair]
    return ours + [str(flag).format(**broken) for flag in flags]


def serve(request: Path) -> None:
    """Fork for each case; exit codes go to found.json."""
    import tests.helpers.preload  # noqa: F401
    from megatron_let.pretrain import main

    asked = json.loads(request.read_text())
    codes: dict[str, list[int]] = {}
    before: dict[str, str] = {}
    for name, case in asked["cases"].items():
        if name not in PREPARED and not before:
            before = digests(*asked["others"])
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        os.environ["WORLD_SIZE"] = str(case["ranks"])
        codes[name] = exit_codes_in_forks(
            *(functools.partial(run_rank, main, case, rank) for rank in range(case["ranks"]))
        )
    request.with_name("found.json").write_text(json.dumps({"codes": codes, "before": before}))


def run_rank(main: Any, case: dict[str, Any], rank: int) -> int:
    signal.alarm(CASE_SECONDS)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    with open(f"{case['folder']}.{rank}.log", "w") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    os.chdir(case["folder"])
    try:
        code = int(main(case["argv"]))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def digests(*places: str) -> dict[str, str]:
    """Return {file: digest} of these files and of every file in these folders."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for place in places
        for path in (Path(place), *Path(place).rglob("*"))
        if path.is_file()
    }


def others(broken: dict[str, Path]) -> list[str]:
    """Return where other runs have written."""
    return [str(broken[name]) for name in ("let_run", "stock_run", "other_metrics")]


def assert_one_sentence(outcome: Outcome, named: tuple[str, ...], broken: dict[str, Path]) -> None:
    assert -signal.SIGALRM not in outcome.codes, f"hung {CASE_SECONDS} s:\n{outcome.log[-600:]}"
    assert len(sentences(outcome.log)) == 1, f"not one sentence but:\n{outcome.log[-1500:]}"
    (sentence,) = sentences(outcome.log)
    assert all(part.format(**broken) in sentence for part in named), sentence
    assert sentence.endswith((".", "?")), sentence
    assert set(outcome.codes) == {2}
    assert "Traceback" not in outcome.log
    assert digests(*others(broken)) == outcome.before, "another run was overwritten"


@pytest.mark.parametrize("name", [*REFUSED, "teacher cut short", *WEIGHT_MISSING])
def test_bad_input_ends_with_one_sentence_and_writes_nothing(
    name: str, outcomes: dict[str, Outcome], broken: dict[str, Path]
) -> None:
    outcome, (_, named) = outcomes[name], (REFUSED | REFUSED_ON_TWO_RANKS)[name]
    assert_one_sentence(outcome, named, broken)
    left = {str(path.relative_to(outcome.folder)) for path in outcome.folder.rglob("*.*")}
    assert left <= {"checkpoints/run.json"}, "half-written"


@pytest.mark.parametrize("name", ["NaN of one token, dp2", "NaN of one token, pp2"])
def test_nan_of_the_teacher_ends_all_ranks_before_the_step(
    name: str, outcomes: dict[str, Outcome], broken: dict[str, Path]
) -> None:
    outcome, (_, named) = outcomes[name], REFUSED_ON_TWO_RANKS[name]
    assert_one_sentence(outcome, named, broken)
    save = outcome.folder / "checkpoints"
    taken = int((save / TRACKER).read_text()) if (save / TRACKER).exists() else 0
    assert sorted(path.name for path in save.glob("iter_*")) == [
        f"iter_{step:07}" for step in range(1, taken + 1)
    ]
    rows = (outcome.folder / "metrics.jsonl").read_text().splitlines() if taken else []
    assert [json.loads(row)["iteration"] for row in rows] == list(range(1, taken + 1))


@pytest.mark.parametrize("name", WARNED)
def test_odd_input_warns_once_and_the_run_continues(
    name: str, outcomes: dict[str, Outcome]
) -> None:
    outcome, (_, (expected,)) = outcomes[name], WARNED[name]
    assert outcome.codes == [0], outcome.log[-1500:]
    assert outcome.log.count(expected) == 1
    rows = (outcome.folder / "metrics.jsonl").read_text().splitlines()
    assert sum("lm_loss" in row for row in rows) == 10


# One rank fails and the others have to end too


def assert_refused(
    folder: Path, broken: dict[str, Path], named: tuple[str, ...], *flags: Any
) -> None:
    start = time.monotonic()
    run = train(
        folder, "--data-path", broken["data"], *flags, ranks=2, check=False,
        TEACHER=str(broken["teacher"]),
    )  # fmt: skip
    assert time.monotonic() - start < RUN_SECONDS
    assert run.returncode != 0
    assert all(part in run.error for part in named), run.error
    assert len(set(sentences(run.log))) == 1, sentences(run.log)


def test_folder_of_another_run_ends_the_ranks_that_did_not_check(
    tmp_path: Path, broken: dict[str, Path]
) -> None:
    save = broken["stock_run"]
    before = digests(str(save))
    flags = ("--save", save, "--pipeline-model-parallel-size", 2)
    assert_refused(tmp_path, broken, (str(save), "at iteration 7"), *flags)
    assert digests(str(save)) == before


def test_token_that_only_the_first_rank_reads_ends_the_others(
    tmp_path: Path, broken: dict[str, Path]
) -> None:
    flags = ("--data-path", broken["large_ids"], "--tensor-model-parallel-size", 2)
    assert_refused(tmp_path, broken, ("300", str(VOCAB_SIZE)), *flags)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
