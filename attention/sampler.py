"""Which token comes next. Knows nothing of scheduling or text.

The filters and their order are vLLM's: temperature, min_p, top_k, top_p. The random draw is stateless: for the token at
output position p it depends on (seed, p) alone, and each row's result on that row alone. So preemption, the other rows
of the batch, and the process that samples do not change a token. Ties go to the lower token id.
"""

import math
from collections.abc import Sequence as Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from attention.sampling_params import SamplingParams
from attention.sequence import TokenLogprobs

_NUM_CANDIDATES = (1024, 8192)  # tried before the whole vocabulary: the best few are found faster than a full order
_MASK_64 = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """What the sampler must know of one row of logits."""

    sampling_params: SamplingParams
    output_position: int  # 0 for the first new token of the request


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """The answer for one row; `is_finite` is False when its logits are not numbers, and the rest then means nothing."""

    token_id: int
    logprobs: TokenLogprobs | None
    is_finite: bool


def sample(logits: Tensor, rows: Collection[SampleRow]) -> list[SampledToken]:
    """One token a row.

    logits: [num_rows, vocab_size] fp32, not modified.
    """
    token_ids, maxima = _best(logits)
    is_finite = [math.isfinite(maximum) for maximum in maxima]
    is_random = [is_ok and not row.sampling_params.is_greedy for row, is_ok in zip(rows, is_finite, strict=True)]
    random_rows = [i for i in range(len(rows)) if is_random[i]]
    if random_rows:
        drawn = _sample_random(logits[random_rows], [rows[i] for i in random_rows])
        for i, token_id in zip(random_rows, drawn.tolist(), strict=True):
            token_ids[i] = token_id
    return [
        SampledToken(
            token_id=token_id,
            logprobs=_logprobs(logits[i], token_id, row.sampling_params.logprobs) if is_finite[i] else None,
            is_finite=is_finite[i],
        )
        for i, (row, token_id) in enumerate(zip(rows, token_ids, strict=True))
    ]


def _best(logits: Tensor) -> tuple[list[int], list[float]]:
    """The largest logit of each row: its token, the lower id of a tie, and what it is.

    NaN anywhere, +inf anywhere and -inf everywhere all show in it.
    """
    if logits.is_cpu:  # numpy finds it ten times as fast as torch
        numbers = logits.numpy()
        ids = numbers.argmax(axis=-1)
        return ids.tolist(), numbers[range(len(ids)), ids].tolist()
    best = logits.max(dim=-1)
    return best.indices.tolist(), best.values.tolist()


def uniform(seed: int, output_position: int) -> float:
    """The random number in [0, 1) of one output position: two rounds of SplitMix64 (Steele et al., OOPSLA 2014)."""
    return (_split_mix(_split_mix(seed) ^ output_position) >> 11) * 2.0**-53


def _split_mix(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _MASK_64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return state ^ (state >> 31)


def _sample_random(logits: Tensor, rows: Collection[SampleRow]) -> Tensor:
    """Inverts the cumulative distribution in the order of token ids. Returns [num_rows] int64."""
    device = logits.device
    weights = filtered_weights(logits, [row.sampling_params for row in rows])  # [num_rows, vocab_size] fp64
    cumulative = weights.cumsum(dim=-1)
    draws = [uniform(row.sampling_params.seed, row.output_position) for row in rows]
    total = cumulative[:, -1:]
    target = torch.tensor(draws, dtype=torch.float64, device=device).unsqueeze(-1) * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))  # the product may round up to total
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def filtered_weights(logits: Tensor, params: Collection[SamplingParams]) -> Tensor:
    """Probabilities up to a factor for each row, 0 for every token that the row's filters leave out.

    logits: [num_rows, vocab_size] fp32, the maximum of each row finite. Returns [num_rows, vocab_size] fp64.
    """
    temperature = torch.tensor([p.temperature for p in params], device=logits.device).unsqueeze(-1)
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature.clamp_min(torch.finfo(torch.float32).tiny)
    weights = scaled.softmax(dim=-1).double()  # in fp32: this kernel treats a row alike whatever rows are beside it
    min_p = torch.tensor([p.min_p for p in params], dtype=torch.float64, device=logits.device).unsqueeze(-1)
    weights.masked_fill_(weights < min_p * weights.amax(dim=-1, keepdim=True), 0.0)
    undecided = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1.0]
    for num_candidates in (*[n for n in _NUM_CANDIDATES if n < logits.shape[-1]], logits.shape[-1]):
        if undecided:
            subset = weights[undecided]
            kept, is_decided = _top_tokens(subset, [params[i] for i in undecided], num_candidates)
            weights[undecided] = torch.where(kept | ~is_decided.unsqueeze(-1), subset, 0.0)
            undecided = [i for i, is_done in zip(undecided, is_decided.tolist(), strict=True) if not is_done]
    return weights


def _top_tokens(weights: Tensor, params: Collection[SamplingParams], num_candidates: int) -> tuple[Tensor, Tensor]:
    """Which tokens top_k and then top_p keep, looking at the best `num_candidates` of each row only.

    weights: [num_rows, vocab_size] fp64. Returns kept [num_rows, vocab_size] bool, and is_decided [num_rows] bool:
    False where a row may keep more tokens than were looked at. A token is kept while those before it have less than
    top_p.
    """
    vocab_size = weights.shape[-1]
    top_k = torch.tensor([min(p.top_k, vocab_size) or vocab_size for p in params], device=weights.device)
    top_p = torch.tensor([p.top_p if p.top_p < 1.0 else torch.inf for p in params], device=weights.device).double()
    best = weights.topk(num_candidates, dim=-1).values  # [num_rows, num_candidates], falling
    is_in_top_k = torch.arange(num_candidates, device=weights.device) < top_k.unsqueeze(-1)
    cumulative = (best * is_in_top_k).cumsum(dim=-1)  # a sequential sum, unlike sum(): independent of the other rows
    everything = torch.where(top_k < vocab_size, cumulative[:, -1], weights.cumsum(dim=-1)[:, -1])  # [num_rows]
    is_kept = is_in_top_k & (cumulative - best < (top_p * everything).unsqueeze(-1))
    num_kept = is_kept.sum(dim=-1).clamp_min(1)
    is_enough = torch.where(top_k < vocab_size, top_k <= num_candidates, num_kept < num_candidates)
    return _first_tokens(weights, best, num_kept), is_enough | (num_candidates == vocab_size)


def _first_tokens(values: Tensor, best: Tensor, num_kept: Tensor) -> Tensor:
    """Marks the `num_kept` largest values of each row, the lower ids of those that tie for the last place.

    values: [num_rows, vocab_size]; best: [num_rows, n], the n largest values, falling; num_kept: [num_rows], 1 to n.
    Returns [num_rows, vocab_size] bool.
    """
    threshold = best.gather(-1, num_kept.unsqueeze(-1) - 1)  # [num_rows, 1]
    num_ties_kept = num_kept.unsqueeze(-1) - (best > threshold).sum(dim=-1, keepdim=True)
    is_tie = values == threshold
    return (values > threshold) | (is_tie & (is_tie.cumsum(dim=-1) <= num_ties_kept))


def _logprobs(logits: Tensor, token_id: int, num_logprobs: int | None) -> TokenLogprobs | None:
    """logits: [vocab_size] fp32, as the model gave them. None when none are asked for."""
    if num_logprobs is None:
        return None
    logprobs = logits.log_softmax(dim=-1).unsqueeze(0)  # [1, vocab_size]
    num_top = min(num_logprobs, logits.shape[-1])
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        best = logprobs.topk(num_top, dim=-1).values
        is_top = _first_tokens(logprobs, best, torch.tensor([num_top], device=logits.device))
        top_ids = is_top[0].nonzero().squeeze(-1)  # [num_top], rising
        order = logprobs[0, top_ids].sort(descending=True, stable=True).indices
        top = tuple(zip(top_ids[order].tolist(), logprobs[0, top_ids[order]].tolist(), strict=True))
    return TokenLogprobs(token_id=token_id, logprob=float(logprobs[0, token_id]), top=top)
