"""What methods gain with teachers of several strengths."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from megatron_let.metrics.compare import ComparedRun, load_run
from megatron_let.metrics.provenance import write_csv
from megatron_let.metrics.teacher_gap import Gain, crossover, describe, gains, plot, rows
from tests.helpers.metrics_files import write_run


def gain(teacher: str, gap: float, loss: float, seed: int = 1, method: str = "let") -> Gain:
    return Gain(method, teacher, seed, gap, loss, 1 + loss, None, None)


STRONG = [gain("strong", -1.0, 0.3 + 0.01 * seed, seed) for seed in range(3)]
WEAK = [gain("weak", 1.0, -0.1 + 0.01 * seed, seed) for seed in range(3)]


@pytest.fixture
def runs(tmp_path: Path) -> list[ComparedRun]:
    def load(name: str, seed: int, final: float) -> ComparedRun:
        folder = tmp_path / f"{name}{seed}"
        write_run(folder, {20: 6.0, 40: final}, settings={"seed": seed})
        return load_run(name, folder)

    return [load("base", 1, 5.0), load("base", 2, 5.2), load("let", 1, 4.5), load("let", 2, 5.3)]


def test_gains_are_from_the_baseline_of_the_seed(runs: list[ComparedRun]) -> None:
    found = gains([("let", "t", run) for run in runs[2:]], {"t": 4.0}, runs[:2])
    assert [g.seed for g in found] == [1, 2]
    assert [g.gap for g in found] == pytest.approx([-1.0, -1.2])
    assert [g.loss for g in found] == pytest.approx([0.5, -0.1])
    # From 6.0 to 4.5 the run passes 5.0 two thirds of the way.
    assert found[0].steps == pytest.approx(40 / (20 + 20 * 2 / 3))
    assert found[0].seconds == pytest.approx(found[0].steps)
    assert found[1].steps is None
    assert [g.step for g in found] == [None, None]


def test_run_without_a_baseline_of_its_seed_is_left_out(runs: list[ComparedRun]) -> None:
    assert gains([("let", "t", runs[3])], {"t": 4.0}, runs[:1]) == []


def test_crossover_is_where_the_means_change_their_sign() -> None:
    found = crossover([*STRONG, *WEAK, gain("strong", -1.0, -9.0, method="rkd")], "let")
    # Means 0.31 at -1 and -0.09 at 1.
    assert found.gap == pytest.approx(-1 + 2 * 0.31 / 0.40)
    assert found.low is not None and found.high is not None
    assert found.low < found.gap < found.high and found.share == 1
    assert found.between == (-1.0, 1.0)
    assert f"{found.gap:+.2f}" in describe(found)


def test_seeds_are_drawn_together_because_teachers_share_the_baselines() -> None:
    shifts = {1: -0.06, 2: 0.0, 3: 0.06}
    found = [
        gain(teacher, gap - shift, loss + shift, seed)
        for teacher, gap, loss in (("strong", -0.2, 0.1), ("weak", 0.2, -0.1))
        for seed, shift in shifts.items()
    ]
    result = crossover(found, "let")
    # A baseline that is worse by x moves the crossing by x, and all draws of one seed have x.
    assert (result.low, result.high) == pytest.approx((-0.06, 0.06), abs=0.021)
    assert result.high > 0.05  # type: ignore[operator]


def test_seeds_of_other_methods_and_missing_ones_change_nothing() -> None:
    pairs = [*STRONG[:2], *WEAK[:2]]
    alone = crossover(pairs, "let")
    assert alone == crossover([*pairs, gain("strong", -1.0, 0.3, 9, method="rkd")], "let")
    # In the draws without the middle teacher's seed, a line past it would cross at 0.55.
    middle = gain("middle", 0.0, 0.3, 0)
    found = crossover([*pairs, middle], "let")
    assert found.low is not None and found.low > 0.74 and found.share == 1


def test_loss_that_is_not_finite_leaves_the_others(runs: list[ComparedRun]) -> None:
    runs[2].metrics.valid_loss[40] = float("nan")
    found = gains([("let", "t", run) for run in runs[2:]], {"t": 4.0}, runs[:2])
    assert [g.seed for g in found] == [2]


def test_spread_over_seeds_widens_the_interval() -> None:
    wide = [gain("weak", 1.0, -0.1 + 0.08 * (seed - 1), seed) for seed in range(3)]
    narrow, wider = crossover([*STRONG, *WEAK], "let"), crossover([*STRONG, *wide], "let")
    assert wider.high - wider.low > narrow.high - narrow.low  # type: ignore[operator]


def test_one_seed_per_teacher_has_no_interval() -> None:
    found = crossover([STRONG[0], WEAK[0]], "let")
    assert found.gap == pytest.approx(0.5) and found.low is None
    assert "too few seeds" in describe(found)


def test_method_that_always_gains_has_no_crossover() -> None:
    found = crossover([*STRONG, gain("weak", 1.0, 0.1)], "let")
    assert (found.gap, found.low, found.share) == (None, None, 0)
    assert "does not change its sign" in describe(found)


def test_csv_and_plot_are_written(tmp_path: Path) -> None:
    write_csv(tmp_path / "gains.csv", rows([*STRONG, *WEAK]), {"date": "today"})
    with (tmp_path / "gains.csv").open() as stream:
        found = list(csv.DictReader(stream))
    assert len(found) == 6 and found[0]["teacher_minus_baseline"] == "-1"
    assert float(found[0]["loss_gain"]) == 0.3 and found[0]["time_speed_up"] == ""
    plot(tmp_path / "gains.png", [*STRONG, *WEAK])
    assert (tmp_path / "gains.png").stat().st_size > 5000
