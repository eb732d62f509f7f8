"""What the machine allows at best: bytes that a decode step must read, operations that a prefill must do.

Plain arithmetic over config.json. A weight is read once a step however many rows use it; an expert is read if any token
of the step chose it. Knows nothing of how anything is computed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

GROUP_SIZES = (128, 64, 32)  # of quantised weights: the largest that divides both sizes of an expert
SCALE_BYTES = 4
BYTES_PER_WEIGHT = {"bf16": 2.0, "float32": 4.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A DeepSeek-V2 or -V3 model, in numbers of weights.

    attention, dense, mixture: of one layer; mixture without routed experts. expert: of one expert. plain: of all layers
    together, weights that stay as they are when the others are quantised.
    """

    hidden_size: int
    vocab_size: int
    num_layers: int
    num_dense_layers: int
    num_experts: int
    top_k: int
    attention: int
    dense: int
    mixture: int
    expert: int
    plain: int
    latent_size: int  # numbers cached of a token in a layer
    latent_up: int  # of one layer: latents to keys and values
    score_size: int  # heads x (qk_head_dim + v_head_dim)
    group_size: int

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "ModelShape":
        """From config.json as parsed."""
        hidden, heads, inner = config["hidden_size"], config["num_attention_heads"], config["moe_intermediate_size"]
        latent, rank = config["kv_lora_rank"], config.get("q_lora_rank")
        rope, value = config["qk_rope_head_dim"], config["v_head_dim"]
        query = config["qk_nope_head_dim"] + rope
        query_weights = rank * (hidden + heads * query) if rank else hidden * heads * query
        latent_up = latent * heads * (config["qk_nope_head_dim"] + value)
        latent_weights = hidden * (latent + rope) + latent_up
        expert = 3 * hidden * inner
        widths = (hidden, inner, config["intermediate_size"], rank or hidden, heads * value)
        num_layers, first = config["num_hidden_layers"], config.get("first_k_dense_replace", 0)
        frequency = config.get("moe_layer_freq", 1)
        num_dense = sum(layer < first or layer % frequency != 0 for layer in range(num_layers))
        return cls(
            hidden_size=hidden,
            vocab_size=config["vocab_size"],
            num_layers=num_layers,
            num_dense_layers=num_dense,
            num_experts=config["n_routed_experts"],
            top_k=config["num_experts_per_tok"],
            attention=query_weights + latent_weights + heads * value * hidden,
            dense=3 * hidden * config["intermediate_size"],
            mixture=config["n_routed_experts"] * hidden + expert * (config.get("n_shared_experts") or 0),
            expert=expert,
            plain=num_layers * latent_up + (num_layers - num_dense) * config["n_routed_experts"] * hidden,
            latent_size=latent + rope,
            latent_up=latent_up,
            score_size=heads * (query + value),
            group_size=next(
                (size for size in GROUP_SIZES if not any(width % size for width in widths)), GROUP_SIZES[-1]
            ),
        )

    @property
    def num_mixture_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def common_weights(self) -> int:
        """Weights that every step reads: all but routed experts and embeddings."""
        layers = self.num_layers * self.attention + self.num_dense_layers * self.dense
        return layers + self.num_mixture_layers * self.mixture + self.vocab_size * self.hidden_size

    def weight_bytes(self, kind: str) -> float:
        """Of one number of a linear layer in the format `kind`."""
        scales = SCALE_BYTES / self.group_size if kind in ("int8", "int4") else 0.0
        return BYTES_PER_WEIGHT[kind] + scales

    def decode_bytes(self, batch: int, context: float, num_distinct: float, kind: str = "bf16") -> float:
        """Read in one step of `batch` sequences of `context` tokens, `num_distinct` experts touched in a layer."""
        plain = BYTES_PER_WEIGHT["float32" if kind == "float32" else "bf16"]
        linear = self.common_weights - self.plain + self.num_mixture_layers * num_distinct * self.expert
        rows = batch * self.hidden_size  # of the embedding
        cache = batch * context * self.cache_bytes_per_token(plain)
        return self.weight_bytes(kind) * linear + plain * (self.plain + rows) + cache

    def cache_bytes_per_token(self, bytes_per_number: float = 2.0) -> float:
        """Of the latent cache, all layers."""
        return self.num_layers * self.latent_size * bytes_per_number

    def prefill_operations(self, num_tokens: int) -> float:
        """Multiplications and additions that a prompt needs from an empty cache; logits of the last token only.

        Attention in its naive form: a token attends to itself and all before it. Of the last layer, taken to be a
        mixture where there is any, only the last token attends and goes on; of the others it needs the latents, and
        keys and values made of them.
        """
        layers = self.num_layers * self.attention + self.num_dense_layers * self.dense
        mixture = self.mixture + self.top_k * self.expert
        mlp = mixture if self.num_mixture_layers else self.dense
        left_out = self.attention - self.hidden_size * self.latent_size - self.latent_up + mlp
        pairs = num_tokens * (num_tokens + 1) / 2
        scores = self.score_size * ((self.num_layers - 1) * pairs + num_tokens)
        products = num_tokens * (layers + self.num_mixture_layers * mixture) - (num_tokens - 1) * left_out
        return 2.0 * (products + scores + self.vocab_size * self.hidden_size)

    def decode_operations(self, batch: int) -> float:
        """Multiplications and additions of one step; those of attention over the cache are left out."""
        layers = self.num_layers * self.attention + self.num_dense_layers * self.dense
        mixtures = self.num_mixture_layers * (self.mixture + self.top_k * self.expert)
        return 2.0 * batch * (layers + mixtures + self.vocab_size * self.hidden_size)

    def decode_rate(
        self, batch: int, context: float, num_distinct: float, kind: str, bytes_per_s: float, operations_per_s: float
    ) -> float:
        """Tokens/s of all sequences together: reading, or computing where that takes longer."""
        reading_s = self.decode_bytes(batch, context, num_distinct, kind) / bytes_per_s
        return batch / max(reading_s, self.decode_operations(batch) / operations_per_s)

    def prefill_rate(self, num_tokens: int, kind: str, operations_per_s: float, bytes_per_s: float) -> float:
        """Tokens/s: the operations, or one reading of the weights where that takes longer."""
        experts = expected_distinct([1.0 / self.num_experts] * self.num_experts, self.top_k, num_tokens)
        if self.num_mixture_layers:  # the last of them is asked by one token
            experts -= (experts - self.top_k) / self.num_mixture_layers
        reading_s = self.decode_bytes(1, num_tokens, experts, kind) / bytes_per_s
        return num_tokens / max(self.prefill_operations(num_tokens) / operations_per_s, reading_s)


def expected_distinct(shares: Sequence[float], top_k: int, batch: int) -> float:
    """Experts of a layer that at least one of `batch` tokens chooses.

    shares: by expert, its share of all choices, summing to 1. Tokens are taken to choose independently.
    """
    return sum(1.0 - (1.0 - min(1.0, top_k * share)) ** batch for share in shares)


def counted_distinct(choices: Sequence[Sequence[int]], num_experts: int, top_k: int, batch: int) -> float:
    """The same from counted choices, averaged over layers; as if all were alike where nothing was counted.

    choices: by mixture layer and expert, tokens that chose it while `batch` sequences decoded.
    """
    uniform = [1.0 / num_experts] * num_experts
    layers = [[count / sum(counts) for count in counts] if sum(counts) else uniform for counts in choices] or [uniform]
    return sum(expected_distinct(shares, top_k, batch) for shares in layers) / len(layers)
