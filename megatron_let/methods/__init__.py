"""Training methods (LET, RKD, SALT) and their registry.

A new method is one class in one file of this folder and one entry of `METHODS`; see
docs/extending.md.
"""

from __future__ import annotations

from megatron_let.methods.base import TeacherMethod, TrainingRun
from megatron_let.methods.distillation import DistillationMethod
from megatron_let.methods.let import LETMethod

__all__ = ["METHODS", "TeacherMethod", "TrainingRun", "build_method"]

METHODS: dict[str, type[TeacherMethod]] = {
    "let": LETMethod,
    "rkd": DistillationMethod,
    "salt": DistillationMethod,
}


def build_method(run: TrainingRun) -> TeacherMethod:
    """Build the method that `run.config` names."""
    return METHODS[run.config.method](run)
