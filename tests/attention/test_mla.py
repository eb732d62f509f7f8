import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attention.attention_metadata import AttentionMetadata
from attention.attention_plan import AttentionPlan
from attention.latent_cache import LatentCache, LatentCacheConfig
from attention.layers import BlockNorms, WeightTarget
from attention.mla import Mla, MlaWeights
from attention.mla_config import MlaConfig
from attention.mla_form import MlaForm
from attention.rotary import RotaryConfig, RotaryEmbedding
from attention.torch_backend import TorchBackend
from tests.attention.test_layers import DictReader

CONFIG = MlaConfig(
    hidden_size=48,
    num_attention_heads=3,
    q_lora_rank=20,
    kv_lora_rank=24,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
)
BLOCK_SIZE, NUM_BLOCKS = 16, 200


def layer(config: MlaConfig, cache: LatentCache, seed: int = 0) -> Mla:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)

    heads = config.num_attention_heads
    tensors = {
        "a.kv_a_proj_with_mqa.weight": matrix(config.latent_dim, config.hidden_size),
        "a.kv_a_layernorm.weight": 1 + 0.1 * torch.randn(config.kv_lora_rank, generator=generator),
        "a.kv_b_proj.weight": matrix(heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        "a.o_proj.weight": matrix(config.hidden_size, heads * config.v_head_dim),
        "a.q_proj.weight": matrix(heads * config.qk_head_dim, config.hidden_size),
    }
    if config.q_lora_rank is not None:
        tensors |= {
            "a.q_a_proj.weight": matrix(config.q_lora_rank, config.hidden_size),
            "a.q_a_layernorm.weight": 1 + 0.1 * torch.randn(config.q_lora_rank, generator=generator),
            "a.q_b_proj.weight": matrix(heads * config.qk_head_dim, config.q_lora_rank),
        }
    target = WeightTarget(reader=DictReader(tensors), dtype=torch.float32, device=torch.device("cpu"))
    weights, ones = MlaWeights.read(target, "a", config), torch.ones(config.hidden_size)
    norms = BlockNorms(attention=ones, mlp=ones, eps=1e-6)
    return Mla(config, weights, norms, config.qk_head_dim**-0.5, TorchBackend(), cache, 0)


def empty_cache(config: MlaConfig) -> LatentCache:
    return LatentCache(
        LatentCacheConfig(
            num_layers=1,
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            kv_lora_rank=config.kv_lora_rank,
            qk_rope_head_dim=config.qk_rope_head_dim,
            dtype=torch.float32,
        )
    )


def run(config: MlaConfig, cache: LatentCache, x: Tensor, chunks: list[int], form: MlaForm) -> Tensor:
    """Attention of one sequence in chunks; its blocks lie backwards in the cache."""
    mla = layer(config, cache)
    table = torch.arange(NUM_BLOCKS - 1, -1, -1, dtype=torch.int32)
    outputs, start = [], 0
    for chunk in chunks:
        positions = torch.arange(start, start + chunk)
        metadata = AttentionMetadata(
            positions=positions,
            slot_mapping=table[positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE,
            query_start_loc=(0, chunk),
            seq_lens=(start + chunk,),
            num_prompt_tokens=(len(x) // 2,),
            block_tables=table.unsqueeze(0),
        )
        rotation = RotaryEmbedding(RotaryConfig(head_dim=config.qk_rope_head_dim)).at(positions)
        plan = AttentionPlan.build(metadata, form)
        rows = x[start : start + chunk]
        outputs.append(mla.forward(rows, rotation, plan)[0] - rows)
        start += chunk
    return torch.cat(outputs)


@pytest.mark.parametrize("q_lora_rank", [20, None])
@pytest.mark.parametrize("chunks", [[1] * 40, [300], [1, 255, 2, 256, 64, 1], [2500, 13]])
def test_absorbed_and_naive_agree(q_lora_rank: int | None, chunks: list[int]) -> None:
    config = replace(CONFIG, q_lora_rank=q_lora_rank)
    x = torch.randn(sum(chunks), config.hidden_size)
    naive = run(config, empty_cache(config), x, [sum(chunks)], MlaForm.NAIVE)
    for form in MlaForm:
        torch.testing.assert_close(run(config, empty_cache(config), x, chunks, form), naive, rtol=1e-4, atol=1e-5)


def test_what_another_sequence_left_in_a_block_does_not_leak_even_if_it_is_nan() -> None:
    x = torch.randn(20, CONFIG.hidden_size)
    for form in MlaForm:
        clean, soiled = empty_cache(CONFIG), empty_cache(CONFIG)
        soiled.tensor[..., : CONFIG.latent_dim] = float("nan")
        expected = run(CONFIG, clean, x, [5, 1, 14], form)
        assert torch.equal(run(CONFIG, soiled, x, [5, 1, 14], form), expected)


def test_every_row_is_planned_once() -> None:
    metadata = AttentionMetadata(
        positions=torch.arange(400),
        slot_mapping=torch.arange(400),
        query_start_loc=(0, 1, 3, 300, 301, 400),
        seq_lens=(10, 2, 297, 1, 5000),
        num_prompt_tokens=(5, 2, 100, 1, 6000),
        block_tables=torch.zeros(5, 400, dtype=torch.int32),
    )
    for form in MlaForm:
        plan = AttentionPlan.build(metadata, form)
        naive_rows = [row for span in plan.naive for row in range(span.start_row, span.end_row)]
        rows = naive_rows + [row for batch in plan.absorbed_batches for row in batch.rows.tolist()]
        assert sorted(rows) == list(range(400))
        assert form is not MlaForm.ABSORBED or not plan.naive
        assert form is not MlaForm.NAIVE or not plan.absorbed
        if form is MlaForm.BY_POSITION:  # the first has 1 generated row, the third 197 and is in the middle
            assert naive_rows == [1, 2, *range(3, 103), 300, *range(301, 400)]
        for_kernels = plan.kernel_rows
        spans = [(span.start_row, span.start_row + span.num_rows, span.is_absorbed) for span in for_kernels.spans]
        assert sorted(row for start, end, _ in spans for row in range(start, end)) == list(range(400))
        absorbed = [row for start, end, is_absorbed in spans if is_absorbed for row in range(start, end)]
        assert sorted(absorbed + naive_rows) == list(range(400))
        if form is MlaForm.BY_POSITION:  # neighbours are one span
            assert [span for span in spans if span[2]] == [(0, 1, True), (103, 300, True)]
            assert for_kernels.sequences[103:300].tolist() == [2] * 197
            assert for_kernels.context_lens[103:300].tolist() == list(range(101, 298))


def test_naive_attention_is_that_of_torch() -> None:
    query, key, value = torch.randn(150, 4, 24), torch.randn(700, 4, 24), torch.randn(700, 4, 16)
    is_seen = torch.arange(700) <= torch.arange(550, 700).unsqueeze(-1)
    heads_first = [tensor.transpose(0, 1) for tensor in (query, key, value)]
    expected = F.scaled_dot_product_attention(*heads_first, attn_mask=is_seen, scale=1.0).transpose(0, 1)
    found, log_denominator = TorchBackend().attend_naive(query, key, value, is_causal=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    scores = torch.einsum("qhd,khd->qhk", query, key).masked_fill(~is_seen.unsqueeze(1), float("-inf"))
    torch.testing.assert_close(log_denominator, scores.logsumexp(dim=-1))


def test_impossible_sizes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="v_head_dim is 0"):
        replace(CONFIG, v_head_dim=0)
    with pytest.raises(ValueError, match="q_lora_rank is 0"):
        replace(CONFIG, q_lora_rank=0)
