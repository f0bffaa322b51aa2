"""Text files to the indexed data sets that Megatron's GPTDataset reads.

A run that was killed goes on where it stopped when the same command is given again, and ends with
the same bytes.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from megatron_let.data.selection import Selection
from megatron_let.data.text_tokenizer import HUGGING_FACE, TOKENIZER_TYPES
from megatron_let.errors import LETError

if TYPE_CHECKING:
    from megatron_let.data.preprocess import PreprocessOptions

USAGE_ERROR = 2
INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run the program; return the exit code.

    Args:
        argv: arguments after the program's name; None takes them from the command line.
    """
    given = _parser().parse_args(argv)
    console = Console(stderr=True)
    # Megatron speaks of GPU libraries when it is imported, and of each shard when it is read.
    logging.getLogger("megatron").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    from megatron_let.data.preprocess import preprocess

    try:
        report = preprocess(_options(given), console)
    except LETError as error:
        _say(console, f"preprocess_data: error: {error}", "red")
        return USAGE_ERROR
    except KeyboardInterrupt:
        _say(console, "preprocess_data: interrupted; the same command goes on from here", "red")
        return INTERRUPTED
    _summarise(report, console)
    return 0


def _say(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="preprocess_data.py", description=" ".join((__doc__ or "").split()), allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, globs and folders: .jsonl, .jsonl.zst, .jsonl.gz, .parquet, .txt",
    )
    add(
        "--output-prefix",
        type=Path,
        required=True,
        help="data sets are named PREFIX_KEY[_SPLIT][_SUBSET]_document",
    )
    add(
        "--tokenizer-type",
        choices=TOKENIZER_TYPES,
        default=HUGGING_FACE,
        help=f"default: {HUGGING_FACE}",
    )
    add(
        "--tokenizer-model",
        type=Path,
        required=True,
        help="folder of a Hugging Face tokenizer, or a SentencePiece .model file",
    )
    add(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the end-of-document token (default: yes)",
    )
    add(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="fields that hold text, each made a data set of its own (default: text)",
    )
    add(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes (default: one a core)",
    )
    add(
        "--subset-key",
        default="meta.pile_set_name",
        metavar="KEY",
        help="field that names a document's subset (default: meta.pile_set_name)",
    )
    add(
        "--include-subsets",
        nargs="+",
        default=[],
        metavar="NAME",
        help="write these subsets only; a file holds one name a line",
    )
    add(
        "--exclude-subsets",
        nargs="+",
        default=[],
        metavar="NAME",
        help="leave these subsets out; a file holds one name a line",
    )
    add(
        "--per-subset",
        action="store_true",
        help="a data set for each subset, and their blend for --data-args-path",
    )
    add(
        "--subset-weights",
        nargs="+",
        default=[],
        metavar="NAME=FACTOR",
        help="how often a subset is seen, relative to its share of the tokens",
    )
    add(
        "--split",
        metavar="TRAIN,VALID,TEST",
        help="data sets for training, validation and test in these proportions, for"
        " --per-split-data-args-path (default: leave it to training's own --split)",
    )
    add(
        "--strict",
        action="store_true",
        help="stop at the first document that cannot be used, instead of reporting it",
    )
    return parser  # fmt: skip


def _options(given: argparse.Namespace) -> PreprocessOptions:
    from megatron_let.data.preprocess import PreprocessOptions

    selection = Selection(
        json_keys=tuple(dict.fromkeys(given.json_keys)),
        subset_key=given.subset_key,
        include_subsets=_names(given.include_subsets),
        exclude_subsets=_names(given.exclude_subsets),
        split=_split(given.split),
        per_subset=given.per_subset,
        append_eod=given.append_eod,
    )
    return PreprocessOptions(
        inputs=tuple(given.input),
        output_prefix=given.output_prefix.absolute(),
        tokenizer_type=given.tokenizer_type,
        tokenizer_model=given.tokenizer_model,
        selection=selection,
        subset_weights=dict(_weight(text) for text in given.subset_weights),
        workers=given.workers,
        strict=given.strict,
    )


def _names(given: list[str]) -> tuple[str, ...]:
    """Subset names; an existing file stands for its lines, without comments."""
    names: list[str] = []
    for name in given:
        lines = Path(name).read_text().splitlines() if Path(name).is_file() else [name]
        names += [line.partition("#")[0].strip() for line in lines]
    return tuple(sorted({name for name in names if name}))


def _split(text: str | None) -> tuple[float, float, float] | None:
    if text is None:
        return None
    try:
        train, valid, test = (float(part) for part in text.split(","))
    except ValueError:
        raise LETError(f"--split is {text!r}; give three weights such as 989,10,1.") from None
    return train, valid, test


def _weight(text: str) -> tuple[str, float]:
    name, _, factor = text.rpartition("=")
    try:
        value = float(factor)
    except ValueError:
        value = -1.0
    if not name or not 0 <= value < float("inf"):
        raise LETError(f"--subset-weights has {text!r}; give NAME=FACTOR with a factor from 0.")
    return name, value


def _summarise(report: dict[str, Any], console: Console) -> None:
    table = Table("subset", "documents", "tokens", "MB", "filtered")
    for name in sorted({*report["subsets"], *report["filtered"]}):
        tally = report["subsets"].get(name, {"documents": 0, "tokens": 0, "text_bytes": 0})
        table.add_row(
            name,
            f"{tally['documents']:,}",
            f"{tally['tokens']:,}",
            f"{tally['text_bytes'] / 1e6:,.1f}",
            f"{report['filtered'].get(name, 0):,}",
        )
    console.print(table)
    written, rejected = report["written"], sum(report["rejected"].values())
    _say(
        console,
        f"{report['documents_in']:,} documents in, {written['documents']:,} out"
        f" ({written['tokens']:,} tokens), {sum(report['filtered'].values()):,} filtered,"
        f" {rejected:,} rejected {report['rejected'] or ''}",
    )
    for path, damage in report["damaged_files"].items():
        _say(console, f"{path}: {damage}; its readable part was kept", "red")
    if report["subsets_not_found"]:
        _say(console, f"not in the input: {', '.join(report['subsets_not_found'])}", "yellow")
    for example in report["rejected_examples"][:3]:
        place = f"{example['file']}, line {example['line']}"
        _say(console, f"{place}: {example['detail']} ({example['reason']})", "yellow")
    for path in report["data_sets"].values():
        _say(console, f"data: {path}")
    if report["data_args"]:
        _say(console, f"blend: {report['data_args']}")


if __name__ == "__main__":
    sys.exit(main())
