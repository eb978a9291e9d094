"""Recipes as YAML: read so strictly that a file means one thing, in memory that its size bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from graphprune.errors import RecipeError
from graphprune.files.json import read_limited, shown

LARGEST = 1 << 20
"""Bytes of a recipe."""

VALUES = 100_000
"""Values of a recipe, each alias counted as what it stands for."""


def read_yaml(path: str | Path) -> object:
    """Reads one YAML document as plain data.

    Raises:
        RecipeError: The file is missing, unreadable, too large or not YAML, or a key is given
            twice.
    """
    try:
        text = read_limited(Path(path), LARGEST).decode("utf-8")
    except FileNotFoundError:
        raise RecipeError("the recipe does not exist", where=str(path)) from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise RecipeError("the recipe can't be read", where=str(path), why=why) from None
    try:
        return _parsed(text)
    except RecursionError:
        why = "it is nested too deeply"
    except yaml.YAMLError as error:
        why = " ".join(str(error).split())
    except (ValueError, OverflowError):  # from the scanner, of "\\UFFFFFFFF"
        why = "an escape in it stands for no character"
    raise RecipeError("the recipe is not valid YAML", where=str(path), why=why)


def _parsed(text: str) -> object:
    loader = _UniqueKeys(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        found: object = loader.construct_document(node)
        return found
    finally:
        loader.dispose()


def _count(node: yaml.Node, counts: dict[int, int | None]) -> int:
    """How many values a node stands for; what an alias repeats is walked once.

    Raises:
        ConstructorError: it contains itself, or stands for too many.
    """
    known = counts.get(id(node), 0)
    if known is None:
        raise _refused("a value contains itself", node)
    if known:
        return known
    counts[id(node)] = None
    total = 1
    if isinstance(node, yaml.CollectionNode):
        for item in node.value:
            parts = item if isinstance(item, tuple) else (item,)
            total += sum(_count(part, counts) for part in parts)
    elif any("\ud800" <= letter <= "\udfff" for letter in node.value):
        raise _refused(f"{shown(node.value)} has half a character", node)
    if total > VALUES:
        raise _refused(f"with all aliases it has more than {VALUES:,} values", node)
    counts[id(node)] = total
    return total


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys; a recipe with both is a mistake."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Builds a value, and says where it is if it can't be read as what it looks like."""
        try:
            return super().construct_object(node, deep=deep)
        # What it raises for a month of 13, 0x_, 5,000 digits, !!bool x and !!timestamp x.
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
            if not isinstance(node, yaml.ScalarNode):
                raise
            kind = node.tag.rpartition(":")[2]
            raise _refused(f"{shown(node.value)} can't be read as {kind}", node) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Builds a mapping and refuses a repeated key; what is merged into it may be replaced."""
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        mapping = super().construct_mapping(node, deep=deep)
        if len({self.construct_object(key, deep=True) for key in own}) < len(own):
            raise _refused("a key is given twice", node)
        return mapping


def _refused(what: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)
