"""Settings of the time series experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_let.errors import LETError
from megatron_let.timeseries.settings import load_settings
from tests.helpers.time_series import small_settings


def test_packaged_settings_have_the_papers_values() -> None:
    settings = load_settings(Path("time_series"))
    assert (settings["student"]["layer"], settings["student"]["weight"]) == (6, 0.1)
    assert len(settings["teacher"]["sets"]) == 7
    assert set(settings["teacher"]["sets"]) < set(settings["student"]["sets"])


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("student", "epochs", 1.5),
        ("student", "epochs", 0),
        ("student", "layer", "six"),
        ("student", "weight", -0.1),
        ("student", "weight", float("nan")),
        ("student", "seeds", 1),
        ("student", "seeds", []),
        ("student", "seeds", [1, "2"]),
        ("student", "sets", "Waves"),
        ("teacher", "width", True),
        ("teacher", "learning_rate", None),
    ],
)
def test_wrong_value_is_one_sentence(tmp_path: Path, section: str, name: str, value: Any) -> None:
    settings = small_settings()
    settings[section][name] = value
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(LETError, match=rf"line \d+: {section}\.{name} is .*; give a value such"):
        load_settings(path)


def test_whole_number_serves_as_a_float(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(small_settings(weight=1)))
    assert load_settings(tmp_path / "a.yaml")["student"]["weight"] == 1


@pytest.mark.parametrize("change", ["missing", "unknown", "no section", "no mapping"])
def test_other_settings_are_refused(tmp_path: Path, change: str) -> None:
    settings: Any = small_settings()
    if change == "missing":
        del settings["student"]["layer"]
    elif change == "unknown":
        settings["student"]["layers"] = 3
    elif change == "no section":
        del settings["teacher"]
    else:
        settings["student"] = [1]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(LETError, match="give exactly"):
        load_settings(tmp_path / "a.yaml")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LETError, match="does not exist"):
        load_settings(tmp_path / "none.yaml")
