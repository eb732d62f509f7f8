"""Shards copy experts from each other over real gRPC; where they cannot, the checkpoint has them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from prometheus_client import CollectorRegistry

from experts.metrics import ShardMetrics
from experts.peer_weights import PeerWeights
from experts.shard import ExpertShard, ShardConfig
from experts.weight_store import ExpertModel, Unit, WeightStore
from protos.credentials import PLAINTEXT
from tests.fake_experts import RandomReader, small_model
from tests.shard_host import running_host

UNITS = [Unit(1, 0, (0, 1)), Unit(2, 3, (6, 7))]
RATE = 2.0**30


@contextmanager
def running_shard(units: list[Unit], model: ExpertModel) -> Iterator[ExpertShard]:
    shard = ExpertShard(ShardConfig(ep_rank=0), model, RandomReader(model), ShardMetrics(CollectorRegistry(), 0))
    shard.activate(1, units)
    shard.start()
    yield shard
    shard.stop()


class FailingReader(RandomReader):
    """Fails at one expert, once."""

    def read_matrix(self, name):
        if ".experts.1.down_proj" in name and not getattr(self, "has_failed", False):
            self.has_failed = True
            raise OSError("the disk was away")
        return super().read_matrix(name)


@pytest.fixture
def host():
    with running_host() as host:
        yield host


def staged(host, sources, reader, model) -> WeightStore:
    store = WeightStore(model, reader)
    with PeerWeights(host.thread, PLAINTEXT, model, sources, RATE) as peers:
        store.stage(UNITS, lambda _: None, peers.copy)
    return store


def test_a_shard_copies_units_from_those_that_have_them_to_the_bit_and_reads_the_rest(host) -> None:
    model = small_model()
    with running_shard(UNITS, model) as shard:
        server = host.serve(shard)
        reader = RandomReader(model)
        store = staged(host, {UNITS[0]: f"127.0.0.1:{server.port}"}, reader, model)
        assert {name.split(".")[2] for name in reader.names_read} == {"2"}
        whole = WeightStore(model, RandomReader(model))
        whole.stage(UNITS)
        for unit in UNITS:
            for expert_id in unit.expert_ids:
                copied, read = store.expert(unit.layer_id, expert_id), whole.expert(unit.layer_id, expert_id)
                for mine, theirs in ((copied.w13, read.w13), (copied.w2, read.w2)):
                    assert torch.equal(getattr(mine, "data", mine), getattr(theirs, "data", theirs))


def test_a_peer_that_is_gone_or_has_not_the_unit_is_asked_once_and_the_checkpoint_read(host, caplog) -> None:
    model = small_model()
    with running_shard([UNITS[0]], model) as shard:
        server = host.serve(shard)
        address = f"127.0.0.1:{server.port}"
        for sources, code in (
            ({UNITS[1]: address}, "FAILED_PRECONDITION"),
            (dict.fromkeys(UNITS, "127.0.0.1:1"), "UNAVAILABLE"),
        ):
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                store = staged(host, sources, RandomReader(model), model)
            assert store.num_units == 2
            (message,) = caplog.messages
            assert code in message
            assert "is read from the checkpoint" in message


def test_a_stage_that_is_tried_again_keeps_what_it_has() -> None:
    model = small_model()
    reader = FailingReader(model)
    store = WeightStore(model, reader)
    with pytest.raises(OSError, match="away"):
        store.stage(UNITS)
    reader.names_read.clear()
    store.stage(UNITS)
    assert not any(".experts.0." in name for name in reader.names_read)
    assert any(".experts.1." in name for name in reader.names_read)
    store.release(1)  # nothing was activated: nothing is left
    assert store.num_units == 0
    assert store.expert(1, 0) is None
