"""The data plane's frames and doorbells, in both directions: what a worker may send a shard, and a shard a worker."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress

from hypothesis import strategies as st

from experts.shard import ExpertShard
from protos import expert_pb2, ring
from protos.codec import decode_frame, join_frame
from protos.errors import MobulaError
from protos.memory import Memory
from router.local_transport import LocalTransport
from router.router_config import RouterConfig
from tests.fake_experts import (
    MultiplyingShard,
    expert_shard,
    grouped_gate,
    placed,
    random_rows,
    router_to,
    small_model,
)
from tests.fuzz.hostile import POSITIVE, almost, messages
from tests.fuzz.target import Target

GATE, MODEL = grouped_gate(), small_model()
ROWS = random_rows(GATE, 3, MODEL.hidden_size)
ANSWER_S = 5.0  # until a shard must have answered, if only with an error
IMPATIENT = RouterConfig(forward_timeout_s=0.02, attempt_timeout_s=0.02)


def targets() -> list[Target]:
    """One for each direction and carrier."""
    frame = _valid_frame()
    header, payload = decode_frame(expert_pb2.ForwardHeader, frame)
    frames = st.one_of(
        almost(frame),
        st.binary(max_size=64),
        st.builds(_frame, _spoiled_headers(header), st.one_of(st.just(bytes(payload)), almost(bytes(payload)))),
        st.builds(_frame, messages(expert_pb2.ForwardHeader.DESCRIPTOR), st.binary(max_size=64)),
    )
    doorbell = ring.pack_forward(header.SerializeToString(), ring.Region(0, 1024), ring.Region(1024, 192))
    regions = st.tuples(*[st.one_of(st.sampled_from(POSITIVE), st.integers(0, 2**64 - 1))] * 4)
    doorbells = st.one_of(almost(doorbell), regions.map(_doorbell), st.binary(max_size=64))
    edits = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4)
    return [
        Target(name="frame", share=20, cases=frames, open=_shard),
        Target(name="answer", share=4, cases=edits, open=_router),
        Target(name="doorbell", share=8, cases=doorbells, open=_doorbell_reader),
    ]


def _valid_frame() -> bytes:
    shard = MultiplyingShard()
    router = router_to(GATE, placed(GATE, 1), lambda address: LocalTransport(shard, address))
    router.combine(router.dispatch(1, ROWS.hidden_states, ROWS.topk_weights, ROWS.topk_ids))
    return shard.frames[0]


def _spoiled_headers(header: expert_pb2.ForwardHeader) -> st.SearchStrategy[expert_pb2.ForwardHeader]:
    """A right header with a few numbers that are not."""

    def spoil(changes: dict[str, int]) -> expert_pb2.ForwardHeader:
        spoiled = expert_pb2.ForwardHeader()
        spoiled.CopyFrom(header)
        for name, value in changes.items():
            is_long = name in ("sequence_number", "placement_version")
            setattr(spoiled, name, value % 2 ** (64 if is_long else 31))
        return spoiled

    names = [field.name for field in header.DESCRIPTOR.fields]
    return st.dictionaries(st.sampled_from(names), st.sampled_from(POSITIVE)).map(spoil)


def _frame(header: expert_pb2.ForwardHeader, payload: bytes) -> bytes:
    return join_frame(header.SerializeToString(), [memoryview(payload)])


def _doorbell(numbers: tuple[int, int, int, int]) -> bytes:
    header = expert_pb2.ForwardHeader(sequence_number=1, layer_id=1, placement_version=1)
    return ring.pack_forward(header.SerializeToString(), ring.Region(*numbers[:2]), ring.Region(*numbers[2:]))


@contextmanager
def _shard() -> Iterator[Callable[[bytes], None]]:
    """A shard that computes; it must answer every frame that is one, and the valid one rightly at the end."""
    shard: ExpertShard = expert_shard(placed(GATE, 1), 0, MODEL)
    shard.start()
    frame = _valid_frame()
    expected = _sums(shard, frame)

    def take(case: bytes) -> None:
        with suppress(MobulaError):
            decode_frame(expert_pb2.ForwardResult, shard.forward(case).result(ANSWER_S))

    try:
        yield take
        assert _sums(shard, frame) == expected
    finally:
        shard.stop()


def _sums(shard: ExpertShard, frame: bytes) -> bytes:
    return bytes(decode_frame(expert_pb2.ForwardResult, shard.forward(frame).result(ANSWER_S))[1])


@contextmanager
def _router() -> Iterator[Callable[[list[tuple[int, int]]], None]]:
    """A router whose shard changes bytes of its answers."""
    shard = MultiplyingShard()
    edits: list[tuple[int, int]] = []

    def forward(frame: bytes) -> Future[bytes]:
        answer = bytearray(shard(frame).result())
        shard.frames.clear()
        for place, value in edits:
            answer[place % len(answer)] = value
        changed: Future[bytes] = Future()
        changed.set_result(bytes(answer))
        return changed

    router = router_to(GATE, placed(GATE, 1), lambda address: LocalTransport(forward, address), config=IMPATIENT)

    def take(case: list[tuple[int, int]]) -> None:
        edits[:] = case
        with suppress(MobulaError):
            router.combine(router.dispatch(1, ROWS.hidden_states, ROWS.topk_weights, ROWS.topk_ids))

    try:
        yield take
    finally:
        router.close()


@contextmanager
def _doorbell_reader() -> Iterator[Callable[[bytes], None]]:
    memory = Memory.of(bytes(4096))

    def take(case: bytes) -> None:
        with suppress(MobulaError):
            _, payload, answer = ring.unpack_forward(case, memory.num_bytes)
            for region in (payload, answer):
                assert len(memory.part(*region).view) == region.num_bytes

    yield take
