"""Run Megatron on a CPU with gloo: a shim for every CUDA call of its training loop.

Each shim is a row of `compat/patch_table.py`; `cpu_shims()` returns its function. A test removes
them one at a time from a run that trains, evaluates and saves.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    # Megatron passes torch.cuda.current_device(), an integer, which torch takes as the current GPU.
    return isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda"))


def _as_tuple(values: Any, length: int) -> tuple[Any, ...]:
    return tuple(values) if isinstance(values, (tuple, list)) else (values,) * length


def _backward(
    tensors: Any,
    gradients: Any = None,
    retain_graph: bool | None = None,
    *,
    gradient: Any = None,
    grad_tensors: Any = None,
    **unused: Any,
) -> None:
    """Replace `Tensor.backward` and `torch.autograd.backward` by a call of the autograd engine."""
    given = next((g for g in (gradients, gradient, grad_tensors) if g is not None), None)
    outputs = _as_tuple(tensors, 1)
    pairs = zip(outputs, _as_tuple(given, len(outputs)), strict=True)
    torch.autograd.Variable._execution_engine.run_backward(
        tensors=outputs,
        grad_tensors=tuple(torch.ones_like(t) if g is None else g for t, g in pairs),
        keep_graph=bool(retain_graph),
        create_graph=False,
        inputs=(),
        allow_unreachable=True,
        accumulate_grad=True,
    )


class CudaDeviceAsCpu(TorchFunctionMode):
    """Replaces `device="cuda"` by the CPU and drops `pin_memory=True` in every torch call."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.backward, torch.autograd.backward):
            # torch would run it with this mode off, and a layer's backward would request CUDA.
            with self:
                return _backward(*args, **kwargs)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


class _Stream(torch.cpu.Stream):
    """A CUDA stream on a CPU, which runs everything in program order, and its events."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        # MoE's dispatcher synchronises with the event that is returned.
        return event or self

    def wait(self, stream: Any = None) -> None:
        pass


def _device_properties(*args: Any, **kwargs: Any) -> SimpleNamespace:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return SimpleNamespace(
        name="CPU", major=0, minor=0, total_memory=total, multi_processor_count=os.cpu_count()
    )


def _tensor_type(original: Callable[..., Any]) -> Callable[..., Any]:
    def tensor_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, *args, **kwargs)
        # Optimizers select parameters by 'torch.cuda.FloatTensor' and its half-precision variants.
        # Under CudaDeviceAsCpu the original calls this function, whose name has the prefix already.
        return "torch.cuda." + original(self).removeprefix("torch.").removeprefix("cuda.")

    return tensor_type


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _mesh_from_group(original: Callable[..., Any]) -> Any:
    def from_group(group: Any, device_type: str, *args: Any, **kwargs: Any) -> Any:
        return original(group, "cpu", *args, **kwargs)

    return staticmethod(from_group)


def _replace_by(function: Any) -> Callable[[Any], Any]:
    return lambda original: function


def cpu_shims() -> dict[str, Callable[[Any], Any]]:
    """Return {patch target: function from the original to its CPU shim}."""
    rng = "megatron.core.tensor_parallel.random:"
    return {
        "torch.cuda:is_available": _replace_by(lambda: True),
        "torch.cuda:device_count": _replace_by(lambda: 1),
        "torch.cuda:set_device": _replace_by(lambda device: None),
        "torch.cuda:current_device": _replace_by(lambda: 0),
        "torch.cuda:get_device_properties": _replace_by(_device_properties),
        "torch.cuda:synchronize": _replace_by(lambda device=None: None),
        "torch.cuda:get_rng_state": _replace_by(lambda device="cuda": torch.get_rng_state()),
        "torch.cuda:manual_seed": _replace_by(torch.default_generator.manual_seed),
        "torch.cuda:Stream": _replace_by(_Stream),
        "torch.cuda:current_stream": _replace_by(lambda device=None: _Stream()),
        "torch.cuda:stream": _replace_by(contextlib.nullcontext),
        "torch.cuda:is_current_stream_capturing": _replace_by(lambda: False),
        "torch.accelerator:is_available": _replace_by(lambda: False),
        "torch.distributed.device_mesh:DeviceMesh.from_group": _mesh_from_group,
        "torch:Tensor.cuda": _replace_by(lambda self, *args, **kwargs: self),
        "torch:Tensor.type": _tensor_type,
        rng + "_get_cuda_rng_state": _replace_by(
            lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
        ),
        rng + "_set_cuda_rng_state": _replace_by(
            lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
        ),
        "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu": _replace_by(
            _on_host
        ),
    }
