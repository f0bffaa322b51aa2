"""Which device a run uses, and what Megatron must be told for it."""

from __future__ import annotations

import importlib.util
import os
import warnings
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Host:
    """What this machine offers.

    Attributes:
        cuda: a GPU is usable; otherwise the run is on the CPU with gloo.
        transformer_engine: Transformer Engine can be imported.
        fused_gradients: Apex's or Transformer Engine's fused weight-gradient kernel is there.
    """

    cuda: bool
    transformer_engine: bool
    fused_gradients: bool

    def describe(self) -> str:
        """One line for the user."""
        device = torch.cuda.get_device_name() if self.cuda else "CPU"
        backend = "NCCL" if self.cuda else "gloo"
        layers = "Transformer Engine" if self.transformer_engine else "torch"
        return f"device {device}, backend {backend}, layers by {layers}"

    def argv(self) -> list[str]:
        """Megatron flags that this host needs; they go before the recipe's."""
        flags = []
        if not self.cuda:
            flags += ["--distributed-backend", "gloo", "--use-cpu-initialization"]
        if not self.transformer_engine:
            flags += ["--transformer-impl", "local", "--no-persist-layer-norm"]
            flags += ["--no-rope-fusion", "--no-masked-softmax-fusion"]
        if not self.fused_gradients:
            flags += ["--no-gradient-accumulation-fusion"]
        if not self.cuda:
            flags += ["--no-bias-swiglu-fusion", "--no-bias-gelu-fusion"]
            flags += ["--no-bias-dropout-fusion", "--disable-jit-fuser"]
        return flags


def detect_host() -> Host:
    """Look at this machine; an importable `apex` alone proves nothing, so its kernel is probed."""
    cuda = torch.cuda.is_available()
    engine = cuda and importlib.util.find_spec("transformer_engine") is not None
    fused = cuda and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    return Host(cuda=cuda, transformer_engine=engine, fused_gradients=fused)


def prepare_process(host: Host, rank: int) -> None:
    """Set what Megatron reads at import or when CUDA starts; call it before importing Megatron."""
    # Megatron asserts it for TP and CP: one queue keeps communication ahead of compute.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not os.environ.get("WANDB_API_KEY"):
        os.environ.setdefault("WANDB_MODE", "offline")
    if not host.cuda:
        # Megatron decides at import what torch.compile gets; there is no inductor gain on a CPU.
        torch._dynamo.config.disable = True
        # transformers imports DeepSpeed where it is installed, which would take our stand-ins of
        # CUDA's calls for a GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if rank != 0:
        warnings.filterwarnings("ignore")
    if not host.transformer_engine:
        # A dozen lines a rank that say Transformer Engine and Apex are not there; one line of
        # ours says it too.
        warnings.filterwarnings("ignore", module=r"megatron\.")
