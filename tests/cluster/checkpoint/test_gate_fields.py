"""What config.json says of the gate."""

import pytest

from cluster.checkpoint.json_fields import InvalidModelConfig
from cluster.checkpoint.model_config import ModelConfig
from tests.checkpoints import SHAPES

V2, V2_LITE = SHAPES["v2"], SHAPES["v2_lite"]


@pytest.mark.parametrize("groups", [(8, 3), (0, 0), (1, 0), (None, None), (16, 1)])
def test_groups_that_greedy_never_uses_are_not_read(groups: tuple[int | None, int | None]) -> None:
    n_group, topk_group = groups
    pruned = V2_LITE | {"n_routed_experts": 15}  # which no eight groups divide
    leftover = pruned | {"n_group": n_group, "topk_group": topk_group}
    assert ModelConfig.from_json(leftover) == ModelConfig.from_json(pruned)


def test_groups_that_limit_a_token_are_checked() -> None:
    with pytest.raises(InvalidModelConfig, match="n_group 8 does not divide n_routed_experts 15"):
        ModelConfig.from_json(V2 | {"n_routed_experts": 15})
