"""What of a model its routing traffic depends on: layers, gate, and the sizes of rows and experts."""

from dataclasses import dataclass

from router.gate_config import GateConfig, ScoringFunc, TopkMethod

MAX_EXPERTS = 65536  # expert ids are kept in 16 bits
MAX_LAYERS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """hidden_size and moe_intermediate_size in numbers, itemsize in bytes a number, of rows and weights alike."""

    name: str
    moe_layer_ids: tuple[int, ...]
    gate: GateConfig
    hidden_size: int
    moe_intermediate_size: int
    itemsize: int = 2

    def __post_init__(self) -> None:
        if not 1 <= len(self.moe_layer_ids) <= MAX_LAYERS:
            raise ValueError(
                f"{self.name} has {len(self.moe_layer_ids)} layers with experts, must be 1 to {MAX_LAYERS}"
            )
        if list(self.moe_layer_ids) != sorted(set(self.moe_layer_ids)) or self.moe_layer_ids[0] < 0:
            raise ValueError(f"moe_layer_ids {self.moe_layer_ids} of {self.name} do not ascend from 0 or more")
        if self.gate.n_routed_experts > MAX_EXPERTS:
            raise ValueError(f"n_routed_experts is {self.gate.n_routed_experts}, limit is {MAX_EXPERTS}")
        for field, limit in (("hidden_size", 2**20), ("moe_intermediate_size", 2**20), ("itemsize", 8)):
            if not 1 <= getattr(self, field) <= limit:
                raise ValueError(f"{field} of {self.name} is {getattr(self, field)}, must be 1 to {limit}")

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layer_ids)

    @property
    def top_k(self) -> int:
        return self.gate.num_experts_per_tok

    @property
    def row_bytes(self) -> int:
        """Of one hidden state on the wire."""
        return self.hidden_size * self.itemsize

    @property
    def expert_parameters(self) -> int:
        """Of one routed expert: w1, w3 and w2."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def expert_bytes(self) -> int:
        return self.expert_parameters * self.itemsize


V2 = ModelShape(  # arXiv 2405.04434, section 3.1.2
    name="v2",
    moe_layer_ids=tuple(range(1, 60)),
    gate=GateConfig(
        n_routed_experts=160,
        num_experts_per_tok=6,
        n_group=8,
        topk_group=3,
        topk_method=TopkMethod.GROUP_LIMITED_GREEDY,
        routed_scaling_factor=16.0,
    ),
    hidden_size=5120,
    moe_intermediate_size=1536,
)
V2_LITE = ModelShape(  # arXiv 2405.04434, appendix B
    name="v2-lite",
    moe_layer_ids=tuple(range(1, 27)),
    gate=GateConfig(n_routed_experts=64, num_experts_per_tok=6),
    hidden_size=2048,
    moe_intermediate_size=1408,
)
V3 = ModelShape(  # arXiv 2412.19437, section 4.2
    name="v3",
    moe_layer_ids=tuple(range(3, 61)),
    gate=GateConfig(
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        topk_method=TopkMethod.NOAUX_TC,
        scoring_func=ScoringFunc.SIGMOID,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    ),
    hidden_size=7168,
    moe_intermediate_size=2048,
)
PUBLISHED = {shape.name: shape for shape in (V2, V2_LITE, V3)}
