import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from router.replicas import choose_replicas

UNITS = np.array([[0, 1, 2], [1, -1, -1], [2, 0, -1]])


def test_replicas_take_turns():
    assert {choose_replicas(UNITS, turn)[0] for turn in range(3)} == {0, 1, 2}
    assert {choose_replicas(UNITS, turn)[2] for turn in range(2)} == {0, 2}


def test_a_shard_to_avoid_is_asked_only_when_nobody_else_has_the_unit():
    for turn in range(6):
        chosen = choose_replicas(UNITS, turn, avoid={1, 2}).tolist()
        assert chosen == [0, 1, 0]


@given(turn=st.integers(0, 100), avoid=st.sets(st.integers(0, 2)))
def test_a_unit_is_asked_of_a_shard_that_holds_it(turn, avoid):
    for chosen, ranks in zip(choose_replicas(UNITS, turn, avoid), UNITS, strict=True):
        assert chosen in ranks[ranks >= 0]
