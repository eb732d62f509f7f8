"""What Python between two computations costs: in a loop, and after the caches were emptied, as a step's weights do it.

Each operation as the data plane does it, and in turn as it could be written more simply. Microseconds of one call.
"""

import ctypes
import statistics
import struct
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from attention.sampler import SampleRow, sample
from attention.sampling_params import SamplingParams
from protos import expert_pb2, tensor_pb2
from protos.memory import Memory, RawMatrix
from router import plan
from router.plan_kernels import UnitAddresses, plan_layer
from tests.bench.row import Options, Row

NAME = "cold"
HIDDEN, NUM_EXPERTS, TOP_K, VOCABULARY = 2048, 64, 6, 102_400
FLUSHED_BYTES = 96 * 2**20  # larger than the caches of a few cores
CALLS, QUICK_CALLS = 40, 10  # of a repeat

Operation = Callable[[], object]


def rows(options: Options) -> Iterator[Row]:
    """By operation, warm and cold; "written simply" does the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        for name, (ours, simple) in operations().items():
            options.show(name)
            options.check_time(5.0)
            yield from _rows_of(name, ours, simple, options)
    finally:
        torch.set_num_threads(before)


def _rows_of(name: str, ours: Operation, simple: Operation | None, options: Options) -> Iterator[Row]:
    flushed = np.ones(FLUSHED_BYTES // 8)
    num_calls = QUICK_CALLS if options.is_quick else CALLS
    for caches, prepare in (("warm", lambda: None), ("cold", flushed.sum)):
        samples, pairs = [], []
        for _ in range(options.num_repeats):
            samples.append(_microseconds(ours, prepare, num_calls))
            if simple is not None:
                pairs.append((samples[-1], _microseconds(simple, prepare, num_calls)))
        yield Row.of(NAME, {"what": name, "caches": caches}, samples, "us", turns={"written simply": pairs})


def _microseconds(operation: Operation, prepare: Operation, num_calls: int) -> float:
    operation()
    times = []
    for _ in range(num_calls):
        prepare()
        started_ns = time.perf_counter_ns()
        operation()
        times.append((time.perf_counter_ns() - started_ns) / 1e3)
    return statistics.median(times)


def operations() -> dict[str, tuple[Operation, Operation | None]]:
    """By name; the second gives the same, and is None where there is nothing simpler."""
    array = np.zeros(HIDDEN * 2, dtype=np.uint8)
    memory = Memory.of(array.data)
    fields = (*range(1, 8), *range(8, 16))
    packed, of_bytes, of_address = struct.Struct("7P8i"), ctypes.CDLL(None).labs, ctypes.CDLL(None).labs
    of_bytes.argtypes, of_address.argtypes = [ctypes.c_char_p], [ctypes.c_void_p]
    return {
        "rows in memory, for a kernel": (
            lambda: RawMatrix(memory, (1, HIDDEN), torch.bfloat16).data_ptr(),
            lambda: torch.frombuffer(memory.view, dtype=torch.bfloat16).view(1, HIDDEN).data_ptr(),
        ),
        "an address that is known": (lambda: memory.address, lambda: array.ctypes.data),
        "15 fields to a C function": (
            lambda: of_bytes(packed.pack(*fields)),
            lambda: of_address(ctypes.addressof(_Fields(*fields))),
        ),
        "a forward's header": (_header, None),
        "a layer's plan, one row": _plans(),
        "a greedy token": _samplers(),
    }


class _Fields(ctypes.Structure):
    _fields_ = (*((f"at{i}", ctypes.c_void_p) for i in range(7)), *((f"count{i}", ctypes.c_int32) for i in range(8)))


def _header() -> bytes:
    return expert_pb2.ForwardHeader(
        sequence_number=123_456, layer_id=3, placement_version=1, num_rows=1, num_assignments=TOP_K, num_partial_sums=1,
        dtype=tensor_pb2.DTYPE_BFLOAT16, timeout_ms=30_000,
    ).SerializeToString()  # fmt: skip


def _plans() -> tuple[Operation, Operation]:
    """Compiled, and in numpy."""
    ids, weights = torch.arange(TOP_K).mul(10).unsqueeze(0), torch.rand(1, TOP_K)
    units, ep_ranks = np.arange(NUM_EXPERTS) // 8, np.arange(8) % 2
    replicas = ep_ranks[:, None].copy()
    addresses = UnitAddresses.of(units, replicas)
    return (
        lambda: plan_layer(ids, weights, units, replicas, 2, None, addresses).num_tokens_by_ranks,
        lambda: plan.plan_layer(ids, weights, units, ep_ranks).num_tokens_by_ranks,
    )


def _samplers() -> tuple[Operation, Operation]:
    logits = torch.randn(1, VOCABULARY)
    greedy = [SampleRow(sampling_params=SamplingParams(temperature=0.0, seed=1, max_tokens=1), output_position=0)]
    return (
        lambda: sample(logits, greedy)[0].token_id,
        lambda: logits.argmax(dim=-1).tolist()[0] if logits.amax(dim=-1).isfinite().tolist()[0] else None,
    )
