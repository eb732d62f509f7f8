from tests.bench.wire import measure


def test_every_way_to_a_shard_is_measured_beside_what_bounds_it() -> None:
    rows = {row.name: row for row in measure(num_rows=2, num_blocks=1)}
    assert all(row.value > 0 for row in rows.values())
    assert {"wire, frame ring", "wire, frame grpc tls", "wire, layer ring", "wire, layer grpc"} <= set(rows)
    assert set(rows["wire, frame grpc"].ratios) == {"frame echo", "frame relay"}
