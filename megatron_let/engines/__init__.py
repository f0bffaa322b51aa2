"""Training engines behind one registry: Megatron's, or DeepSpeed's ZeRO.

Modules outside this package use `load_engine` and import no engine, except
checkpoint/formats.py, which imports the DeepSpeed reader.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from megatron_let.teacher.model import Sharding


class Engine(Protocol):
    """Interface of a training engine."""

    def check_arguments(self, args: argparse.Namespace) -> None:
        """Check the arguments before Megatron validates them.

        Raises:
            LETError: names the flag that the engine does not support.
        """
        ...

    def config_from_args(self, args: argparse.Namespace, cuda: bool) -> dict[str, Any]:
        """Return the engine's own config, completed from the run's arguments; {} for none.

        Raises:
            LETError: the user's config contradicts the arguments.
        """
        ...

    def enable(self, args: argparse.Namespace, cuda: bool) -> Callable[[argparse.Namespace], Any]:
        """Apply the engine's patches for the next `pretrain()`.

        Args:
            args: Megatron's validated arguments.
            cuda: the run is on GPUs.

        Returns:
            The function from arguments to the model's config.

        Raises:
            LETError: the engine cannot run, or cannot load the checkpoint.
        """
        ...

    def teacher_sharding(self, args: argparse.Namespace) -> Sharding | None:
        """Return the sharding of the teacher over the replicas; None for a replicated teacher."""
        ...


def load_engine(name: str) -> Engine:
    """Import one of `config.arguments.ENGINES`."""
    if name == "deepspeed":
        from megatron_let.engines.deepspeed import engine

        return engine
    from megatron_let.engines import megatron

    return megatron
