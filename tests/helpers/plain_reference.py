"""Late-to-Early Training in plain PyTorch, written from the paper only.

The reference of the package's tests, so it imports neither the package nor Megatron. Models are
dicts of tensors with Megatron's or Hugging Face's names. Activations are [b, s, h],
not Megatron's [s, b, h]; losses are means over all tokens of a global batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Name of a learned projection among the parameters; excluded from the gradient norm.
PROJECTION = "let_projection_weight"


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama that its tensors do not show.

    Attributes:
        num_layers, num_heads: layers of the decoder, and heads per layer.
        num_groups: key and value heads; equal to `num_heads` without grouped-query attention.
        norm_eps, rope_base: RMSNorm's epsilon and the base of the rotary embedding.
    """

    num_layers: int
    num_heads: int
    num_groups: int
    norm_eps: float = 1e-5
    rope_base: float = 10000.0


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; matrices are [out, in], d is the size of a head.

    Attributes:
        attention_norm, mlp_norm: [h].
        query, key, value: [heads * d, h], [groups * d, h], [groups * d, h].
        attention_output: [h, heads * d].
        gate, up, down: [ffn, h], [ffn, h], [h, ffn].
    """

    attention_norm: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    attention_output: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


def megatron_layer(parameters: Mapping[str, Tensor], index: int, shape: LlamaShape) -> LayerWeights:
    """Read layer `index` (0-based) from Megatron's names and fused matrices."""
    prefix = f"decoder.layers.{index}."
    query, key, value = split_qkv(parameters[prefix + "self_attention.linear_qkv.weight"], shape)
    gate, up = parameters[prefix + "mlp.linear_fc1.weight"].chunk(2)
    return LayerWeights(
        attention_norm=parameters[prefix + "input_layernorm.weight"],
        query=query,
        key=key,
        value=value,
        attention_output=parameters[prefix + "self_attention.linear_proj.weight"],
        mlp_norm=parameters[prefix + "pre_mlp_layernorm.weight"],
        gate=gate,
        up=up,
        down=parameters[prefix + "mlp.linear_fc2.weight"],
    )


def split_qkv(fused: Tensor, shape: LlamaShape) -> tuple[Tensor, Tensor, Tensor]:
    """Split Megatron's [groups * (q + 2) * d, h]: each group has q queries, a key and a value.

    Returns:
        [heads * d, h], [groups * d, h], [groups * d, h].
    """
    queries = shape.num_heads // shape.num_groups
    by_group = fused.unflatten(0, (shape.num_groups, queries + 2, -1))
    query, key, value = by_group.split([queries, 1, 1], dim=1)
    return query.flatten(0, 2), key.flatten(0, 2), value.flatten(0, 2)


def huggingface_layer(parameters: Mapping[str, Tensor], index: int) -> LayerWeights:
    """Read layer `index` (0-based) from the names of a Hugging Face Llama."""
    prefix = f"model.layers.{index}."
    return LayerWeights(
        attention_norm=parameters[prefix + "input_layernorm.weight"],
        query=parameters[prefix + "self_attn.q_proj.weight"],
        key=parameters[prefix + "self_attn.k_proj.weight"],
        value=parameters[prefix + "self_attn.v_proj.weight"],
        attention_output=parameters[prefix + "self_attn.o_proj.weight"],
        mlp_norm=parameters[prefix + "post_attention_layernorm.weight"],
        gate=parameters[prefix + "mlp.gate_proj.weight"],
        up=parameters[prefix + "mlp.up_proj.weight"],
        down=parameters[prefix + "mlp.down_proj.weight"],
    )


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise [..., h] over its last dimension."""
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps) * weight


def rotate(heads: Tensor, base: float) -> Tensor:
    """Apply the rotary embedding to [b, s, heads, d], rotating channel i with channel i + d/2."""
    length, size = heads.shape[1], heads.shape[-1]
    exponent = torch.arange(0, size, 2, dtype=heads.dtype) / size
    angle = torch.arange(length, dtype=heads.dtype)[:, None] * base**-exponent
    cos, sin = angle.cos()[None, :, None, :], angle.sin()[None, :, None, :]
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attend(hidden: Tensor, layer: LayerWeights, shape: LlamaShape) -> Tensor:
    """Apply causal grouped-query self-attention, [b, s, h] to [b, s, h]."""
    query = rotate((hidden @ layer.query.T).unflatten(-1, (shape.num_heads, -1)), shape.rope_base)
    key = rotate((hidden @ layer.key.T).unflatten(-1, (shape.num_groups, -1)), shape.rope_base)
    value = (hidden @ layer.value.T).unflatten(-1, (shape.num_groups, -1))
    # Consecutive query heads share a group.
    queries = shape.num_heads // shape.num_groups
    key, value = (x.repeat_interleave(queries, dim=2) for x in (key, value))
    scores = torch.einsum("bqnd,bknd->bnqk", query, key) / math.sqrt(query.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    context = torch.einsum("bnqk,bknd->bqnd", weights, value)
    return context.flatten(2) @ layer.attention_output.T


def decoder_layer(hidden: Tensor, layer: LayerWeights, shape: LlamaShape) -> Tensor:
    """Apply one decoder layer, [b, s, h] to [b, s, h]."""
    hidden = hidden + attend(rms_norm(hidden, layer.attention_norm, shape.norm_eps), layer, shape)
    normed = rms_norm(hidden, layer.mlp_norm, shape.norm_eps)
    return hidden + (F.silu(normed @ layer.gate.T) * (normed @ layer.up.T)) @ layer.down.T


def each_document_alone(
    states: Callable[[Tensor], Tensor], tokens: Tensor, end: int | None
) -> Tensor:
    """Map tokens [b, s] to [..., b, s, h], one document at a time, each ending with token `end`.

    With None a row is one document.
    """
    if end is None:
        return states(tokens)
    rows = []
    for row in tokens:
        borders = (row == end).nonzero().flatten() + 1
        documents = [d for d in row.tensor_split(borders.tolist()) if len(d)]
        rows.append(torch.cat([states(document[None]) for document in documents], dim=-2))
    return torch.cat(rows, dim=-3)


def student_states(parameters: Mapping[str, Tensor], shape: LlamaShape, tokens: Tensor) -> Tensor:
    """Return the residual stream of a Megatron model, h^(0) to h^(L), as [L + 1, b, s, h]."""
    states = [parameters["embedding.word_embeddings.weight"][tokens]]
    for index in range(shape.num_layers):
        states.append(decoder_layer(states[-1], megatron_layer(parameters, index, shape), shape))
    return torch.stack(states)


def student_logits(parameters: Mapping[str, Tensor], shape: LlamaShape, last: Tensor) -> Tensor:
    """Map h^(L) [b, s, h] to logits [b, s, v], with tied embeddings if there is no output layer."""
    normed = rms_norm(last, parameters["decoder.final_layernorm.weight"], shape.norm_eps)
    tied = parameters["embedding.word_embeddings.weight"]
    return normed @ parameters.get("output_layer.weight", tied).T


def teacher_state(
    parameters: Mapping[str, Tensor],
    shape: LlamaShape,
    tokens: Tensor,
    layer: int,
    final_norm: bool,
) -> Tensor:
    """Return the state of a Hugging Face Llama after layer `layer` (1-based), [b, s, d_T].

    Args:
        parameters, shape: the teacher.
        tokens: [b, s].
        layer: equal to `shape.num_layers` for the last.
        final_norm: apply the model's final norm to the result.
    """
    with torch.no_grad():
        hidden = parameters["model.embed_tokens.weight"][tokens]
        for index in range(layer):
            hidden = decoder_layer(hidden, huggingface_layer(parameters, index), shape)
        if final_norm:
            hidden = rms_norm(hidden, parameters["model.norm.weight"], shape.norm_eps)
    return hidden


def interpolate(hidden: Tensor, size: int) -> Tensor:
    """Interpolate [..., d_M] to [..., size] by equation 6, with u_j in exact integers."""
    last = hidden.shape[-1] - 1
    coordinates = []
    for j in range(size):
        floor, remainder = divmod(j * last, size - 1)
        beta = remainder / (size - 1)
        # At the end beta is 0 and floor + 1 is out of range.
        above = hidden[..., min(floor + 1, last)]
        coordinates.append((1 - beta) * hidden[..., floor] + beta * above)
    return torch.stack(coordinates, dim=-1)


def mean_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Return minus equation 7 as a token mean, from [b, s, d_M] and [b, s, d_T]."""
    student = interpolate(student, teacher.shape[-1])
    return ((student * teacher).sum(-1) / (student.norm(dim=-1) * teacher.norm(dim=-1))).mean()


def mean_logsum(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the token mean of log(sum |z_s - z_t|^4 + 1e-6), z standardised over features."""
    student = interpolate(student, teacher.shape[-1])
    z_student, z_teacher = (
        (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        for x in (student, teacher)
    )
    return ((z_student - z_teacher).abs().pow(4).sum(-1) + 1e-6).log().mean()


def mean_correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean canonical correlation over all tokens, with a ridge of 1e-3 on correlations.

    Whitens by eigenvectors: the singular values of S^(-1/2) C T^(-1/2).
    """
    num_directions = min(student.shape[-1], teacher.shape[-1])
    student = interpolate(student, teacher.shape[-1])
    x, y = ((z - z.mean(0)) / z.std(0) for z in (student.flatten(0, -2), teacher.flatten(0, -2)))
    roots = []
    for z in (x, y):
        values, vectors = torch.linalg.eigh(z.T @ z / (len(z) - 1) + 1e-3 * torch.eye(z.shape[1]))
        roots.append(vectors @ torch.diag(values.rsqrt()) @ vectors.T)
    whitened = roots[0] @ (x.T @ y / (len(x) - 1)) @ roots[1]
    return torch.linalg.matrix_norm(whitened, "nuc") / num_directions


def token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each term of equation 1, from [b, s, v] and [b, s] to [b, s]."""
    return -logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return each row's mean over values whose mask is 1, from [n, ...] and [n, ...] to [n]."""
    return (values * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)


def alignment_weight(step: int, weight: float, stop_step: int) -> float:
    """Return lambda of equation 5 at the 0-based step."""
    return weight * max(0.0, (stop_step - step) / stop_step)


@dataclass(frozen=True)
class Batch:
    """One global batch: `tokens`, `labels` and `loss_mask` (1 where the label counts), [b, s]."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor


@dataclass(frozen=True)
class Teacher:
    """A Hugging Face Llama and its tapped layer; see `teacher_state`."""

    parameters: Mapping[str, Tensor]
    shape: LlamaShape
    layer: int
    final_norm: bool

    def __call__(self, tokens: Tensor) -> Tensor:
        return teacher_state(self.parameters, self.shape, tokens, self.layer, self.final_norm)


@dataclass(frozen=True)
class LETObjective:
    """The loss of a run (equations 1, 5 and 7).

    Attributes:
        shape, teacher: the student's shape, and the teacher.
        layer: k, 1-based.
        weight, stop_step: lambda_0 and S_stop.
        microbatch_size: None averages the language-model loss over the tokens of the global
            batch; a number averages it over the tokens of each group of this many sequences, then
            over groups, which differs if masks do. The alignment loss is always a mean over all
            tokens; canonical correlations use the tokens of a microbatch.
        alignment: `cosine`, `logsum` or `cca`.
        end: token that ends a document; None if models see a row as one document.
    """

    shape: LlamaShape
    teacher: Teacher
    layer: int
    weight: float
    stop_step: int
    microbatch_size: int | None = None
    alignment: str = "cosine"
    end: int | None = None

    def projected(self, parameters: Mapping[str, Tensor], student: Tensor) -> Tensor:
        """Return h_M, or W h_M if W is among the parameters."""
        return student @ parameters[PROJECTION].T if PROJECTION in parameters else student

    def aligned(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the value that is multiplied by the weight and subtracted from the loss."""
        if self.alignment == "cosine":
            return mean_cosine(student, teacher)
        if self.alignment == "logsum":
            return -mean_logsum(student, teacher)
        pairs = (x.unflatten(0, (-1, self.microbatch_size or len(x))) for x in (student, teacher))
        return torch.stack([mean_correlation(*pair) for pair in zip(*pairs, strict=True)]).mean()

    def losses(
        self, parameters: Mapping[str, Tensor], batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return four scalars: the loss to train with, its token mean, the cosine, `aligned`."""
        of_student = functools.partial(student_states, parameters, self.shape)
        states = each_document_alone(of_student, batch.tokens, self.end)
        logits = student_logits(parameters, self.shape, states[-1])
        losses, mask = token_cross_entropy(logits, batch.labels), batch.loss_mask
        token_mean = masked_mean(losses[None], mask[None]).mean()
        size = self.microbatch_size or len(mask)
        trained = masked_mean(losses.unflatten(0, (-1, size)), mask.unflatten(0, (-1, size)))
        student = self.projected(parameters, states[self.layer])
        teacher = each_document_alone(self.teacher, batch.tokens, self.end)
        aligned = self.aligned(student, teacher)
        return trained.mean(), token_mean, mean_cosine(student, teacher), aligned

    def gradients(self, parameters: Mapping[str, Tensor], batch: Batch, step: int) -> StepResult:
        """Differentiate the total loss at the 0-based step with respect to every parameter."""
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        trained, token_mean, cosine, aligned = self.losses(leaves, batch)
        weight = alignment_weight(step, self.weight, self.stop_step)
        total = trained - weight * aligned
        gradients = torch.autograd.grad(total, list(leaves.values()))
        return StepResult(
            token_mean.item(),
            cosine.item(),
            aligned.item(),
            weight,
            dict(zip(leaves, gradients, strict=True)),
        )


@dataclass(frozen=True)
class DistillationObjective:
    """Soft labels: (1 - w) CE(data) + w CE(softmax(teacher's logits / temperature)).

    Attributes:
        shape, teacher_shape, teacher: shapes of student and teacher; the teacher's parameters.
        weights: w at each 0-based step.
        temperature: divides the teacher's logits.
        top_k: number of the teacher's largest logits that are kept per token; 0 keeps all.
        microbatch_size, end: as in `LETObjective`.
    """

    shape: LlamaShape
    teacher_shape: LlamaShape
    teacher: Mapping[str, Tensor]
    weights: list[float]
    temperature: float
    top_k: int
    microbatch_size: int | None = None
    end: int | None = None

    def soft_labels(self, tokens: Tensor) -> Tensor:
        """Return the teacher's distribution [b, s, v] for tokens [b, s]."""
        teacher = Teacher(self.teacher, self.teacher_shape, self.teacher_shape.num_layers, True)
        state = each_document_alone(teacher, tokens, self.end)
        logits = state @ self.teacher["lm_head.weight"].T / self.temperature
        if self.top_k:
            smallest = logits.topk(self.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < smallest, -math.inf)
        return logits.softmax(-1)

    def gradients(self, parameters: Mapping[str, Tensor], batch: Batch, step: int) -> StepResult:
        """Differentiate the mixed loss at the 0-based step with respect to every parameter."""
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        of_student = functools.partial(student_states, leaves, self.shape)
        states = each_document_alone(of_student, batch.tokens, self.end)
        logits = student_logits(leaves, self.shape, states[-1])
        hard, mask = token_cross_entropy(logits, batch.labels), batch.loss_mask
        soft = -(self.soft_labels(batch.tokens) * logits.log_softmax(-1)).sum(-1)
        weight, size = self.weights[step], self.microbatch_size or len(mask)
        mixed = ((1 - weight) * hard + weight * soft).unflatten(0, (-1, size))
        total = masked_mean(mixed, mask.unflatten(0, (-1, size))).mean()
        gradients = torch.autograd.grad(total, list(leaves.values()))
        hard_mean = masked_mean(hard[None], mask[None]).mean().item()
        by_name = dict(zip(leaves, gradients, strict=True))
        return StepResult(hard_mean, math.nan, soft.mean().item(), weight, by_name)


@dataclass(frozen=True)
class StepResult:
    """A step before its update: token means, and the unclipped gradient by parameter name.

    `aligned` is the value that the weight multiplies: the alignment's, or the soft labels' loss.
    """

    lm_loss: float
    cosine: float
    aligned: float
    weight: float
    gradients: dict[str, Tensor]

    @property
    def grad_norm(self) -> float:
        """Return the 2-norm of the model's gradient, without a learned projection."""
        of_model = (g for name, g in self.gradients.items() if name != PROJECTION)
        return math.sqrt(sum(g.double().square().sum().item() for g in of_model))


@dataclass(frozen=True)
class Optimization:
    """AdamW with warm-up and cosine decay; counts are steps.

    As in Megatron, weight decay excludes parameters of one dimension (norms and biases).
    """

    learning_rate: float
    min_learning_rate: float
    num_warmup_steps: int
    num_steps: int
    weight_decay: float
    betas: tuple[float, float]
    clip_grad: float
    epsilon: float = 1e-8

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate at the 0-based step; with a warm-up, 0 at the first step."""
        if self.num_warmup_steps > 0 and step <= self.num_warmup_steps:
            return self.learning_rate * step / self.num_warmup_steps
        progress = (step - self.num_warmup_steps) / (self.num_steps - self.num_warmup_steps)
        span = self.learning_rate - self.min_learning_rate
        return self.min_learning_rate + span * 0.5 * (1 + math.cos(math.pi * progress))

    def clip_factor(self, grad_norm: float) -> float:
        """Return the factor that clips every gradient of the model."""
        return min(1.0, self.clip_grad / (grad_norm + 1e-6))


def train(
    parameters: dict[str, Tensor],
    objective: LETObjective | DistillationObjective,
    optimization: Optimization,
    batches: list[Batch],
) -> Iterator[StepResult]:
    """Train `parameters` in place, one update per batch; yield each step before its update."""
    decayed = [p for p in parameters.values() if p.dim() > 1]
    others = [p for p in parameters.values() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": optimization.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=optimization.betas,
        eps=optimization.epsilon,
    )
    for step, batch in enumerate(batches):
        result = objective.gradients(parameters, batch, step)
        yield result
        factor = optimization.clip_factor(result.grad_norm)
        for name, parameter in parameters.items():
            parameter.grad = result.gradients[name] * (1 if name == PROJECTION else factor)
        for group in optimizer.param_groups:
            group["lr"] = optimization.learning_rate_at(step)
        optimizer.step()
