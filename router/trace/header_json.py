"""A trace's header as JSON. What is missing, unknown or of a wrong type is an error with its name and value."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from router.gate_config import GateConfig, ScoringFunc, TopkMethod
from router.trace.model_shape import ModelShape
from router.trace.trace import MAX_TEXT, TraceError, TraceHeader

FORMAT, VERSION = "mobula-trace", 1

_MODEL = {"name": str, "moe_layer_ids": list, "hidden_size": int, "moe_intermediate_size": int, "itemsize": int}
_GATE = {
    "n_routed_experts": int,
    "num_experts_per_tok": int,
    "n_group": int,
    "topk_group": int,
    "topk_method": str,
    "scoring_func": str,
    "norm_topk_prob": bool,
    "routed_scaling_factor": float,
}


def header_to_json(header: TraceHeader) -> bytes:
    """UTF-8."""
    model = dataclasses.asdict(header.model)
    gate = model.pop("gate")
    content = {"format": FORMAT, "version": VERSION, "source": header.source, "seed": header.seed}
    return json.dumps(content | {"started_at": header.started_at, "model": model, "gate": gate}, indent=1).encode()


def header_from_json(content: bytes) -> TraceHeader:
    """Raises TraceError."""
    fields = parse_object(content, "trace.json")
    if fields.get("format") != FORMAT:
        raise TraceError(f"format is {fields.get('format')!r}, must be {FORMAT!r}: not a trace")
    if fields.get("version") != VERSION:
        raise TraceError(f"version is {fields.get('version')!r}, this program reads {VERSION}: use a newer one")
    model, gate = _typed(fields, "model", _MODEL), _typed(fields, "gate", _GATE)
    layer_ids = model.pop("moe_layer_ids")
    if not all(type(layer_id) is int for layer_id in layer_ids):
        raise TraceError("model.moe_layer_ids holds something else than integers")
    texts = {name: fields.get(name) for name in ("source", "started_at")}
    for name, value in texts.items():
        if not (isinstance(value, str) and len(value) <= MAX_TEXT) and not (name == "started_at" and value is None):
            raise TraceError(f"{name} is {str(value)[:40]!r}, expected a text of up to {MAX_TEXT} characters")
    seed = fields.get("seed")
    if seed is not None and type(seed) is not int:
        raise TraceError(f"seed is {seed!r}, expected an integer or null")
    try:
        gate["topk_method"] = TopkMethod(gate["topk_method"])
        gate["scoring_func"] = ScoringFunc(gate["scoring_func"])
        shape = ModelShape(**model, moe_layer_ids=tuple(layer_ids), gate=GateConfig(**gate))
    except ValueError as error:
        raise TraceError(str(error)) from error
    return TraceHeader(model=shape, source=str(texts["source"]), seed=seed, started_at=texts["started_at"])


def parse_object(content: bytes, name: str) -> dict[str, Any]:
    """One JSON object. Raises TraceError."""
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{name} is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise TraceError(f"{name} holds a {type(parsed).__name__}, expected a JSON object")
    return parsed


def _typed(fields: Mapping[str, Any], name: str, types: Mapping[str, type]) -> dict[str, Any]:
    """A nested object with exactly these fields, each of its type; a bool is no integer."""
    values = fields.get(name)
    if not isinstance(values, dict) or set(values) != set(types):
        found = sorted(values) if isinstance(values, dict) else repr(values)[:40]
        raise TraceError(f"{name} has the fields {found}, expected {sorted(types)}")
    for key, kind in types.items():
        value = float(values[key]) if kind is float and type(values[key]) is int else values[key]
        if type(value) is not kind:
            raise TraceError(f"{name}.{key} is {repr(value)[:40]}, expected {kind.__name__}")
    return dict(values)
