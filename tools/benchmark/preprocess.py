"""Compare the speed of preprocessing with datatrove's own reader and tokenizer step.

Both read the same JSON lines, end each document with the same token, and write uint16 to the same
disk; this package also hashes, counts, merges and syncs. Each measurement is a forked process with
the tokenizer already loaded; the two alternate, so that other load on the machine affects both.
Per-core measurements are restricted to one core. The same text in fewer and in more files shows how
the speed of all cores depends on the number of tasks. Needs orjson, for datatrove's reader.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS_FOLDER, source

from megatron_let.cli.common import print_table
from megatron_let.data.text_tokenizer import HUGGING_FACE
from megatron_let.files.environment_text import environment_text
from megatron_let.metrics.provenance import write_csv
from megatron_let.preprocessing import merge  # noqa: F401  imports torch before the clock starts
from megatron_let.preprocessing.job import PreprocessOptions
from megatron_let.preprocessing.run import preprocess

RESULTS = RESULTS_FOLDER / "preprocess.csv"
LIBRARIES = ("tokenizers", "sentencepiece", "datatrove", "numpy")
# Files of the text, and so tasks; the others are measured on all cores.
TASKS = 16
OTHER_TASKS = (2, 64)
Job = Callable[[Path], None]


def main() -> int:
    """Measure, print a table and write the CSV; return the exit code."""
    options = _parse()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        folder = Path(name)
        texts = list(environment_text(options.megabytes * 1_000_000))
        num_bytes = sum(len(text.encode()) for text in texts)
        for tasks in (TASKS, *OTHER_TASKS):
            _write_corpus(folder / f"{tasks}", texts, tasks)
        jobs = _jobs(options, folder)
        samples: dict[str, list[dict[str, float]]] = {job: [] for job in jobs}
        cores = sorted(os.sched_getaffinity(0))
        for repeat in range(options.repeats):
            # Alternate cores, so that load on one core does not affect one side only.
            single = {cores[repeat % len(cores)]}
            names = list(jobs) if repeat % 2 == 0 else list(jobs)[::-1]
            for job in names:
                allowed = set(cores) if job.endswith("workers") else single
                samples[job].append(_measure(jobs[job], folder / "out", allowed))
                shutil.rmtree(folder / "out", ignore_errors=True)
    rows = [_row(name, samples, num_bytes) for name in samples]
    _print(rows)
    tokenizers = [path.name for path in (options.hugging_face, options.sentence_piece) if path]
    columns = {
        **source(),
        "load_1min": f"{os.getloadavg()[0]:.2f}",
        "tokenizers": " ".join(tokenizers),
        "libraries": " ".join(f"{n}=={importlib.metadata.version(n)}" for n in LIBRARIES),
    }
    write_csv(RESULTS, rows, columns)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--hugging-face", type=Path, required=True, help="folder of a tokenizer")
    add("--sentence-piece", type=Path, help="a .model file")
    add("--megabytes", type=int, default=16, help="amount of real text (default: 16)")
    add("--repeats", type=int, default=7, help="number of measurements (default: 7)")
    add("--scratch", type=Path, help="folder for the text and the results")
    return parser.parse_args()


def _write_corpus(folder: Path, texts: list[str], tasks: int) -> None:
    """Write the texts to one file per task."""
    folder.mkdir()
    for part in range(tasks):
        lines = (json.dumps({"text": text, "meta": {}}) + "\n" for text in texts[part::tasks])
        (folder / f"{part:02d}.jsonl").write_text("".join(lines))


def _jobs(options: argparse.Namespace, scratch: Path) -> dict[str, Job]:
    cores = len(os.sched_getaffinity(0))
    folder, corpus = options.hugging_face, scratch / f"{TASKS}"
    jobs: dict[str, Job] = {
        "ours, Hugging Face": _ours(corpus, HUGGING_FACE, folder, 1),
        "datatrove, Hugging Face": _datatrove(corpus, folder),
    }
    for tasks in (TASKS, *OTHER_TASKS):
        name = f"ours, Hugging Face, {tasks} tasks, {cores} workers"
        jobs[name] = _ours(scratch / f"{tasks}", HUGGING_FACE, folder, cores)
    if options.sentence_piece:
        from transformers import LlamaTokenizer

        # datatrove reads no .model file.
        model, converted = options.sentence_piece, scratch / "converted"
        tokenizer = LlamaTokenizer.from_pretrained(str(model.parent), vocab_file=str(model))
        tokenizer.save_pretrained(converted)
        jobs["ours, SentencePiece"] = _ours(corpus, "SentencePieceTokenizer", model, 1)
        jobs["datatrove, SentencePiece"] = _datatrove(corpus, converted)
    return jobs


def _baseline(name: str) -> str | None:
    """Return the measurement that one is compared with."""
    if name.endswith("workers"):
        return "ours, Hugging Face"
    return name.replace("ours", "datatrove") if name.startswith("ours") else None


def _ours(corpus: Path, kind: str, model: Path, workers: int) -> Job:
    def job(out: Path) -> None:
        options = PreprocessOptions((str(corpus),), out / "ours", kind, model, workers=workers)
        preprocess(options, lambda line: None)

    return job


def _datatrove(corpus: Path, tokenizer: Path) -> Job:
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.utils.logging import logger
    from transformers import AutoTokenizer

    logger.remove()
    end = AutoTokenizer.from_pretrained(tokenizer).eos_token

    def job(out: Path) -> None:
        step = DocumentTokenizer(
            str(out), str(tokenizer / "tokenizer.json"), eos_token=end, shuffle_documents=False
        )
        for rank in range(TASKS):
            step.run(JsonlReader(str(corpus)).run(rank=rank, world_size=TASKS), rank, TASKS)

    return job


def _measure(job: Job, out: Path, cores: set[int]) -> dict[str, float]:
    """Return clock and CPU seconds of a job in a forked process on these cores."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def target() -> None:
        out.mkdir()
        os.sched_setaffinity(0, cores)
        start, cpu = time.perf_counter(), _cpu_seconds()
        job(out)
        theirs.send({"seconds": time.perf_counter() - start, "cpu": _cpu_seconds() - cpu})

    process = context.Process(target=target)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _row(name: str, samples: dict[str, list[dict[str, float]]], num_bytes: int) -> dict[str, Any]:
    """Return speeds, and ratios to the baseline's time, as median, minimum and maximum."""
    found, base = samples[name], _baseline(name)
    row: dict[str, Any] = {"what": name, "text_bytes": num_bytes, "samples": len(found)}
    for key in ("seconds", "cpu"):
        row |= _spread(f"mb_per_{key}", [num_bytes / 1e6 / sample[key] for sample in found])
    if base:
        row["baseline"] = base
        for key in ("seconds", "cpu"):
            pairs = zip(samples[base], found, strict=True)
            row |= _spread(f"ratio_{key}", [theirs[key] / ours[key] for theirs, ours in pairs])
    return row


def _spread(name: str, values: list[float]) -> dict[str, float]:
    statistic = {"": statistics.median(values), "_min": min(values), "_max": max(values)}
    return {name + suffix: round(value, 3) for suffix, value in statistic.items()}


def _print(rows: list[dict[str, Any]]) -> None:
    table = [("", "MB/s", "MB/s of CPU", "against", "clock", "CPU")]
    for row in rows:
        clock, cpu = (
            f"{row[f'ratio_{k}']:.2f} ({row[f'ratio_{k}_min']:.2f} to {row[f'ratio_{k}_max']:.2f})"
            if "baseline" in row
            else ""
            for k in ("seconds", "cpu")
        )
        speeds = (f"{row['mb_per_seconds']:.2f}", f"{row['mb_per_cpu']:.2f}")
        table.append((row["what"], *speeds, row.get("baseline", ""), clock, cpu))
    print_table(None, table, 140)


if __name__ == "__main__":
    sys.exit(main())
