"""The real entry compared with an independent implementation in plain PyTorch and fp64.

Each case is one run of the entry that saves, with Megatron's flags, all parameters after and all
gradients before each update. The first step of a warm-up has learning rate 0, so the parameters
after it are the initial ones.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_let.checkpoint.torch_dist import TorchDist
from tests.helpers import plain_reference as plain
from tests.helpers.data import END_OF_DOCUMENT
from tests.helpers.models import random_model
from tests.helpers.runs import Run
from tests.helpers.runs import train as run_entry

# Sizes in configs/tiny.yaml.
NUM_LAYERS = 4
NUM_HEADS = 4
HIDDEN_SIZE = 64
SEQUENCE_LENGTH = 64
GLOBAL_BATCH_SIZE = 8
MICRO_BATCH_SIZE = 2
SEED = 1234

# The first update has learning rate 0, so six steps give five updates.
NUM_STEPS = 6
OPTIMIZATION = plain.Optimization(
    learning_rate=1e-3,
    min_learning_rate=1e-4,
    num_warmup_steps=2,
    num_steps=NUM_STEPS,
    weight_decay=0.1,
    betas=(0.9, 0.999),
    clip_grad=0.5,
)
TEACHER_SHAPE = plain.LlamaShape(num_layers=3, num_heads=4, num_groups=2, norm_eps=1e-6)

TOLERANCE = 1e-5

type Flags = list[str | int | float]


@dataclass(frozen=True)
class Distillation:
    """Soft labels: the flags, and the corresponding settings; `weights` has one per step."""

    flags: Flags
    weights: list[float]
    temperature: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Case:
    """One run: the student, and what it is aligned with.

    Attributes:
        layer, weight, stop_step: k, lambda_0 and S_stop.
        teacher_width: d_T; the student's d_M is 64.
        teacher_layer: value of the flag; `tap` is the layer that it selects.
        final_norm: whether the teacher's final norm follows its last layer.
        num_groups, tied: key and value heads of the student; tied embeddings.
        mask: end-of-document tokens have no language-model loss.
        documents: positions and attention restart in each document.
        per_token: the language-model loss is a mean over tokens, not over microbatches.
        loss: alignment loss.
        learned: the projection is a linear layer instead of the interpolation.
        method: `let`, or `rkd` or `salt` with the settings of `distillation`.
    """

    layer: int = 3
    weight: float = 0.1
    stop_step: int = 100
    teacher_width: int = 48
    teacher_layer: str = "last"
    tap: int = TEACHER_SHAPE.num_layers
    final_norm: bool = True
    num_groups: int = NUM_HEADS
    tied: bool = False
    mask: bool = False
    documents: bool = False
    per_token: bool = False
    loss: str = "cosine"
    learned: bool = False
    method: str = "let"
    distillation: Distillation | None = None

    def flags(self) -> Flags:
        """Return the flags that differ from the recipe."""
        of_data: Flags = ["--eod-mask-loss"] if self.mask else []
        of_data += ["--reset-position-ids", "--reset-attention-mask"] if self.documents else []
        if self.distillation is not None:
            return ["--let-method", self.method, *self.distillation.flags, *of_data]
        groups: Flags = ["--group-query-attention", "--num-query-groups", self.num_groups]
        return [
            "--let-layer", self.layer,
            "--let-weight", self.weight,
            "--let-stop-step", self.stop_step,
            "--let-teacher-layer", self.teacher_layer,
            "--let-loss", self.loss,
            *(["--let-projection", "learned"] if self.learned else []),
            "--let-teacher-final-norm" if self.final_norm else "--no-let-teacher-final-norm",
            *(groups if self.num_groups < NUM_HEADS else []),
            *(["--no-untie-embeddings-and-output-weights"] if self.tied else []),
            *of_data,
            *(["--calculate-per-token-loss"] if self.per_token else []),
        ]  # fmt: skip

    @property
    def shape(self) -> plain.LlamaShape:
        """Return the shape of the student."""
        return plain.LlamaShape(NUM_LAYERS, NUM_HEADS, self.num_groups)


CASES = {
    "third layer, weight decays to 0": Case(stop_step=3),
    "first layer, GQA, wider teacher, no final norm": Case(
        layer=1, weight=1.0, teacher_width=80, final_norm=False, num_groups=2
    ),
    "last layer, tied, teacher as wide": Case(
        layer=NUM_LAYERS, weight=1.0, teacher_width=64, tied=True
    ),
    "middle of the teacher, GQA, tied": Case(
        teacher_layer="middle", tap=1, num_groups=1, tied=True, weight=1.0, teacher_width=80
    ),
    "masked tokens": Case(layer=2, weight=1.0, final_norm=False, mask=True),
    "each document alone": Case(weight=1.0, mask=True, documents=True),
    "masked tokens, per-token loss": Case(
        weight=1.0, teacher_layer="2", tap=2, mask=True, per_token=True
    ),
    "LogSum, masked tokens, per-token loss": Case(
        weight=1.0, loss="logsum", mask=True, per_token=True
    ),
    # 128 tokens per microbatch are four per feature.
    "CCA": Case(weight=1.0, loss="cca", teacher_width=32),
    "learned projection, masked tokens": Case(
        weight=1.0, teacher_width=80, mask=True, learned=True
    ),
    "learned projection, LogSum, per-token loss": Case(
        layer=1, weight=1.0, loss="logsum", mask=True, per_token=True, learned=True
    ),
    "RKD, masked tokens, each document alone": Case(
        method="rkd",
        mask=True,
        documents=True,
        distillation=Distillation(
            ["--let-kd-weight", 0.3, "--let-kd-temperature", 0.5], NUM_STEPS * [0.3], 0.5
        ),
    ),
    "SALT, the teacher's top 7": Case(
        method="salt",
        distillation=Distillation(
            ["--let-stop-step", 4, "--let-kd-top-k", 7],
            [0.5, 0.5, 0.5, 0.5, 0.0, 0.0],
            top_k=7,
        ),
    ),
}


SLOW = ("learned projection, LogSum, per-token loss",)


def save_normed_teacher(folder: Path, width: int) -> Path:
    """Save a random Llama whose norm weights are not 1, which would not change a cosine."""
    model = random_model("llama", width)
    generator = torch.Generator().manual_seed(width)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def read_batches(documents: Path, mask: bool) -> list[plain.Batch]:
    """Return the global batches of a run, from Megatron's data set."""
    tokenizer = SimpleNamespace(
        vocab_size=END_OF_DOCUMENT + 1, eod=END_OF_DOCUMENT, pad=-1, unique_identifiers={}
    )
    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQUENCE_LENGTH,
        blend=([str(documents)], None),
        split="90,10,0",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=mask,
        create_attention_mask=False,
        path_to_cache=str(documents.parent / "cache of the test"),
    )
    sizes = [NUM_STEPS * GLOBAL_BATCH_SIZE, GLOBAL_BATCH_SIZE, None]
    data = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[0]
    return [
        stack([data[step * GLOBAL_BATCH_SIZE + index] for index in range(GLOBAL_BATCH_SIZE)])
        for step in range(NUM_STEPS)
    ]


def stack(samples: list[dict[str, Tensor]]) -> plain.Batch:
    """Stack samples [s] into a batch [b, s]."""
    names = [field.name for field in dataclasses.fields(plain.Batch)]
    return plain.Batch(**{name: torch.stack([s[name] for s in samples]) for name in names})


def load_teacher(folder: Path) -> dict[str, Tensor]:
    """Load the weights of a saved teacher in fp64."""
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    return in_double(state)


def in_double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Finished:
    """A finished run and its reference.

    Attributes:
        gradients: before each update, in step order.
        parameters: the initial ones, then those after each update.
    """

    case: Case
    run: Run
    gradients: list[dict[str, Tensor]]
    parameters: list[dict[str, Tensor]]
    objective: plain.LETObjective | plain.DistillationObjective
    batches: list[plain.Batch]

    @cached_property
    def expected(self) -> list[plain.StepResult]:
        """Return the steps of the reference at the run's parameters before each update."""
        return [
            self.objective.gradients(in_double(parameters), batch, step)
            for step, (parameters, batch) in enumerate(
                zip(self.parameters[:-1], self.batches, strict=True)
            )
        ]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(c, id=n, marks=[pytest.mark.distributed, *([pytest.mark.slow] * (n in SLOW))])
        for n, c in CASES.items()
    ],
)
def finished(
    request: pytest.FixtureRequest, documents: Path, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """Run the entry for one case."""
    case: Case = request.param
    folder = tmp_path_factory.mktemp("run")
    teacher = save_normed_teacher(folder / "teacher", case.teacher_width)
    run = run_entry(
        folder, *case.flags(),
        "--data-path", documents,
        "--train-iters", NUM_STEPS,
        "--eval-iters", 0,
        "--weight-decay", OPTIMIZATION.weight_decay,
        "--clip-grad", OPTIMIZATION.clip_grad,
        "--save", folder / "saved", "--save-interval", 1 if case.learned else NUM_STEPS,
        "--ckpt-format", "torch_dist" if case.learned else "torch",
        "--save-params-interval", 1, "--save-wgrads-interval", 1,
        TEACHER=str(teacher),
    )  # fmt: skip
    after = [read_saved(folder, "params", step) for step in range(NUM_STEPS)]
    gradients = [read_saved(folder, "wgrads", step) for step in range(NUM_STEPS)]
    if case.learned:
        add_projection(folder, after, gradients)
    return Finished(
        case,
        run,
        gradients,
        [after[0], *after],
        objective(case, load_teacher(teacher)),
        read_batches(documents, case.mask),
    )


def objective(
    case: Case, teacher: dict[str, Tensor]
) -> plain.LETObjective | plain.DistillationObjective:
    """Return the objective of the run."""
    microbatch_size = None if case.per_token else MICRO_BATCH_SIZE
    end = END_OF_DOCUMENT if case.documents else None
    if case.distillation is not None:
        of = case.distillation
        settings = (of.weights, of.temperature, of.top_k, microbatch_size, end)
        return plain.DistillationObjective(case.shape, TEACHER_SHAPE, teacher, *settings)
    final_norm = case.final_norm and case.tap == TEACHER_SHAPE.num_layers
    return plain.LETObjective(
        shape=case.shape,
        teacher=plain.Teacher(teacher, TEACHER_SHAPE, case.tap, final_norm),
        layer=case.layer,
        weight=case.weight,
        stop_step=case.stop_step,
        microbatch_size=microbatch_size,
        alignment=case.loss,
        end=end,
    )


def read_saved(folder: Path, kind: str, step: int) -> dict[str, Tensor]:
    """Read the `params` or `wgrads` that Megatron saved at the 0-based step."""
    file = folder / "saved" / kind / f"iter_{step + 1:07d}" / "mp_rank_00.pth"
    return torch.load(file)["model_chunk0"]


def add_projection(
    folder: Path, parameters: list[dict[str, Tensor]], gradients: list[dict[str, Tensor]]
) -> None:
    """Add W after each update, and its gradient, computed from the change of its first moment."""
    beta = OPTIMIZATION.betas[0]
    before = torch.zeros(())
    for step in range(NUM_STEPS):
        saved = TorchDist(folder / "saved" / f"iter_{step + 1:07d}")
        parameters[step][plain.PROJECTION] = saved.read(plain.PROJECTION)
        moment = saved.read("let_projection_exp_avg").double()
        gradients[step][plain.PROJECTION] = (moment - beta * before) / (1 - beta)
        before = moment


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the norm of the difference over the norm of `theirs`, which is not 0."""
    return float((ours.double() - theirs).norm() / theirs.norm())


def whole(tensors: dict[str, Tensor]) -> Tensor:
    """Concatenate all tensors to one vector, in the order of their names."""
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def test_first_update_leaves_parameters_unchanged(finished: Finished) -> None:
    """Otherwise the parameters after it would not be the initial ones."""
    norms = [v for name, v in finished.parameters[0].items() if name.endswith("norm.weight")]
    assert len(norms) == 2 * NUM_LAYERS + 1
    assert all(torch.equal(norm, torch.ones_like(norm)) for norm in norms)


def test_gradients_match_reference(finished: Finished) -> None:
    for gradients, expected in zip(finished.gradients, finished.expected, strict=True):
        assert gradients.keys() == expected.gradients.keys()
        for name, gradient in gradients.items():
            assert relative_difference(gradient, expected.gradients[name]) < TOLERANCE, name
        assert relative_difference(whole(gradients), whole(expected.gradients)) < TOLERANCE


def test_metrics_match_reference(finished: Finished) -> None:
    for row, expected in zip(finished.run.steps, finished.expected, strict=True):
        check_metrics(row, expected)


def test_metrics_report_the_aligned_value(finished: Finished) -> None:
    case = finished.case
    sign = -1 if case.loss == "logsum" else 1
    key = f"let_{case.loss}" if case.method == "let" else "kd_loss"
    for row, expected in zip(finished.run.steps, finished.expected, strict=True):
        assert (key in row) == (expected.weight > 0)
        if expected.weight > 0:
            value = row[key]
            assert value == pytest.approx(sign * expected.aligned, rel=TOLERANCE, abs=1e-7)


def check_metrics(row: dict[str, float], expected: plain.StepResult) -> None:
    """Compare a row of the metrics file with the reference's step."""
    assert row["lm_loss"] == pytest.approx(expected.lm_loss, rel=TOLERANCE)
    assert row["grad_norm"] == pytest.approx(expected.grad_norm, rel=TOLERANCE)
    assert ("let_weight" in row) == (expected.weight > 0)
    if expected.weight > 0:
        # NaN means no cosine.
        cosine = row.get("let_cosine", math.nan)
        assert cosine == pytest.approx(expected.cosine, abs=1e-7, nan_ok=True)
        assert row["let_weight"] == pytest.approx(expected.weight, rel=1e-6)


def test_five_updates_match_reference(finished: Finished) -> None:
    parameters = in_double(finished.parameters[0])
    steps = plain.train(parameters, finished.objective, OPTIMIZATION, finished.batches)
    clipped = []
    for step, (row, expected) in enumerate(zip(finished.run.steps, steps, strict=True)):
        check_metrics(row, expected)
        # Megatron logs the rate of the next update.
        assert row["learning_rate"] == pytest.approx(OPTIMIZATION.learning_rate_at(step + 1))
        clipped.append(OPTIMIZATION.clip_factor(expected.grad_norm) < 1)
    assert any(clipped) or finished.case.method == "rkd"
    for name, value in finished.parameters[-1].items():
        assert relative_difference(value, parameters[name]) < TOLERANCE, name


def test_reference_weight_schedule_equals_equation_5() -> None:
    weights = [plain.alignment_weight(step, 0.3, 3) for step in range(5)]
    assert weights == pytest.approx([0.3, 0.2, 0.1, 0.0, 0.0])


@pytest.mark.parametrize("width", [48, 80])
def test_reference_teacher_matches_transformers(tmp_path: Path, width: int) -> None:
    """The reference's forward, with grouped queries, compared with transformers."""
    folder = save_normed_teacher(tmp_path / "teacher", width)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokens = torch.randint(256, (2, SEQUENCE_LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = model.model(tokens, output_hidden_states=True).hidden_states
    for layer, final_norm in ((1, False), (2, False), (3, True)):
        ours = plain.teacher_state(load_teacher(folder), TEACHER_SHAPE, tokens, layer, final_norm)
        assert relative_difference(ours, states[layer]) < 1e-6


def test_reference_interpolation_matches_values_by_hand() -> None:
    """Wider, narrower and equal widths keep both ends, and a linear ramp stays linear."""
    hidden = torch.tensor([0.0, 10.0, 40.0], dtype=torch.float64)
    assert plain.interpolate(hidden, 5).tolist() == [0.0, 5.0, 10.0, 25.0, 40.0]
    assert plain.interpolate(hidden, 2).tolist() == [0.0, 40.0]
    assert plain.interpolate(hidden, 3).tolist() == hidden.tolist()
    ramp = torch.linspace(0, 1, 64, dtype=torch.float64)
    for size in (48, 80):
        expected = torch.linspace(0, 1, size, dtype=torch.float64)
        assert torch.allclose(plain.interpolate(ramp, size), expected, atol=1e-14)
