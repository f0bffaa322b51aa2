"""Score models on tasks with EleutherAI's lm-eval, with a cache of one result per task."""

import hashlib
import json
import tempfile
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_let.checkpoint.tokenizer_files import hugging_face_tokenizer, tokenizer_hash
from megatron_let.errors import LETError
from megatron_let.evaluation.models import checkpoint_hash, load_model
from megatron_let.evaluation.tasks import Task, data_fingerprint, local_data
from megatron_let.files.atomic import write_json

ACCURACIES = ("acc", "acc_norm")
# In bf16, lm-eval's default for a bf16 model, -100 is rounded to a multiple of 0.5.
_SOFTMAX = "float32"


@dataclass(frozen=True)
class Settings:
    """Settings of a task run; part of the key of a cached result.

    Attributes:
        num_fewshot: examples before the question; the paper uses 1.
        limit: items per task; None for all.
        dtype: torch's name of the precision of the weights; None keeps the checkpoint's.
    """

    num_fewshot: int = 1
    limit: int | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Result:
    """Scores of a model on one task.

    Attributes:
        task: lm-eval's name of the task.
        scores: accuracies and standard errors under lm-eval's names (`acc`, `acc_stderr`, ...).
        answers: one digit per item, 1 if it is correct in plain accuracy.
    """

    task: str
    scores: dict[str, float]
    items: int
    task_version: str
    answers: str = field(repr=False)


def versions() -> dict[str, str]:
    """Return the package versions that a score depends on."""
    names = ("lm-eval", "datasets", "transformers", "tokenizers", "torch")
    return {name: version(name) for name in names}


def evaluate(
    weights: Any,
    tasks: tuple[Task, ...],
    settings: Settings,
    cache: Path,
    data: Path | None = None,
    batch_size: str | None = None,
    device: str = "cpu",
) -> list[Result]:
    """Score a model on tasks, computing only results that are not in the cache.

    Args:
        weights: model from `open_model`.
        cache: folder of results, one JSON file per task.
        data: folder of local task data; None takes it from the hub.
        batch_size: a number, or `auto` for the largest that fits. None is `auto` on a GPU, and on a
            CPU one forward pass per context where the model has a key-value cache, else 8.

    Raises:
        LETError: lm-eval is not installed, or the data of a task is missing.
    """
    identity = {
        "checkpoint": checkpoint_hash(weights.folder),
        "tokenizer": tokenizer_hash(weights.tokenizer),
        "device": torch.device(device).type,
        "settings": asdict(settings) | {"softmax": _SOFTMAX, "batch_size": batch_size},
        "versions": versions(),
    }
    files = {task: cache / _file_name(identity, task, data) for task in tasks}
    missing = [task for task, path in files.items() if not path.is_file()]
    model = _lm_eval_model(weights, settings, batch_size, device) if missing else None
    for task in missing:
        cache.mkdir(parents=True, exist_ok=True)
        # One by one, so that an interruption loses one task at most.
        write_json(files[task], asdict(_score(model, task, settings, data)))
    return [Result(**json.loads(path.read_text())) for path in files.values()]


def _file_name(identity: dict[str, Any], task: Task, data: Path | None) -> str:
    identity = identity | {"task": task.name, "data": data_fingerprint(task, data)}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return f"{identity['checkpoint']}-{task.name}-{digest}.json"


def check_installed() -> None:
    """Raise a LETError that says how to install lm-eval if it is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise LETError(
            "The tasks need lm-eval; install it with: bash launch/lib/environment.sh evaluation"
        ) from error


def check_tokenizer(weights: Any) -> None:
    """Raise a LETError if a model from `open_model` has no tokenizer."""
    if weights.tokenizer is None:
        raise LETError(
            f"lm-eval needs a tokenizer, and {weights.folder} names none; give --tokenizer."
        )


def _lm_eval_model(weights: Any, settings: Settings, batch_size: str | None, device: str) -> Any:
    check_installed()
    from lm_eval.models.huggingface import HFLM

    from megatron_let.evaluation.shared_context import SharedContextLM, can_share_context

    check_tokenizer(weights)
    dtype = getattr(torch, settings.dtype) if settings.dtype else None
    model = load_model(weights, dtype, device)
    on_cpu = torch.device(device).type == "cpu"
    shared = batch_size is None and on_cpu and can_share_context(model)
    return (SharedContextLM if shared else HFLM)(
        pretrained=model,
        tokenizer=hugging_face_tokenizer(weights.tokenizer),
        batch_size=batch_size or ("8" if on_cpu else "auto"),
        device=device,
        softmax_dtype=_SOFTMAX,
    )


def _score(model: Any, task: Task, settings: Settings, data: Path | None) -> Result:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        found = simple_evaluate(
            model=model,
            tasks=[_specification(task, data, Path(folder))],
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            bootstrap_iters=100,
            log_samples=True,
            # Indexing lm-eval's 13,000 other tasks takes a minute.
            task_manager=TaskManager(include_defaults=False),
        )
    assert found is not None
    return _result(task, found)


def _specification(task: Task, data: Path | None, folder: Path) -> str:
    """Return the path of lm-eval's task file, or of one that includes it and reads local data."""
    import lm_eval.tasks

    original = str(Path(lm_eval.tasks.__file__).parent / task.file)
    if data is None:
        return original
    path = folder / f"{task.name}.yaml"
    settings = {"include": original, "task": task.name, **local_data(task, data)}
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def _result(task: Task, found: Any) -> Result:
    raw = found["results"][task.name]
    scores = {}
    for metric in ACCURACIES:
        if f"{metric},none" in raw:
            scores[metric] = float(raw[f"{metric},none"])
            scores[f"{metric}_stderr"] = _number(raw[f"{metric}_stderr,none"])
    samples = sorted(found["samples"][task.name], key=lambda sample: sample["doc_id"])
    return Result(
        task.name,
        scores,
        len(samples),
        str(found["versions"][task.name]),
        "".join(str(int(sample["acc"])) for sample in samples),
    )


def _number(value: Any) -> float:
    # lm-eval gives "N/A" for a single item.
    return float(value) if isinstance(value, int | float) else float("nan")
