"""LETConfig: what a run asks of Late-to-Early Training, checked on construction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Method = Literal["none", "let"]
METHODS: tuple[Method, ...] = ("none", "let")
Placement = Literal["aligned-stage", "spread", "bubble", "auto"]
PLACEMENTS: tuple[Placement, ...] = ("aligned-stage", "spread", "bubble", "auto")


class LETError(ValueError):
    """A request that cannot be carried out; the message is one sentence for the user.

    Attributes:
        collective: every rank raises it, so that one of them suffices to print it.
    """

    def __init__(self, message: str, collective: bool = False) -> None:
        super().__init__(message)
        self.collective = collective


def first_line(error: BaseException) -> str:
    """First line of another package's message, to be quoted in one of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class LETConfig:
    """Settings of Late-to-Early Training (paper, Algorithm 1).

    Attributes:
        method: `let` aligns layer `layer` of the student with the teacher; `none` is stock.
        teacher: Hugging Face folder or `.gguf` file of a causal language model.
        layer: k, the student's aligned layer, 1-based.
        weight: lambda_0, the weight of the alignment loss at step 0.
        stop_step: S_stop, the 0-based step at which the weight has decayed to 0.
        teacher_layer: `last`, `middle` (half of the layers, rounded down) or a 1-based number.
        teacher_final_norm: whether the teacher's final norm is applied to its last layer.
        teacher_dtype: precision of the teacher's weights, forward pass and exchanged states.
        teacher_compile: whether the teacher goes through `torch.compile`.
        placement: where in the pipeline the teacher runs; `auto` measures the first steps and
            takes the fastest. It does not change the numbers.
        max_prefetch: microbatches whose teacher states the stage of layer k may hold before their
            backward; None for those of a global batch.

    Raises:
        LETError: a value is out of range.
    """

    method: Method = "none"
    teacher: Path | None = None
    layer: int = 3
    weight: float = 0.1
    stop_step: int = 1500
    teacher_layer: str = "last"
    teacher_final_norm: bool = True
    teacher_dtype: Literal["bf16", "fp32"] = "bf16"
    teacher_compile: bool = False
    placement: Placement = "auto"
    max_prefetch: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise LETError(f"--let-method is {self.method!r}; choose one of {', '.join(METHODS)}.")
        if self.method == "none":
            return
        if self.teacher is None:
            raise LETError("--let-method let needs --let-teacher DIR, the small trained model.")
        if self.layer < 1:
            raise LETError(f"--let-layer is {self.layer}; layers are counted from 1.")
        if not math.isfinite(self.weight) or self.weight < 0:
            raise LETError(
                f"--let-weight is {self.weight}; give a finite weight of at least 0 (the paper's"
                " is 0.1)."
            )
        if self.stop_step <= 0:
            raise LETError(
                f"--let-stop-step is {self.stop_step}; give the step, at least 1, at which the"
                " weight reaches 0, or --let-method none for a run without a teacher."
            )
        if self.placement not in PLACEMENTS:
            raise LETError(
                f"--let-placement is {self.placement!r}; choose one of {', '.join(PLACEMENTS)}."
            )
        if self.max_prefetch is not None and self.max_prefetch < 1:
            raise LETError(
                f"--let-max-prefetch is {self.max_prefetch}; the stage of layer k holds at least 1"
                " microbatch's states."
            )
        tap = self.teacher_layer
        if tap not in ("last", "middle") and not (tap.isdecimal() and int(tap) >= 1):
            raise LETError(f"--let-teacher-layer is {tap!r}; give last, middle or a number from 1.")

    @property
    def enabled(self) -> bool:
        """Whether any step of the run can have a weight above 0."""
        return self.method != "none" and self.weight > 0
