"""The three auxiliary losses of DeepSeek-V2 (arXiv 2405.04434, section 2.2.3, eqs. 23-31).

Each is a sum of products of a load (how often selected: no gradient) and a probability (gradient), taken per sequence
and averaged over sequences. Each sum is 1.0 for perfectly uniform routing. A device is an expert group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceFactors:
    """Weights of the losses; the defaults are those of DeepSeek-V2."""

    expert: float = 0.003  # alpha1
    device: float = 0.05  # alpha2
    communication: float = 0.02  # alpha3


def selections(topk_ids: Tensor, num_experts: int) -> Tensor:
    """[num_sequences, num_tokens, num_experts] fp32, 1.0 where the token selects the expert."""
    chosen = torch.zeros(*topk_ids.shape[:-1], num_experts)
    return chosen.scatter_(-1, topk_ids, 1.0)


def expert_loss(scores: Tensor, topk_ids: Tensor) -> Tensor:
    """Sum over experts of f_i P_i (eqs. 23-25), a scalar.

    scores: [num_sequences, num_tokens, num_experts] fp32; topk_ids: [num_sequences, num_tokens, top_k] int64.
    """
    num_experts, top_k = scores.shape[-1], topk_ids.shape[-1]
    f = selections(topk_ids, num_experts).mean(dim=1) * num_experts / top_k  # [num_sequences, num_experts]
    return (f * scores.mean(dim=1)).sum(dim=-1).mean()


def device_loss(scores: Tensor, topk_ids: Tensor, num_devices: int) -> Tensor:
    """Sum over devices of f'_i P'_i (eqs. 26-28), a scalar: balances the computation. Shapes as in `expert_loss`."""
    num_experts, top_k = scores.shape[-1], topk_ids.shape[-1]
    f = selections(topk_ids, num_experts).mean(dim=1) * num_experts / top_k
    f_device = f.unflatten(-1, (num_devices, -1)).mean(dim=-1)  # [num_sequences, num_devices]
    p_device = scores.mean(dim=1).unflatten(-1, (num_devices, -1)).sum(dim=-1)
    loss: Tensor = (f_device * p_device).sum(dim=-1).mean()
    return loss


def communication_loss(scores: Tensor, topk_ids: Tensor, num_devices: int, max_devices_per_token: int) -> Tensor:
    """Sum over devices of f''_i P''_i (eqs. 29-31), a scalar: balances what each device receives.

    Shapes as in `expert_loss`. A token is sent to a device at most once, whatever number of its experts it selects.
    """
    chosen = selections(topk_ids, scores.shape[-1]).unflatten(-1, (num_devices, -1))
    sent = chosen.amax(dim=-1)  # [num_sequences, num_tokens, num_devices]
    f_device = sent.mean(dim=1) * num_devices / max_devices_per_token
    p_device = scores.mean(dim=1).unflatten(-1, (num_devices, -1)).sum(dim=-1)
    loss: Tensor = (f_device * p_device).sum(dim=-1).mean()
    return loss


def balance_loss(
    scores: Tensor, topk_ids: Tensor, num_devices: int, max_devices_per_token: int, factors: BalanceFactors
) -> Tensor:
    """The weighted sum of the three losses for one layer, a scalar. Shapes as in `expert_loss`."""
    return (
        factors.expert * expert_loss(scores, topk_ids)
        + factors.device * device_loss(scores, topk_ids, num_devices)
        + factors.communication * communication_loss(scores, topk_ids, num_devices, max_devices_per_token)
    )
