"""A preprocessing run: plan, tasks on an executor, merge."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from megatron_let.data.fingerprint import fingerprint
from megatron_let.data.text_tokenizer import load_text_tokenizer
from megatron_let.errors import LETError
from megatron_let.files.atomic import check_separate, write_json
from megatron_let.preprocessing.executors import queued_on_slurm, run_tasks, submit_to_slurm
from megatron_let.preprocessing.inputs import divide, find_inputs, signature
from megatron_let.preprocessing.job import Job, PreprocessOptions

# Part of every plan, so that a run does not continue shards of another format.
_FORMAT = 2
_LOCK_SECONDS = 10.0


def preprocess(options: PreprocessOptions, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Build the data sets, or continue where a killed run stopped.

    Returns:
        The report, which is also written to `PREFIX.report.json`; None if Slurm will make it.

    Raises:
        LETError: the options or the input are unusable, or the disk is full; finished shards stay.
    """
    # The workers are the parallelism, and the tokenizers' threads do not survive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _check(options)
    job = _plan(options)
    for reason in dict.fromkeys(job.ignored.values()):
        names = [url for url, why in job.ignored.items() if why == reason]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        say(f"not read ({reason}): {', '.join(names[:3])}{more}")
    try:
        return _run(job, say)
    except OSError as error:
        raise job.explain(error) from error


def _run(job: Job, say: Callable[[str], None]) -> dict[str, Any] | None:
    options = job.options
    if options.executor == "slurm" and (numbers := queued_on_slurm(job)):
        say(f"this data's jobs {numbers} are in the queue: nothing to submit")
        return None
    report_path = job.path(".report.json")
    if report_path.is_file() and not options.overwrite:
        report: dict[str, Any] = json.loads(report_path.read_text())
        _check_same_plan(report_path, report["plan"], job.plan)
        shutil.rmtree(job.work, ignore_errors=True)
        say(f"the data of {report_path} is complete: nothing to do")
        return report
    job.work.mkdir(parents=True, exist_ok=True)
    with _locked(job.work):
        _claim(job, report_path)
        if options.executor == "slurm":
            say(submit_to_slurm(job))
            return None
        run_tasks(job, say)
        # It imports torch.
        from megatron_let.preprocessing.merge import merge

        report = merge(job)
    shutil.rmtree(job.work)
    return report


def _check(options: PreprocessOptions) -> None:
    selection, split = options.selection, options.selection.split
    if options.workers is not None and options.workers < 1:
        raise LETError(f"--workers is {options.workers}; give at least 1.")
    # Written so that NaN is refused.
    if split is not None and not (min(split) >= 0 and 0 < sum(split) < math.inf):
        given = ",".join(f"{w:g}" for w in split)
        raise LETError(f"--split is {given}; give three finite weights from 0, such as 989,10,1.")
    if options.subset_weights and not selection.per_subset:
        raise LETError("--subset-weights needs --per-subset; give both.")
    if len(selection.json_keys) > 1 and (selection.per_subset or split is not None):
        raise LETError(
            f"--per-subset and --split make a blend of one field and --json-keys has"
            f" {len(selection.json_keys)}; give one key per run."
        )
    both = set(selection.include_subsets) & set(selection.exclude_subsets)
    if both:
        raise LETError(
            f"{min(both)!r} is in --include-subsets and --exclude-subsets; remove it from one."
        )


def _plan(options: PreprocessOptions) -> Job:
    files, ignored = find_inputs(options.inputs)
    tokenizer = load_text_tokenizer(options.tokenizer_type, options.tokenizer_model)
    tasks = divide(files)
    signatures = "\n".join(signature(url, info) for url, info in files.items())
    plan = {
        "format": _FORMAT,
        "input files": len(files),
        "input": hashlib.sha256(signatures.encode()).hexdigest(),
        "tasks": len(tasks),
        "tokenizer": fingerprint(tokenizer),
        "tokenizer name": options.tokenizer_model.name,
        "selection": json.loads(json.dumps(asdict(options.selection))),
        "max_document_bytes": options.max_document_bytes,
        "subset_weights": options.subset_weights,
    }
    job = Job(options, tasks, tokenizer, plan, ignored)
    # The folder is deleted when the run is complete.
    check_separate(job.work, *map(Path, files))
    return job


def _claim(job: Job, report_path: Path) -> None:
    """Make the work folder this run's, or check that it is."""
    path = job.work / "plan.json"
    theirs = json.loads(path.read_text()) if path.is_file() else None
    # The weights are used after the tasks.
    ours = {name: value for name, value in job.plan.items() if name != "subset_weights"}
    if job.options.overwrite or (theirs is not None and not _has_written(job)):
        _remove_run(job, report_path)
    elif theirs is not None:
        _check_same_plan(path, theirs, ours)
    if not path.is_file():
        write_json(path, job.plan)


def _has_written(job: Job) -> bool:
    """Return whether a document was written, or a cluster may write one."""
    return any(job.work.glob("[0-9]*.idx")) or any(job.work.glob("data-*"))


def _remove_run(job: Job, report_path: Path) -> None:
    """Delete the data sets of the run that the report describes, and the unfinished shards."""
    if report_path.is_file():
        report = json.loads(report_path.read_text())
        suffixes = (".bin", ".idx", ".tokenizer.json")
        files = [prefix + suffix for prefix in report["data_sets"].values() for suffix in suffixes]
        for file in filter(None, (*files, report["data_args"], report_path)):
            # Not at the report's path, which in a copy is that of the original.
            report_path.with_name(Path(file).name).unlink(missing_ok=True)
    for path in job.work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def _check_same_plan(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise LETError(
                f"{path} belongs to another run: its {name} differs ({_short(theirs.get(name))}"
                f" there, {_short(value)} here); give another --output-prefix, or --overwrite to"
                " delete that run's data and start over."
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
