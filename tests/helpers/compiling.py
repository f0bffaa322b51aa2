"""Use torch.compile in a process in which other tests have applied the CPU shims."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch._dynamo
from torch.overrides import _len_torch_function_stack, _pop_mode_temporarily


@contextlib.contextmanager
def dynamo_enabled() -> Iterator[None]:
    """Enable dynamo, without the shims' function mode and without code of earlier tests."""
    torch._dynamo.reset()
    with contextlib.ExitStack() as stack:
        for _ in range(_len_torch_function_stack()):
            stack.enter_context(_pop_mode_temporarily())
        stack.enter_context(torch._dynamo.config.patch(disable=False))
        yield
    torch._dynamo.reset()
