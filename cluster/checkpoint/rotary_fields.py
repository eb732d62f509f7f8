"""What a config.json says of the rotary embedding."""

from attention.rotary import RotaryConfig, YarnConfig
from cluster.checkpoint.json_fields import InvalidModelConfig, JsonFields, UnsupportedModel


def read_rotary(fields: JsonFields, head_dim: int) -> RotaryConfig:
    """Reads `rope_scaling` as published and `rope_parameters` as transformers rewrites it.

    Raises InvalidModelConfig, UnsupportedModel, or ValueError for values that no rotary embedding has.
    """
    scaling, parameters = fields.nested("rope_scaling"), fields.nested("rope_parameters")
    if scaling is not None and parameters is not None and scaling.values != parameters.values:
        raise InvalidModelConfig("rope_scaling and rope_parameters contradict each other; keep one of them")
    rope = scaling or parameters or JsonFields({})
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    if fields.has("rope_theta") and fields.number("rope_theta") != theta:
        raise InvalidModelConfig(
            f"rope_theta is {fields.values['rope_theta']} and {theta} in rope_parameters; keep one of them"
        )
    rope_type = rope.text("rope_type", rope.text("type", "default"))
    if rope.text("type", rope_type) != rope_type:
        raise InvalidModelConfig(f"rope_type is {rope_type!r} and type is {rope.values['type']!r}; keep one of them")
    if rope_type not in ("default", "yarn"):
        raise UnsupportedModel(f"rope type is {rope_type!r}, supported are 'default' and 'yarn'")
    yarn = _yarn(rope) if rope_type == "yarn" else None
    return RotaryConfig(head_dim=head_dim, theta=theta, yarn=yarn)


def _yarn(rope: JsonFields) -> YarnConfig:
    if rope.has("attention_factor"):
        raise rope.unsupported("attention_factor", "null: it follows from mscale and mscale_all_dim")
    if not rope.boolean("truncate", True):
        raise rope.unsupported("truncate", "true")
    known = {
        *("type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "attention_factor", "truncate"),
    }
    for name in rope.values:
        if name not in known:
            raise rope.unsupported(name, f"one of {sorted(known)}")
    return YarnConfig(
        factor=rope.number("factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings"),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        mscale=rope.number("mscale", 1.0),
        mscale_all_dim=rope.number("mscale_all_dim", 0.0),
    )
