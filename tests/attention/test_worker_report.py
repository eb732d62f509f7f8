"""What a worker says of the system, from a router that is a plain object."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

from attention.worker_report import WorkerReport
from protos import generation_pb2
from tests.fake_experts import grouped_gate, placed


def test_the_number_of_shards_is_that_of_the_placement_in_use() -> None:
    router = SimpleNamespace(expert_map=placed(grouped_gate(), 2))
    info = generation_pb2.GetModelInfoResponse(model_id="small", dp_size=3)
    report = WorkerReport(router, grouped_gate(), info)  # type: ignore[arg-type]
    assert asyncio.run(report.model_info()).ep_size == 2
    fewer = replace(router.expert_map, placement_version=2, unit_to_ep_ranks=router.expert_map.unit_to_ep_ranks * 0)
    router.expert_map = fewer  # shard 1 was drained
    answer = asyncio.run(report.model_info())
    assert (answer.model_id, answer.dp_size, answer.ep_size) == ("small", 3, 1)
