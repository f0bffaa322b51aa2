"""The environment's text: each file once, in a reproducible order."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_let.files import environment_text


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """An environment of two folders."""
    paths = {"stdlib": tmp_path / "stdlib", "purelib": tmp_path / "purelib"}
    for path in paths.values():
        path.mkdir()
    monkeypatch.setattr(environment_text.sysconfig, "get_path", lambda name: str(paths[name]))
    return paths


def text_of(name: str, size: int = 2_000) -> str:
    return (f"# {name}\n" * size)[:size]


def test_environment_text_reads_each_file_of_both_folders_once(roots: dict[str, Path]) -> None:
    kept = {name: text_of(name) for name in ("a.py", "b.md", "c.rst", "d.txt")}
    for name, text in kept.items():
        (roots["stdlib"] / name).write_text(text)
    (roots["purelib"] / "package").mkdir()
    (roots["purelib"] / "package" / "copy.py").write_text(kept["a.py"])
    (roots["purelib"] / "small.py").write_text("x")
    (roots["purelib"] / "large.py").write_text(text_of("large", 100_001))
    (roots["purelib"] / "binary.so").write_text(text_of("binary"))
    (roots["purelib"] / "latin.py").write_bytes(b"# caf\xe9\n" * 300)
    assert sorted(environment_text.environment_text(10**6)) == sorted(kept.values())


def test_environment_text_order_does_not_depend_on_location(
    roots: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abcdefgh":
        (roots["purelib"] / f"{name}.py").write_text(text_of(name))
    first = list(environment_text.environment_text(10**6))
    roots["purelib"] = roots["purelib"].rename(tmp_path / "a-moved-environment")
    assert list(environment_text.environment_text(10**6)) == first
    assert first != sorted(first), "packages are mixed"


@pytest.mark.parametrize(("budget", "expected"), [(0, 0), (1, 1), (2_000, 1), (2_001, 2)])
def test_text_stops_at_budget(roots: dict[str, Path], budget: int, expected: int) -> None:
    for name in "abcd":
        (roots["purelib"] / f"{name}.py").write_text(text_of(name))
    assert len(list(environment_text.environment_text(budget))) == expected


def test_environment_text_skips_folders_and_dangling_links(roots: dict[str, Path]) -> None:
    (roots["purelib"] / "a.py").write_text(text_of("a"))
    (roots["purelib"] / "dangling.py").symlink_to("nowhere.py")
    folder = roots["purelib"] / "folder.py"
    folder.mkdir()
    for i in range(100):
        # A folder's size grows with its entries, so that it looks like a file of 1 kB.
        (folder / f"{i}-{'x' * 60}").touch()
    assert list(environment_text.environment_text(10**6)) == [text_of("a")]
