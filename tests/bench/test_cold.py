from tests.bench.cold import operations


def test_what_is_written_simply_gives_the_same():
    pairs = operations()
    del pairs["15 fields to a C function"]  # whose answer is where they lie
    for name, (ours, simple) in pairs.items():
        assert ours() is not None
        assert simple is None or simple() == ours(), name
