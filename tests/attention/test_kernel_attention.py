"""The attention kernels against fp64, and that a row's bits are its own."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from attention.latent_cache import LatentCache, LatentCacheConfig
from attention.layers import rms_norm
from attention.rotary import RotaryConfig, RotaryEmbedding
from attention.torch_backend import TorchBackend
from experts.kernels.library import set_num_threads
from experts.kernels.linear import KernelHeads
from experts.kernels.packed_matrix import pack_plain
from tests.experts.kernels.instruction_sets import each_instruction_set, needs_kernels
from tests.kernel_attention import mla_decode, mla_prefill, mla_prepare

__all__ = ["each_instruction_set"]

DTYPES = [torch.float32, torch.bfloat16]
BLOCK_SIZE = 16
FP32_ROUNDING, BF16_ROUNDING = 2**-24, 2**-9  # of one operation, relative


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    num_heads: int
    rank: int
    rope: int
    nope: int
    value: int

    @property
    def latent_dim(self) -> int:
        return self.rank + self.rope

    @property
    def scale(self) -> float:
        return (self.nope + self.rope) ** -0.5


V2 = Sizes(num_heads=128, rank=512, rope=64, nope=128, value=128)
V2_LITE = Sizes(num_heads=16, rank=512, rope=64, nope=128, value=128)
SMALL = Sizes(num_heads=4, rank=24, rope=8, nope=12, value=20)
ODD = Sizes(num_heads=19, rank=70, rope=6, nope=34, value=33)


class Sequences:
    """Latents of sequences in blocks anywhere in a cache whose other numbers are all NaN."""

    def __init__(self, sizes: Sizes, lengths: list[int], dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        num_blocks = [-(-length // BLOCK_SIZE) for length in lengths]
        config = LatentCacheConfig(
            num_layers=1, num_blocks=sum(num_blocks) + 3, block_size=BLOCK_SIZE, kv_lora_rank=sizes.rank,
            qk_rope_head_dim=sizes.rope, dtype=dtype,
        )  # fmt: skip
        self.latent_cache = LatentCache(config)
        self.cache = self.latent_cache.tensor[0].fill_(math.nan)
        order = torch.randperm(config.num_blocks, generator=generator).to(torch.int32)
        self.tables = torch.zeros(len(lengths), max(num_blocks), dtype=torch.int32)
        self.latents = []  # by sequence, [length, latent_dim]
        first = 0
        for i, length in enumerate(lengths):
            self.tables[i, : num_blocks[i]] = order[first : first + num_blocks[i]]
            first += num_blocks[i]
            self.latents.append(torch.randn(length, sizes.latent_dim, generator=generator).to(dtype))
            self.cache.view(-1, self.cache.shape[2])[self.slots(i), : sizes.latent_dim] = self.latents[i]

    def slots(self, sequence: int) -> Tensor:
        positions = torch.arange(len(self.latents[sequence]) if len(self.latents) > sequence else 0)
        return self.tables[sequence].long()[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE


def tolerance(length: int, *dtypes: torch.dtype) -> float:
    """Relative to the largest output: sums of fp32 products, and bf16 where something is rounded to it.

    Scores of about unit size carry the rounding of their sums into the exponent; weights sum to one, so the output's
    error is that of a score plus that of its own sum. With bf16 the weights, keys and values may be rounded, then the
    result.
    """
    if torch.bfloat16 in dtypes:
        return 8 * BF16_ROUNDING
    return 16 * (math.sqrt(length) + 32) * FP32_ROUNDING


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


def absorbed_oracle(query: Tensor, latents: Tensor, rank: int, scale: float) -> Tensor:
    """query: [num_heads, latent_dim]; latents: [length, latent_dim]."""
    scores = query.double() @ latents.double().T * scale
    return scores.softmax(dim=-1) @ latents[:, :rank].double()


def decode(sequences: Sequences, sizes: Sizes, query: Tensor, rows: list[tuple[int, int]]) -> Tensor:
    """rows: sequence and context of each."""
    seq_indices, context_lens = (torch.tensor(column, dtype=torch.int32) for column in zip(*rows, strict=True))
    return mla_decode(
        query, sequences.cache, sequences.tables, seq_indices, context_lens, sizes.rank, sizes.scale
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [V2, V2_LITE, SMALL, ODD])
def test_absorbed_attention_is_that_of_fp64(each_instruction_set: str, sizes: Sizes, dtype: torch.dtype) -> None:
    lengths = [1, 300, 63, 1100]
    sequences = Sequences(sizes, lengths, dtype)
    query = (2 * torch.randn(len(lengths), sizes.num_heads, sizes.latent_dim)).to(dtype)
    found = decode(sequences, sizes, query, list(enumerate(lengths)))
    for row, length in enumerate(lengths):
        expected = absorbed_oracle(query[row], sequences.latents[row], sizes.rank, sizes.scale)
        assert relative_error(found[row], expected) < tolerance(length, dtype)


@needs_kernels
@pytest.mark.parametrize(("query_dtype", "cache_dtype"), [DTYPES, DTYPES[::-1]])
def test_queries_and_cache_may_be_of_two_kinds(query_dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    sequences = Sequences(ODD, [200], cache_dtype)
    query = torch.randn(1, ODD.num_heads, ODD.latent_dim).to(query_dtype)
    found = decode(sequences, ODD, query, [(0, 200)])
    expected = absorbed_oracle(query[0], sequences.latents[0], ODD.rank, ODD.scale)
    assert relative_error(found[0], expected) < tolerance(200, query_dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_absorbed_attention_is_that_of_the_torch_backend(dtype: torch.dtype) -> None:
    sequences = Sequences(V2_LITE, [700, 90], dtype)
    query = torch.randn(2, V2_LITE.num_heads, V2_LITE.latent_dim).to(dtype)
    found = decode(sequences, V2_LITE, query, [(0, 700), (1, 90)])
    scaled = (query.float() * V2_LITE.scale).unsqueeze(1)
    expected = TorchBackend().attend_absorbed(scaled, sequences.latent_cache, 0, sequences.tables, (700, 90))
    assert relative_error(found, expected.squeeze(1)) < tolerance(700, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [V2_LITE, ODD])
def test_a_decoded_row_has_the_same_bits_beside_any_others_on_any_threads(
    each_instruction_set: str, sizes: Sizes, dtype: torch.dtype
) -> None:
    lengths = [2100, 17, 129, 640]
    sequences = Sequences(sizes, lengths, dtype)
    query = torch.randn(9, sizes.num_heads, sizes.latent_dim).to(dtype)
    # The last five are tokens of one sequence that are computed again together.
    rows = [*enumerate(lengths), *((0, 2100 - i) for i in range(5))]
    together = decode(sequences, sizes, query, rows)
    for num_threads in (1, 2, 5):
        set_num_threads(num_threads)
        alone = torch.cat([decode(sequences, sizes, query[i : i + 1], [row]) for i, row in enumerate(rows)])
        set_num_threads(1)
        assert torch.equal(alone, together)


@dataclass(frozen=True, slots=True)
class Expansion:
    """W_UK and W_UV of every head, as published and packed."""

    key: Tensor  # [num_heads, nope, rank]
    value: Tensor  # [num_heads, value, rank]
    packed_key: KernelHeads
    packed_value: KernelHeads


def expansion(sizes: Sizes, dtype: torch.dtype) -> Expansion:
    key = (torch.randn(sizes.num_heads, sizes.nope, sizes.rank) / math.sqrt(sizes.rank)).to(dtype)
    value = (torch.randn(sizes.num_heads, sizes.value, sizes.rank) / math.sqrt(sizes.rank)).to(dtype)
    return Expansion(key, value, *(KernelHeads([pack_plain([head]) for head in heads]) for heads in (key, value)))


def naive_oracle(query: Tensor, latents: Tensor, weights: Expansion, sizes: Sizes) -> Tensor:
    """query: [num_rows, num_heads, qk_head_dim]; latents: [length, latent_dim]."""
    compressed, rotated = latents.double().split([sizes.rank, sizes.rope], dim=-1)
    key = torch.cat(
        (
            torch.einsum("tr,hnr->htn", compressed, weights.key.double()),
            rotated.expand(sizes.num_heads, -1, -1),
        ),
        dim=-1,
    )
    value = torch.einsum("tr,hvr->htv", compressed, weights.value.double())
    scores = torch.einsum("qhd,htd->hqt", query.double(), key) * sizes.scale
    length, num_rows = len(latents), len(query)
    hidden = torch.arange(length) > torch.arange(length - num_rows, length).unsqueeze(1)
    return torch.einsum("hqt,htv->qhv", scores.masked_fill(hidden, -math.inf).softmax(dim=-1), value)


def prefill(
    sequences: Sequences, sizes: Sizes, weights: Expansion, query: Tensor, num_context_tokens: int, index: int = 0
) -> Tensor:
    return mla_prefill(
        query, weights.packed_key, weights.packed_value, sequences.cache, sequences.tables[index],
        num_context_tokens, sizes.scale,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "length", "num_rows"), [(V2_LITE, 300, 300), (SMALL, 1300, 150), (ODD, 77, 77)])
def test_naive_attention_is_that_of_fp64(
    each_instruction_set: str, sizes: Sizes, length: int, num_rows: int, dtype: torch.dtype
) -> None:
    sequences, weights = Sequences(sizes, [length], dtype), expansion(sizes, dtype)
    query = (2 * torch.randn(num_rows, sizes.num_heads, sizes.nope + sizes.rope)).to(dtype)
    found = prefill(sequences, sizes, weights, query, length - num_rows)
    expected = naive_oracle(query, sequences.latents[0], weights, sizes)
    assert relative_error(found, expected) < tolerance(length + sizes.rank, dtype)


@needs_kernels
def test_naive_attention_of_deepseek_v2_is_that_of_fp64() -> None:
    sequences, weights = Sequences(V2, [150], torch.bfloat16), expansion(V2, torch.bfloat16)
    query = torch.randn(100, V2.num_heads, V2.nope + V2.rope).bfloat16()
    found = prefill(sequences, V2, weights, query, 50)
    expected = naive_oracle(query, sequences.latents[0], weights, V2)
    assert relative_error(found, expected) < tolerance(150 + V2.rank, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_has_the_same_bits_however_it_is_cut_and_whoever_computes_it(
    each_instruction_set: str, dtype: torch.dtype
) -> None:
    length = 1200
    sizes = SMALL
    sequences, weights = Sequences(sizes, [length, 100], dtype), expansion(sizes, dtype)
    query = torch.randn(length, sizes.num_heads, sizes.nope + sizes.rope).to(dtype)
    whole = prefill(sequences, sizes, weights, query, 0)
    other = Sequences(sizes, [length], dtype, seed=1)
    other.cache.view(-1, other.cache.shape[2])[other.slots(0), : sizes.latent_dim] = sequences.latents[0]
    for chunk, num_threads in ((7, 1), (64, 2), (500, 5), (500, 2)):
        set_num_threads(num_threads)
        pieces = []
        for start in range(0, length, chunk):
            rows = query[start : start + chunk]
            # Beside it, in the same memory, another sequence is computed.
            prefill(sequences, sizes, weights, rows[:40], 60 - min(40, len(rows)), index=1)
            # What is not computed yet is not in the cache yet.
            holder = other if chunk == 64 else sequences
            saved = holder.cache.view(-1, holder.cache.shape[2])[holder.slots(0)[start + len(rows) :]].clone()
            holder.cache.view(-1, holder.cache.shape[2])[holder.slots(0)[start + len(rows) :]] = math.nan
            pieces.append(prefill(holder, sizes, weights, rows, start))
            holder.cache.view(-1, holder.cache.shape[2])[holder.slots(0)[start + len(rows) :]] = saved
        set_num_threads(1)
        cut = torch.cat(pieces)
        integers = torch.int32 if dtype is torch.float32 else torch.int16
        assert torch.equal(cut.view(integers), whole.view(integers)), chunk


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_prompt_has_the_same_bits_however_it_is_cut(dtype: torch.dtype) -> None:
    sequences, weights = Sequences(V2_LITE, [300], dtype), expansion(V2_LITE, dtype)
    query = torch.randn(300, V2_LITE.num_heads, V2_LITE.nope + V2_LITE.rope).to(dtype)
    whole = prefill(sequences, V2_LITE, weights, query, 0)
    set_num_threads(2)
    cut = torch.cat([prefill(sequences, V2_LITE, weights, query[i : i + 64], i) for i in range(0, 300, 64)])
    set_num_threads(1)
    assert torch.equal(cut, whole)


@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [V2_LITE, SMALL, ODD])
def test_rows_are_prepared_as_torch_does_it(
    each_instruction_set: str, sizes: Sizes, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    num_rows = 37
    sequences = Sequences(sizes, [num_rows], cache_dtype)
    slots = sequences.slots(0)
    latent = torch.randn(num_rows, sizes.latent_dim + 3).to(dtype)[:, : sizes.latent_dim]
    norm = (1 + 0.1 * torch.randn(sizes.rank)).to(dtype)
    query = torch.randn(num_rows, sizes.num_heads, sizes.nope + sizes.rope).to(dtype)
    rotation = RotaryEmbedding(RotaryConfig(head_dim=sizes.rope)).at(torch.arange(1000, 1000 + num_rows))
    expected_query = torch.cat((query[..., : sizes.nope], rotation.apply(query[..., sizes.nope :])), dim=-1)
    before = sequences.cache.clone()
    mla_prepare(query, latent, norm, 1e-6, rotation, slots, sequences.cache)
    assert torch.equal(query, expected_query)
    rows = sequences.cache.view(-1, sequences.cache.shape[2])[slots]
    assert torch.equal(rows[:, sizes.rank : sizes.latent_dim], rotation.apply(latent[:, sizes.rank :]).to(cache_dtype))
    expected = rms_norm(latent[:, : sizes.rank], norm, 1e-6).to(cache_dtype)
    # The mean may be summed in another order: an fp32 rounding, which may turn a rounding to bf16.
    step = 2 * BF16_ROUNDING if torch.bfloat16 in (dtype, cache_dtype) else sizes.rank * FP32_ROUNDING
    torch.testing.assert_close(rows[:, : sizes.rank], expected, rtol=2 * step, atol=0)
    untouched = torch.ones(sequences.cache.shape[:2], dtype=torch.bool).view(-1)
    untouched[slots] = False
    row_width = sequences.cache.shape[2]
    assert sequences.cache.view(-1, row_width)[untouched].isnan().equal(before.view(-1, row_width)[untouched].isnan())


@needs_kernels
def test_odd_sizes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="kv_lora_rank is 25"):
        mla_decode(
            torch.zeros(1, 4, 32), torch.zeros(1, 16, 32), torch.zeros(1, 1, dtype=torch.int32),
            torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32), 25, 1.0,
        )  # fmt: skip
