"""Problems of one node."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_let.doctor import node


@pytest.mark.parametrize(
    ("query", "values", "expected"),
    [
        ("memory.total", ["40960"] * 8, "GPU 0 has 40 GiB, 75 needed"),
        ("memory.total", ["81559"] * 7, "7 GPUs, 8 expected"),
        ("memory.used", ["0", "50000"], "GPU 1 holds 49 GiB of another process"),
        ("ecc.errors.uncorrected.volatile.total", ["0", "3"], "GPU 1 counts 3 uncorrected"),
    ],
)
def test_unfit_gpu_is_reported(
    query: str, values: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    healthy = {"memory.total": ["81559"] * 8, "memory.used": ["500"] * 8}
    answers = healthy | {"ecc.errors.uncorrected.volatile.total": ["[N/A]"] * 8} | {query: values}
    monkeypatch.setattr(node, "nvidia_smi", answers.__getitem__)
    monkeypatch.setattr(node, "_xid_problems", lambda: iter(()))
    problems = list(node.node_problems(tmp_path, 8, 75, 0))
    assert len(problems) >= 1 and problems[0].startswith(expected)


def test_fatal_xid_of_the_kernel_log_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    log = "NVRM: Xid (PCI:0000:07:00): 79, pid=1, GPU has fallen off\nNVRM: Xid (PCI:1): 13, x\n"
    answer = subprocess.CompletedProcess([], 0, stdout=log)
    monkeypatch.setattr(node.subprocess, "run", lambda *_, **__: answer)
    assert list(node._xid_problems()) == ["the kernel logged Xid 79 since the last boot"]


def test_small_disk_is_reported(tmp_path: Path) -> None:
    (problem,) = node.node_problems(tmp_path, 0, 75, 10**9)
    assert "1e+09 needed for its checkpoints" in problem
