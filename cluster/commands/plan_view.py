"""A serving plan for the terminal. Apart from views.py, which clients use without waiting for torch."""

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from attention.kernel_mla import odd_sizes
from attention.mla_config import MlaConfig
from cluster.byte_count import format_bytes
from cluster.roles.preflight import ServingPlan
from experts.kernels import library as kernels
from router import compiled


def plan_view(plan: ServingPlan) -> RenderableType:
    """What will be started, in a few lines."""
    model, decoder, gate = plan.model, plan.model.config.decoder, plan.model.config.decoder.gate
    numbers = str(model.dtype).removeprefix("torch.")
    if model.expert_format is not None:
        numbers += f", experts {model.expert_format}"
    cache = f"{format_bytes(plan.cache_bytes)} latent cache"
    if plan.spared_cache_bytes:
        cache += f" ({format_bytes(plan.spared_cache_bytes)} less than cache_gib: no request could use them)"
    rows = {
        "model": f"{model.model_id} ({model.config.model_type}, {numbers})",
        "layers": f"{decoder.num_hidden_layers}, of which {len(decoder.moe_layer_ids)} with {gate.n_routed_experts} "
        f"routed experts, {gate.num_experts_per_tok} per token",
        "workers": f"{plan.num_workers} x {format_bytes(plan.worker_weight_bytes)} of weights + "
        f"{cache}, context {plan.max_model_len} tokens",
        "shards": f"{plan.expert_map.ep_size} x {format_bytes(max(plan.shard_weight_bytes))} of weights, "
        f"{plan.expert_map.num_units} placement units a layer; a token visits at most "
        f"{plan.expert_map.max_ranks_per_token(gate)} shards a layer",
        "kernels": _kernels(decoder.mla),
    }
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, text in rows.items():
        table.add_row(name, Text(text))  # no markup: names of folders may hold brackets
    return table


def _kernels(mla: MlaConfig) -> str:
    found = kernels.instruction_set()
    if found is None:
        text = f"torch (slower: the CPU kernels are {kernels.why_not()})"
    else:
        text = f"{found}, chosen for this processor"
    if found is not None and (odd := odd_sizes(mla)):
        sizes = " and ".join(f"{name} ({size})" for name, size in odd.items())
        text += (
            f"; attention by torch, slower: {sizes} {'are' if len(odd) > 1 else 'is'} odd, the kernels take even ones"
        )
    if why := compiled.why_not():
        text += f"; routing by numpy, slower: the router's library is {why}"
    return text
