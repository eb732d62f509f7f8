"""YAML that somebody else wrote: bounded, each key once, no aliases. Knows nothing of what it says."""

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from protos.bounded_file import read_bounded

MAX_FILE_BYTES = 1024 * 1024


def read_yaml(path: Path) -> Any:
    """The document. Raises OSError, ValueError, RecursionError, yaml.YAMLError."""
    return yaml.load(read_bounded(path, MAX_FILE_BYTES).decode("utf-8"), Loader=_StrictLoader)


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which plain loaders keep the last in silence, and aliases, with which a few
    lines stand for more values than there is memory.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            counts = Counter(self.construct_object(key, deep=True) for key, _ in node.value)
            twice = sorted(str(key) for key, count in counts.items() if count > 1)
            raise yaml.constructor.ConstructorError(None, None, f"keys stand twice: {twice}", node.start_mark)
        return mapping

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not supported", mark)
        return super().compose_node(parent, index)
