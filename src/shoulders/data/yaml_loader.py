"""Reading YAML that people write: a key given twice is a mistake, not its last value."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml
from yaml.constructor import ConstructorError

# What the parser raises: of scalars such as `2024-13-45` and `!!int abc`, and of deep nesting, too.
NO_YAML = (yaml.YAMLError, ValueError, AttributeError, RecursionError)


class UniqueKeyLoader(yaml.SafeLoader):
    """A safe YAML loader that refuses a key given twice, where YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return a mapping as the safe loader does."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ConstructorError(
                        None, None, f"'{key.value}' is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """Return what a YAML text says; raises one of `NO_YAML`."""
    return yaml.load(text, Loader=UniqueKeyLoader)
