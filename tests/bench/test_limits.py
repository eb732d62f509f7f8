import pytest

from tests.bench.checkpoints import COMMON, SHAPES, tensor_specs
from tests.bench.limits import ModelShape, counted_distinct, expected_distinct

LITE4 = ModelShape.read(COMMON | SHAPES["lite4"])


@pytest.mark.parametrize("name", list(SHAPES))
def test_weights_add_up_to_those_of_the_checkpoint(name: str) -> None:
    shape = ModelShape.read(COMMON | SHAPES[name])
    in_checkpoint = sum(spec.num_bytes // 2 for spec in tensor_specs(COMMON | SHAPES[name]) if len(spec.shape) == 2)
    embedding = shape.vocab_size * shape.hidden_size
    experts = shape.num_mixture_layers * shape.num_experts * shape.expert
    assert shape.common_weights + experts + embedding == in_checkpoint


def test_decode_of_one_token_reads_its_experts_and_all_that_is_common() -> None:
    by_hand = 2 * (LITE4.common_weights + 3 * 6 * 3 * 2048 * 1408 + 2048)
    assert LITE4.decode_bytes(1, 0, 6.0) == by_hand
    assert LITE4.decode_rate(1, 0, 6.0, "bf16", 40e9, 1e15) == pytest.approx(55.0, abs=0.1)


def test_batch_reads_more_experts_but_not_as_many_more() -> None:
    distinct = expected_distinct([1 / 64] * 64, 6, 8)
    assert distinct == pytest.approx(64 * (1 - (58 / 64) ** 8))
    assert LITE4.decode_rate(8, 0, distinct, "bf16", 40e9, 1e15) == pytest.approx(143.7, abs=0.1)


def test_context_adds_the_latent_cache_once_a_sequence() -> None:
    growth = LITE4.decode_bytes(4, 1000, 6.0) - LITE4.decode_bytes(4, 0, 6.0)
    assert growth == 4 * 1000 * 4 * (512 + 64) * 2


@pytest.mark.parametrize(("kind", "bytes_per_weight"), [("bf16", 2.0), ("int8", 1 + 4 / 64), ("int4", 0.5 + 4 / 64)])
def test_quantised_weights_bring_their_scales(kind: str, bytes_per_weight: float) -> None:
    assert LITE4.weight_bytes(kind) == bytes_per_weight


def test_gate_and_latent_expansion_stay_plain_when_all_else_is_quantised() -> None:
    plain = 4 * 512 * 16 * (128 + 128) + 3 * 64 * 2048
    linear = LITE4.common_weights + 3 * 6 * 3 * 2048 * 1408 - plain
    assert LITE4.decode_bytes(1, 0, 6.0, "int4") == (0.5 + 4 / 64) * linear + 2 * (plain + 2048)


def test_group_of_scales_divides_the_inputs_of_every_matrix() -> None:
    assert LITE4.group_size == 64  # of 10,944, the width of its dense layer
    assert ModelShape.read(COMMON | SHAPES["tiny"] | {"moe_intermediate_size": 96}).group_size == 32


def test_slow_processor_limits_a_large_batch_by_its_operations() -> None:
    assert LITE4.decode_rate(128, 0, 64.0, "bf16", 1e15, 100e9) == pytest.approx(
        128 * 100e9 / LITE4.decode_operations(128)
    )


def test_prefill_is_limited_by_operations_and_falls_with_length() -> None:
    rates = [LITE4.prefill_rate(length, "bf16", 850e9, 40e9) for length in (512, 2048, 8192)]
    assert rates[0] == pytest.approx(1669, abs=1)
    assert rates == sorted(rates, reverse=True)


def test_the_last_layer_of_a_prompt_is_its_latents_and_one_token() -> None:
    attention = 2048 * 16 * 192 + 2048 * 576 + 512 * 16 * 256 + 16 * 128 * 2048
    mixture = 64 * 2048 + 8 * 3 * 2048 * 1408
    latents = 2048 * 576 + 512 * 16 * 256
    three = 3 * attention + 3 * 2048 * 10944 + 2 * mixture
    scores = 16 * (192 + 128) * (3 * 100 * 101 // 2 + 100)
    products = 100 * (three + latents) + (attention - latents + mixture) + 16384 * 2048
    assert LITE4.prefill_operations(100) == 2 * (products + scores)


def test_short_prompt_is_limited_by_one_reading_of_the_weights() -> None:
    assert LITE4.prefill_rate(1, "bf16", 1e15, 40e9) == pytest.approx(55.0, abs=0.1)


def test_distinct_experts_are_as_counted() -> None:
    assert counted_distinct([[5, 5, 0, 0]], 4, 2, 100) == 2.0  # two experts take everything
    assert counted_distinct([], 64, 6, 8) == expected_distinct([1 / 64] * 64, 6, 8)
    assert counted_distinct([[1, 1, 1, 1], [4, 0, 0, 0]], 4, 1, 1) == 1.0
