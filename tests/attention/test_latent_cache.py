from dataclasses import replace

import pytest
import torch

from attention.latent_cache import LatentCache, LatentCacheConfig

CONFIG = LatentCacheConfig(
    num_layers=2, num_blocks=5, block_size=4, kv_lora_rank=6, qk_rope_head_dim=2, dtype=torch.float32
)


def test_a_row_is_found_where_its_slot_says() -> None:
    cache = LatentCache(CONFIG)
    kv_c, k_pe = torch.randn(3, 6), torch.randn(3, 2)
    cache.write(1, torch.tensor([4 * 3 + 1, 0, 19]), kv_c, k_pe)
    assert torch.equal(cache.tensor[1, 3, 1, :8], torch.cat((kv_c[0], k_pe[0])))
    assert torch.equal(cache.tensor[1, 0, 0, :8], torch.cat((kv_c[1], k_pe[1])))
    assert torch.equal(cache.tensor[1, 4, 3, :8], torch.cat((kv_c[2], k_pe[2])))
    assert cache.tensor.count_nonzero() == 3 * 8
    assert not cache.tensor[0].any()


def test_blocks_are_gathered_in_the_order_of_the_table() -> None:
    cache = LatentCache(CONFIG)
    cache.tensor.copy_(torch.randn_like(cache.tensor))
    gathered = cache.gather(0, torch.tensor([[4, 0], [2, 2]], dtype=torch.int32))
    assert gathered.shape == (2, 8, 8)
    assert torch.equal(gathered[0], torch.cat((cache.tensor[0, 4, :, :8], cache.tensor[0, 0, :, :8])))
    assert torch.equal(gathered[1], torch.cat((cache.tensor[0, 2, :, :8], cache.tensor[0, 2, :, :8])))


def test_rows_are_kept_in_the_format_of_the_cache() -> None:
    cache = LatentCache(replace(CONFIG, dtype=torch.bfloat16))
    kv_c = torch.randn(1, 6)
    cache.write(0, torch.tensor([7]), kv_c, torch.zeros(1, 2))
    assert torch.equal(cache.tensor[0, 1, 3, :6], kv_c[0].bfloat16())


def test_rows_are_padded_with_zeros_to_whole_vectors() -> None:
    assert CONFIG.row_width == 32
    assert replace(CONFIG, kv_lora_rank=512, qk_rope_head_dim=64).row_width == 576
    assert not LatentCache(CONFIG).tensor.any()


def test_a_block_of_deepseek_v2_in_bf16_costs_69120_bytes_a_token() -> None:
    config = LatentCacheConfig(
        num_layers=60, num_blocks=1, block_size=64, kv_lora_rank=512, qk_rope_head_dim=64, dtype=torch.bfloat16
    )
    assert config.bytes_per_block == 64 * 69120
    assert CONFIG.bytes_per_block == LatentCache(CONFIG).tensor.nbytes // 5


@pytest.mark.parametrize("name", ["num_layers", "num_blocks", "block_size", "kv_lora_rank", "qk_rope_head_dim"])
def test_an_empty_cache_is_refused_by_the_name_of_what_is_not_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        replace(CONFIG, **{name: 0})
