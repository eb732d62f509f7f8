"""Weights as frames and back: the same bits, and nothing that is not an expert of the model."""

from dataclasses import replace

import pytest
import torch

from experts.kernels.library import native
from experts.weight_frames import FRAME_BYTES, CopyError, ExpertCopy, frames
from experts.weight_store import Expert, ExpertModel, Unit, WeightStore
from protos import expert_pb2
from protos.codec import decode_frame, join_frame
from tests.fake_experts import RandomReader, small_model

LARGE = replace(small_model(torch.bfloat16), hidden_size=512, moe_intermediate_size=512)


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
            assert torch.equal(mine.data, theirs.data)
            assert mine.num_outputs == theirs.num_outputs


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


@pytest.mark.skipif(native() is None, reason="needs the kernels")
def test_packing_in_pieces_gives_the_same_bits() -> None:
    store = WeightStore(LARGE, RandomReader(LARGE))
    read: list[int] = []
    store.stage([Unit(1, 0, (0,))], read.append)
    whole = stored(LARGE)
    assert torch.equal(store.expert(1, 0).w13.data, whole.w13.data)
    assert torch.equal(store.expert(1, 0).w2.data, whole.w2.data)
    assert len(read) == 12
    assert sum(read) == LARGE.expert_bytes
