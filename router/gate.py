"""The gate: which routed experts a token visits, and with which weight.

Pure tensor mathematics; knows nothing of placement. DeepSeek-V2 (arXiv 2405.04434) eqs. 20-22 and section 2.2.2,
DeepSeek-V3 (arXiv 2412.19437) eqs. 12-16. Always fp32: a bf16 gate picks other experts near ties.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from router.gate_config import GateConfig, ScoringFunc, TopkMethod


def router_logits(hidden_states: Tensor, gate_weight: Tensor) -> Tensor:
    """Affinity of each token for each expert, fp32.

    hidden_states: [num_tokens, hidden_size]; gate_weight: [n_routed_experts, hidden_size] fp32.
    Returns [num_tokens, n_routed_experts] fp32.
    """
    return F.linear(hidden_states.float(), gate_weight)


def expert_scores(logits: Tensor, scoring_func: ScoringFunc) -> Tensor:
    """Scores over *all* experts, before any group is masked: [num_tokens, n_routed_experts] fp32."""
    if scoring_func is ScoringFunc.SIGMOID:
        return logits.float().sigmoid()
    return logits.float().softmax(dim=-1)


def select_experts(logits: Tensor, config: GateConfig, correction_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The experts of each token.

    logits: [num_tokens, n_routed_experts]; correction_bias: [n_routed_experts] fp32 (V3), steers the selection only.
    Returns topk_weights [num_tokens, top_k] fp32 and topk_ids [num_tokens, top_k] int64; ids ascend within a row and
    have no duplicates, so that whatever is summed over them has one order. Ties go to the lower index. Differentiable
    in the weights.
    """
    scores = expert_scores(logits, config.scoring_func)
    choice = scores if correction_bias is None else scores + correction_bias
    if config.is_group_limited:
        choice = _mask_groups(choice, config)
    topk_ids = _top_indices(choice, config.num_experts_per_tok).sort(dim=-1).values  # [num_tokens, top_k]
    topk_weights = scores.gather(-1, topk_ids)
    if config.norm_topk_prob and config.num_experts_per_tok > 1:
        topk_weights = topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + 1e-20)
    return topk_weights * config.routed_scaling_factor, topk_ids


def _mask_groups(choice: Tensor, config: GateConfig) -> Tensor:
    """Scores with every expert outside the token's best `topk_group` groups at -inf.

    V2 ranks a group by its best expert, V3 by the sum of its best two. The mask is -inf and not the 0.0 of the
    published code: an underflowed score of 0.0 would tie with it and break the device limit.
    """
    grouped = choice.unflatten(-1, (config.n_group, config.experts_per_group))  # [num_tokens, n_group, per group]
    if config.topk_method is TopkMethod.NOAUX_TC:
        group_scores = grouped.topk(min(2, config.experts_per_group), dim=-1).values.sum(dim=-1)
    else:
        group_scores = grouped.amax(dim=-1)  # [num_tokens, n_group]
    kept = torch.zeros_like(group_scores, dtype=torch.bool)
    kept.scatter_(-1, _top_indices(group_scores, config.topk_group), True)
    masked: Tensor = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf"))
    return masked.flatten(-2)


def _top_indices(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest values of each row; `topk` leaves the order of ties open, a stable sort not."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
