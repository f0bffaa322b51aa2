"""The model under DeepSpeed: built, partitioned if ZeRO-3 asks for it, and wrapped."""

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

from megatron_let.engines.deepspeed.ds_config import Config, zero_stage
from megatron_let.engines.deepspeed.mpu import ModelParallelUnit

MakeEngine = Callable[[torch.nn.Module], deepspeed.DeepSpeedEngine]


class DeepSpeedModel(torch.nn.Module):
    """What Megatron's loop sees as its model chunk, in DDP's place.

    Attributes:
        engine: DeepSpeed's, through which every forward goes.
        force_all_reduce: written by Megatron's `train_step`, of no meaning here.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        super().__init__()
        self.engine = engine
        self.force_all_reduce = False

    def __getattr__(self, name: str) -> Any:
        """What the loop asks of the model itself (`config`, `pg_collection`, `decoder`)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(unwrap_model(self.engine.module), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the wrapped model's."""
        return self.engine(*args, **kwargs)

    def zero_grad_buffer(self) -> None:
        """DeepSpeed clears gradients after each step by itself."""


def zero_init(config: Config) -> contextlib.AbstractContextManager[Any]:
    """The context in which parameters are partitioned as they are made; ZeRO-3 only."""
    if zero_stage(config) != 3:
        return contextlib.nullcontext()
    # Without it zero.Init counts one rank in silence, and refuses the batch size.
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed.zero.Init(
        data_parallel_group=parallel_state.get_data_parallel_group(),
        config_dict_or_path=config,
        mpu=ModelParallelUnit(),
        # Not the dtype: it would round the rotary frequencies to bf16.
        tensor_overrides=[DeepSpeedTensorOverride.device],
    )


class DeepSpeedModelBuilder(GPTModelBuilder):
    """Builds the chunk without DDP, under which ZeRO would train nothing."""

    def build_distributed_models(self, *args: Any, **options: Any) -> list[Any]:
        """As `GPTModelBuilder.build_distributed_models`; `wrap_with_ddp` is ignored."""
        config: DeepSpeedModelConfig = self._model_config
        options["wrap_with_ddp"] = False
        with config.build_context():
            models = super().build_distributed_models(*args, **options)
        assert config.make_engine is not None, "the config has no engine"
        return [DeepSpeedModel(config.make_engine(model)) for model in models]


@dataclass(kw_only=True)
class DeepSpeedModelConfig(GPTModelConfig):
    """A GPT model that `pretrain()` builds on DeepSpeed's engine.

    Attributes:
        build_context: entered around the model's construction.
        make_engine: from the built module to its engine.
    """

    builder: ClassVar[str] = f"{__name__}.DeepSpeedModelBuilder"
    build_context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    make_engine: MakeEngine | None = None
