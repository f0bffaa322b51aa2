"""`--help` of every command answers without the imports that take seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_let.cli.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[3]
SLOW = ("torch", "transformers", "megatron", "triton", "matplotlib")
_RUN = f"""
import runpy, sys
kind, *sys.argv = sys.argv[1:]
try:
    run = runpy.run_path if kind == "path" else runpy.run_module
    run(sys.argv[0], run_name="__main__")
finally:
    print("imported:", *[name for name in {SLOW} if name in sys.modules])
"""

CALLS = [
    *(("path", str(path.relative_to(ROOT))) for path in sorted((ROOT / "tools").glob("*.py"))),
    *(("module", "megatron_let.cli", name) for name in COMMANDS),
    ("module", "megatron_let.cli"),
    ("module", "megatron_let.doctor"),
    *(("module", "megatron_let.cli", "convert", name) for name in ("megatron-to-hf", "verify")),
    *(("module", "megatron_let.cli", "evaluate", name) for name in ("tasks", "perplexity")),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: " ".join(call[1:]))
def test_help_imports_no_slow_package(call: tuple[str, ...]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", _RUN, *call, "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout and "--help" in result.stdout
    assert result.stdout.splitlines()[-1] == "imported:"
