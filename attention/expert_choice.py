"""A mixture layer's gate: which experts each row visits, by the kernel where it is built, else by router/gate.py.

With an overload valve some of them are left out again; without one nothing is computed beyond the gate.
"""

import torch
from torch import Tensor

from attention.layers import Projection
from experts.kernels.gate import MAX_EXPERTS, kernel_select_experts
from experts.kernels.library import native
from router.gate import select_experts
from router.gate_config import DEEPSEEK_METHODS, GateConfig, ScoringFunc, TopkMethod
from router.overload_valve import OverloadValve


def choose_experts(
    hidden_states: Tensor,
    gate: Projection,
    config: GateConfig,
    correction_bias: Tensor | None,
    valve: OverloadValve | None = None,
) -> tuple[Tensor, Tensor]:
    """topk_weights [num_tokens, top_k] fp32 and topk_ids [num_tokens, top_k] int64, ascending; see select_experts.

    hidden_states: [num_tokens, hidden_size]; gate: in fp32; correction_bias: [n_routed_experts] fp32. Where the valve
    left an assignment out its id is NO_EXPERT.
    """
    logits = gate(hidden_states, out_dtype=torch.float32)
    topk_weights, topk_ids = _chosen(logits, config, correction_bias)
    if valve is not None:
        topk_ids = valve.limit(topk_ids, logits)
    return topk_weights, topk_ids


def _chosen(logits: Tensor, config: GateConfig, correction_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    has_kernel = native() is not None and logits.device.type == "cpu" and config.topk_method in DEEPSEEK_METHODS
    if not has_kernel or config.n_routed_experts > MAX_EXPERTS:
        return select_experts(logits, config, correction_bias)
    return kernel_select_experts(
        logits,
        correction_bias,
        top_k=config.num_experts_per_tok,
        num_groups=config.n_group if config.is_group_limited else 0,
        top_groups=config.topk_group,
        is_sigmoid=config.scoring_func is ScoringFunc.SIGMOID,
        ranks_groups_by_two=config.topk_method is TopkMethod.NOAUX_TC,
        is_normalised=config.norm_topk_prob,
        scaling_factor=config.routed_scaling_factor,
    )
