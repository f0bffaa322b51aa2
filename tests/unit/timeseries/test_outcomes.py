"""Files of finished runs, and the table and plot made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_let.errors import LETError
from megatron_let.timeseries.outcomes import is_finished, load_runs, plot, save_run, table_rows


def run(data_set: str, method: str, seed: int, **more: Any) -> dict[str, Any]:
    return {"data_set": data_set, "method": method, "seed": seed, "student": "S", **more}


def save(output: Path, *key: Any, accuracies: list[float]) -> None:
    epochs = [{"test_accuracy": value, "cosine": None} for value in accuracies]
    save_run(output, run(*key), epochs, {"date": "2026-01-01"})


def test_table_has_mean_and_range_of_last_epochs_and_differences_of_pairs(tmp_path: Path) -> None:
    for seed, (baseline, let) in {1: (0.5, 0.7), 2: (0.6, 0.5)}.items():
        save(tmp_path, "A", "baseline", seed, accuracies=[0.9, baseline])
        save(tmp_path, "A", "let", seed, accuracies=[0.1, let])
    save(tmp_path, "A", "let", 3, accuracies=[0.9])
    save(tmp_path, "B", "baseline", 1, accuracies=[0.25])
    assert table_rows(load_runs(tmp_path)) == [
        ("data set", "without LET", "LET", "difference", "seeds"),
        ("A", "55.0 (50.0 to 60.0)", "70.0 (50.0 to 90.0)", "5.0 (-10.0 to 20.0)", "2"),
        ("B", "25.0 (25.0 to 25.0)", "–", "–", "0"),
    ]


def test_run_is_finished_once_saved(tmp_path: Path) -> None:
    key = ("A", "let", 1)
    assert not is_finished(tmp_path, run(*key))
    save(tmp_path, *key, accuracies=[0.5])
    assert is_finished(tmp_path, run(*key))
    assert not is_finished(tmp_path, run("A", "let", 2))


def test_finished_run_of_another_student_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "A", "let", 1, accuracies=[0.5])
    with pytest.raises(LETError, match=r"seed-1\.csv has another student; give another --output"):
        is_finished(tmp_path, run("A", "let", 1) | {"student": "T"})


def test_plot_is_a_png(tmp_path: Path) -> None:
    save(tmp_path, "A", "baseline", 1, accuracies=[0.1, 0.2])
    save(tmp_path, "B", "let", 1, accuracies=[0.1, 0.2])
    plot(tmp_path / "a.png", load_runs(tmp_path))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
