"""Weights as frames and back: the same bits, and nothing that is not an expert of the model."""

from dataclasses import replace

import pytest
import torch

from experts.kernels.expert_set import PackedExpert
from experts.kernels.library import native
from experts.kernels.packed_matrix import DICTIONARY, EXCEPTION, PackedMatrix, pack_compact
from experts.weight_frames import FRAME_BYTES, CopyError, ExpertCopy, frames
from experts.weight_store import Expert, ExpertModel, Unit, WeightStore
from protos import expert_pb2
from protos.codec import decode_frame, join_frame
from tests.fake_experts import RandomReader, small_model

LARGE = replace(small_model(torch.float32), hidden_size=512, moe_intermediate_size=256)  # three frames
LARGE_BF16 = replace(LARGE, dtype=torch.bfloat16)
needs_kernels = pytest.mark.skipif(native() is None, reason="needs the kernels")


def stored(model: ExpertModel, *, use_kernels: bool = True) -> Expert:
    store = WeightStore(model, RandomReader(model), use_kernels=use_kernels)
    store.stage([Unit(1, 0, (0,))])
    expert = store.expert(1, 0)
    assert expert
    return expert


def copied(model: ExpertModel, sent: list[bytes]) -> Expert:
    copy = ExpertCopy(model)
    for frame in sent:
        copy.add(frame)
    return copy.expert()


def has_same_bits(mine: PackedMatrix, theirs: PackedMatrix) -> bool:
    same_form = (mine.number_format, mine.num_outputs) == (theirs.number_format, theirs.num_outputs)
    return same_form and all(map(torch.equal, mine.parts, theirs.parts))


@pytest.mark.parametrize("use_kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_has_the_same_bits(use_kernels, dtype) -> None:
    model = small_model(dtype)
    expert = stored(model, use_kernels=use_kernels)
    again = copied(model, list(frames(expert)))
    assert type(again) is type(expert)
    for mine, theirs in ((expert.w13, again.w13), (expert.w2, again.w2)):
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine, theirs)
        else:
            assert has_same_bits(mine, theirs)


def test_frames_are_bounded_and_valid_messages_and_a_small_expert_is_one() -> None:
    sent = list(frames(stored(LARGE)))
    messages = [expert_pb2.CopyExpertResponse.FromString(frame) for frame in sent]
    assert [len(message.payload) for message in messages] == [FRAME_BYTES] * 3
    assert max(map(len, sent)) < FRAME_BYTES + 64
    assert len(list(frames(stored(small_model())))) == 1


def flipped(sent: list[bytes]) -> list[bytes]:
    spoiled = bytearray(sent[1])
    spoiled[-1] ^= 1
    return [sent[0], bytes(spoiled), *sent[2:]]


def of_another_size(sent: list[bytes]) -> list[bytes]:
    header, payload = decode_frame(expert_pb2.CopyExpertHeader, sent[0])
    header.ClearField("crc32")
    header.matrices[0].num_inputs *= 2**20
    return [join_frame(header.SerializeToString(), [payload]), *sent[1:]]


def without_checksum(sent: list[bytes]) -> list[bytes]:
    message = expert_pb2.CopyExpertResponse.FromString(sent[0])
    message.header.ClearField("crc32")
    return [message.SerializeToString(), *sent[1:]]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (flipped, "was damaged on its way"),
        (lambda sent: sent[:-1], f"{FRAME_BYTES} bytes are missing"),
        (lambda sent: [], "all bytes are missing"),
        (lambda sent: sent[1:], "describes 0 matrices"),
        (of_another_size, "the model's are"),
        (without_checksum, "does not end with a checksum"),
        (lambda sent: [*sent, *sent[1:]], "after the expert's last one"),
    ],
)
def test_what_is_not_whole_is_not_taken(spoil, words) -> None:
    with pytest.raises(CopyError, match=words):
        copied(LARGE, spoil(list(frames(stored(LARGE)))))


@needs_kernels
def test_packing_in_pieces_gives_the_same_bits() -> None:
    store = WeightStore(LARGE_BF16, RandomReader(LARGE_BF16))
    read: list[int] = []
    store.stage([Unit(1, 0, (0,))], read.append)
    whole = stored(LARGE_BF16)
    assert has_same_bits(store.expert(1, 0).w13, whole.w13)
    assert has_same_bits(store.expert(1, 0).w2, whole.w2)
    assert len(read) == 8
    assert sum(read) == LARGE_BF16.expert_bytes


def compact_expert() -> PackedExpert:
    """As a processor with AVX-512 keeps it; any can compute with it."""
    gate, up = torch.randn(2, 256, 512).bfloat16()
    w13, w2 = pack_compact([gate, up]), pack_compact([torch.randn(512, 256).bfloat16()])
    assert w13
    assert w2
    return PackedExpert(w13=w13, w2=w2)


@needs_kernels
def test_a_compact_expert_arrives_with_its_exceptions() -> None:
    expert = compact_expert()
    assert expert.w13.num_exceptions > 0
    again = copied(LARGE_BF16, list(frames(expert)))
    assert has_same_bits(expert.w13, again.w13)
    assert has_same_bits(expert.w2, again.w2)


@needs_kernels
@pytest.mark.parametrize("field", ["first_exception", "num_exceptions", "step"])
@pytest.mark.parametrize("value", [-1, 2**30])
def test_dictionaries_that_would_make_the_kernels_read_other_memory_are_not_taken(field: str, value: int) -> None:
    expert = compact_expert()
    memory, end = expert.w13.dictionaries.numpy(), expert.w13.num_panels * DICTIONARY.itemsize
    spoiled = memory[end:].view(EXCEPTION) if field == "step" else memory[:end].view(DICTIONARY)
    spoiled[field][0] = value
    with pytest.raises(CopyError, match="names exceptions that it does not have"):
        copied(LARGE_BF16, list(frames(expert)))


@needs_kernels
def test_more_exceptions_than_a_matrix_has_steps_are_not_made_room_for() -> None:
    header, payload = decode_frame(expert_pb2.CopyExpertHeader, next(iter(frames(compact_expert()))))
    header.ClearField("crc32")
    header.matrices[0].num_exceptions = 2**31
    with pytest.raises(CopyError, match="the model's are"):
        copied(LARGE_BF16, [join_frame(header.SerializeToString(), [payload])])


@needs_kernels
def test_a_compact_matrix_whose_inputs_are_not_whole_steps_is_not_taken() -> None:
    model = replace(LARGE_BF16, hidden_size=510)
    header, payload = decode_frame(expert_pb2.CopyExpertHeader, next(iter(frames(stored(model)))))
    header.ClearField("crc32")
    for matrix in header.matrices:
        matrix.format = expert_pb2.WEIGHT_FORMAT_COMPACT
    with pytest.raises(CopyError, match="the model's are"):
        copied(model, [join_frame(header.SerializeToString(), [payload])])
