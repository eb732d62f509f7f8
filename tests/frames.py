"""Frames as a client writes them."""

from collections.abc import Sequence

from google.protobuf.message import Message
from torch import Tensor

from protos.codec import join_frame, raw_bytes


def encode_frame(header: Message, tensors: Sequence[Tensor]) -> bytes:
    """One message of header and payload: the tensors' bytes, in order."""
    return join_frame(header.SerializeToString(), [raw_bytes(tensor) for tensor in tensors])
