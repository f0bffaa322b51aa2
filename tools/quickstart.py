"""The quickstart: the same small model trained twice, without and with a real teacher.

Run it by `bash launch/quickstart.sh`, which makes the environment first.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_let.cli.local_run import train_locally
from megatron_let.data.counts import Tally
from megatron_let.data.environment_text import environment_text
from megatron_let.data.indexed import write_indexed
from megatron_let.data.text_tokenizer import load_hugging_face
from megatron_let.errors import LETError
from megatron_let.metrics.head_to_head import (
    comparison_table,
    head_to_head,
    plot_losses,
    sentences,
)
from megatron_let.metrics.provenance import provenance, write_csv
from megatron_let.metrics.read import load_metrics
from megatron_let.teacher.inspect import inspect_teacher
from megatron_let.teacher.package import packaged_teacher

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("baseline", "let")
SIGNATURE = "quickstart.json"
SEQUENCE_LENGTH = 128
TOKENS_PER_STEP = 8 * SEQUENCE_LENGTH
VALID_TOKENS = 8 * TOKENS_PER_STEP
BYTES_PER_TOKEN = 3  # of code, and fewer than of prose, so that the text suffices


def main() -> int:
    """Run all stages; return the exit code."""
    options = _parse()
    console = Console(width=None if sys.stdout.isatty() else 100)
    start = time.monotonic()
    try:
        with _claimed_output(options):
            console.print(f"[1/4] teacher: {options.teacher or 'SmolLM2-135M from its package'}")
            folder = inspect_teacher(options.teacher or packaged_teacher())
            console.print(f"[2/4] text: {_describe_text(options)}")
            _prepare_data(options, folder.path, console)
        console.print(f"[3/4] two runs of {options.steps} steps, same seed and data order")
        for method in METHODS:
            output = options.output / method
            environment = _environment(options, folder.path, output)
            command = _command(method, options.steps)
            train_locally(method, command, environment, output, options.steps, console)
    except LETError as error:
        console.print(f"quickstart: error: {error}", style="red", highlight=False, soft_wrap=True)
        return 2
    console.print("[4/4] report")
    _report(options, console)
    console.print(f"done in {(time.monotonic() - start) / 60:.1f} minutes")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="quickstart.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="of each run (default: 200)")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "runs" / "quickstart", help="folder of the results"
    )
    parser.add_argument("--teacher", type=Path, help="Hugging Face folder or .gguf of your own")
    parser.add_argument("--text", type=Path, nargs="+", help="text files of your own")
    options = parser.parse_args()
    if options.steps < 20:
        parser.error(f"--steps is {options.steps}; give at least 20")
    options.output = options.output.resolve()
    return options


@contextmanager
def _claimed_output(options: argparse.Namespace) -> Iterator[None]:
    """Sign the output folder; take the signature back if teacher or text are then refused."""
    is_new = _claim_output(options)
    try:
        yield
    except LETError:
        if is_new:
            shutil.rmtree(options.output / "data", ignore_errors=True)
            (options.output / SIGNATURE).unlink()
        raise


def _claim_output(options: argparse.Namespace) -> bool:
    """Sign the output folder with the options, or refuse one that another run has signed.

    Returns:
        Whether this call signed it.
    """
    wanted = {
        "steps": options.steps,
        "teacher": str(options.teacher.resolve()) if options.teacher else None,
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
        return False
    if options.output.is_dir() and any(options.output.iterdir()):
        raise LETError(f"{options.output} is not empty and no quickstart's; give another --output.")
    options.output.mkdir(parents=True, exist_ok=True)
    signature.write_text(json.dumps(wanted, indent=2) + "\n")
    return True


def _describe_text(options: argparse.Namespace) -> str:
    if options.text:
        return ", ".join(str(path) for path in options.text)
    return "sources and documents of this Python environment"


def _documents(options: argparse.Namespace) -> Iterator[str]:
    needed = (options.steps * TOKENS_PER_STEP + VALID_TOKENS) * BYTES_PER_TOKEN
    if not options.text:
        yield from environment_text(max(needed, 1_000_000))
        return
    for path in options.text:
        if not path.is_file():
            raise LETError(f"The text file {path} does not exist.")
        try:
            text = path.read_text()
        except UnicodeDecodeError as error:
            raise LETError(f"The text file {path} is no UTF-8 ({error.reason}).") from error
        # Paragraphs, gathered, so that a part can be held out of a single file too.
        yield from _pieces(text)


def _pieces(text: str, size: int = 4_000) -> Iterator[str]:
    piece = ""
    for paragraph in text.split("\n\n"):
        piece += paragraph + "\n\n"
        if len(piece) >= size:
            yield piece
            piece = ""
    if piece.strip():
        yield piece


def _prepare_data(options: argparse.Namespace, tokenizer: Path, console: Console) -> None:
    """Tokenise the text once into a training and a held-out set."""
    folder = options.output / "data"
    counts_file = folder / "counts.json"
    if not counts_file.is_file():
        hf_tokenizer = load_hugging_face(tokenizer)
        held_out, training = _split(list(_documents(options)))
        counts = {
            "valid": write_indexed(folder / "valid", held_out, hf_tokenizer),
            "train": write_indexed(folder / "train", training, hf_tokenizer),
        }
        _check_enough(counts)
        counts_file.write_text(json.dumps({name: vars(c) for name, c in counts.items()}))
    for name, count in json.loads(counts_file.read_text()).items():
        console.print(f"      {name}: {count['documents']} documents, {count['tokens']:,} tokens")


def _split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Hold out the first documents, up to the validation size but at most a tenth of the text."""
    budget = min(VALID_TOKENS * BYTES_PER_TOKEN, sum(map(len, documents)) // 10)
    held_out: list[str] = []
    while documents and sum(map(len, held_out)) < budget:
        held_out.append(documents.pop(0)[:budget])
    return held_out, documents


def _check_enough(counts: dict[str, Tally]) -> None:
    for name, count in counts.items():
        if count.tokens <= 8 * SEQUENCE_LENGTH:
            raise LETError(
                f"The text gives {count.tokens} tokens for the {name} set and a batch is 8"
                f" sequences of {SEQUENCE_LENGTH}; give more --text."
            )


def _command(method: str, steps: int) -> list[str]:
    flags = ["--train-iters", str(steps), "--lr-warmup-iters", str(max(1, steps // 10))]
    if method == "let":
        flags += ["--let-stop-step", str(steps // 3)]
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
        "-m", "megatron_let.pretrain", "--config", str(ROOT / f"configs/quickstart_{method}.yaml"),
        *flags,
    ]  # fmt: skip


def _environment(options: argparse.Namespace, teacher: Path, output: Path) -> dict[str, str]:
    variables = {"DATA": options.output / "data", "TEACHER": teacher, "OUTPUT": output}
    threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    # All files are local by now; transformers must not look for a network.
    fixed = {"HF_HUB_OFFLINE": "1", **{name: str(path) for name, path in variables.items()}}
    return {**threads, **os.environ, **fixed}


def _report(options: argparse.Namespace, console: Console) -> None:
    """Print the table and write report.json and losses.png."""
    runs = {m: load_metrics(options.output / m / "metrics.jsonl") for m in METHODS}
    rows = comparison_table(runs["baseline"], runs["let"])
    console.print(_table(rows))
    summary = head_to_head(runs, options.steps, TOKENS_PER_STEP)
    for line in sentences(summary):
        console.print(line, highlight=False)
    source = provenance(" ".join(["bash launch/quickstart.sh", *sys.argv[1:]]))
    files = {name: options.output / name for name in ("losses.png", "losses.csv", "report.json")}
    curves = {"baseline": runs["baseline"], "LET": runs["let"]}
    plot_losses(curves, files["losses.png"], "The same student without and with the teacher")
    write_csv(files["losses.csv"], rows, source)
    files["report.json"].write_text(json.dumps(summary | source, indent=2) + "\n")
    for path in files.values():
        console.print(f"written: {path}", soft_wrap=True)
    for method in METHODS:
        console.print(f"{method}: {options.output / method}", soft_wrap=True)


def _table(rows: list[dict[str, Any]]) -> Table:
    columns = ("step", "baseline", "LET", "difference", "cosine", "weight")
    table = Table(*columns, title="held-out loss")
    for row in rows:
        ours, theirs = row["let_valid_loss"], row["baseline_valid_loss"]
        cosine, weight = row["let_cosine"], row["let_weight"]
        table.add_row(
            str(row["step"]),
            f"{theirs:.4f}",
            f"{ours:.4f}",
            f"{ours - theirs:+.4f}",
            "" if cosine is None else f"{cosine:.3f}",
            "" if weight is None else f"{weight:.3f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
