"""One training test on the oldest torch, which tests/run.sh runs beside the other tests."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

# Folder that gets the log, and then the exit code, of tests/oldest_torch.sh.
FOLDER = os.environ.get("OLDEST_TORCH")
# tests/run.sh ends it earlier.
SECONDS = 1600


@pytest.mark.distributed
@pytest.mark.skipif(
    FOLDER is None,
    reason="needs a second environment with the oldest torch, which bash tests/run.sh installs",
)
def test_training_on_the_oldest_torch_passes() -> None:
    log, code = Path(FOLDER or "") / "log", Path(FOLDER or "") / "code"
    deadline = time.monotonic() + SECONDS
    while not code.exists() or not code.read_text():
        assert time.monotonic() < deadline, f"it still runs:\n{log.read_text()[-3000:]}"
        time.sleep(1)
    assert code.read_text() == "0\n", log.read_text()[-6000:]
    assert " passed" in log.read_text()
