"""Replicas' known answers are compared by a controller whose processes are plain objects."""

import pytest

from cluster.controller.replica_check import INTERVAL_S, Difference, differences
from tests.cluster.fake_processes import run, system

KEYS = [(1, expert_id) for expert_id in range(8)]


def answers(**changes: int) -> dict[tuple[int, int], int]:
    """Of all experts; changes: by e0 to e7."""
    return {(1, expert_id): changes.get(f"e{expert_id}", 100 + expert_id) for _, expert_id in KEYS}


def test_replicas_that_agree_have_nothing_to_do():
    assert differences({0: answers(), 1: answers(), 2: {}}) == []


def test_of_two_that_differ_both_read_again():
    assert differences({0: answers(e3=5), 1: answers()}) == [Difference(0, ((1, 3),)), Difference(1, ((1, 3),))]


def test_of_three_the_one_that_stands_alone_reads_again():
    assert differences({0: answers(), 1: answers(e3=5, e4=6), 2: answers()}) == [Difference(1, ((1, 3), (1, 4)))]


def test_processors_that_compute_other_bits_are_not_faults():
    other = {key: answer + 1 for key, answer in answers().items()}
    assert differences({0: answers(), 1: other}) == []


def test_an_expert_that_one_shard_has_alone_is_compared_with_nobody():
    assert differences({0: {(1, 0): 5}, 1: {(1, 1): 6}}) == []


@pytest.mark.parametrize("has_replaced", [False, True])
def test_a_shard_is_told_once_and_its_successor_again(has_replaced):
    now = [0.0]
    controller, fakes = system(num_shards=3, clock=lambda: now[0])
    for name, known in (("shard-0", answers()), ("shard-1", answers(e3=5)), ("shard-2", answers())):
        fakes[name].answers["known_answers"] = known
    run(controller, 4)
    for _ in range(3):
        now[0] += INTERVAL_S
        run(controller, 3)
    assert fakes["shard-1"].told("read_again") == [([(1, 3)],)]
    assert fakes["shard-0"].told("read_again") == fakes["shard-2"].told("read_again") == []
    if has_replaced:
        fakes["shard-1"].restart()
        run(controller, 4)
        now[0] += INTERVAL_S
        run(controller, 3)
        assert len(fakes["shard-1"].told("read_again")) == 2
