"""The gates and capacities once more, one token and one expert at a time, as the papers write them."""

import math

from torch import Tensor

from router.gate_config import GateConfig, TopkMethod


def best(values: list[float], count: int) -> list[int]:
    """Indices of the largest, best first; of equal ones the lower."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def softmax(values: list[float]) -> list[float]:
    shifted = [math.exp(value - max(values)) for value in values]
    return [value / sum(shifted) for value in shifted]


def choose(scores: Tensor, logits: Tensor, config: GateConfig, bias: Tensor | None) -> dict[int, float]:
    """One token's experts and their weights.

    scores: [n_routed_experts] fp32, because where they underflow or saturate decides DeepSeek's ties.
    """
    values, top_k = logits.tolist(), config.num_experts_per_tok
    match config.topk_method:
        case TopkMethod.MIXTRAL:
            chosen = best(values, top_k)
            return dict(zip(chosen, softmax([values[i] for i in chosen]), strict=True))
        case TopkMethod.GSHARD_TOP2:
            gates = softmax(values)
            first, second = best(values, 2)
            total = gates[first] + gates[second]
            return {first: gates[first] / total, second: gates[second] / total}
        case TopkMethod.SWITCH_TOP1:
            (expert,) = best(values, 1)
            return {expert: softmax(values)[expert]}
    choice = (scores if bias is None else scores + bias).tolist()
    allowed = set(range(len(choice)))
    if config.is_group_limited:
        groups = [
            range(g * config.experts_per_group, (g + 1) * config.experts_per_group) for g in range(config.n_group)
        ]
        num_best = 2 if config.topk_method is TopkMethod.NOAUX_TC else 1
        group_scores = [sum(sorted((choice[i] for i in group), reverse=True)[:num_best]) for group in groups]
        allowed = {i for g in best(group_scores, config.topk_group) for i in groups[g]}
    chosen = best([choice[i] if i in allowed else -math.inf for i in range(len(choice))], top_k)
    weights = {i: scores.tolist()[i] for i in chosen}
    if config.norm_topk_prob:
        total = sum(weights.values()) + 1e-20
        weights = {i: weight / total for i, weight in weights.items()}
    return {i: weight * config.routed_scaling_factor for i, weight in weights.items()}


def gshard(logits: Tensor, capacity: int, uniforms: list[float] | None) -> list[dict[int, float]]:
    """Algorithm 1 of GShard: each token's experts and weights. uniforms: the random numbers; None asks always."""
    gates = [softmax(row) for row in logits.tolist()]
    choices = [best(row, 2) for row in logits.tolist()]
    counts = [0] * logits.shape[1]
    combined: list[dict[int, float]] = [{} for _ in gates]
    for which in (0, 1):
        for token, gate in enumerate(gates):
            weight = gate[choices[token][which]] / (gate[choices[token][0]] + gate[choices[token][1]])
            expert = choices[token][which]
            is_asked = which == 0 or uniforms is None or 2 * weight > uniforms[token]
            if is_asked and counts[expert] < capacity:
                counts[expert] += 1
                combined[token][expert] = weight
    return combined


def kept_by_switch(ids: list[list[int]], capacity: int) -> set[tuple[int, int]]:
    """The (token, column) pairs that are served."""
    counts: dict[int, int] = {}
    kept = set()
    for token, experts in enumerate(ids):
        for column, expert in enumerate(experts):
            if counts.get(expert, 0) < capacity:
                counts[expert] = counts.get(expert, 0) + 1
                kept.add((token, column))
    return kept


def kept_by_gshard(ids: list[list[int]], affinities: list[list[float]], capacity: int) -> set[tuple[int, int]]:
    counts: dict[int, int] = {}
    kept = set()
    for which in range(len(ids[0]) if ids else 0):
        for token, experts in enumerate(ids):
            column = best(affinities[token], len(experts))[which]
            if counts.get(experts[column], 0) < capacity:
                counts[experts[column]] = counts.get(experts[column], 0) + 1
                kept.add((token, column))
    return kept


def kept_by_device(
    ids: list[list[int]], affinities: list[list[float]], devices: list[int], capacity: int
) -> set[tuple[int, int]]:
    """Drops a device's weakest assignment, the last of equal ones, until the rest fits."""
    kept = {(token, column) for token, experts in enumerate(ids) for column in range(len(experts))}
    for device in set(devices):
        mine = sorted(pair for pair in kept if devices[ids[pair[0]][pair[1]]] == device)
        while len(mine) > capacity:
            weakest = max(mine, key=lambda pair: (-affinities[pair[0]][pair[1]], pair))
            mine.remove(weakest)
            kept.remove(weakest)
    return kept
