import subprocess

import pytest

from tests.bench import wire
from tests.bench.row import Unmeasurable
from tests.bench.wire import measure


def test_every_way_to_a_shard_is_measured_beside_what_bounds_it() -> None:
    rows = {row.name: row for row in measure(num_rows=2, num_blocks=1)}
    assert all(row.value > 0 for row in rows.values())
    assert {"wire, frame ring", "wire, frame grpc tls", "wire, layer ring", "wire, layer grpc"} <= set(rows)
    assert set(rows["wire, frame grpc"].ratios) == {"frame echo", "frame relay"}


@pytest.mark.parametrize(
    ("told", "last"), [("Traceback ...\nOSError: " + "x" * 400 + "\n", "OSError: x"), ("", "nothing")]
)
def test_what_ended_the_measuring_process_is_told_from_its_beginning(
    monkeypatch: pytest.MonkeyPatch, told: str, last: str
) -> None:
    ended = subprocess.CompletedProcess([], 1, stdout="", stderr=told)
    monkeypatch.setattr(wire.subprocess, "run", lambda *arguments, **settings: ended)
    with pytest.raises(Unmeasurable, match=f"ended with 1: (it said )?{last}"):
        list(measure(num_rows=1, num_blocks=1))
