"""Experts move while requests run: real roles, real gRPC and rings, the real controller; only Ray is not there."""

import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from cluster.config import RebalancingConfig
from cluster.controller import controller as controller_module
from cluster.controller.balance import Proposer
from cluster.controller.controller import Controller
from cluster.controller.process import ManagedProcess, RoleName
from cluster.controller.rebalance import RebalanceState, RebalanceStatus
from cluster.roles.shard_role import ShardRole
from experts.kernels.library import native
from router.expert_map import ExpertMap
from router.trace.header_json import header_from_json
from router.trace.trace import TraceWindow, check_window
from tests.checkpoints import write_checkpoint
from tests.role_process import RoleProcess
from tests.system import HOST, System

NUM_SHARDS = 3
NUM_TOKENS = 24
TIMEOUT_S = 120.0


def shuffled(load: np.ndarray, current: ExpertMap, placement_version: int, shards: Collection[int]) -> ExpertMap:
    """Any units on any shards, some on several."""
    rng = np.random.default_rng(placement_version)
    num_layers, num_units, _ = current.unit_to_ep_ranks.shape
    ranks = np.full((num_layers, num_units, 2), -1)
    for layer in ranks:
        for unit in layer:
            count = rng.integers(1, 3)
            unit[:count] = rng.permutation(sorted(shards))[:count]
    return ExpertMap(
        placement_version=placement_version,
        ep_size=max(shards) + 1,
        moe_layer_ids=current.moe_layer_ids,
        expert_to_unit=current.expert_to_unit.copy(),
        unit_to_ep_ranks=ranks,
    )


@contextmanager
def controlled(
    system: System, proposer: Proposer | None = None, rebalancing: RebalancingConfig | None = None
) -> Iterator[tuple[Controller, dict[str, RoleProcess]]]:
    """The controller of a system that runs. proposer: unset: units anywhere."""
    processes, handles = [], {}
    for role, members in ((RoleName.SHARD, system.shards), (RoleName.WORKER, system.workers)):
        for rank, member in enumerate(members):
            handle = RoleProcess(lambda rank=rank: ShardRole(system.config, rank, HOST), member)
            processes.append(ManagedProcess(role=role, rank=rank, handle=handle))
            handles[processes[-1].name] = handle

    def create(_: RoleName, rank: int) -> ManagedProcess:
        role = ShardRole(system.config, rank, HOST)
        handles[f"shard-{rank}"] = RoleProcess(lambda: ShardRole(system.config, rank, HOST), role)
        return ManagedProcess(role=RoleName.SHARD, rank=rank, handle=handles[f"shard-{rank}"])

    controller = Controller(
        processes,
        system.plan.expert_map,
        proposer or Proposer(shuffled, system.plan.model.expert_bytes),
        rebalancing or RebalancingConfig(),
        create,
        drain_timeout_s=1.0,
    )
    controller.start()
    wait_until(lambda: controller.status().is_serving)
    try:
        yield controller, handles
    finally:
        controller._stopping.set()
        controller._thread.join()
        for name, handle in handles.items():  # the newest are the system's to stop
            if name.startswith("shard"):
                system.shards[int(name.removeprefix("shard-")) :][:1] = [handle.role]
        for handle in handles.values():
            handle.close()


def wait_until(condition: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.005)


def rebalanced(controller: Controller) -> RebalanceStatus:
    """After one more."""
    controller.rebalance()
    wait_until(lambda: controller.status().rebalance.state is RebalanceState.IDLE)
    return controller.status().rebalance


@contextmanager
def load(system: System, prompts: list[list[int]], expected: list[list[int]]) -> Iterator[list[int]]:
    """Each prompt again and again; the number of answers, which must all be as expected."""
    stopping, answered, wrong = threading.Event(), [], []

    def client(prompt: list[int], answer: list[int]) -> None:
        while not stopping.is_set():
            try:
                tokens = system.greedy(prompt, NUM_TOKENS)
            except grpc.RpcError as error:
                wrong.append(error)
                return
            (answered if tokens == answer else wrong).append(tokens)

    threads = [threading.Thread(target=client, args=pair) for pair in zip(prompts, expected, strict=True)]
    for thread in threads:
        thread.start()
    yield answered
    stopping.set()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert wrong == []


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    folder = write_checkpoint(tmp_path / "model", "v2", seed=7, num_hidden_layers=3)
    dtype = "float32" if native() is None else "bfloat16"
    with System(folder, num_workers=2, num_shards=NUM_SHARDS, dtype=dtype) as system:
        yield system


@pytest.fixture
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(3, 320, size=size).tolist() for size in (1, 9, 40, 70)]


@pytest.mark.parametrize("num_rebalances", [10, pytest.param(100, marks=pytest.mark.bench)])
def test_rebalances_in_a_row_under_load_fail_no_request_and_change_no_token(
    system, prompts, monkeypatch, num_rebalances
):
    monkeypatch.setattr(controller_module, "MOVE_ROUND_S", 0.005)
    expected = [system.greedy(prompt, NUM_TOKENS) for prompt in prompts]
    with controlled(system) as (controller, _), load(system, prompts, expected) as answered:
        for number in range(1, num_rebalances + 1):
            status = rebalanced(controller)
            assert (status.num_done, status.num_aborted) == (number, 0), status
            assert status.moved_bytes == status.planned_bytes > 0
        version = controller.status().placement_version
        assert version == num_rebalances + 1
        for shard in system.shards:  # what the placement says, and nothing that is left of others
            assert shard._shard.placement_versions == (version,)
            expert_map = system.workers[0]._router.expert_map
            assert shard._shard.num_units == len(expert_map.units_of(shard._ep_rank))
        assert {worker._router.expert_map.placement_version for worker in system.workers} == {version}
        wait_until(lambda: len(answered) >= 2 * len(prompts))
    assert system.becomes_idle()


def test_a_shard_that_dies_in_the_middle_of_a_rebalance_fails_no_request_and_changes_no_token(system, prompts):
    expected = [system.greedy(prompt, NUM_TOKENS) for prompt in prompts]
    with controlled(system) as (controller, handles), load(system, prompts, expected) as answered:
        reads = threading.Event()
        role = handles["shard-1"].role
        stage = role.stage

        def stage_and_tell(*args) -> None:
            reads.set()
            stage(*args)

        role.stage = stage_and_tell
        controller.rebalance()
        assert reads.wait(TIMEOUT_S)
        handles["shard-1"].die()
        wait_until(lambda: not controller.status().is_serving)
        handles["shard-1"].come_back()
        wait_until(lambda: controller.status().is_serving and controller._balance.is_idle)
        status = controller.status()
        assert (status.rebalance.num_done, status.rebalance.num_aborted) == (0, 1)
        assert status.placement_version == 1
        before = len(answered)
        assert rebalanced(controller).num_done == 1
        assert controller.status().placement_version == 3
        wait_until(lambda: len(answered) >= before + len(prompts))


def test_shards_that_are_added_and_drained_while_requests_run_fail_none_and_change_no_token(
    system, prompts, monkeypatch
):
    monkeypatch.setattr(controller_module, "MOVE_ROUND_S", 0.005)
    expected = [system.greedy(prompt, NUM_TOKENS) for prompt in prompts]
    with controlled(system) as (controller, handles), load(system, prompts, expected) as answered:
        for ep_ranks, change in (
            ((0, 1, 2, 3), lambda: controller.scale_shards(4)),
            ((0, 2, 3), lambda: controller.drain_shard(1)),
            ((0, 1, 2, 3, 4), lambda: controller.scale_shards(5)),
            ((0, 1), lambda: controller.scale_shards(2)),
        ):
            change()
            wait_until(lambda ranks=ep_ranks: shard_ranks(controller) == ep_ranks_in_use(system) == ranks)
            before = len(answered)
            wait_until(lambda before=before: len(answered) >= before + len(prompts))
        assert controller.status().rebalance.num_aborted == 0
        assert not handles["shard-4"].is_alive
    assert system.becomes_idle()


def test_the_choices_of_a_running_system_are_sampled_and_change_no_token(system, prompts):
    expected = [system.greedy(prompt, NUM_TOKENS) for prompt in prompts]
    with controlled(system) as (controller, _), load(system, prompts, expected) as answered:
        controller.sample_choices()
        wait_until(lambda: len(answered) >= len(prompts))
        header, choices = controller.sample_choices()
        model = header_from_json(header).model
        assert {dp_rank for dp_rank, _ in choices} == {0, 1}
        for _, topk_ids in choices:
            check_window(TraceWindow(topk_ids=topk_ids), model)
        assert sum(topk_ids.shape[1] for _, topk_ids in choices) >= len(prompts) * (NUM_TOKENS - 1)


def ep_ranks_in_use(system: System) -> tuple[int, ...] | None:
    """That all workers agree on."""
    in_use = {worker._router.expert_map.ep_ranks for worker in system.workers}
    return in_use.pop() if len(in_use) == 1 else None


def shard_ranks(controller: Controller) -> tuple[int, ...] | None:
    """Once all of them serve and nothing moves."""
    status = controller.status()
    if not status.is_serving or status.rebalance.state is not RebalanceState.IDLE:
        return None
    return tuple(int(name.removeprefix("shard-")) for name, _ in status.processes if name.startswith("shard"))
