"""A checkpoint that completes after wandb has finished does not fail the run."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.training import wandb_utils

from megatron_let.compat import PatchSet
from megatron_let.run import artifacts


@pytest.mark.parametrize("runs", [True, False])
def test_artifact_is_logged_while_wandb_runs(
    runs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[Any] = []
    run = SimpleNamespace(log_artifact=lambda *a, **_: logged.append(a), entity="e", project="p")
    artifact = SimpleNamespace(add_reference=lambda *_, **__: None, add_file=lambda *_: None)
    wandb = SimpleNamespace(run=run if runs else None, Artifact=lambda *_, **__: artifact)
    monkeypatch.setattr(wandb_utils, "get_wandb_writer", lambda: wandb)
    monkeypatch.setattr(artifacts, "get_wandb_writer", lambda: wandb)
    args = argparse.Namespace(wandb_project="let", async_save=True)
    patches = PatchSet().apply_all(artifacts.wrappers(args))
    try:
        wandb_utils.on_save_checkpoint_success(str(tmp_path), "tracker", str(tmp_path), 30)
    finally:
        patches.undo()
    assert len(logged) == runs


def test_nothing_is_patched_without_wandb_or_async_save() -> None:
    for project, save in (("", True), ("let", False)):
        args = argparse.Namespace(wandb_project=project, async_save=save)
        assert not artifacts.wrappers(args)
