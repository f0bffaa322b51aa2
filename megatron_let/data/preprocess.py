"""Preprocess text files into Megatron's indexed data sets: plan, shards, merge, report."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from megatron.core.datasets.indexed_dataset import DType
from rich.console import Console

from megatron_let.data.blend import (
    blend_list,
    blend_weights,
    write_data_args,
    write_per_split_data_args,
)
from megatron_let.data.counts import Counts
from megatron_let.data.fingerprint import TokenizerFingerprint, fingerprint, write_sidecar_file
from megatron_let.data.inputs import (
    REJECTED,
    Source,
    Unit,
    UnitReader,
    file_signature,
    find_inputs,
    group_sources,
)
from megatron_let.data.merge import merge_shards
from megatron_let.data.pool import WorkerPool
from megatron_let.data.progress import ProgressBar
from megatron_let.data.selection import SPLITS, Selection
from megatron_let.data.shards import Shards, ShardWriter
from megatron_let.data.text_tokenizer import TextTokenizer, load_text_tokenizer
from megatron_let.errors import LETError
from megatron_let.files.atomic import atomic_file, remove_partial, write_json

# Part of every plan, so that a run does not continue shards of another format.
_FORMAT = 1
BLOCK_BYTES = 32 * 1024 * 1024
MAX_DOCUMENT_BYTES = 16 * 1024 * 1024
_EXAMPLES = 20
_LOCK_SECONDS = 10.0
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class PreprocessOptions:
    """Options of a preprocessing run.

    Attributes:
        inputs: files, globs and folders.
        output_prefix: data sets are named `PREFIX_KEY[_SPLIT][_SUBSET]_document`.
        tokenizer_type: one of `TOKENIZER_TYPES`.
        tokenizer_model: folder or `.model` file.
        subset_weights: factor of each subset's share in the blend.
        strict: stop at the first unusable document.
        block_bytes: text per shard; a continued run needs the same size.
        max_document_bytes: longer documents are rejected.
    """

    inputs: tuple[str, ...]
    output_prefix: Path
    tokenizer_type: str
    tokenizer_model: Path
    selection: Selection = field(default_factory=Selection)
    subset_weights: dict[str, float] = field(default_factory=dict)
    workers: int = 1
    strict: bool = False
    block_bytes: int = BLOCK_BYTES
    max_document_bytes: int = MAX_DOCUMENT_BYTES

    def output_path(self, suffix: str) -> Path:
        """Return the path of a file next to the data sets."""
        return self.output_prefix.with_name(self.output_prefix.name + suffix)

    def prefix(self, output: str) -> Path:
        """Return the path of a data set, without suffix, by its name."""
        return self.output_path(f"_{output}_document")


def preprocess(options: PreprocessOptions, console: Console) -> dict[str, Any]:
    """Build the data sets, or continue where a killed run stopped.

    Returns:
        The report, which is also written to `PREFIX.report.json`.

    Raises:
        LETError: the options or the input are unusable, or the disk is full; finished shards stay.
    """
    # The workers are the parallelism, and the tokenizers' threads do not survive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _check(options)
    files, ignored = find_inputs(options.inputs)
    tokenizer = load_text_tokenizer(options.tokenizer_type, options.tokenizer_model)
    made_with = fingerprint(tokenizer)
    plan = _plan(options, files, made_with)
    sizes = ((path, path.stat().st_size) for path in files)
    sources = group_sources(sizes, options.block_bytes)
    run = _Run(options, sources, ignored, tokenizer, made_with, plan)
    try:
        return run.carry_out(console)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise LETError(
            f"The disk of {options.output_prefix.parent} is full ({error.strerror}); free some"
            " space and run the same command again, which continues where it stopped."
        ) from error


def _check(options: PreprocessOptions) -> None:
    selection = options.selection
    if options.workers < 1:
        raise LETError(f"--workers is {options.workers}; give at least 1.")
    if selection.split is not None and (min(selection.split) < 0 or sum(selection.split) <= 0):
        given = ",".join(f"{w:g}" for w in selection.split)
        raise LETError(f"--split is {given}; give three weights from 0, such as 989,10,1.")
    if options.subset_weights and not selection.per_subset:
        raise LETError("--subset-weights needs --per-subset; give both.")
    if len(selection.json_keys) > 1 and (selection.per_subset or selection.split is not None):
        raise LETError(
            f"--per-subset and --split make a blend of one field and --json-keys has"
            f" {len(selection.json_keys)}; give one key per run."
        )
    both = set(selection.include_subsets) & set(selection.exclude_subsets)
    if both:
        raise LETError(
            f"{min(both)!r} is in --include-subsets and --exclude-subsets; remove it from one."
        )


def _plan(
    options: PreprocessOptions, files: list[Path], made_with: TokenizerFingerprint
) -> dict[str, Any]:
    """Return everything that determines the bytes of the result."""
    signatures = [file_signature(path) for path in files]
    return {
        "format": _FORMAT,
        "input files": len(files),
        "input": hashlib.sha256("\n".join(signatures).encode()).hexdigest(),
        "tokenizer": asdict(made_with),
        "selection": json.loads(json.dumps(asdict(options.selection))),
        "block_bytes": options.block_bytes,
        "max_document_bytes": options.max_document_bytes,
    }


@dataclass
class _Run:
    options: PreprocessOptions
    sources: list[Source]
    ignored: list[Path]
    tokenizer: TextTokenizer
    made_with: TokenizerFingerprint
    plan: dict[str, Any]
    counts: Counts = field(default_factory=Counts)

    @property
    def shards(self) -> Shards:
        return Shards(self.options.output_path(".work"))

    def carry_out(self, console: Console) -> dict[str, Any]:
        """Write shards, merge and report; remove the run's work folder at the end."""
        report_path = self.options.output_path(".report.json")
        if report_path.is_file():
            report = _finished(report_path, self._result_plan())
            shutil.rmtree(self.shards.folder, ignore_errors=True)
            console.print(f"the data of {report_path} is complete: nothing to do")
            return report
        start = time.monotonic()
        self.shards.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.shards.folder):
            _claim(self.shards.folder / "plan.json", self.plan)
            remove_partial(self.shards.folder)
            self._write_shards(console)
            names = self._shard_names()
            for name in names:
                self.counts.add(Counts.from_json(self.shards.read(name)["counts"]))
            self.counts.check()
            report = self._merge(names, console)
            report["seconds"] = round(time.monotonic() - start, 1)
            write_json(report_path, report)
        shutil.rmtree(self.shards.folder)
        return report

    def _result_plan(self) -> dict[str, Any]:
        """Return the plan and the subset weights, which a continued run may still change."""
        return {**self.plan, "subset_weights": self.options.subset_weights}

    def _write_shards(self, console: Console) -> None:
        options = self.options
        writer = ShardWriter(
            self.shards,
            self.sources,
            self.tokenizer,
            options.selection,
            options.max_document_bytes,
            options.strict,
        )
        # Forked before the progress bar starts its thread.
        total_bytes = sum(source.num_bytes for source in self.sources)
        with WorkerPool(options.workers, writer) as pool, ProgressBar(console, total_bytes) as bar:
            for unit, counts in pool.map(self._units(bar)):
                bar.advance(unit.input_bytes, counts)

    def _units(self, bar: ProgressBar) -> Iterator[Unit]:
        """Yield the units without a finished shard."""
        for source in self.sources:
            if self._is_done(source):
                bar.skip(source.num_bytes)
                continue
            reader = UnitReader(source, self.options.block_bytes, self.options.max_document_bytes)
            blocks = 0
            for unit in reader:
                blocks += 1
                if self.shards.record(unit.name).is_file():
                    bar.skip(unit.input_bytes)
                else:
                    yield unit
            if reader.damage and self.options.strict:
                raise LETError(f"{source.paths[0]}: {reader.damage}; copy the file again.")
            write_json(self._end(source), {"blocks": blocks, "damage": reader.damage})

    def _is_done(self, source: Source) -> bool:
        """Return whether all shards of a source are finished."""
        end = self._end(source)
        return end.is_file() and all(
            self.shards.record(Unit(source.index, block).name).is_file()
            for block in range(json.loads(end.read_text())["blocks"])
        )

    def _end(self, source: Source) -> Path:
        """Return the path of a source's number of blocks, written once all of it was read."""
        return self.shards.folder / f"{source.index:05d}.end.json"

    def _shard_names(self) -> list[str]:
        return [
            Unit(source.index, block).name
            for source in self.sources
            for block in range(json.loads(self._end(source).read_text())["blocks"])
        ]

    def _merge(self, names: list[str], console: Console) -> dict[str, Any]:
        outputs = sorted(self.counts.outputs)
        if not outputs:
            raise LETError(
                f"No document was written: {self.counts.filtered.total()} were filtered and"
                f" {dict(self.counts.rejected)} rejected; check --json-keys"
                f" {' '.join(self.options.selection.json_keys)} and the subsets."
            )
        unknown = sorted(set(self.options.subset_weights) - set(self.counts.subsets))
        if unknown:
            raise LETError(
                f"--subset-weights has {unknown[0]!r}, of which nothing was written; the subsets"
                f" are {', '.join(sorted(self.counts.subsets))}."
            )
        console.print(f"merging {len(names)} shards into {len(outputs)} data sets")
        prefixes = {name: self.options.prefix(name) for name in outputs}
        dtype = DType.optimal_dtype(self.tokenizer.vocab_size)
        merge_shards(self.shards, names, prefixes, dtype)
        for prefix in prefixes.values():
            write_sidecar_file(prefix, self.made_with, self.options.tokenizer_model.name)
        rejected_path = self.options.output_path(REJECTED)
        examples = _concatenate([self.shards.rejections(n) for n in names], rejected_path)
        return {
            "plan": self._result_plan(),
            "data_sets": {name: str(path) for name, path in prefixes.items()},
            "data_args": self._write_blend(prefixes),
            "dtype": dtype.__name__,
            "written": vars(self.counts.written()),
            **self.counts.to_json(),
            "rejected_examples": examples,
            "damaged_files": self._damaged(),
            "ignored_files": [str(path) for path in self.ignored],
            "subsets_not_found": sorted(
                {*self.options.selection.include_subsets, *self.options.selection.exclude_subsets}
                - {*self.counts.subsets, *self.counts.filtered}
            ),
        }

    def _damaged(self) -> dict[str, str]:
        ends = {str(s.paths[0]): json.loads(self._end(s).read_text()) for s in self.sources}
        return {path: end["damage"] for path, end in ends.items() if end["damage"]}

    def _write_blend(self, prefixes: dict[str, Path]) -> str | None:
        """Write the data-args file of a run with several data sets of one key."""
        selection = self.options.selection
        if not selection.per_subset and selection.split is None:
            return None
        key = selection.json_keys[0]
        factors = {
            selection.output_name(key, split, subset): factor
            for subset, factor in self.options.subset_weights.items()
            for split in (SPLITS if selection.split else (None,))
        }
        blends = {}
        for split in SPLITS if selection.split else ("all",):
            start = f"{key}_{split}" if selection.split else key
            tokens = {
                name: tally.tokens
                for name, tally in sorted(self.counts.outputs.items())
                if name == start or name.startswith(start + "_")
            }
            if tokens:
                blends[split] = blend_list(blend_weights(tokens, factors), prefixes)
        if selection.split:
            path = self.options.output_path(".data_args.json")
            write_per_split_data_args(path, blends)
        else:
            path = self.options.output_path(".data_args.txt")
            write_data_args(path, blends["all"])
        return str(path)


def _finished(report_path: Path, plan: dict[str, Any]) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(report_path.read_text())
    _check_same_plan(report_path, report["plan"], plan)
    return report


def _claim(path: Path, plan: dict[str, Any]) -> None:
    if path.is_file():
        _check_same_plan(path, json.loads(path.read_text()), plan)
    else:
        write_json(path, plan)


def _check_same_plan(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise LETError(
                f"{path} belongs to another run: its {name} differs ({_short(theirs.get(name))}"
                f" there, {_short(value)} here); give another --output-prefix, or delete it and its"
                " data."
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        # The workers of a run that was just killed hold the lock until the kernel ends them.
        deadline = time.monotonic() + _LOCK_SECONDS
        while not _try_lock(lock):
            if time.monotonic() > deadline:
                raise LETError(
                    f"Another run is writing {folder}; wait until it ends, or give another"
                    " --output-prefix."
                )
            time.sleep(0.05)
        yield


def _concatenate(paths: list[Path], target: Path) -> list[dict[str, Any]]:
    """Concatenate the rejections of all shards; return the first ones."""
    examples: list[dict[str, Any]] = []
    with atomic_file(target) as partial, partial.open("wb") as out:
        for path in paths:
            with path.open("rb") as lines:
                for line in lines:
                    out.write(line)
                    if len(examples) < _EXAMPLES:
                        examples.append(json.loads(line))
    return examples
