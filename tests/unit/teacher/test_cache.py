"""The folder of converted and downloaded teachers."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_let.teacher.cache import default_cache


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MEGATRON_LET_CACHE": "/c", "XDG_CACHE_HOME": "/x"}, "/c"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/megatron_let"),
        ({"XDG_CACHE_HOME": "", "MEGATRON_LET_CACHE": "", "HOME": "/h"}, "/h/.cache/megatron_let"),
    ],
)
def test_cache_follows_environment(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MEGATRON_LET_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert default_cache() == Path(expected)
