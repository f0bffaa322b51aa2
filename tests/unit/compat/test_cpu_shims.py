"""The CPU shims, the flags of a host, and the torch layers against Megatron's."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import parallel_state
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_let.compat import PatchSet, local_layers
from megatron_let.compat.cpu_shims import CudaDeviceAsCpu, cpu_shims
from megatron_let.compat.device import Host, detect_host, prepare_process, set_hardware_queues
from megatron_let.compat.local_layers import (
    RMSNorm,
    SDPAttention,
    check_local_layers,
    local_layer_spec,
    zigzag_positions,
)
from megatron_let.errors import LETError

CPU_HOST = Host(cuda=False, transformer_engine=False, fused_gradients=False)
HOSTS = {
    "CPU": CPU_HOST,
    "GPU with torch": Host(True, False, False),
    "GPU with Apex": Host(True, False, True),
    "GPU with everything": Host(True, True, True),
}

# Flags


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_host_flags_are_flags_of_megatron(host: Host) -> None:
    from megatron.training.arguments import add_megatron_arguments

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    parser.parse_args(host.argv())


def test_cpu_host_selects_gloo_and_torch_layers() -> None:
    flags = " ".join(CPU_HOST.argv())
    for expected in (
        "--distributed-backend gloo", "--use-cpu-initialization", "--transformer-impl local",
        "--no-gradient-accumulation-fusion", "--no-bias-swiglu-fusion", "--no-rope-fusion",
    ):  # fmt: skip
        assert expected in flags


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_no_host_makes_attention_masks(host: Host) -> None:
    assert "--no-create-attention-mask-in-dataloader" in host.argv()


def test_gpu_with_all_packages_needs_no_other_flags() -> None:
    assert HOSTS["GPU with everything"].argv() == ["--no-create-attention-mask-in-dataloader"]


def test_gpu_without_transformer_engine_selects_local_layers() -> None:
    flags = HOSTS["GPU with torch"].argv()
    assert flags[1:3] == ["--transformer-impl", "local"]
    assert "gloo" not in flags and "--use-cpu-initialization" not in flags
    assert "--no-gradient-accumulation-fusion" in flags
    assert "--no-gradient-accumulation-fusion" not in HOSTS["GPU with Apex"].argv()


def test_describe_names_device_backend_and_layers() -> None:
    assert CPU_HOST.describe() == "device CPU, backend gloo, layers by torch"


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("installed", [set(), {"apex"}, {"fused_weight_gradient_mlp_cuda"}])
def test_fused_gradients_need_the_apex_kernel_not_the_package(
    cuda: bool, installed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: True if name in installed else None
    )
    expected = cuda and "fused_weight_gradient_mlp_cuda" in installed
    assert detect_host() == Host(cuda, False, expected)


@pytest.fixture
def clean_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "WANDB_MODE", "WANDB_API_KEY"):
        # Set first, so that monkeypatch undoes what the function sets.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    # monkeypatch would delete this setting, which the module does not store as an attribute.
    disabled = torch._dynamo.config.disable
    with warnings.catch_warnings():
        yield monkeypatch
    torch._dynamo.config.disable = disabled


def test_wandb_mode_without_key_is_offline(clean_process: pytest.MonkeyPatch) -> None:
    prepare_process(CPU_HOST, rank=0)
    assert os.environ["WANDB_MODE"] == "offline"


@pytest.mark.parametrize(
    ("tp", "cp", "given", "expected"),
    [(1, 1, None, None), (2, 1, None, "1"), (1, 2, None, "1"), (2, 1, "8", "8")],
)
def test_one_hardware_queue_is_set_for_tensor_and_context_parallelism_only(
    tp: int, cp: int, given: str | None, expected: str | None, clean_process: pytest.MonkeyPatch
) -> None:
    if given is not None:
        clean_process.setenv("CUDA_DEVICE_MAX_CONNECTIONS", given)
    set_hardware_queues(argparse.Namespace(tensor_model_parallel_size=tp, context_parallel_size=cp))
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == expected


@pytest.mark.parametrize(
    ("variables", "mode"),
    [({"WANDB_API_KEY": "key"}, None), ({"WANDB_MODE": "disabled"}, "disabled")],
)
def test_wandb_settings_of_the_user_are_kept(
    variables: dict[str, str], mode: str | None, clean_process: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        clean_process.setenv(name, value)
    prepare_process(CPU_HOST, rank=0)
    assert os.environ.get("WANDB_MODE") == mode


def test_megatron_let_warnings_are_shown_on_rank_0(clean_process: pytest.MonkeyPatch) -> None:
    prepare_process(CPU_HOST, rank=0)
    with pytest.warns(UserWarning, match="seen"):
        warnings.warn_explicit(
            "seen", UserWarning, "arguments.py", 1, "megatron_let.config.arguments"
        )


# RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_matches_fp64_formula(dtype: torch.dtype) -> None:
    norm = RMSNorm(transformer_config(params_dtype=dtype), 32, eps=1e-5)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    hidden = torch.randn(7, 2, 32, dtype=dtype)
    exact = hidden.double()
    expected = exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(norm(hidden).double(), expected, rtol=tolerance, atol=tolerance)
    assert norm(hidden).dtype == dtype


def test_rms_norm_weight_is_marked_under_sequence_parallelism() -> None:
    parallel = transformer_config(tensor_model_parallel_size=2, sequence_parallel=True)
    assert RMSNorm(parallel, 32).weight.sequence_parallel
    assert not RMSNorm(transformer_config(), 32).weight.sequence_parallel


# Context parallel positions


@given(st.integers(1, 5), st.integers(1, 6))
def test_zigzag_positions_match_megatrons_load_balancing(cp: int, chunk: int) -> None:
    length = 2 * chunk * cp
    positions = zigzag_positions(2 * chunk, cp, torch.device("cpu"))
    assert sorted(positions.tolist()) == list(range(length))
    for rank, local in enumerate(positions.view(cp, -1).tolist()):
        owners = [p * 2 * cp // length for p in local]
        assert owners == [rank] * chunk + [2 * cp - 1 - rank] * chunk
        assert local == sorted(local)


def test_zigzag_positions_of_two_ranks_equal_values_by_hand() -> None:
    assert zigzag_positions(4, 2, torch.device("cpu")).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]


# Attention


class Group:
    """A process group of `size` ranks on rank `rank`."""

    def __init__(self, size: int = 1, rank: int = 0) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


def transformer_config(**values: Any) -> TransformerConfig:
    common: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cpu_initialization": True,
        "masked_softmax_fusion": False,
    }
    return TransformerConfig(**common | values)


def attention(kind: type, config: TransformerConfig, cp: Group | None = None, **values: Any) -> Any:
    groups = SimpleNamespace(tp=Group(), cp=cp or Group())
    return kind(config, 1, AttnMaskType.causal, "self", pg_collection=groups, **values)


@pytest.fixture
def megatron_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Megatron's attention allocates on the current GPU and forks its RNG."""
    patches = PatchSet().apply_all(cpu_shims())
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("model-parallel-rng", 1)
    parallel_state._set_global_memory_buffer()
    with CudaDeviceAsCpu():
        yield
    parallel_state.destroy_global_memory_buffer()
    tracker.reset()
    patches.undo()


def heads(config: TransformerConfig, length: int) -> tuple[torch.Tensor, ...]:
    """Return query [s, b, heads, d], key and value [s, b, groups, d]."""
    torch.manual_seed(0)
    width = config.kv_channels
    query = torch.randn(length, 2, config.num_attention_heads, width)
    keys = torch.randn(2, length, 2, config.num_query_groups, width)
    return query, keys[0], keys[1]


class RequestsCuda(torch.autograd.Function):
    """Backward returns twice the incoming gradient, accumulated on "cuda"."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return torch.zeros(gradient.shape, device="cuda") + 2 * gradient


@pytest.mark.parametrize(
    ("backward", "expected"),
    [
        (lambda y: y.sum().backward(), 2),
        (lambda y: y.backward(torch.full_like(y, 3)), 6),
        (lambda y: y.backward(gradient=torch.full_like(y, 3)), 6),
        # As full activation recompute calls it.
        (lambda y: torch.autograd.backward((y,), (torch.full_like(y, 3),)), 6),
        (lambda y: torch.autograd.backward(y, grad_tensors=torch.full_like(y, 3)), 6),
        (lambda y: torch.autograd.backward([y.sum(), 3 * y.sum()]), 8),
    ],
)
def test_backward_that_requests_cuda_runs_on_cpu(backward: Any, expected: int) -> None:
    x = torch.ones(3, requires_grad=True)
    with CudaDeviceAsCpu():
        backward(RequestsCuda.apply(x))
    assert x.grad is not None and x.grad.tolist() == [expected] * 3


def masked(length: int, *ends: tuple[int, ...]) -> torch.Tensor:
    """Return Megatron's mask [b, 1, s, s] of rows whose documents end at these tokens."""
    tokens = torch.zeros(len(ends), length, dtype=torch.int64)
    for row, places in zip(tokens, ends, strict=True):
        row[list(places)] = 1
    return torch.stack(
        [_get_ltor_masks_and_position_ids(row, 1, True, True, False, True)[0] for row in tokens]
    )


@pytest.mark.parametrize("groups", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("ends", [(), (2, 3, 9)], ids=["causal", "documents"])
def test_attention_matches_megatron(
    groups: int, scale: float | None, ends: tuple[int, ...], megatron_on_cpu: None
) -> None:
    config = transformer_config(num_query_groups=groups)
    query, key, value = (t.requires_grad_() for t in heads(config, 12))
    mask = masked(12, ends, ends[:1])
    upstream = torch.randn(12, 2, 32)
    results = []
    for kind in (DotProductAttention, SDPAttention):
        core = attention(kind, config, softmax_scale=scale)
        context = core(query, key, value, mask, AttnMaskType.causal)
        results.append((context, *torch.autograd.grad(context, (query, key, value), upstream)))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cp", [2, 3])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("documents", [False, True])
def test_attention_of_context_parallel_ranks_matches_one_rank(
    cp: int, groups: int, documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformer_config(num_query_groups=groups)
    length = 4 * cp
    query, key, value = heads(config, length)
    mask = masked(length, (1, 4), (6,)) if documents else None
    whole = attention(SDPAttention, config)(query, key, value, mask)
    order = zigzag_positions(length // cp, cp, torch.device("cpu"))
    for rank in range(cp):
        core = attention(SDPAttention, config, cp=Group(cp, rank))
        gathered = {"key": key[order], "value": value[order]}
        local = order.view(cp, -1)[rank]
        shards = {"key": key[local], "value": value[local]}
        monkeypatch.setattr(
            core,
            "_gather",
            lambda shard, s=shards, g=gathered: next(g[n] for n in s if s[n] is shard),
        )
        rows = None if mask is None else mask[:, :, local]
        context = core(query[local], shards["key"], shards["value"], rows)
        torch.testing.assert_close(context, whole[local], rtol=1e-6, atol=1e-6)


def test_attention_default_scale_is_inverse_root_of_head_width() -> None:
    config = transformer_config()
    query, key, value = heads(config, 6)
    default = attention(SDPAttention, config)(query, key, value, None)
    explicit = attention(SDPAttention, config, softmax_scale=1 / math.sqrt(8))
    torch.testing.assert_close(default, explicit(query, key, value, None))


def test_attention_dropout_uses_rng_tracker_and_is_off_in_eval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forks: list[str] = []

    @contextlib.contextmanager
    def fork() -> Iterator[None]:
        forks.append("model-parallel-rng")
        yield

    tracker = SimpleNamespace(fork=fork)
    monkeypatch.setattr(local_layers, "get_cuda_rng_tracker", lambda: tracker)
    config = transformer_config(attention_dropout=0.5)
    core = attention(SDPAttention, config)
    query, key, value = heads(config, 6)
    assert not torch.equal(core(query, key, value, None), core(query, key, value, None))
    assert len(forks) == 2, "tensor-parallel ranks would share one mask"
    core.eval()
    assert torch.equal(core(query, key, value, None), core(query, key, value, None))
    assert len(forks) == 2


# What the torch layers do not support


def test_unsupported_norm_raises_error_naming_flag() -> None:
    config = SimpleNamespace(transformer=transformer_config(normalization="LayerNorm"))
    with pytest.raises(LETError, match=r"--normalization LayerNorm .* --normalization RMSNorm"):
        local_layer_spec(config)


def test_dispatcher_without_its_library_raises_error_naming_flag() -> None:
    config = transformer_config(normalization="RMSNorm", moe_token_dispatcher_type="flex")
    with pytest.raises(LETError, match="--moe-token-dispatcher-type flex"):
        check_local_layers(config)


def test_window_raises_error_naming_flag() -> None:
    with pytest.raises(LETError, match="--window-size"):
        check_local_layers(transformer_config(normalization="RMSNorm", window_size=(4, 0)))
