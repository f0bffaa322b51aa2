"""Tokenize text files into the indexed data sets that Megatron's GPTDataset reads.

After an interruption the same command continues, and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import re
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_let.cli.common import run_command, say
from megatron_let.data.text_tokenizer import HUGGING_FACE, TOKENIZER_TYPES
from megatron_let.errors import LETError
from megatron_let.preprocessing.job import PreprocessOptions, Selection


def main(argv: list[str] | None = None) -> int:
    """Preprocess the files; return the exit code."""
    given = _parser().parse_args(argv)
    return run_command(
        "preprocess",
        lambda console: _preprocess(given, console),
        "interrupted; run the same command again to continue",
    )


def _preprocess(given: argparse.Namespace, console: Console) -> int:
    # The import loads datatrove, which takes a second.
    from megatron_let.preprocessing.run import preprocess

    report = preprocess(_options(given), partial(say, console))
    if report is not None:
        _summarise(report, console)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=" ".join((__doc__ or "").split()), allow_abbrev=False
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH",
        help="files, globs and folders, as paths or URLs (s3://, hf://datasets/): .jsonl, .ndjson,"
        " .txt, also compressed, and .parquet")  # fmt: skip
    add("--output-prefix", type=Path, required=True,
        help="data sets are named PREFIX_KEY[_SPLIT][_SUBSET]_document")  # fmt: skip
    add("--tokenizer-type", choices=TOKENIZER_TYPES, default=HUGGING_FACE,
        help=f"default: {HUGGING_FACE}")  # fmt: skip
    add("--tokenizer-model", type=Path, required=True,
        help="folder of a Hugging Face tokenizer, or a SentencePiece .model file")  # fmt: skip
    add("--append-eod", action=argparse.BooleanOptionalAction, default=True,
        help="end each document with the end-of-document token (default: yes)")  # fmt: skip
    add("--json-keys", nargs="+", default=["text"], metavar="KEY",
        help="fields that hold text; each gets a data set (default: text)")  # fmt: skip
    add("--executor", choices=("local", "slurm", "ray"), default="local",
        help="run on this machine (default), as jobs of Slurm, or on a Ray cluster")  # fmt: skip
    add("--workers", type=int, metavar="N",
        help="tasks at once (default: one per core; on a cluster, as many as fit)")  # fmt: skip
    add("--subset-key", default="meta.pile_set_name", metavar="KEY",
        help="field that names a document's subset (default: meta.pile_set_name)")  # fmt: skip
    add("--include-subsets", nargs="+", default=[], metavar="NAME",
        help="write these subsets only; a file holds one name per line")  # fmt: skip
    add("--exclude-subsets", nargs="+", default=[], metavar="NAME",
        help="skip these subsets; a file holds one name per line")  # fmt: skip
    add("--per-subset", action="store_true",
        help="write one data set per subset, and their blend for --data-args-path")  # fmt: skip
    add("--subset-weights", nargs="+", default=[], metavar="NAME=FACTOR",
        help="how often a subset is seen, relative to its share of the tokens")  # fmt: skip
    add("--split", metavar="TRAIN,VALID,TEST",
        help="write data sets for training, validation and test in these proportions, for"
        " --per-split-data-args-path (default: leave it to training's --split)")  # fmt: skip
    add("--strict", action="store_true",
        help="stop at the first unusable document instead of reporting it")  # fmt: skip
    add("--overwrite", action="store_true",
        help="delete what another run left under the prefix, and start over")  # fmt: skip
    return parser


def _options(given: argparse.Namespace) -> PreprocessOptions:
    selection = Selection(
        json_keys=tuple(dict.fromkeys(given.json_keys)),
        subset_key=given.subset_key,
        include_subsets=_names("--include-subsets", given.include_subsets),
        exclude_subsets=_names("--exclude-subsets", given.exclude_subsets),
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
        executor=given.executor,
        workers=given.workers,
        strict=given.strict,
        overwrite=given.overwrite,
    )


def _names(flag: str, given: list[str]) -> tuple[str, ...]:
    """Return subset names; an existing file is replaced by its lines, without comments.

    Raises:
        LETError: a path to no file, or a value that names no subset.
    """
    names: set[str] = set()
    for value in given:
        is_file = Path(value).is_file()
        # A subset's name may have a slash, so only these are paths.
        if not is_file and (value.endswith(".txt") or value.startswith(("/", "./", "../", "~/"))):
            raise LETError(
                f"{flag} has {value!r}, which is not a file; correct the path, or give a file that"
                " contains it if it is the name of a subset."
            )
        lines = [value]
        if is_file:
            # A name may have a #, as C# has.
            lines = [re.sub(r"(^|\s)#.*", "", x) for x in Path(value).read_text().splitlines()]
        found = {line.strip() for line in lines} - {""}
        if not found:
            raise LETError(f"{flag} has {value!r}, which names no subset; give a name per line.")
        names |= found
    return tuple(sorted(names))


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
        raise LETError(f"--subset-weights has {text!r}; give NAME=FACTOR with a factor >= 0.")
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
    say(
        console,
        f"{report['documents_in']:,} documents in, {written['documents']:,} out"
        f" ({written['tokens']:,} tokens), {sum(report['filtered'].values()):,} filtered,"
        f" {rejected:,} rejected {report['rejected'] or ''}",
    )
    for path, damage in report["damaged_files"].items():
        say(console, f"{path}: {damage}; its readable part was kept", "red")
    if report["subsets_not_found"]:
        say(console, f"not in the input: {', '.join(report['subsets_not_found'])}", "yellow")
    for example in report["rejected_examples"][:3]:
        place = f"{example['file']}, line {example['line']}"
        say(console, f"{place}: {example['detail']} ({example['reason']})", "yellow")
    for path in report["data_sets"].values():
        say(console, f"data: {path}")
    if report["data_args"]:
        say(console, f"blend: {report['data_args']}")
