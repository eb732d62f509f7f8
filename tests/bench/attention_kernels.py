"""The attention kernels alone: generated tokens at several contexts and batches, and prompts, against the machine's
limit and against torch on the same numbers laid out as torch likes them best.

The limit of a call is reading the context once, or multiplying.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from experts.kernels.library import instruction_set
from experts.kernels.linear import KernelHeads
from experts.kernels.packed_matrix import pack_plain
from tests.bench.kernel_cell import Cell, measure
from tests.bench.row import Options, Row, Unmeasurable
from tests.kernel_attention import mla_decode, mla_prefill

RANK, ROPE, NOPE, VALUE = 512, 64, 128, 128  # of DeepSeek-V2 and V2-Lite
LATENT, BLOCK_SIZE = RANK + ROPE, 16
SCALE = (NOPE + ROPE) ** -0.5
CONTEXTS, QUICK_CONTEXTS = (1024, 16384, 131072), (1024, 16384)
HEADS, BATCHES = (16, 128), (1, 8)
PROMPTS = (512, 2048)
PREFILL_HEADS = 16
MAX_CACHE_BYTES = 2.5e9


def rows(options: Options) -> Iterator[Row]:
    """Decode, then prefill, in bf16. Raises Unmeasurable without the kernels."""
    if instruction_set() is None:
        raise Unmeasurable("the CPU kernels are not built")
    for context in QUICK_CONTEXTS if options.is_quick else CONTEXTS:
        for num_heads in HEADS:
            for batch in BATCHES:
                if 2 * LATENT * batch * context > MAX_CACHE_BYTES:
                    continue
                yield measure(decode_cell(context, num_heads, batch), options)
    for num_rows in PROMPTS[:1] if options.is_quick else PROMPTS:
        yield measure(prefill_cell(num_rows), options)


def decode_cell(context: int, num_heads: int, batch: int) -> Cell:
    """torch: a matrix product, a softmax and a matrix product over each sequence's latents in one piece."""
    num_blocks = -(-context // BLOCK_SIZE)
    some = torch.randn(1024, BLOCK_SIZE, LATENT).bfloat16()
    cache = some.repeat(-(-batch * num_blocks // len(some)), 1, 1)[: batch * num_blocks].contiguous()
    tables = torch.randperm(batch * num_blocks).to(torch.int32).view(batch, num_blocks)
    query = torch.randn(batch, num_heads, LATENT).bfloat16()
    sequences = torch.arange(batch, dtype=torch.int32)
    context_lens = torch.full((batch,), context, dtype=torch.int32)

    def theirs() -> None:
        for sequence in range(batch):
            latents = cache[sequence * num_blocks : (sequence + 1) * num_blocks].view(-1, LATENT)[:context]
            weights = torch.softmax((query[sequence] @ latents.T).float() * SCALE, dim=-1).bfloat16()
            weights @ latents[:, :RANK]

    return Cell(
        name="attention decode",
        params={"context": context, "heads": num_heads, "batch": batch},
        num_bytes=2.0 * LATENT * batch * context,
        num_operations=2.0 * (LATENT + RANK) * batch * context * num_heads,
        ours=lambda: mla_decode(query, cache, tables, sequences, context_lens, RANK, SCALE),
        theirs={"torch": theirs},
    )


def prefill_cell(num_rows: int) -> Cell:
    """From an empty cache. torch: the expansion in two products, then its own attention, values padded to keys."""
    num_blocks = -(-num_rows // BLOCK_SIZE)
    cache = torch.randn(num_blocks, BLOCK_SIZE, LATENT).bfloat16()
    table = torch.randperm(num_blocks).to(torch.int32)
    query = torch.randn(num_rows, PREFILL_HEADS, NOPE + ROPE).bfloat16()
    keys, values = (
        (torch.randn(PREFILL_HEADS, size, RANK) / RANK**0.5).bfloat16() for size in (NOPE, VALUE)
    )  # fmt: skip
    expand_key, expand_value = (KernelHeads([pack_plain([head]) for head in heads]) for heads in (keys, values))
    latents = cache.view(-1, LATENT)[:num_rows]

    def theirs() -> Tensor:
        compressed, rotated = latents.split([RANK, ROPE], dim=-1)
        key = F.linear(compressed, keys.flatten(0, 1)).unflatten(-1, (PREFILL_HEADS, NOPE)).transpose(0, 1)
        key = torch.cat((key, rotated.expand(PREFILL_HEADS, -1, -1)), dim=-1)  # [heads, rows, qk_head_dim]
        value = F.linear(compressed, values.flatten(0, 1)).unflatten(-1, (PREFILL_HEADS, VALUE)).transpose(0, 1)
        value = F.pad(value, (0, NOPE + ROPE - VALUE))
        return F.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), is_causal=True, scale=SCALE
        )  # fmt: skip

    pairs = num_rows * (num_rows + 1) / 2
    expansion = num_rows * RANK * (NOPE + VALUE)
    return Cell(
        name="attention prefill",
        params={"rows": num_rows, "heads": PREFILL_HEADS},
        num_bytes=2.0 * LATENT * num_rows,
        num_operations=2.0 * PREFILL_HEADS * (expansion + pairs * (NOPE + ROPE + VALUE)),
        ours=lambda: mla_prefill(query, expand_key, expand_value, cache, table, 0, SCALE),
        theirs={"torch": theirs},
    )
