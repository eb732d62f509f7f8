"""What a config.json says of the rotary embedding."""

from attention.rotary import RotaryConfig, YarnConfig
from cluster.checkpoint.json_fields import InvalidModelConfig, JsonFields, UnsupportedModel

SPELLINGS = ("rope_scaling", "rope_parameters")  # as published; as transformers rewrites it
ORIGINAL_LENGTH = "original_max_position_embeddings"
YARN_KEYS = frozenset(
    {
        *("type", "rope_type", "rope_theta", "factor", ORIGINAL_LENGTH, "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "attention_factor", "truncate", "partial_rotary_factor"),
    }
)


def read_rotary(fields: JsonFields, head_dim: int) -> RotaryConfig:
    """fields: config.json.

    Raises InvalidModelConfig, UnsupportedModel, or ValueError for values that no rotary embedding has.
    """
    ropes = [rope for rope in map(fields.nested, SPELLINGS) if rope is not None and rope.values]
    first, *others = [_rotary(fields, rope, head_dim) for rope in ropes or [JsonFields({})]]
    if any(other != first for other in others):
        raise InvalidModelConfig("rope_scaling and rope_parameters contradict each other; keep one of them")
    return first


def _rotary(fields: JsonFields, rope: JsonFields, head_dim: int) -> RotaryConfig:
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    if fields.has("rope_theta") and fields.number("rope_theta") != theta:
        raise InvalidModelConfig(
            f"rope_theta is {fields.values['rope_theta']} and {theta} in rope_parameters; keep one of them"
        )
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise rope.unsupported("partial_rotary_factor", "1.0")
    rope_type = rope.text("rope_type", rope.text("type", "default"))
    if rope.text("type", rope_type) != rope_type:
        raise InvalidModelConfig(f"rope_type is {rope_type!r} and type is {rope.values['type']!r}; keep one of them")
    if rope_type not in ("default", "yarn"):
        raise UnsupportedModel(f"rope type is {rope_type!r}, supported are 'default' and 'yarn'")
    yarn = _yarn(fields, rope) if rope_type == "yarn" else None
    return RotaryConfig(head_dim=head_dim, theta=theta, yarn=yarn)


def _yarn(fields: JsonFields, rope: JsonFields) -> YarnConfig:
    if rope.has("attention_factor"):
        raise rope.unsupported("attention_factor", "null: it follows from mscale and mscale_all_dim")
    if not rope.boolean("truncate", True):
        raise rope.unsupported("truncate", "true")
    for name in rope.values:
        if name not in YARN_KEYS:
            raise rope.unknown(name, YARN_KEYS)
    return YarnConfig(
        factor=rope.number("factor"),
        original_max_position_embeddings=_original_length(fields, rope),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        mscale=rope.number("mscale", 1.0),
        mscale_all_dim=rope.number("mscale_all_dim", 0.0),
    )


def _original_length(fields: JsonFields, rope: JsonFields) -> int:
    """As transformers looks for it: with yarn's other values, beside them, else the whole length."""
    if not rope.has(ORIGINAL_LENGTH):
        return fields.whole_number(ORIGINAL_LENGTH if fields.has(ORIGINAL_LENGTH) else "max_position_embeddings")
    length = rope.whole_number(ORIGINAL_LENGTH)
    if fields.has(ORIGINAL_LENGTH) and fields.whole_number(ORIGINAL_LENGTH) != length:
        raise InvalidModelConfig(
            f"{ORIGINAL_LENGTH} is {fields.values[ORIGINAL_LENGTH]} and {length} among yarn's values; keep one of them"
        )
    return length
