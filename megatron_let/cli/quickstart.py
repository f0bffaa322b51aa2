"""Train the same small model without and with a real teacher, and compare.

Run it by `bash launch/quickstart.sh`, which first makes the environment. It prepares data and
teacher, and is then the sweep configs/sweep_head_to_head.yaml with one seed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from megatron_let.cli.common import output_console, run_command, say
from megatron_let.cli.compare import report
from megatron_let.cli.local_run import ROOT, run_environment, train_locally
from megatron_let.errors import LETError
from megatron_let.files.atomic import write_json
from megatron_let.files.environment_text import environment_text
from megatron_let.metrics.compare import ComparedRun, load_run
from megatron_let.metrics.sweep import load_sweep, runs_of

SIGNATURE = "quickstart.json"
_SWEEP = Path("sweep_head_to_head")
_SEED = 1234
_SEQUENCE_LENGTH = 128
_TOKENS_PER_STEP = 8 * _SEQUENCE_LENGTH
_VALID_TOKENS = 8 * _TOKENS_PER_STEP
_BYTES_PER_TOKEN = 3  # of code, and fewer than of prose, so that the text suffices
# Of a document made of paragraphs.
_PIECE_CHARACTERS = 4_000


def main(argv: list[str] | None = None) -> int:
    """Run all stages; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parse(argv)
    command = shlex.join(["bash", "launch/quickstart.sh", *argv])
    return run_command(
        "quickstart",
        lambda console: _quickstart(options, command),
        "interrupted; run it again to continue",
    )


def _quickstart(options: argparse.Namespace, command: str) -> int:
    # Imported once Megatron's and transformers' warnings are off.
    from megatron_let.teacher.inspect import inspect_teacher
    from megatron_let.teacher.package import packaged_teacher

    start, console = time.monotonic(), output_console()
    with _claimed_output(options):
        say(console, f"[1/4] teacher: {options.teacher or 'SmolLM2-135M from its package'}")
        teacher = inspect_teacher(options.teacher or packaged_teacher()).path
        texts = map(str, options.text or ["sources and documents of this Python environment"])
        say(console, f"[2/4] text: {', '.join(texts)}")
        _prepare_data(options, teacher, console)
    say(console, f"[3/4] two runs of {options.steps} steps, same seed and data order")
    runs = _train(options, teacher, console)
    say(console, "[4/4] report")
    title = "The same student without and with the teacher"
    report(runs, None, options.output / "comparison", title, command)
    for run in runs:
        say(console, f"{run.name}: {run.path}")
    say(console, f"done in {(time.monotonic() - start) / 60:.1f} minutes")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="quickstart.sh", description=description)
    add = parser.add_argument
    add("--steps", type=int, default=200, help="steps of each run (default: 200)")
    add("--output", type=Path, default=ROOT / "runs" / "quickstart", help="folder of the results")
    add("--teacher", type=Path, help="model folder, .gguf file or hub id")
    add("--text", type=Path, nargs="+", help="text files")
    options = parser.parse_args(argv)
    if options.steps < 20:
        parser.error(f"--steps is {options.steps}; give at least 20")
    options.output = options.output.resolve()
    return options


@contextmanager
def _claimed_output(options: argparse.Namespace) -> Iterator[None]:
    """Record the options in the output folder; remove the record if validation fails.

    Raises:
        LETError: the folder has other files, or records other options.
    """
    teacher = options.teacher
    wanted = {
        "steps": options.steps,
        "teacher": None
        if teacher is None
        else str(teacher.resolve() if teacher.exists() else teacher),
        "text": [str(path.resolve()) for path in options.text or ()],
    }
    signature = options.output / SIGNATURE
    if signature.is_file():
        found = json.loads(signature.read_text())
        for name, value in wanted.items():
            if found.get(name) != value:
                raise LETError(
                    f"{options.output} holds another quickstart: --{name} is {found.get(name)}"
                    f" there and {value} here; give another --output."
                )
        yield
        return
    if options.output.is_dir() and any(options.output.iterdir()):
        raise LETError(
            f"{options.output} is not empty and holds no quickstart; give another --output."
        )
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(signature, wanted)
    try:
        yield
    except LETError:
        shutil.rmtree(options.output / "data", ignore_errors=True)
        signature.unlink()
        raise


def _prepare_data(options: argparse.Namespace, tokenizer: Path, console: Console) -> None:
    """Tokenise the text once into a training and a held-out set."""
    from megatron_let.data.indexed import write_indexed
    from megatron_let.data.text_tokenizer import load_hugging_face

    folder = options.output / "data"
    counts_file = folder / "counts.json"
    if not counts_file.is_file():
        hf_tokenizer = load_hugging_face(tokenizer)
        held_out, training = _split(list(_documents(options)))
        counts = {}
        for name, documents in (("valid", held_out), ("train", training)):
            counts[name] = write_indexed(folder / name, documents, hf_tokenizer)
        for name, count in counts.items():
            if count["tokens"] <= _TOKENS_PER_STEP:
                raise LETError(
                    f"The text gives {count['tokens']} tokens for the {name} set and a batch has"
                    f" {_TOKENS_PER_STEP}; give more --text."
                )
        write_json(counts_file, counts)
    for name, count in json.loads(counts_file.read_text()).items():
        say(console, f"      {name}: {count['documents']} documents, {count['tokens']:,} tokens")


def _documents(options: argparse.Namespace) -> Iterator[str]:
    needed = (options.steps * _TOKENS_PER_STEP + _VALID_TOKENS) * _BYTES_PER_TOKEN
    if not options.text:
        yield from environment_text(max(needed, 1_000_000))
        return
    for path in options.text:
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
    """Hold out the first documents, up to the validation size but at most a tenth of the text."""
    budget = min(_VALID_TOKENS * _BYTES_PER_TOKEN, sum(map(len, documents)) // 10)
    held_out: list[str] = []
    while documents and sum(map(len, held_out)) < budget:
        held_out.append(documents.pop(0)[:budget])
    return held_out, documents


def _train(options: argparse.Namespace, teacher: Path, console: Console) -> list[ComparedRun]:
    """Train both variants of the sweep."""
    flags = {
        "--train-iters": options.steps,
        "--lr-warmup-iters": max(1, options.steps // 10),
        "--let-stop-step": options.steps // 3,
    }
    more = [str(word) for flag in flags.items() for word in flag]
    environment = run_environment(options.output / "data", teacher)
    trained = []
    for run in runs_of(load_sweep(_SWEEP), [_SEED], more):
        folder = options.output / run.variant
        train_locally(run, folder, environment, console)
        trained.append(load_run(run.variant, folder))
    return trained
