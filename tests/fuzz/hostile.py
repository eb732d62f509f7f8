"""Hostile values: bytes that were almost right, JSON with one thing wrong, messages at the edges of their schema."""

from collections.abc import Sequence
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

POSITIVE = (0, 1, 2, 7, 127, 128, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64 - 1)
NUMBERS = (0, 1, -1, 2, 7, 127, 128, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64 - 1)
HOSTILE_JSON: tuple[Any, ...] = (
    *(None, True, False, "", "x" * 1000, "\x00", "\ud800", [], {}, [[]], {"": {}}, [None], -1, 2**31, 2**63, 2**64),
    *(10**30, -(10**30), 0.5, 1e308, float("nan"), float("inf"), [1] * 100, {"type": "yarn"}, "deepseek_v2"),
)


@st.composite
def almost(draw: st.DrawFn, sample: bytes, max_edits: int = 4) -> bytes:
    """The bytes with some of them cut, changed, doubled, or others put between."""
    data = bytearray(sample)
    for _ in range(draw(st.integers(1, max_edits))):
        place = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(("cut", "change", "insert", "drop", "repeat"))):
            case "cut":
                del data[place:]
            case "change" if place < len(data):
                data[place] = draw(st.integers(0, 255))
            case "insert":
                data[place:place] = draw(st.binary(max_size=16))
            case "drop":
                del data[place : place + draw(st.integers(1, 64))]
            case "repeat":
                data[place:place] = data[place : place + draw(st.integers(1, 64))]
    return bytes(data)


@st.composite
def spoiled(draw: st.DrawFn, sample: Any, max_edits: int = 3) -> Any:
    """A JSON value in which some values are gone, hostile or another's."""
    value = _copy(sample)
    for _ in range(draw(st.integers(1, max_edits))):
        node, keys = value, list(_keys(value))
        while keys:  # some way down
            key = draw(st.sampled_from(keys))
            inner = list(_keys(node[key]))
            if inner and draw(st.booleans()):
                node, keys = node[key], inner
                continue
            if draw(st.integers(0, 4)) == 0:
                del node[key]
            else:
                node[key] = _copy(draw(st.sampled_from(HOSTILE_JSON)))
            break
    return value


def messages(descriptor: Descriptor, depth: int = 3) -> st.SearchStrategy[Message]:
    """A message of this schema, with values at their edges, and now and then a field that the schema does not have."""
    return st.builds(_build, st.just(GetMessageClass(descriptor)), _fields(descriptor, depth), st.binary(max_size=6))


def _fields(descriptor: Descriptor, depth: int) -> st.SearchStrategy[dict[str, Any]]:
    optional = {field.name: _values(field, depth) for field in descriptor.fields if depth or not field.message_type}
    return st.fixed_dictionaries({}, optional=optional)


def _values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    value = _value(field, depth)
    return st.lists(value, max_size=4) if field.is_repeated else value


def _value(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return messages(field.message_type, depth - 1)
    if field.enum_type is not None:
        return st.sampled_from([value.number for value in field.enum_type.values] + [99])
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return st.binary(max_size=64)
        case FieldDescriptor.CPPTYPE_STRING:
            return st.one_of(st.text(max_size=40), st.sampled_from(("user", "a" * 3000, "\x00", "{{", "\u202e")))
        case FieldDescriptor.CPPTYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return st.floats(width=32)
        case FieldDescriptor.CPPTYPE_UINT32:
            return _numbers(0, 2**32 - 1)
        case FieldDescriptor.CPPTYPE_UINT64:
            return _numbers(0, 2**64 - 1)
        case FieldDescriptor.CPPTYPE_INT32:
            return _numbers(-(2**31), 2**31 - 1)
        case _:
            return _numbers(-(2**63), 2**63 - 1)


def _numbers(low: int, high: int) -> st.SearchStrategy[int]:
    edges: Sequence[int] = [number for number in NUMBERS if low <= number <= high]
    return st.one_of(st.sampled_from(edges), st.integers(low, high))


def _build(message_class: type[Message], fields: dict[str, Any], unknown: bytes) -> Message:
    message = message_class()
    for name, value in fields.items():
        if isinstance(value, Message):
            getattr(message, name).CopyFrom(value)
        elif isinstance(value, list):
            for item in value:
                (getattr(message, name).add().CopyFrom if isinstance(item, Message) else getattr(message, name).append)(
                    item
                )
        else:
            setattr(message, name, value)
    if unknown:
        message.MergeFromString(b"\x9a\x3f" + bytes((len(unknown),)) + unknown)  # field 1011, bytes
    return message


def _keys(value: Any) -> Any:
    return value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value
