"""Train a small model, then a larger one without and with it as the teacher, and compare.

Run it by `bash launch/quickstart.sh`, which first makes the environment. It is the command line of
preprocessing and of conversion, and the sweep configs/sweep_head_to_head.yaml with one seed.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_let.cli.common import check_output, output_console, positive, run_command, say
from megatron_let.cli.compare import report
from megatron_let.cli.local_run import (
    LOG,
    ROOT,
    Trainer,
    export,
    interruptible,
    run_environment,
    run_subcommand,
)
from megatron_let.config.recipes import find_recipe, load_recipe
from megatron_let.doctor.check import driver_versions
from megatron_let.errors import LETError
from megatron_let.files.atomic import write_json
from megatron_let.files.environment_text import environment_text
from megatron_let.files.names import DONE, METRICS
from megatron_let.metrics.compare import load_run
from megatron_let.metrics.sweep import SweepRun, flags_of, load_sweep, runs_of
from megatron_let.planner.sizes import TransformerSize, teacher_size

SIGNATURE = "quickstart.json"
SMOLLM2 = "smollm2"
_ALREADY_DONE = "      already done"
_CONTROL = (
    "In the documented runs of the quickstart on a CPU, a teacher with random weights gave half of"
    " the gain or more (docs/results.md)."
)
_SWEEP = Path("sweep_head_to_head")
_STUDENT_RECIPE, _TEACHER_RECIPE = Path("quickstart_baseline"), Path("quickstart_teacher")
_VOCAB_SIZE = 4096
# The small model sees seven times the student's tokens; on a GPU, fourteen times.
_TEACHER_STEPS_PER_STEP = 7
_STEPS = 224
# Settings over the recipes' on a GPU.
_GPU_STEPS = 1100
_GPU = {"seq-length": 1024, "max-position-embeddings": 1024, "bf16": True}
_GPU_STUDENT = _GPU | {
    "num-layers": 12, "hidden-size": 768, "ffn-hidden-size": 2048, "num-attention-heads": 12,
    "micro-batch-size": 32, "global-batch-size": 32, "lr": 6e-4, "min-lr": 6e-5,
}  # fmt: skip
_GPU_TEACHER = _GPU | {
    "num-layers": 4, "hidden-size": 256, "ffn-hidden-size": 704,
    "micro-batch-size": 64, "global-batch-size": 64,
}  # fmt: skip
# Of code; prose has more, so that the text suffices.
_BYTES_PER_TOKEN = 3
_HELD_OUT_DOCUMENTS, _HELD_OUT_CHARACTERS = 24, 2_000
_MIN_CHARACTERS = 100_000
_TOKENIZER_CHARACTERS = 6_000_000
# Of a document made of paragraphs.
_PIECE_CHARACTERS = 4_000


def main(argv: list[str] | None = None) -> int:
    """Run all stages; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parse(argv)
    command = shlex.join(["bash", "launch/quickstart.sh", *argv])
    with interruptible():
        return run_command(
            "quickstart",
            lambda _: _Quickstart(options, command).run(),
            f"interrupted; continue where it stopped with: {command}",
        )


def _parse(argv: list[str]) -> argparse.Namespace:
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="quickstart.sh", description=description)
    add = parser.add_argument
    add("--steps", type=int, help=f"steps of the student (default: {_STEPS}; GPU: {_GPU_STEPS})")
    add("--seed", type=positive, default=1234, help="of all runs (default: 1234)")
    add("--output", type=Path, default=ROOT / "runs" / "quickstart", help="folder of the results")
    add("--teacher", help=f"instead of training one: a folder, .gguf file, hub id or {SMOLLM2}")
    add("--text", type=Path, nargs="+", help="text files")
    add("--verbose", action="store_true", help="show the output of all programs, not only the log")
    options = parser.parse_args(argv)
    if options.steps is not None and options.steps < 20:
        parser.error(f"--steps is {options.steps}; give at least 20")
    options.output = options.output.resolve()
    # A file given twice would be held out and trained on.
    options.text = list(dict.fromkeys(path.resolve() for path in options.text or ()))
    return options


class _Quickstart:
    """The stages, of which each leaves finished what it made."""

    def __init__(self, options: argparse.Namespace, command: str) -> None:
        self.options, self.command = options, command
        self.console = output_console()
        self.verbose = self.console if options.verbose else None
        self.output: Path = options.output
        self.data = self.output / "data"
        self.teacher_run = self.output / "teacher_training"
        self.log = self.output / "quickstart.log"
        self.gpu = _has_gpu()
        self.student = load_recipe(_STUDENT_RECIPE) | (_GPU_STUDENT if self.gpu else {})
        self.small = load_recipe(_TEACHER_RECIPE) | (_GPU_TEACHER if self.gpu else {})
        self.steps: int = options.steps or (_GPU_STEPS if self.gpu else _STEPS)
        self.teacher_steps = _TEACHER_STEPS_PER_STEP * self.steps
        # Ranks of the small model, and then students at a time.
        self.processes = 1 if self.gpu else min(2, len(os.sched_getaffinity(0)))
        self.trains_teacher = options.teacher is None
        self.stage = 0

    def run(self) -> int:
        """Run the stages; return the exit code."""
        start = time.monotonic()
        check_output(self.output)
        self._claim_output()
        say(self.console, f"output: {self.output}; logs: {self.log.name}, */{LOG} in it")
        if self.trains_teacher:
            self._prepare_data(self.output / "tokenizer")
            teacher = self._train_teacher()
        else:
            teacher = self._given_teacher()
            self._prepare_data(teacher)
        self._train_students(teacher)
        self._report()
        say(self.console, f"done in {(time.monotonic() - start) / 60:.1f} minutes")
        return 0

    def _say_stage(self, text: str) -> None:
        self.stage += 1
        say(self.console, f"[{self.stage}/{5 if self.trains_teacher else 4}] {text}")

    def _claim_output(self) -> None:
        """Record the options in the output folder; until a run begins there, they may change.

        Raises:
            LETError: the folder has other files, or runs of other options.
        """
        teacher = self.options.teacher
        known = teacher is None or not Path(teacher).exists()
        wanted = {
            "steps": self.steps,
            "seed": self.options.seed,
            "teacher": teacher if known else str(Path(teacher).resolve()),
            "text": [*map(str, self.options.text)],
        }
        signature = self.output / SIGNATURE
        found = json.loads(signature.read_text()) if signature.is_file() else {}
        if found == wanted:
            return
        for name, value in wanted.items():
            if found.get(name) != value and any(self.output.glob(f"*/{METRICS}")):
                raise LETError(
                    f"{self.output} holds another quickstart: --{name} is {found.get(name)} there"
                    f" and {value} here; give another --output."
                )
        if not found and self.output.is_dir() and any(self.output.iterdir()):
            raise LETError(
                f"{self.output} is not empty and holds no quickstart; give another --output."
            )
        for name in ("data", "tokenizer"):
            shutil.rmtree(self.output / name, ignore_errors=True)
        self.output.mkdir(parents=True, exist_ok=True)
        write_json(signature, wanted)

    def _prepare_data(self, tokenizer: Path) -> None:
        """Tokenize the text once into a training and a held-out set."""
        texts = map(str, self.options.text or ["sources and documents of this environment"])
        own = f" and a tokenizer of {_VOCAB_SIZE:,} tokens" if self.trains_teacher else ""
        self._say_stage(f"text{own}, 10 to 60 seconds: {', '.join(texts)}")
        if (self.data / DONE).is_file():
            return say(self.console, _ALREADY_DONE)
        held_out, training = _split(list(self._documents()))
        if self.trains_teacher:
            _train_tokenizer(training, tokenizer)
        # An interrupted stage starts over.
        shutil.rmtree(self.data, ignore_errors=True)
        for name, documents in (("valid", held_out), ("train", training)):
            lines, prefix = self.data / f"{name}.jsonl", self.data / name
            lines.parent.mkdir(exist_ok=True)
            lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
            words = ("preprocess", "--input", lines, "--output-prefix", prefix)
            run_subcommand((*words, "--tokenizer-model", tokenizer), self.log, self.verbose)
            size = sum(map(len, documents)) / 1e6
            say(self.console, f"      {name}: {len(documents):,} documents, {size:.2f} MB")
        (self.data / DONE).touch()

    def _documents(self) -> Iterator[str]:
        """Yield the text files' pieces, or as much of this environment's text as is needed."""
        if self.options.text:
            yield from _text_files(self.options.text)
            return
        settings, steps = self.student, self.steps
        if self.trains_teacher:
            settings, steps = self.small, self.teacher_steps
        tokens = steps * settings["global-batch-size"] * settings["seq-length"]
        yield from environment_text(max(tokens * _BYTES_PER_TOKEN, 1_000_000))

    def _train_teacher(self) -> Path:
        """Train the small model, and return its Hugging Face folder."""
        folder = self.output / "teacher"
        size = _size(self.small, _VOCAB_SIZE)
        self._say_stage(
            f"the small model, {_millions(size)} parameters: {self.teacher_steps} steps"
        )
        settings = _schedule(self.teacher_steps) | (_GPU_TEACHER if self.gpu else {})
        flags = ("--seed", str(self.options.seed), *flags_of(settings))
        run = SweepRun("teacher", self.options.seed, find_recipe(_TEACHER_RECIPE), flags)
        self._train({self.teacher_run: run}, self.output / "tokenizer", 1, self.processes)
        self._say_stage("its checkpoint as a Hugging Face folder, about 10 seconds")
        if (folder / "config.json").is_file():
            say(self.console, _ALREADY_DONE)
        export(self.teacher_run, folder, self.log, self.verbose)
        self._say_cost(size)
        return folder

    def _given_teacher(self) -> Path:
        """Return the folder of `--teacher`, and say what it costs."""
        given = self.options.teacher
        self._say_stage(f"teacher: {given}")
        with self._output_to_log():
            from megatron_let.teacher.inspect import inspect_teacher
            from megatron_let.teacher.package import packaged_teacher

            folder = inspect_teacher(packaged_teacher() if given == SMOLLM2 else given).path
            size = teacher_size(str(folder))
        self._say_cost(size)
        return folder

    def _say_cost(self, teacher: TransformerSize) -> None:
        """Say how an aligned step compares with a plain one, in arithmetic."""
        student, length = _size(self.student, teacher.vocab_size), self.student["seq-length"]
        share = teacher.forward_flops(length, False) / (3 * student.forward_flops(length, True))
        text = f"      an aligned step has {1 + share:.2f} times the arithmetic of a plain one"
        if _parameters(teacher) > _parameters(student):
            text += (
                f": the teacher, {_millions(teacher)} parameters, is larger than the student,"
                f" {_millions(student)}, where the paper's is at most a tenth of it"
            )
        say(self.console, text)

    def _train_students(self, teacher: Path) -> None:
        """Train both variants of the sweep, side by side if there are two cores."""
        self._say_stage(f"the student without and with the teacher: {self.steps} steps each")
        sweep = load_sweep(_SWEEP)
        settings = _schedule(self.steps) | (_GPU_STUDENT if self.gpu else {})
        for name, flags in sweep.variants.items():
            aligned = {"let-stop-step": self.steps // 5} if name != sweep.baseline else {}
            sweep.variants[name] = {**flags, **settings, **aligned}
        runs = runs_of(sweep, [self.options.seed])
        self._train({self.output / run.variant: run for run in runs}, teacher, self.processes, 1)

    def _train(
        self, runs: dict[Path, SweepRun], teacher: Path, jobs: int, nproc_per_node: int
    ) -> None:
        environment = run_environment(self.data, teacher, jobs * nproc_per_node)
        trainer = Trainer(environment, self.console, jobs, nproc_per_node, self.options.verbose)
        for message in trainer.train(runs).values():
            raise LETError(message)

    def _report(self) -> None:
        self._say_stage("report")
        runs = [load_run(name, self.output / name) for name in load_sweep(_SWEEP).variants]
        title = "The student without and with the small model as its teacher"
        remarks = [self._spent(runs[0].seconds()), _CONTROL] if self.trains_teacher else []
        report(runs, None, self.output / "comparison", title, self.command, remarks)

    def _spent(self, baseline_seconds: Mapping[int, float]) -> str:
        """Return the small model's own loss and cost in a sentence."""
        small = load_run("teacher", self.teacher_run)
        step, loss = small.metrics.last_step, small.metrics.final_valid_loss
        tokens, seconds = small.tokens()[step], small.seconds()[step]
        share = seconds / max(baseline_seconds.values())
        return (
            f"The small model's own held-out loss is {loss:.4f}, after {tokens:,.0f} tokens. Its"
            f" training took {seconds:.0f} s on all cores, {share:.0%} of the baseline's seconds;"
            " the times above leave it out."
        )

    @contextlib.contextmanager
    def _output_to_log(self) -> Iterator[None]:
        """Send what this process prints, libraries included, to the log."""
        if self.options.verbose:
            yield
            return
        streams = {1: os.dup(1), 2: os.dup(2)}
        try:
            with self.log.open("a") as log:
                for stream in streams:
                    os.dup2(log.fileno(), stream)
            yield
        finally:
            for stream, saved in streams.items():
                os.dup2(saved, stream)
                os.close(saved)


def _has_gpu() -> bool:
    """Return whether torch can use a GPU; imports it only where there is a driver."""
    if not driver_versions():
        return False
    import torch

    return torch.cuda.is_available()


def _schedule(steps: int) -> dict[str, Any]:
    """Return the settings that follow from the number of steps: sixteen evaluations, four saves."""
    return {
        "train-iters": steps,
        "lr-warmup-iters": max(1, steps // 10),
        "eval-interval": max(1, steps // 16),
        "save-interval": max(1, steps // 4),
    }


def _size(settings: Mapping[str, Any], vocab_size: int) -> TransformerSize:
    heads, hidden = settings["num-attention-heads"], settings["hidden-size"]
    return TransformerSize(
        num_layers=settings["num-layers"],
        hidden_size=hidden,
        ffn_hidden_size=settings["ffn-hidden-size"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        gated=True,
        vocab_size=vocab_size,
        tied=True,
    )


def _parameters(size: TransformerSize) -> int:
    return size.num_layers * size.layer_params + size.embedding_params


def _millions(size: TransformerSize) -> str:
    return f"{_parameters(size) / 1e6:.1f}M"


def _text_files(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        if not path.is_file():
            raise LETError(f"The text file {path} does not exist.")
        try:
            text = path.read_text()
        except UnicodeDecodeError as error:
            raise LETError(f"The text file {path} is not UTF-8 ({error.reason}).") from error
        yield from _pieces(text)


def _pieces(text: str) -> Iterator[str]:
    """Gather paragraphs into documents, so that a part of a single file can be held out too."""
    piece = ""
    for paragraph in text.split("\n\n"):
        piece += paragraph + "\n\n"
        if len(piece) >= _PIECE_CHARACTERS:
            yield piece
            piece = ""
    if piece.strip():
        yield piece


def _split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Hold out the beginnings of the first documents, at most a tenth of the documents.

    Raises:
        LETError: there is too little text.
    """
    size, number = sum(map(len, documents)), min(_HELD_OUT_DOCUMENTS, len(documents) // 10)
    if size < _MIN_CHARACTERS or not number:
        raise LETError(
            f"The text has {size:,} characters in {len(documents)} parts, and at least"
            f" {_MIN_CHARACTERS:,} in 10 are needed; give more --text."
        )
    return [text[:_HELD_OUT_CHARACTERS] for text in documents[:number]], documents[number:]


def _train_tokenizer(documents: list[str], folder: Path) -> None:
    """Train a byte-level BPE, and save it as a Hugging Face folder."""
    from tokenizers import ByteLevelBPETokenizer

    end, tokenizer = "<|endoftext|>", ByteLevelBPETokenizer()
    share = max(1, sum(map(len, documents)) // _TOKENIZER_CHARACTERS)
    tokenizer.train_from_iterator(
        documents[::share], _VOCAB_SIZE, min_frequency=0, show_progress=False, special_tokens=[end]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    write_json(folder / "tokenizer_config.json", settings)
