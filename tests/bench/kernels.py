"""The kernels alone: the experts' feed-forward at several numbers of rows and formats, then attention.

Experts have DeepSeek-V2-Lite's dimensions, each its own memory, all the same number of rows. torch is a loop of its
linear products in bf16; "16 bits" are the same kernels with bf16 weights as they are published.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from experts.kernels.expert_set import ExpertSet, PackedExpert
from experts.kernels.library import instruction_set
from experts.kernels.packed_matrix import Matrix, PackedMatrix, pack, pack_plain
from experts.quantized_matrix import QuantizedMatrix
from tests.bench import attention_kernels
from tests.bench.kernel_cell import Cell, measure
from tests.bench.row import PLAIN, Options, Row, Unmeasurable
from tests.fake_experts import wire_assignments

HIDDEN, INNER, NUM_EXPERTS = 2048, 1408, 12
GROUP_SIZE = 128
ROWS, QUICK_ROWS = (1, 4, 16, 64, 256), (1, 16)
NUM_BITS = {"int8": 8, "int4": 4}

Pack = Callable[[Sequence[Matrix]], PackedMatrix]


def rows(options: Options) -> Iterator[Row]:
    """Raises Unmeasurable without the kernels."""
    if instruction_set() is None:
        raise Unmeasurable("the CPU kernels are not built")
    matrices = [torch.randn(shape) / shape[1] ** 0.5 for shape in ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))]
    plain = [[matrix.bfloat16() for matrix in matrices] for _ in range(NUM_EXPERTS)]  # torch's: a copy an expert
    for number_format in options.formats:
        experts = packed_experts(matrices, number_format)
        in_16_bits = packed_experts(matrices, number_format, pack_plain) if number_format == PLAIN else None
        for num_rows in QUICK_ROWS if options.is_quick else ROWS:
            yield measure(experts_cell(experts, plain, num_rows, number_format, in_16_bits), options)
    yield from attention_kernels.rows(options)


def packed_experts(matrices: list[Tensor], number_format: str, pack: Pack = pack) -> dict[int, PackedExpert]:
    """The same weights for every expert, in memory of each one's own."""
    kept: list[Matrix] = [
        matrix.bfloat16()
        if number_format == PLAIN
        else QuantizedMatrix.quantize(matrix, NUM_BITS[number_format], GROUP_SIZE)
        for matrix in matrices
    ]
    return {i: PackedExpert(w13=pack(kept[:2]), w2=pack(kept[2:])) for i in range(NUM_EXPERTS)}


def experts_cell(
    experts: dict[int, PackedExpert],
    plain: list[list[Tensor]],
    num_rows: int,
    number_format: str,
    in_16_bits: dict[int, PackedExpert] | None,
) -> Cell:
    """num_rows: of each expert."""
    expert_set = ExpertSet(experts, INNER)
    count = num_rows * NUM_EXPERTS
    hidden_states, indices = torch.randn(count, HIDDEN).bfloat16(), torch.arange(count)
    expert_ids = torch.arange(NUM_EXPERTS).repeat_interleave(num_rows)
    assignments = wire_assignments(torch.ones(count), indices, expert_ids, indices)
    out = torch.empty_like(hidden_states)

    def torchs() -> None:
        for mine, (gate, up, down) in zip(hidden_states.split(num_rows), plain, strict=True):
            F.linear(F.silu(F.linear(mine, gate)) * F.linear(mine, up), down)

    theirs: dict[str, Callable[[], object]] = {"torch": torchs}
    if in_16_bits:
        plain_set = ExpertSet(in_16_bits, INNER)
        theirs["16 bits"] = lambda: plain_set.forward(hidden_states, assignments, out)
    return Cell(
        name="experts",
        params={"format": number_format, "rows an expert": num_rows},
        num_bytes=float(sum(expert.nbytes for expert in experts.values())),
        num_operations=6.0 * count * HIDDEN * INNER,
        ours=lambda: expert_set.forward(hidden_states, assignments, out),
        theirs=theirs,
        kind=number_format,
    )
