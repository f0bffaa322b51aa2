"""Speed of preprocessing against datatrove's tokenizer step, on the same files in the same run.

Needs datatrove and orjson besides (pip install datatrove orjson). Both sides read JSON lines, end
each document with the same token, and write uint16 to the same disk; ours also merges its shards.
Each measurement is a forked process with the tokenizer loaded before; the sides take turns, so that
a load from elsewhere meets both. What is measured per core is held to one core, reader included.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_let.data.environment_text import environment_text
from megatron_let.data.preprocess import BLOCK_BYTES, PreprocessOptions, preprocess
from megatron_let.data.text_tokenizer import HUGGING_FACE

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tools" / "benchmark" / "results" / "preprocess.csv"
LIBRARIES = ("tokenizers", "transformers", "sentencepiece", "datatrove", "megatron-core", "numpy")
Job = Callable[[Path], None]


def main() -> int:
    """Measure, print a table, write the CSV; return the exit code."""
    options = _parse()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        folder = Path(name)
        num_bytes = _write_corpus(folder / "corpus", options.megabytes * 1_000_000)
        jobs = _jobs(options, folder / "corpus")
        per_core = {name for name in jobs if not name.endswith("workers")}
        samples: dict[str, list[dict[str, float]]] = {job: [] for job in jobs}
        cores = sorted(os.sched_getaffinity(0))
        for repeat in range(options.repeats):
            # Turns on each core: a neighbour's load on one must not weigh on one side.
            single = {cores[repeat % len(cores)]}
            names = list(jobs) if repeat % 2 == 0 else list(jobs)[::-1]
            for job in names:
                samples[job].append(
                    _measure(jobs[job], folder / "out", single if job in per_core else set(cores))
                )
                shutil.rmtree(folder / "out", ignore_errors=True)
    rows = _rows(samples, num_bytes, _baselines(options))
    _print(rows)
    _write_csv(rows, options)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--hugging-face", type=Path, required=True, help="folder of a tokenizer")
    add("--sentence-piece", type=Path, help="a .model file")
    add("--megabytes", type=int, default=16, help="of real text (default: 16)")
    add("--repeats", type=int, default=7, help="of every measurement (default: 7)")
    add("--scratch", type=Path, help="folder for the text and the results")
    return parser.parse_args()


def _write_corpus(folder: Path, num_bytes: int) -> int:
    """Real text in as many files as there are cores; return its bytes of UTF-8."""
    folder.mkdir()
    texts = list(environment_text(num_bytes))
    cores = len(os.sched_getaffinity(0))
    for part in range(cores):
        lines = (json.dumps({"text": text, "meta": {}}) + "\n" for text in texts[part::cores])
        (folder / f"{part}.jsonl").write_text("".join(lines))
    return sum(len(text.encode()) for text in texts)


def _jobs(options: argparse.Namespace, corpus: Path) -> dict[str, Job]:
    cores = len(os.sched_getaffinity(0))
    hugging_face = options.hugging_face
    # As many blocks a core as make the end of the run no matter.
    block_bytes = min(BLOCK_BYTES, options.megabytes * 1_000_000 // (cores * 8))
    jobs: dict[str, Job] = {
        "ours, Hugging Face": _ours(corpus, HUGGING_FACE, hugging_face, 1, block_bytes),
        "datatrove, Hugging Face": _datatrove(corpus, hugging_face),
        f"ours, Hugging Face, {cores} workers": _ours(
            corpus, HUGGING_FACE, hugging_face, cores, block_bytes
        ),
    }
    if options.sentence_piece:
        model = options.sentence_piece
        converted = corpus.parent / "converted"
        _convert_sentence_piece(model, converted)
        jobs["ours, SentencePiece"] = _ours(corpus, "SentencePieceTokenizer", model, 1, block_bytes)
        jobs["datatrove, SentencePiece"] = _datatrove(corpus, converted)
    return jobs


def _baselines(options: argparse.Namespace) -> dict[str, str]:
    """What each measurement is compared with."""
    cores = len(os.sched_getaffinity(0))
    found = {
        "ours, Hugging Face": "datatrove, Hugging Face",
        f"ours, Hugging Face, {cores} workers": "ours, Hugging Face",
    }
    if options.sentence_piece:
        found["ours, SentencePiece"] = "datatrove, SentencePiece"
    return found


def _ours(corpus: Path, kind: str, model: Path, workers: int, block_bytes: int) -> Job:
    def job(out: Path) -> None:
        preprocess(
            PreprocessOptions(
                (str(corpus),), out / "ours", kind, model, workers=workers, block_bytes=block_bytes
            ),
            Console(file=io.StringIO()),
        )

    return job


def _datatrove(corpus: Path, tokenizer: Path) -> Job:
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.utils.logging import logger
    from transformers import AutoTokenizer

    logger.remove()
    end = AutoTokenizer.from_pretrained(tokenizer).eos_token

    def job(out: Path) -> None:
        reader = JsonlReader(str(corpus))
        step = DocumentTokenizer(
            str(out), str(tokenizer / "tokenizer.json"), eos_token=end, shuffle_documents=False
        )
        step.run(reader.run(), rank=0, world_size=1)

    return job


def _convert_sentence_piece(model: Path, folder: Path) -> None:
    """The form of a SentencePiece model that datatrove can read."""
    from transformers import LlamaTokenizer

    LlamaTokenizer.from_pretrained(str(model.parent), vocab_file=str(model)).save_pretrained(folder)


def _measure(job: Job, out: Path, cores: set[int]) -> dict[str, float]:
    """Seconds on the clock and of CPU, in a process of its own on some cores."""
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


def _rows(
    samples: dict[str, list[dict[str, float]]], num_bytes: int, baselines: dict[str, str]
) -> list[dict[str, Any]]:
    rows = []
    for name, found in samples.items():
        row: dict[str, Any] = {"what": name, "text_bytes": num_bytes, "samples": len(found)}
        for key in ("seconds", "cpu"):
            speeds = sorted(num_bytes / 1e6 / sample[key] for sample in found)
            row[f"mb_per_{key}"] = round(statistics.median(speeds), 3)
            row[f"mb_per_{key}_min"], row[f"mb_per_{key}_max"] = (
                round(speeds[0], 3),
                round(speeds[-1], 3),
            )
        if base := baselines.get(name):
            row["baseline"] = base
            for key in ("seconds", "cpu"):
                pairs = zip(samples[base], found, strict=True)
                ratios = sorted(theirs[key] / ours[key] for theirs, ours in pairs)
                row[f"ratio_{key}"] = round(statistics.median(ratios), 3)
                row[f"ratio_{key}_min"], row[f"ratio_{key}_max"] = (
                    round(ratios[0], 3),
                    round(ratios[-1], 3),
                )
        rows.append(row)
    return rows


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table("", "MB/s", "MB/s of CPU", "against", "clock", "CPU")
    for row in rows:
        clock, cpu = (
            f"{row[f'ratio_{k}']:.2f} ({row[f'ratio_{k}_min']:.2f} to {row[f'ratio_{k}_max']:.2f})"
            if "baseline" in row
            else ""
            for k in ("seconds", "cpu")
        )
        speeds = (f"{row['mb_per_seconds']:.2f}", f"{row['mb_per_cpu']:.2f}")
        table.add_row(row["what"], *speeds, row.get("baseline", ""), clock, cpu)
    Console(width=140).print(table)


def _write_csv(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    tokenizers = [options.hugging_face.name]
    if options.sentence_piece:
        tokenizers.append(options.sentence_piece.name)
    fixed = {
        "tokenizers": " ".join(tokenizers),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": " ".join(f"{n}=={importlib.metadata.version(n)}" for n in LIBRARIES),
        "command": "tools/benchmark/preprocess.py"
        f" --megabytes {options.megabytes} --repeats {options.repeats}",
    }
    names = list(dict.fromkeys(name for row in rows for name in row))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*names, *fixed])
        writer.writeheader()
        writer.writerows({**row, **fixed} for row in rows)


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


if __name__ == "__main__":
    sys.exit(main())
