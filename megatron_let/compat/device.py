"""The device of a run, and the flags and environment that Megatron needs for it."""

from __future__ import annotations

import argparse
import importlib.util
import os
import warnings
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Host:
    """Capabilities of this machine.

    Attributes:
        cuda: a GPU is usable; otherwise the run is on the CPU with gloo.
        transformer_engine: Transformer Engine can be imported.
        fused_gradients: Apex's fused weight-gradient kernel can be imported.
    """

    cuda: bool
    transformer_engine: bool
    fused_gradients: bool

    def describe(self) -> str:
        """Return one line for the log."""
        device = torch.cuda.get_device_name() if self.cuda else "CPU"
        backend = "NCCL" if self.cuda else "gloo"
        layers = "Transformer Engine" if self.transformer_engine else "torch"
        return f"device {device}, backend {backend}, layers by {layers}"

    def argv(self) -> list[str]:
        """Return the Megatron flags that this host needs; the recipe may override them."""
        # Attention is causal without it: 26 MB per microbatch of 16 x 1280 tokens.
        flags = ["--no-create-attention-mask-in-dataloader"]
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
            # Megatron's FSDP would reduce with an operation that gloo lacks.
            flags += ["--no-gradient-reduce-div-fusion"]
        return flags


def detect_host() -> Host:
    """Detect this machine's capabilities.

    Apex can be installed without its kernels, so the kernel's module is looked up.
    """
    cuda = torch.cuda.is_available()
    engine = cuda and importlib.util.find_spec("transformer_engine") is not None
    fused = cuda and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    return Host(cuda=cuda, transformer_engine=engine, fused_gradients=fused)


def prepare_process(host: Host, rank: int) -> None:
    """Set what Megatron reads at import or CUDA at its start; call it before importing Megatron."""
    if not os.environ.get("WANDB_API_KEY"):
        os.environ.setdefault("WANDB_MODE", "offline")
    if not host.cuda:
        # Megatron chooses at import what torch.compile compiles; inductor gains nothing on a CPU.
        torch._dynamo.config.disable = True
        # transformers imports an installed DeepSpeed, which would take the CPU shims for a GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if rank != 0:
        warnings.filterwarnings("ignore")
    if not host.transformer_engine:
        # A dozen lines per rank about missing Transformer Engine and Apex; Host.describe() says it.
        warnings.filterwarnings("ignore", module=r"megatron\.")


def set_hardware_queues(args: argparse.Namespace) -> None:
    """Set one hardware queue for TP and CP, as Megatron asserts; call it before CUDA starts.

    With one queue, communication that overlaps compute starts first. Without TP and CP, kernels
    would only wait for messages of the pipeline and of the teacher.
    """
    if args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
