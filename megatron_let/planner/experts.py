"""Activations of a mixture of experts, with tokens routed evenly over the experts.

It counts Megatron's all-to-all dispatcher without fused permutation. Its sizes are those of experts
that run one after another; Transformer Engine's grouped product keeps the same tensors.
"""

from megatron_let.planner.sizes import Experts, TransformerSize

_BF16 = 2
_FP32 = 4
# Of each token and expert: logit, probability and score for the auxiliary loss in fp32, position
# in the order of the experts in int64, and the routing map.
_ROUTER_BYTES = 3 * _FP32 + 8 + 1


def expert_layer_bytes(size: TransformerSize, experts: Experts, tp: int, expert_tp: int) -> int:
    """Return what router and experts of a layer keep for the backward, per token of the sequence.

    In bf16: the routed tokens, and the first product and the activation of each expert. The tensor-
    parallel ranks of an expert hold the same tokens, and a share of its products each.
    """
    products = (3 if size.gated else 2) * _BF16
    routed = _routed_bytes(size, experts) * expert_tp
    routed += experts.topk * experts.ffn_hidden_size * products
    shared = experts.shared_ffn_hidden_size * products // tp
    return (routed + experts.num_experts * _ROUTER_BYTES) // tp + shared


def expert_work_bytes(
    size: TransformerSize, experts: Experts, tp: int, ep: int, expert_tp: int
) -> int:
    """Return the temporary memory of the experts' forward, per token of the sequence.

    Until the experts end, the layer holds the permuted tokens and those of the all-to-all; then the
    experts' outputs in their own order and in that of the ranks. Splitting an expert adds an fp32
    copy of its output, which is reduced to a share of the tokens.
    """
    routed, gathered = _routed_bytes(size, experts), expert_tp
    copies = 1 + (1 if ep > 1 else 0) + 2 * gathered
    if gathered > 1:
        copies += (gathered + 1) * _FP32 // _BF16
    return copies * routed // tp


def _routed_bytes(size: TransformerSize, experts: Experts) -> int:
    """Return one token's copies for its experts."""
    return experts.topk * size.hidden_size * _BF16
