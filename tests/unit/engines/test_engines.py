"""The registry of engines, and that DeepSpeed stays behind it."""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_let.config.arguments import ENGINES, add_arguments
from megatron_let.engines import load_engine
from megatron_let.engines.deepspeed.checkpoint_info import CheckpointInfo, write_info
from megatron_let.errors import LETError
from megatron_let.files.names import TRACKER, checkpoint_name
from tests.helpers.runs import ROOT, environment

pytestmark = pytest.mark.medium

PACKAGE = ROOT / "megatron_let"
# The only module outside engines/ that may import the DeepSpeed engine.
FORMATS = PACKAGE / "checkpoint/formats.py"


def imports(file: Path) -> Iterator[str]:
    """Return every module that an import statement names, at the top or in a function."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_flag_offers_every_engine() -> None:
    usage = add_arguments(argparse.ArgumentParser()).format_help()
    assert f"--engine {{{','.join(ENGINES)}}}" in usage


def test_only_the_registries_import_the_deepspeed_engine() -> None:
    found = {
        file
        for folder in (PACKAGE, ROOT / "tools")
        for file in folder.rglob("*.py")
        for name in imports(file)
        if name.startswith("megatron_let.engines.deepspeed")
    }
    assert {file for file in found if not file.is_relative_to(PACKAGE / "engines")} == {FORMATS}


def test_only_the_deepspeed_engine_imports_deepspeed() -> None:
    for folder in (PACKAGE, ROOT / "tools"):
        for file in folder.rglob("*.py"):
            if not file.is_relative_to(PACKAGE / "engines/deepspeed"):
                assert not [n for n in imports(file) if n.split(".")[0] == "deepspeed"], file


def test_engines_and_entry_import_without_deepspeed() -> None:
    program = """
import sys
sys.modules["deepspeed"] = None
from megatron_let import pretrain
pretrain.prepare_process(pretrain.detect_host(), 0)
import megatron_let.integration
import megatron_let.checkpoint.formats
from megatron_let.config.arguments import ENGINES
from megatron_let.engines import load_engine
print(*[load_engine(name).__name__ for name in ENGINES])
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split()[-2:] == [
        "megatron_let.engines.megatron",
        "megatron_let.engines.deepspeed.engine",
    ]


def test_megatron_engine_refuses_a_deepspeed_checkpoint(tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_text("5")
    folder = tmp_path / checkpoint_name(5)
    folder.mkdir()
    common = {"ckpt_step": None, "finetune": False, "hybrid_layer_pattern": None}
    args = argparse.Namespace(load=str(tmp_path), **common)
    load_engine("megatron").enable(args, cuda=False)
    write_info(folder, CheckpointInfo(5, 1, 2, 1))
    with pytest.raises(LETError, match="--engine deepspeed"):
        load_engine("megatron").enable(args, cuda=False)
