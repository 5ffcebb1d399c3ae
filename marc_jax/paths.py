"""Trees of parameters and the flat dicts "text/layers/attn/q/kernel" -> leaf. Pure Python."""

from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested dict -> flat dict with "/" between the names; a flat dict comes back unchanged."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}/"))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict:
    """Flat dict with "/" between the names -> nested dict. Raises ValueError when a path is leaf and branch."""
    nested: dict = {}
    for path, value in flat.items():
        *branches, leaf = path.split("/")
        node = nested
        for branch in branches:
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                raise ValueError(f"path {path!r} goes through another leaf")
        if leaf in node:
            raise ValueError(f"path {path!r} is both a leaf and a group of leaves")
        node[leaf] = value
    return nested
