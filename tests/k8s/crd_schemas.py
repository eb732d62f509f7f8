"""Custom resources against the schema in their definition, strictly: a field that the definition lacks is a fault, as
for an API server that was asked to validate strictly. Rules in CEL are not looked at.
"""

from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

Schema = dict[str, Any]
_METADATA: Schema = {"type": "object"}  # the API server checks it by rules of its own


def faults(manifest: dict[str, Any], folder: Path) -> list[str]:
    """`path: what is wrong`, best first. Raises LookupError when no definition in `folder` has the kind and version."""
    group, version = manifest["apiVersion"].split("/")
    validator = _validator(folder, group, version, manifest["kind"])
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


@cache
def _validator(folder: Path, group: str, version: str, kind: str) -> jsonschema.protocols.Validator:
    for path in sorted(folder.glob("*.yaml")):
        for definition in _definitions(path):
            spec = definition["spec"]
            if (spec["group"], spec["names"]["kind"]) == (group, kind):
                schemas = {v["name"]: v["schema"]["openAPIV3Schema"] for v in spec["versions"]}
                if version not in schemas:
                    raise LookupError(f"{path.name} has {kind} in {sorted(schemas)}, not in {version}")
                schema = strict(schemas[version])
                schema["properties"]["metadata"] = _METADATA
                return jsonschema.Draft202012Validator(schema)
    raise LookupError(f"no definition of {group}/{version} {kind} in {folder}")


@cache
def _definitions(path: Path) -> list[dict[str, Any]]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a megabyte each
    return [document for document in yaml.load_all(path.read_text(encoding="utf-8"), Loader=loader) if document]


def strict(schema: Schema) -> Schema:
    """A structural schema as a JSON schema that refuses unknown fields."""
    result = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
        result["anyOf"] = [{"type": "integer"}, {"type": "string"}]
        result.pop("pattern", None)  # meant for strings only
    if "properties" in schema:
        result["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result.setdefault("additionalProperties", False)
    if isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = strict(schema["additionalProperties"])
    if "items" in schema:
        result["items"] = strict(schema["items"])
    if schema.get("nullable") and "type" in result:
        result["type"] = [result["type"], "null"]
    return result
