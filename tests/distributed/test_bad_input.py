"""Bad input through the real entry: one sentence, an exit code, and nothing written over.

Starting Python with torch and Megatron takes ten times as long as refusing a run. So one process
imports both and is forked for each row of the tables, and each fork calls the entry's `main()`.
What only several ranks under torchrun can show follows at the end.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
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
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.helpers.data import write_indexed_data
from tests.helpers.forks import exit_code_in_fork
from tests.helpers.models import MAX_POSITIONS, NUM_LAYERS, VOCAB_SIZE, save_teacher
from tests.helpers.runs import ROOT, environment, free_port, train

pytestmark = pytest.mark.distributed

# Against hanging, not for speed: a rank left alone waits ten minutes in a collective.
CASE_SECONDS = 120
RUN_SECONDS = 240
NAN_TOKEN = 201
TRACKER = "latest_checkpointed_iteration.txt"
STUDENT_TOKENIZER = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "{words}")
FULL_GRAPH = ("--cuda-graph-impl", "full_iteration")
RKD = ("--let-method", "rkd")
RL = ("--perform-rl-step", "--save-interval", 1)

# what is wrong -> (flags after the tiny recipe, what the sentence says); {name} is of `broken`.
REFUSED: dict[str, tuple[tuple[str | int | float, ...], str]] = {
    # The teacher's folder
    "teacher missing": (("--let-teacher", "{nowhere}"), "The teacher {nowhere} does not exist"),
    "teacher no model": (("--let-teacher", "{empty_folder}"), "has no config.json"),
    "teacher no gguf": (("--let-teacher", "{text_file}"), "is a file but no .gguf"),
    "teacher of unknown kind": (("--let-teacher", "{unknown}"), "of no known model"),
    "teacher is BERT": (("--let-teacher", "{bert}"), "is no causal language model"),
    "teacher is T5": (("--let-teacher", "{t5}"), "is no causal language model"),
    "teacher without weights": (("--let-teacher", "{no_weights}"), "has no weight file"),
    "teacher cut short": (
        ("--let-teacher", "{cut}"),
        "model.safetensors is cut short or damaged at 999 bytes; copy it again",
    ),
    "teacher lacks a shard": (("--let-teacher", "{no_shard}"), "b.safetensors is missing"),
    "teacher lacks a weight": (("--let-teacher", "{no_layer}"), "has no weight for layers.3"),
    # Its tokens
    "other tokenizer": (
        ("--let-teacher", "{other_tokenizer}", *STUDENT_TOKENIZER),
        "token 5 is 'five' for the student and 'FIVE' for the teacher",
    ),
    "no tokenizer": (STUDENT_TOKENIZER, "has no tokenizer to compare"),
    "tokenizer larger than the teacher": (
        ("--vocab-size", VOCAB_SIZE + 1),
        f"tokenizer has {VOCAB_SIZE + 1} tokens but the teacher knows {VOCAB_SIZE}",
    ),
    "data beyond the teacher's tokens": (
        ("--data-path", "{large_ids}"),
        f"The data has token id 300 but the teacher's vocabulary has {VOCAB_SIZE} ids",
    ),
    "sequence too long": (
        ("--seq-length", 2 * MAX_POSITIONS, "--max-position-embeddings", 2 * MAX_POSITIONS),
        f"--seq-length is {2 * MAX_POSITIONS} but the teacher was built for {MAX_POSITIONS}",
    ),
    # The alignment
    "layer 0": (("--let-layer", 0), "--let-layer is 0; layers are counted from 1"),
    "layer beyond the student": (("--let-layer", 5), "--let-layer is 5 but the student has 4"),
    "teacher layer beyond it": (
        ("--let-teacher-layer", NUM_LAYERS + 1),
        f"--let-teacher-layer is {NUM_LAYERS + 1} but the teacher has {NUM_LAYERS} layers",
    ),
    "negative weight": (("--let-weight", -0.1), "--let-weight is -0.1; give a finite weight"),
    "weight not a number": (("--let-weight", "nan"), "--let-weight is nan; give a finite weight"),
    "stop step 0": (("--let-stop-step", 0), "--let-stop-step is 0; give the step, at least 1"),
    "stop step negative": (("--let-stop-step", -3), "--let-stop-step is -3"),
    "too few tokens for CCA": (
        ("--let-loss", "cca"),
        "the 48 features of the teacher over the 128 tokens of a microbatch, which chance alone",
    ),
    "no share": ((*RKD, "--let-kd-weight", 2.0), "--let-kd-weight is 2.0; give the teacher's"),
    "CUDA graphs with RKD": (
        (*RKD, "--cuda-graph-impl", "local"),
        "--let-method rkd cannot be used with --cuda-graph-impl local",
    ),
    "RKD with a learned projection": (
        (*RKD, "--let-projection", "learned"),
        "--let-projection learned is for hidden states and --let-method rkd learns from logits",
    ),
    "learned projection in old checkpoints": (
        ("--let-projection", "learned", "--ckpt-format", "torch"),
        "--let-projection learned cannot be used with --ckpt-format torch",
    ),
    "learned projection with DeepSpeed": (
        ("--let-projection", "learned", "--engine", "deepspeed"),
        "--engine deepspeed cannot be used with --let-projection learned",
    ),
    # What bypasses the hook, and what LET was never tried with
    "CUDA graphs": (("--cuda-graph-impl", "local"), "--cuda-graph-impl local"),
    "CUDA graphs of a step": (FULL_GRAPH, "--cuda-graph-impl full_iteration"),
    "MoE overlap": (
        ("--overlap-moe-expert-parallel-comm",),
        "bypasses the hook on layer k; drop --overlap-moe-expert-parallel-comm",
    ),
    "MoE capacity": (("--moe-expert-rank-capacity-factor", 1.0), "--moe-expert-rank-capacity"),
    "hybrid model": (("--hybrid-layer-pattern", "*-*-*-*-"), "--hybrid-layer-pattern"),
    "Megatron FSDP": (("--use-megatron-fsdp",), "--use-megatron-fsdp"),
    "torch FSDP": (("--use-torch-fsdp2",), "--use-torch-fsdp2"),
    "fine-tuning": (("--sft",), "--sft"),
    "attention within documents": (("--reset-attention-mask",), "--reset-attention-mask"),
    "positions within documents": (("--reset-position-ids",), "--reset-position-ids"),
    "masking between documents": (
        ("--dataloader-inter-document-masking",),
        "--dataloader-inter-document-masking",
    ),
    "hybrid context parallel": (("--hybrid-context-parallel",), "--hybrid-context-parallel"),
    "reinforcement learning": (RL, "--perform-rl-step"),
    # The student, where layers are torch's
    "LayerNorm": (("--normalization", "LayerNorm"), "--normalization RMSNorm"),
    "experts": (("--num-experts", 4), "no --num-experts 4"),
    "window": (("--window-size", "4,0"), "--window-size"),
    # The data
    "data missing": (("--data-path", "{nowhere}"), "The data file {nowhere}.bin does not exist"),
    "data empty": (("--data-path", "{empty_data}"), "{empty_data}"),
    "data of three tokens": (("--data-path", "{three_tokens}"), "{three_tokens}"),
    "data without validation": (("--data-path", "{one_document}"), "{one_document}"),
    # The teacher's numbers
    "NaN in a layer": (
        ("--let-teacher", "{nan_layer}", "--save-interval", 1),
        "{nan_layer} gave NaN or Inf in microbatch 0 of step 1; the step was not taken",
    ),
    "Inf in a layer": (
        ("--let-teacher", "{inf_layer}", "--save-interval", 1),
        "{inf_layer} gave NaN or Inf in microbatch 0 of step 1; the step was not taken",
    ),
    "NaN in RKD's teacher": (
        (*RKD, "--let-teacher", "{nan_layer}", "--save-interval", 1),
        "{nan_layer} gave NaN or Inf in microbatch 0 of step 1; the step was not taken",
    ),
    # What is watched
    "guard without metrics of a baseline": (
        ("--let-guard", "--let-guard-baseline", "{nowhere}"),
        "--let-guard-baseline {nowhere} has no evaluation; give the metrics file of a run",
    ),
    # The output
    "folder of a baseline": (
        ("--save", "{baseline_run}", "--load", "{baseline_run}"),
        "{baseline_run} holds another run: --let-method is none there and let here",
    ),
    "folder of another seed": (
        ("--save", "{let_run}", "--load", "{let_run}", "--seed", 7),
        "{let_run} holds another run: --seed is 1234 there and 7 here",
    ),
    "folder started over": (("--save", "{let_run}"), "at iteration 5; add --load {let_run}"),
    "folder of stock Megatron": (("--save", "{stock_run}"), "holds another run at iteration 7"),
    "metrics of another run": (
        ("--let-metrics-path", "{other_metrics}"),
        "The metrics file {other_metrics} holds another run",
    ),
    # The recipe
    "unknown setting": (
        ("--config", "{misspelt}"),
        "let-wieght, which is no flag of Megatron or LET; did you mean let-weight?",
    ),
    "no such recipe": (("--config", "{nowhere}"), "The recipe {nowhere} does not exist"),
}  # fmt: skip

# Other runs, which the entry makes before any of the cases.
PREPARED: dict[str, tuple[str | int, ...]] = {
    "let_run": ("--save", "{let_run}", "--train-iters", 5),
    "baseline_run": ("--save", "{baseline_run}", "--train-iters", 5, "--let-method", "none"),
}

# what is odd -> (flags, what the warning says); the run goes on.
WARNED: dict[str, tuple[tuple[str | int, ...], str]] = {
    "stop step beyond the run": (
        ("--let-stop-step", 11),
        "--let-stop-step 11 is beyond the run's 10 steps: the weight never reaches 0",
    ),
    "teacher that does harm": (
        ("--let-guard", "--let-guard-baseline", "{low_losses}"),
        "LET: warning: the held-out loss is ",
    ),
    "flags without a method": (
        ("--let-method", "none"),
        "--let-layer, --let-stop-step, --let-teacher, --let-teacher-dtype, --let-weight",
    ),
}


# Things that are broken


def copy_teacher(teacher: Path, folder: Path, **config: Any) -> Path:
    shutil.copytree(teacher, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def spoil(teacher: Path, folder: Path, key: str, row: int, value: float) -> Path:
    """Copy a teacher with one row of a weight set to NaN or Inf."""
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
    """As many sequences of 64 tokens as ten steps read, and NAN_TOKEN in a single one of them."""
    tokens = np.random.default_rng(0).integers(0, NAN_TOKEN, size=80 * 64 + 1)
    tokens[20 * 64 + 30] = NAN_TOKEN
    return write_tokens(prefix, tokens)


def write_stock_run(folder: Path, iteration: int) -> Path:
    """Folder of a run without LET's signature: Megatron's tracker and a checkpoint."""
    (folder / f"iter_{iteration:07}").mkdir(parents=True)
    (folder / f"iter_{iteration:07}" / "__0_0.distcp").write_bytes(b"weights")
    (folder / TRACKER).write_text(str(iteration))
    return folder


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("broken")
    teacher = save_teacher(root / "teacher")
    things = {
        "nowhere": root / "nowhere",
        "empty_folder": root / "empty",
        "text_file": root / "teacher.txt",
        "teacher": teacher,
        "data": write_indexed_data(root / "walks"),
        "unknown": copy_teacher(teacher, root / "unknown", model_type="frobnicate"),
        "bert": root / "bert",
        "t5": root / "t5",
        "no_weights": copy_teacher(teacher, root / "no_weights"),
        "cut": copy_teacher(teacher, root / "cut"),
        "no_shard": copy_teacher(teacher, root / "no_shard"),
        "no_layer": copy_teacher(teacher, root / "no_layer", num_hidden_layers=NUM_LAYERS + 1),
        "words": save_words(root / "words", "two", "three", "four", "five"),
        "other_tokenizer": copy_teacher(teacher, root / "other_tokenizer"),
        "large_ids": write_tokens(root / "large_ids", *[[300] * 900] * 20),
        "empty_data": write_tokens(root / "empty_data"),
        "three_tokens": write_tokens(root / "three_tokens", *[[1, 2, 3]] * 10),
        "one_document": write_tokens(root / "one_document", range(200)),
        "nan_in_one": write_one_nan_token(root / "nan_in_one"),
        "nan_layer": spoil(
            teacher, root / "nan_layer", "model.layers.1.mlp.down_proj.weight", 0, np.nan
        ),
        "inf_layer": spoil(
            teacher, root / "inf_layer", "model.layers.1.mlp.down_proj.weight", 0, np.inf
        ),
        "nan_token": spoil(
            teacher, root / "nan_token", "model.embed_tokens.weight", NAN_TOKEN, np.nan
        ),
        "stock_run": write_stock_run(root / "stock_run", 7),
        "let_run": root / "let_run",
        "baseline_run": root / "baseline_run",
        "other_metrics": root / "other_metrics.jsonl",
        "low_losses": root / "low_losses.jsonl",
        "misspelt": root / "misspelt.yaml",
    }
    things["empty_folder"].mkdir()
    things["text_file"].write_text("weights")
    BertModel(BertConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2,
                         num_attention_heads=4, intermediate_size=64)).save_pretrained(
        things["bert"])  # fmt: skip
    T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    ).save_pretrained(things["t5"])
    (things["no_weights"] / "model.safetensors").unlink()
    os.truncate(things["cut"] / "model.safetensors", 999)
    (things["no_shard"] / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}})
    )
    shutil.copy(things["cut"] / "config.json", things["no_shard"] / "config.json")
    shutil.move(things["no_shard"] / "model.safetensors", things["no_shard"] / "a.safetensors")
    save_words(things["other_tokenizer"], "two", "three", "four", "FIVE")
    things["other_metrics"].write_text('{"iteration": 1, "lm_loss": 5.0}\n')
    things["low_losses"].write_text(
        "".join(f'{{"iteration": {step}, "valid_loss": 1.0}}\n' for step in (5, 10))
    )
    things["misspelt"].write_text("let:\n  let-wieght: 0.1\n")
    return things


# One process, forked for each case


@dataclass(frozen=True)
class Outcome:
    """What one fork did.

    Attributes:
        code: negative for a signal, as in subprocess.
        before: digests of the other runs' files before any of the cases.
    """

    code: int
    log: str
    folder: Path
    before: dict[str, str]

    @property
    def sentences(self) -> list[str]:
        return sentences(self.log)


def sentences(log: str) -> list[str]:
    """What follows `megatron_let: error (rank N):` in each such line."""
    return re.findall(r"^megatron_let: error \(rank \d+\): (.*)$", log, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    broken: dict[str, Path],
) -> dict[str, Outcome]:
    """Outcomes of the cases that are selected for this session."""
    root = tmp_path_factory.mktemp("cases")
    selected = {
        item.callspec.params["name"]
        for item in request.session.items
        if "outcomes" in getattr(item, "fixturenames", ())
    }
    tables = REFUSED | WARNED
    flags = PREPARED | {name: tables[name][0] for name in tables if name in selected}
    cases = {}
    for index, name in enumerate(flags):
        folder = root / str(index)
        folder.mkdir()
        cases[name] = {"argv": arguments(folder, broken, flags[name]), "folder": str(folder)}
    (root / "cases.json").write_text(json.dumps({"cases": cases, "others": others(broken)}))
    # A fork cannot use CUDA; what is refused here does not depend on the device.
    variables = {"TEACHER": str(broken["teacher"]), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(
        [sys.executable, "-m", "tests.distributed.test_bad_input", str(root / "cases.json")],
        env=environment(**variables),
        cwd=root,
        check=True,
    )
    found = json.loads((root / "found.json").read_text())
    assert all(found["codes"][name] == 0 for name in PREPARED)
    return {
        name: Outcome(
            found["codes"][name],
            Path(case["folder"] + ".log").read_text(),
            Path(case["folder"]),
            found["before"],
        )
        for name, case in cases.items()
    }


def arguments(folder: Path, broken: dict[str, Path], flags: tuple[Any, ...]) -> list[str]:
    """The tiny recipe on good data into `folder`, and the flags of the case."""
    common = {
        "--config": str(ROOT / "configs/tiny.yaml"),
        "--data-path": str(broken["data"]),
        "--save": str(folder / "checkpoints"),
        "--let-metrics-path": str(folder / "metrics.jsonl"),
    }
    ours = [text for pair in common.items() if pair[0] not in flags for text in pair]
    return ours + [str(flag).format(**broken) for flag in flags]


def serve(request: Path) -> None:
    """Import everything once and fork for each case; exit codes go to found.json."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    from megatron_let.compat.device import detect_host, prepare_process

    prepare_process(detect_host(), 0)
    import megatron_let.integration  # noqa: F401
    from megatron_let.pretrain import main

    asked = json.loads(request.read_text())
    codes: dict[str, int] = {}
    before: dict[str, str] = {}
    for name, case in asked["cases"].items():
        if name not in PREPARED and not before:
            before = digests(*asked["others"])
        os.environ["MASTER_PORT"] = str(free_port())
        codes[name] = exit_code_in_fork(
            functools.partial(run_case, main, case["argv"], Path(case["folder"]))
        )
    request.with_name("found.json").write_text(json.dumps({"codes": codes, "before": before}))


def run_case(main: Any, argv: list[str], folder: Path) -> int:
    signal.alarm(CASE_SECONDS)
    with open(f"{folder}.log", "w") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    os.chdir(folder)
    try:
        code = int(main(argv))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def digests(*places: str) -> dict[str, str]:
    """Of every file in these folders, and of these files."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for place in places
        for path in (Path(place), *Path(place).rglob("*"))
        if path.is_file()
    }


def others(broken: dict[str, Path]) -> list[str]:
    """Where other runs have written."""
    return [str(broken[n]) for n in ("let_run", "baseline_run", "stock_run", "other_metrics")]


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_in_one_sentence(
    name: str, outcomes: dict[str, Outcome], broken: dict[str, Path]
) -> None:
    outcome, expected = outcomes[name], REFUSED[name][1].format(**broken)
    assert outcome.code != -signal.SIGALRM, f"no end after {CASE_SECONDS} s:\n{outcome.log[-600:]}"
    assert len(outcome.sentences) == 1, f"not one sentence but:\n{outcome.log[-1500:]}"
    (sentence,) = outcome.sentences
    assert expected in sentence and sentence.endswith((".", "?")), sentence
    assert outcome.code == 2
    assert "Traceback" not in outcome.log
    left = {str(path.relative_to(outcome.folder)) for path in outcome.folder.rglob("*.*")}
    assert left <= {"checkpoints/run.json"}, "half-written"
    assert digests(*others(broken)) == outcome.before, "another run was written over"


@pytest.mark.parametrize("name", WARNED)
def test_odd_input_warns_and_the_run_goes_on(name: str, outcomes: dict[str, Outcome]) -> None:
    outcome, expected = outcomes[name], WARNED[name][1]
    assert outcome.code == 0, outcome.log[-1500:]
    assert outcome.log.count(expected) == 1, "said once"
    rows = (outcome.folder / "metrics.jsonl").read_text().splitlines()
    assert sum("lm_loss" in row for row in rows) == 10


# Under torchrun, where one rank knows and the others must end too


def assert_refused(folder: Path, broken: dict[str, Path], expected: str, *flags: Any) -> None:
    """Two ranks end, none left waiting, with one sentence however many of them say it."""
    start = time.monotonic()
    run = train(
        folder, "--data-path", broken["data"], *flags, ranks=2, check=False,
        TEACHER=str(broken["teacher"]),
    )  # fmt: skip
    assert time.monotonic() - start < RUN_SECONDS
    assert run.returncode != 0
    assert expected in run.error
    assert len(set(sentences(run.log))) == 1, sentences(run.log)


def test_ranks_say_the_same_sentence_at_start_up(tmp_path: Path, broken: dict[str, Path]) -> None:
    cut = broken["cut"]
    assert_refused(tmp_path, broken, "is cut short or damaged", "--let-teacher", cut)
    assert not digests(str(tmp_path))


def test_folder_of_another_run_ends_the_ranks_that_did_not_look(
    tmp_path: Path, broken: dict[str, Path]
) -> None:
    save = broken["stock_run"]
    before = digests(str(save))
    flags = ("--save", save, "--pipeline-model-parallel-size", 2)
    assert_refused(tmp_path, broken, "holds another run at iteration 7", *flags)
    assert digests(str(save)) == before


def test_token_that_only_the_first_rank_reads_ends_the_others(
    tmp_path: Path, broken: dict[str, Path]
) -> None:
    flags = ("--data-path", broken["large_ids"], "--tensor-model-parallel-size", 2)
    assert_refused(tmp_path, broken, "The data has token id 300", *flags)


@pytest.mark.parametrize("layout", [(), ("--pipeline-model-parallel-size", 2)], ids=["dp2", "pp2"])
def test_nan_of_the_teacher_ends_all_ranks_before_the_step(
    layout: tuple[Any, ...], tmp_path: Path, broken: dict[str, Path]
) -> None:
    """With DP2 one replica alone meets the token."""
    save = tmp_path / "checkpoints"
    flags = ("--data-path", broken["nan_in_one"], "--split", "100,0,0", "--eval-iters", 0)
    saving = ("--save", save, "--save-interval", 1)
    expected = f"The teacher {broken['nan_token']} gave NaN or Inf in microbatch"
    assert_refused(
        tmp_path, broken, expected, "--let-teacher", broken["nan_token"], *flags, *saving, *layout
    )
    taken = int((save / TRACKER).read_text()) if (save / TRACKER).exists() else 0
    assert sorted(path.name for path in save.glob("iter_*")) == [
        f"iter_{step:07}" for step in range(1, taken + 1)
    ]
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines() if taken else []
    assert [json.loads(row)["iteration"] for row in rows] == list(range(1, taken + 1))


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
