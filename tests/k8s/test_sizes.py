"""The overlays of published models hold them: every unit has a place, in memory that the Pods have."""

import pytest

from router.placement import PlacementRequest
from router.placement.members import place_on
from router.placement.units import experts_held
from router.trace.model_shape import PUBLISHED
from tests.k8s.manifests import config, groups, render

GIB = 2**30


@pytest.mark.parametrize(
    ("overlay", "model", "device_gib"),
    [("v2-lite-1node", "v2-lite", 24), ("v2-8gpu", "v2", 80), ("v2-multinode", "v2", 80)],
)
def test_shards_hold_the_model(overlay: str, model: str, device_gib: int) -> None:
    manifests = render(f"overlays/{overlay}")
    shards = config(manifests).expert_shards
    shape = PUBLISHED[model]
    request = PlacementRequest(
        moe_layer_ids=shape.moe_layer_ids,
        gate=shape.gate,
        ep_size=shards.count,
        units_per_layer=shards.units_per_layer,
        num_replicas=shards.num_replicas,
        redundancy=shards.redundancy,
        expert_bytes=shape.expert_bytes,
    )
    traits = {ep_rank: shards.traits(ep_rank) for ep_rank in range(shards.count)}
    placed = place_on(request, traits, placement_version=1, policy=shards.placement_policy.value)
    largest = max(experts_held(placed, shards.count)) * shape.expert_bytes
    assert largest < (shards.max_weight_gib or device_gib) * GIB
    assert largest < device_gib * GIB
    memory = groups(manifests)["expert"].container["resources"]["limits"]["memory"]
    assert largest < int(memory.removesuffix("Gi")) * GIB  # weights pass the Pod's memory on their way
