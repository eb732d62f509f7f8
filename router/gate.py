"""Gates: which routed experts a token visits, and with which weight. Each is one pure function of the router logits.

Knows nothing of placement, nor of capacity (capacity.py). Always fp32: a bf16 gate picks other experts near ties.

    greedy                 DeepSeek-V2-Lite
    group_limited_greedy   DeepSeek-V2 (arXiv 2405.04434) eqs. 20-22 and section 2.2.2
    noaux_tc               DeepSeek-V3 (arXiv 2412.19437) eqs. 12-16
    mixtral                Mixtral (arXiv 2401.04088) section 2.1
    gshard_top2            GShard (arXiv 2006.16668) algorithm 1, without its capacity and random second choice
    switch_top1            Switch Transformer (arXiv 2101.03961) eqs. 1-2, without its capacity

DeepSeek's choose by scores, as published: scores that underflow tie, and so do those that a sigmoid saturates. The
others choose by the logits themselves, whose order softmax keeps but for such ties.
"""

from collections.abc import Callable, Mapping

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
    """The experts of each token, by the gate that `config` names.

    logits: [num_tokens, n_routed_experts]; correction_bias: [n_routed_experts] fp32, of `noaux_tc` only.
    Returns topk_weights [num_tokens, top_k] fp32 and topk_ids [num_tokens, top_k] int64; ids ascend within a row and
    have no duplicates, so that whatever is summed over them has one order. Ties go to the lower index. Differentiable
    in the weights.
    """
    if config.topk_method is TopkMethod.NOAUX_TC:
        return noaux_tc(logits, config, correction_bias)
    assert correction_bias is None, "only noaux_tc has one"
    return _GATES[config.topk_method](logits, config)


def greedy(logits: Tensor, config: GateConfig) -> tuple[Tensor, Tensor]:
    """The experts with the best scores. See select_experts."""
    scores = expert_scores(logits, config.scoring_func)
    return _weighted(scores, scores, config)


def group_limited_greedy(logits: Tensor, config: GateConfig) -> tuple[Tensor, Tensor]:
    """The best experts of the `topk_group` groups whose best expert is best. See select_experts."""
    scores = expert_scores(logits, config.scoring_func)
    group_scores = scores.unflatten(-1, (config.n_group, config.experts_per_group)).amax(dim=-1)
    return _weighted(scores, _within_best_groups(scores, group_scores, config), config)


def noaux_tc(logits: Tensor, config: GateConfig, correction_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best experts of the `topk_group` groups whose best two are best. See select_experts.

    correction_bias: [n_routed_experts] fp32, steers the selection; the weights are of scores without it.
    """
    scores = expert_scores(logits, config.scoring_func)
    choice = scores if correction_bias is None else scores + correction_bias
    grouped = choice.unflatten(-1, (config.n_group, config.experts_per_group))  # [num_tokens, n_group, per group]
    group_scores = grouped.topk(min(2, config.experts_per_group), dim=-1).values.sum(dim=-1)
    return _weighted(scores, _within_best_groups(choice, group_scores, config), config)


def mixtral(logits: Tensor, config: GateConfig) -> tuple[Tensor, Tensor]:
    """The experts with the best logits, weighted by the softmax over these alone. See select_experts."""
    topk_ids = _top_indices(logits, config.num_experts_per_tok).sort(dim=-1).values
    return logits.float().gather(-1, topk_ids).softmax(dim=-1), topk_ids


def gshard_top2(logits: Tensor, config: GateConfig) -> tuple[Tensor, Tensor]:
    """The best two, with weights g1 / (g1 + g2) and g2 / (g1 + g2). See select_experts, asks_second_choice."""
    topk_ids = _top_indices(logits, 2).sort(dim=-1).values
    gates = expert_scores(logits, config.scoring_func).gather(-1, topk_ids)
    return gates / gates.sum(dim=-1, keepdim=True), topk_ids  # g1 is at least 1 / n_routed_experts


def switch_top1(logits: Tensor, config: GateConfig) -> tuple[Tensor, Tensor]:
    """The best expert, weighted by its share of the softmax over all. See select_experts."""
    topk_ids = _top_indices(logits, 1)
    return expert_scores(logits, config.scoring_func).gather(-1, topk_ids), topk_ids


def asks_second_choice(topk_weights: Tensor, uniforms: Tensor) -> Tensor:
    """GShard's random routing: the second expert is asked with probability 2 g2, which is 1 where it weighs a half.

    topk_weights: [num_tokens, 2] of gshard_top2; uniforms: [num_tokens] in [0, 1), drawn by the caller, e.g.
    torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)).
    Returns [num_tokens, 2] bool: the assignments to dispatch, the first choice among them always.
    """
    first = topk_weights.argmax(dim=-1, keepdim=True)  # of equal ones the lower
    return (2 * topk_weights > uniforms.unsqueeze(-1)).scatter(-1, first, True)


_GATES: Mapping[TopkMethod, Callable[[Tensor, GateConfig], tuple[Tensor, Tensor]]] = {
    TopkMethod.GREEDY: greedy,
    TopkMethod.GROUP_LIMITED_GREEDY: group_limited_greedy,
    TopkMethod.MIXTRAL: mixtral,
    TopkMethod.GSHARD_TOP2: gshard_top2,
    TopkMethod.SWITCH_TOP1: switch_top1,
}


def _weighted(scores: Tensor, choice: Tensor, config: GateConfig) -> tuple[Tensor, Tensor]:
    """The best of `choice`, with their scores as DeepSeek's config.json says: normalised or not, and scaled."""
    topk_ids = _top_indices(choice, config.num_experts_per_tok).sort(dim=-1).values  # [num_tokens, top_k]
    topk_weights = scores.gather(-1, topk_ids)
    if config.norm_topk_prob:
        topk_weights = topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + 1e-20)
    return topk_weights * config.routed_scaling_factor, topk_ids


def _within_best_groups(choice: Tensor, group_scores: Tensor, config: GateConfig) -> Tensor:
    """`choice` with every expert outside the token's best `topk_group` groups at -inf.

    group_scores: [num_tokens, n_group]. The mask is -inf and not the 0.0 of the published code: an underflowed score of
    0.0 would tie with it and break the device limit.
    """
    kept = torch.zeros_like(group_scores, dtype=torch.bool)
    kept.scatter_(-1, _top_indices(group_scores, config.topk_group), True)
    return choice.masked_fill(~kept.repeat_interleave(config.experts_per_group, dim=-1), float("-inf"))


def _top_indices(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest values of each row; `topk` leaves the order of ties open, a stable sort not."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
