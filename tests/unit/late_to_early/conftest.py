"""A small Llama, a batch of it and a teacher's state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.helpers.checkpoints import save_llama
from tests.helpers.late_to_early import BATCH, D_T, LENGTH
from tests.helpers.models import save_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("student") / "llama", vocab_size=250)


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(250, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def state() -> Tensor:
    return torch.randn(BATCH, LENGTH, D_T, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def mask() -> Tensor:
    """Right padding of unequal lengths, as a tokenizer returns it."""
    lengths = torch.tensor([LENGTH, 3, 15, 9])
    return (torch.arange(LENGTH) < lengths[:, None]).long()


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "llama")
