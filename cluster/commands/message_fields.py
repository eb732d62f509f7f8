"""A protobuf message as the plain values that JSON has, for programs that read a command's output.

Unlike protobuf's own mapping, whole numbers stay numbers (none here exceeds 2**53), enumerations are written as people
say them ("staging"), and every field is there, unset ones as null.
"""

from typing import Any

from google.protobuf.message import Message


def plain_fields(message: Message) -> dict[str, Any]:
    """Field names of the .proto file to values."""
    return {field.name: _field(message, field) for field in message.DESCRIPTOR.fields}


def _field(message: Message, field: Any) -> Any:
    if field.is_repeated:
        return [_value(field, item) for item in getattr(message, field.name)]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _value(field, getattr(message, field.name))


def _value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return plain_fields(value)
    if field.enum_type is not None:
        prefix = field.enum_type.values_by_number[0].name.removesuffix("UNSPECIFIED")
        named = field.enum_type.values_by_number.get(value)
        return named.name.removeprefix(prefix).lower() if named else value
    return value
