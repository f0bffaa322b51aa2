"""Write the metrics file: JSON lines, one per training step and one per evaluation."""

import functools
import json
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.training.utils import is_last_rank

from megatron_let.losses import LOSSES
from megatron_let.metrics.held_out import MicrobatchLosses

# Names under which Megatron reports to stdout, TensorBoard and wandb.
LOSS_KEY = "lm loss"
WEIGHT_KEY = "let weight"
SOFT_LOSS_KEY = "kd loss"


def alignment_key(name: str) -> str:
    """Return the key of the alignment value `cosine`, or of another `--let-loss`."""
    return f"let {name}"


# Reported only by steps with a teacher.
TEACHER_KEYS = (*map(alignment_key, LOSSES), SOFT_LOSS_KEY, WEIGHT_KEY)


def peak_memory_bytes() -> int:
    """Return this process's peak memory: allocated on the GPU, else resident on the host."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def largest_peak_memory_bytes() -> int:
    """Return `peak_memory_bytes` of the process with the most; collective over the job."""
    if not torch.distributed.is_initialized():
        return peak_memory_bytes()
    peak = torch.tensor([peak_memory_bytes()], dtype=torch.int64, device="cuda")
    torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
    return int(peak.item())


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinity, which JSON lacks, by null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def drop_stale_averages(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `training_log`, which would print a cosine of 0 for steps without a teacher."""

    @functools.wraps(original)
    def training_log(loss_dict: Any, total_loss_dict: Any, *args: Any, **kwargs: Any) -> Any:
        if loss_dict:
            for key in set(TEACHER_KEYS) - loss_dict.keys():
                total_loss_dict.pop(key, None)
        return original(loss_dict, total_loss_dict, *args, **kwargs)

    return training_log


class MetricsFile:
    """Append rows to one file, on the rank that holds the loss.

    A training row has `iteration` (1-based), `lm_loss`, `let_cosine`, `let_weight` (both absent
    once the weight is 0), `let_logsum` or `let_cca` if that is the loss, `kd_loss` under `rkd` and
    `salt`, `grad_norm`, `learning_rate`, `step_seconds`, `tokens_per_second` and
    `max_memory_bytes`, of the rank with the most. An evaluation row has `iteration` and
    `valid_loss` or `test_loss` (with `_1`, `_2` for further validation sets), and `microbatches`,
    the losses of its microbatches. A row with `changed` has the settings with which a run was
    continued on purpose. A step that a killed run lost and repeated has two rows; the later one
    counts.
    """

    def __init__(
        self,
        path: Path,
        sequence_length: int,
        observe: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> None:
        """Store the tokens per sample; `observe` gets each row, on the rank that writes it."""
        self._path = path
        self._observe = observe
        self._sequence_length = sequence_length
        self._evaluation: tuple[int, str] | None = None
        self._evaluated: set[tuple[int, str]] = set()
        self._num_sets = 0

    def _write(self, row: dict[str, Any]) -> None:
        if is_last_rank():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as stream:
                stream.write(json.dumps(_finite(row)) + "\n")
            self._observe(_finite(row))

    def wrap_train_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `train_step`: time it and write its row."""

        @functools.wraps(original)
        def train_step(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = original(*args, **kwargs)
            seconds = time.perf_counter() - start
            optimizer, iteration = args[3], kwargs["iteration"] + 1
            peak = largest_peak_memory_bytes()
            if LOSS_KEY in result[0]:
                row = self._step_row(result, optimizer, iteration, seconds)
                self._write(row | {"max_memory_bytes": peak})
            return result

        return train_step

    def _step_row(
        self, result: tuple[Any, ...], optimizer: Any, iteration: int, seconds: float
    ) -> dict[str, Any]:
        losses, grad_norm = result[0], result[5]
        tokens = get_current_running_global_batch_size() * self._sequence_length
        row: dict[str, Any] = {"iteration": iteration, "lm_loss": float(losses[LOSS_KEY])}
        for key in TEACHER_KEYS:
            if key in losses:
                row[key.replace(" ", "_")] = float(losses[key])
        if grad_norm is not None:
            row["grad_norm"] = float(grad_norm)
        return row | {
            "learning_rate": get_canonical_lr_for_logging(optimizer.param_groups),
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
        }

    def wrap_evaluate_and_print_results(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `evaluate_and_print_results`, which knows the iteration and the split."""

        @functools.wraps(original)
        def evaluate_and_print_results(*args: Any, **kwargs: Any) -> Any:
            prefix, iteration = args[0], args[4]
            self._evaluation = (iteration, "test_loss" if "test set" in prefix else "valid_loss")
            self._num_sets = 0
            try:
                return original(*args, **kwargs)
            finally:
                self._evaluation = None

        return evaluate_and_print_results

    def wrap_evaluate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `evaluate`, which returns the losses; write a row inside the evaluation loop."""

        @functools.wraps(original)
        def evaluate(forward_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if self._evaluation is None:
                return original(forward_step, *args, **kwargs)
            microbatches = MicrobatchLosses(LOSS_KEY)
            result = original(microbatches.observe(forward_step), *args, **kwargs)
            parts = microbatches.gather()
            if result[0] and LOSS_KEY in result[0]:
                self._write_evaluation(float(result[0][LOSS_KEY]), parts)
            return result

        return evaluate

    def _write_evaluation(self, loss: float, microbatches: list[float]) -> None:
        assert self._evaluation is not None
        iteration, name = self._evaluation
        if self._num_sets > 0:
            name = f"{name}_{self._num_sets}"
        self._num_sets += 1
        # Megatron evaluates once more after the last step; keep the first row of each step.
        if (iteration, name) not in self._evaluated:
            self._evaluated.add((iteration, name))
            parts = {"microbatches": microbatches} if microbatches else {}
            self._write({"iteration": iteration, name: loss, **parts})
