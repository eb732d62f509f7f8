"""The shape of a gate. Plain values: what only places experts needs no tensors."""

from dataclasses import dataclass, fields
from enum import StrEnum


class TopkMethod(StrEnum):
    """How experts are selected and weighted: the gates of gate.py. DeepSeek's names are those of config.json."""

    GREEDY = "greedy"
    GROUP_LIMITED_GREEDY = "group_limited_greedy"
    NOAUX_TC = "noaux_tc"
    MIXTRAL = "mixtral"
    GSHARD_TOP2 = "gshard_top2"
    SWITCH_TOP1 = "switch_top1"


# Those whose scoring function, groups, normalisation and scaling are the checkpoint's to choose.
DEEPSEEK_METHODS = frozenset({TopkMethod.GREEDY, TopkMethod.GROUP_LIMITED_GREEDY, TopkMethod.NOAUX_TC})


class ScoringFunc(StrEnum):
    """How router logits become scores."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """The gate's shape, as the checkpoint defines it."""

    n_routed_experts: int
    num_experts_per_tok: int
    n_group: int = 1
    topk_group: int = 1
    topk_method: TopkMethod = TopkMethod.GREEDY
    scoring_func: ScoringFunc = ScoringFunc.SOFTMAX
    norm_topk_prob: bool = False  # weights are divided by their sum, that of a single expert too
    routed_scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, must be 1 to n_routed_experts "
                f"({self.n_routed_experts})"
            )
        if self.n_group < 1 or self.n_routed_experts % self.n_group:
            raise ValueError(f"n_group {self.n_group} does not divide n_routed_experts {self.n_routed_experts}")
        if not 1 <= self.topk_group <= self.n_group:
            raise ValueError(f"topk_group is {self.topk_group}, must be 1 to n_group ({self.n_group})")
        reachable = self.max_groups_per_token * self.experts_per_group
        if reachable < self.num_experts_per_tok:
            raise ValueError(
                f"topk_group {self.topk_group} groups of {self.experts_per_group} experts hold {reachable}, "
                f"fewer than num_experts_per_tok {self.num_experts_per_tok}"
            )
        if self.topk_method not in DEEPSEEK_METHODS:
            self._check_fixed_gate()

    def _check_fixed_gate(self) -> None:
        """The gates that leave nothing but the number of experts open."""
        fixed_top_k = {TopkMethod.GSHARD_TOP2: 2, TopkMethod.SWITCH_TOP1: 1}.get(self.topk_method)
        if fixed_top_k is not None and self.num_experts_per_tok != fixed_top_k:
            raise ValueError(f"num_experts_per_tok is {self.num_experts_per_tok}, {self.topk_method} has {fixed_top_k}")
        for field in fields(self):
            if field.name not in ("n_routed_experts", "num_experts_per_tok", "topk_method"):
                value = getattr(self, field.name)
                if value != field.default:
                    raise ValueError(f"{field.name} is {value}, {self.topk_method} has {field.default}; leave it out")

    @property
    def experts_per_group(self) -> int:
        return self.n_routed_experts // self.n_group

    @property
    def is_group_limited(self) -> bool:
        """Whether a token's experts lie in at most `topk_group` of `n_group` expert groups."""
        return self.topk_method is TopkMethod.GROUP_LIMITED_GREEDY or self.topk_method is TopkMethod.NOAUX_TC

    @property
    def max_groups_per_token(self) -> int:
        return self.topk_group if self.is_group_limited else self.n_group
