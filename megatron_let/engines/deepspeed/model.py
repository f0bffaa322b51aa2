"""The model on DeepSpeed's engine: built, partitioned under ZeRO-3, and wrapped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from megatron.training.models import GPTModelConfig
from megatron.training.models.gpt import GPTModelBuilder

from megatron_let.engines.deepspeed.adapters import ModelParallelUnit
from megatron_let.engines.deepspeed.config import Config, zero_stage

MakeEngine = Callable[[torch.nn.Module], deepspeed.DeepSpeedEngine]


class DeepSpeedModel(torch.nn.Module):
    """The model chunk of Megatron's loop, in place of DDP.

    Attributes:
        engine: DeepSpeed's engine, which runs every forward pass.
        force_all_reduce: set by Megatron's `train_step`; ignored.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        super().__init__()
        self.engine = engine
        self.force_all_reduce = False

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapped model, such as `config` or `decoder`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(unwrap_model(self.engine.module), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped model's forward pass."""
        return self.engine(*args, **kwargs)

    def zero_grad_buffer(self) -> None:
        """Do nothing: DeepSpeed clears the gradients after each step."""


def zero_init(config: Config) -> contextlib.AbstractContextManager[Any]:
    """Return a context that partitions parameters as they are created; ZeRO-3 only."""
    if zero_stage(config) != 3:
        return contextlib.nullcontext()
    # Without it zero.Init silently assumes one rank, and rejects the batch size.
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed.zero.Init(
        data_parallel_group=parallel_state.get_data_parallel_group(),
        config_dict_or_path=config,
        mpu=ModelParallelUnit(),
        # Not the dtype, which would round the rotary frequencies to bf16.
        tensor_overrides=[DeepSpeedTensorOverride.device],
    )


class DeepSpeedModelBuilder(GPTModelBuilder):
    """Builds the model without DDP, under which ZeRO would train nothing."""

    def build_distributed_models(self, *args: Any, **options: Any) -> list[Any]:
        """Build the models and their engines; `wrap_with_ddp` is ignored."""
        config: DeepSpeedModelConfig = self._model_config
        options["wrap_with_ddp"] = False
        with config.build_context():
            models = super().build_distributed_models(*args, **options)
        assert config.make_engine is not None, "the config has no engine"
        return [DeepSpeedModel(config.make_engine(model)) for model in models]


@dataclass(kw_only=True)
class DeepSpeedModelConfig(GPTModelConfig):
    """Config of a GPT model that `pretrain()` builds on DeepSpeed's engine.

    Attributes:
        build_context: entered while the model is built.
    """

    builder: ClassVar[str] = f"{__name__}.DeepSpeedModelBuilder"
    build_context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    make_engine: MakeEngine | None = None
