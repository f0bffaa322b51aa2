"""LETConfig: the settings of Late-to-Early Training, validated on construction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from megatron_let.errors import LETError
from megatron_let.losses import LOSSES

Projection = Literal["interpolate", "learned"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
Placement = Literal["aligned-stage", "spread", "bubble", "auto"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)


@dataclass(frozen=True)
class MethodTraits:
    """What flags, checks and the planner need to know about a method.

    Attributes:
        learns_from: the teacher's hidden states or its logits; None for no teacher.
        uses: fields of `LETConfig` that the method reads, besides `method`.
    """

    learns_from: Literal["states", "logits"] | None = None
    uses: frozenset[str] = frozenset()

    @property
    def ends_at_stop_step(self) -> bool:
        """Whether the weight is 0 from `stop_step` on."""
        return "stop_step" in self.uses


_ALIGNMENT = frozenset(
    {
        *("teacher", "teacher_dtype", "stop_step", "layer", "weight", "teacher_layer"),
        *("teacher_final_norm", "teacher_compile", "placement", "max_prefetch", "loss"),
        *("projection", "cross_tokenizer"),
    }
)
_DISTILLATION = frozenset({"teacher", "teacher_dtype", "kd_weight", "kd_temperature", "kd_top_k"})

# Values of --let-method; `methods.METHODS` has the class of each but `none`.
METHODS: dict[str, MethodTraits] = {
    "none": MethodTraits(),
    "let": MethodTraits("states", _ALIGNMENT),
    "rkd": MethodTraits("logits", _DISTILLATION),
    "salt": MethodTraits("logits", _DISTILLATION | {"stop_step"}),
}


@dataclass(frozen=True)
class LETConfig:
    """Settings of Late-to-Early Training (paper, Algorithm 1).

    Attributes:
        method: `let` aligns layer `layer` of the student with the teacher; `rkd` and `salt` distill
            the teacher's output distribution, to the end or for `stop_step` steps; `none` trains
            without a teacher.
        teacher: Hugging Face folder or `.gguf` file of a causal language model.
        layer: k, the student's aligned layer, 1-based.
        weight: lambda_0, the weight of the alignment loss at step 0.
        stop_step: S_stop, the 0-based step at which the weight has decayed to 0; n_KD of `salt`.
        teacher_layer: `last`, `middle` (half of the layers, rounded down) or a 1-based number.
        teacher_final_norm: whether the teacher's final norm is applied to its last layer.
        teacher_dtype: precision of the teacher's weights, forward pass and exchanged states;
            `run.output_folder.resolve_teacher_dtype` replaces the flag's `auto`.
        teacher_compile: whether to compile the teacher with `torch.compile`; None compiles it on a
            GPU, unless it is sharded.
        placement: where in the pipeline the teacher runs; `auto` measures the first steps and
            takes the fastest. It does not change the numbers.
        max_prefetch: microbatches whose teacher states the stage of layer k may hold before their
            backward; None for those of a global batch.
        loss: the cosine (equation 7), the LogSum loss or canonical correlations.
        projection: maps the student's state to the teacher's width: equation 6, or a linear layer
            that is trained with the student and removed with the teacher.
        cross_tokenizer: the teacher reads the same text under its own tokenizer (the paper's LET†).
        kd_weight: w of `rkd` and `salt`, the share of the teacher's distribution in the targets.
        kd_temperature: divides the teacher's logits.
        kd_top_k: number of the teacher's largest logits to keep per token; 0 keeps all.

    Raises:
        LETError: a value is out of range.
    """

    method: str = "none"
    teacher: Path | None = None
    layer: int = 3
    weight: float = 0.1
    stop_step: int = 1500
    teacher_layer: str = "last"
    teacher_final_norm: bool = True
    teacher_dtype: Literal["bf16", "fp32"] = "bf16"
    teacher_compile: bool | None = None
    placement: Placement = "auto"
    max_prefetch: int | None = None
    loss: str = "cosine"
    projection: Projection = "interpolate"
    cross_tokenizer: bool = False
    kd_weight: float = 0.5
    kd_temperature: float = 1.0
    kd_top_k: int = 0

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("method", self.method, METHODS),
            ("loss", self.loss, LOSSES),
            ("projection", self.projection, PROJECTIONS),
            ("placement", self.placement, PLACEMENTS),
        ):
            if value not in choices:
                raise LETError(f"--let-{name} is {value!r}; choose one of {', '.join(choices)}.")
        if self.traits.learns_from is None:
            return
        if self.teacher is None:
            raise LETError(
                f"--let-method {self.method} needs --let-teacher DIR, the small trained model."
            )
        if self.traits.learns_from == "states":
            self._check_alignment()
        else:
            self._check_distillation()
        if self.stop_step <= 0:
            raise LETError(
                f"--let-stop-step is {self.stop_step}; give the step, at least 1, at which the"
                " weight reaches 0, or --let-method none for a run without a teacher."
            )

    def _check_alignment(self) -> None:
        if self.layer < 1:
            raise LETError(f"--let-layer is {self.layer}; layers are counted from 1.")
        if not math.isfinite(self.weight) or self.weight < 0:
            raise LETError(
                f"--let-weight is {self.weight}; give a finite weight of at least 0 (the paper's"
                " is 0.1)."
            )
        if self.max_prefetch is not None and self.max_prefetch < 1:
            raise LETError(
                f"--let-max-prefetch is {self.max_prefetch}; the stage of layer k holds at least 1"
                " microbatch's states."
            )
        if self.cross_tokenizer and self.loss != "cosine":
            raise LETError(
                f"--let-loss {self.loss} cannot be used with --let-cross-tokenizer, under which"
                " some tokens have no teacher state; use --let-loss cosine."
            )
        if self.projection != "interpolate" and self.loss == "cca":
            # In directions without a gradient Adam would take full steps on rounding noise.
            raise LETError(
                f"--let-projection {self.projection} gets no gradient from --let-loss cca, which is"
                " invariant to invertible linear maps; use --let-loss cosine or logsum."
            )
        tap = self.teacher_layer
        if tap not in ("last", "middle") and not (tap.isdecimal() and int(tap) >= 1):
            raise LETError(f"--let-teacher-layer is {tap!r}; give last, middle or a number from 1.")

    def _check_distillation(self) -> None:
        if self.projection != "interpolate":
            raise LETError(
                f"--let-projection {self.projection} maps hidden states and --let-method"
                f" {self.method} distills logits; drop it, or give --let-method let."
            )
        if not 0 <= self.kd_weight <= 1:
            raise LETError(
                f"--let-kd-weight is {self.kd_weight}; give the teacher's share, from 0 to 1."
            )
        if not (math.isfinite(self.kd_temperature) and self.kd_temperature > 0):
            raise LETError(
                f"--let-kd-temperature is {self.kd_temperature}; give a finite number above 0."
            )
        if self.kd_top_k < 0:
            raise LETError(
                f"--let-kd-top-k is {self.kd_top_k}; give the number of the teacher's logits to"
                " keep per token, or 0 for all."
            )

    @property
    def traits(self) -> MethodTraits:
        """Return the row of `method` in `METHODS`."""
        return METHODS[self.method]

    @property
    def aligns_tokens(self) -> bool:
        """Return whether the teacher reads the text under its own tokenizer."""
        return self.cross_tokenizer and "cross_tokenizer" in self.traits.uses

    @property
    def initial_weight(self) -> float:
        """Return the weight of the teacher's loss at step 0: lambda_0, or w."""
        return self.weight if self.traits.learns_from == "states" else self.kd_weight

    @property
    def enabled(self) -> bool:
        """Return whether the weight is above 0 at step 0."""
        return self.traits.learns_from is not None and self.initial_weight > 0


def alignment_weight(step: int, initial_weight: float, stop_step: int) -> float:
    """Return lambda(s) = lambda_0 * max(0, (S_stop - s) / S_stop), equation 5 of the paper.

    Args:
        step: s, 0-based training step.
        initial_weight: lambda_0.
        stop_step: S_stop, at least 1.
    """
    return initial_weight * max(0, stop_step - step) / stop_step
