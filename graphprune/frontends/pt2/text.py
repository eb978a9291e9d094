"""The texts in a serialised ``torch.export`` program that PyTorch does more with than keep.

Some it evaluates (sizes), some it looks up (operators, classes of nested inputs), some it writes
into Python code that it then runs (names). Each kind has a check here, which raises a `LoadError`.
"""

from __future__ import annotations

import enum
import json
import re
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from graphprune.errors import LoadError
from graphprune.frontends.pt2.expressions import ExpressionError, check_expression, is_symbol

Check = Callable[[str, str], None]
"""Of a text and the place where it stands."""

_PATH = re.compile(r"[^\x00-\x1f\x7f\"'\\(){}]*")
_DEVICE = re.compile(r"[a-z_]{1,20}")
_PAYLOAD = re.compile(r"[A-Za-z0-9_]{1,200}")
_UNBACKED = re.compile(r"(u|zuf)\d{1,5}")
_SYMBOLIC = re.compile(
    r"_operator\.(add|and_|eq|floordiv|ge|getitem|gt|le|lshift|lt|mod|mul|ne|neg|not_|or_|pos|pow|"
    r"rshift|sub|truediv|abs|xor|invert)|math\.(trunc|floor|ceil|sqrt|pow)|"
    r"torch\.sym_(float|int|ite|max|min|not|sum)|torch\._sym_(sqrt|cos|cosh|sin|sinh|tan|tanh|asin|"
    r"acos|atan|log2|exp)|torch\._functorch\.predispatch\._(add_batch_dim|remove_batch_dim|"
    r"(vmap|jvp)_(increment|decrement)_nesting|(enter|exit)_dual_level|(make|unpack)_dual|"
    r"unwrap_for_grad)|torch\._functorch\.predispatch\.lazy_load_decompositions"
)
_HIGHER = frozenset(
    "_export_tracepoint associative_scan auto_functionalized auto_functionalized_v2 "
    "autograd_function_apply cond flex_attention flex_attention_backward foreach_map "
    "graphsafe_run_with_rng_state hints_wrapper invoke_quant invoke_quant_packed invoke_subgraph "
    "map_impl out_dtype run_and_save_rng_state run_with_rng_state scan strict_mode "
    "tag_activation_checkpoint while_loop while_loop_stack_output with_effects wrap "
    "wrap_activation_checkpoint wrap_with_autocast wrap_with_set_grad_enabled".split()
)
"""Operators that take graphs, all of which are in the file."""
_NUMERIC = frozenset({"aten", "prims", "quantized", "quantized_decomposed", "torchvision"})
"""Libraries whose operators compute on tensors and nothing else, but for what names a file."""
_FACTORIES = {
    "builtins": frozenset({"list", "dict", "set", "tuple", "int", "float", "str", "bool"}),
    "collections": frozenset({"OrderedDict", "deque", "Counter"}),
}
_TYPED = frozenset({"collections.namedtuple", "collections.defaultdict"})
"""Kinds of nested inputs whose further data is no JSON, or names something to import."""


def refused(what: str, where: str, why: str | None = None) -> LoadError:
    """The error of a file that we don't let PyTorch open."""
    return LoadError(
        what,
        where=where,
        why=why,
        hint="read docs/security.md; if you know where the file comes from and that it may run "
        "code here, open it with --trust (trust=True)",
    )


def free(text: str, where: str) -> None:
    """Nothing is done with this text but to keep it."""


def expression(text: str, where: str) -> None:
    """A size, which sympy evaluates."""
    try:
        check_expression(text)
    except ExpressionError as error:
        shown = text if len(text) <= 80 else f"{text[:80]}..."
        raise refused(
            "a size in the file isn't arithmetic", where, f"{error.why}: {shown}"
        ) from None


def symbol(text: str, where: str) -> None:
    """The name of an unknown size; PyTorch counts up to the numbers of some."""
    unbacked = re.match(r"(u|zuf)\d", text)
    if not is_symbol(text) or (unbacked and not _UNBACKED.fullmatch(text)):
        raise refused("the name of a size is none", where, f"{text[:80]!r}")


def identifier(text: str, where: str) -> None:
    """A name that is written into the code of the graph, which PyTorch runs."""
    if text and not text.isidentifier():
        raise refused("a name in the graph is none", where, f"{text[:80]!r} would become code")


def path(text: str, where: str) -> None:
    """The name of a parameter or module; those that aren't identifiers are written in quotes."""
    parts = text.split(".")
    private = any(p.startswith("__") and p.endswith("__") for p in parts)
    if private or len(text) > 10_000 or not _PATH.fullmatch(text):
        raise refused("the name of a parameter or module is none", where, f"{text[:80]!r}")


def constant(text: str, where: str) -> None:
    """An input that is text, which PyTorch writes in quotes into a check of the inputs."""
    if not text.isprintable() or any(c in text for c in "'\"\\"):
        raise refused("an input has quotes in it", where, f"{text[:80]!r} would become code")


def device(text: str, where: str) -> None:
    """A kind of device."""
    if not _DEVICE.fullmatch(text):
        raise refused("a device is none", where, f"{text[:80]!r}")


def payload(text: str, where: str) -> None:
    """The name of an entry of the archive, below the folder of its kind."""
    if not _PAYLOAD.fullmatch(text):
        raise refused("the name of an entry leads elsewhere", where, f"{text[:80]!r}")


def origin(text: str, where: str) -> None:
    """Where an operator came from: looked up and not called, but for extensions' own names."""
    for one in text.split(";"):
        if one.rpartition(",")[2].startswith("#"):
            raise refused("an operator of an extension", where, one[:80])


def operator(text: str, where: str) -> None:
    """An operator, which is looked up by its name and called when the graph runs."""
    if _SYMBOLIC.fullmatch(text):
        return
    parts = text.split(".")
    if parts[:3] == ["torch", "ops", "higher_order"] and len(parts) == 4:
        found = getattr(torch.ops.higher_order, parts[3], None) if parts[3] in _HIGHER else None
        if isinstance(found, HigherOrderOperator):
            return
    elif parts[:2] == ["torch", "ops"] and len(parts) == 5:
        why = _trouble(*parts[2:])
        if why is None:
            return
        raise refused(f"the graph calls {text}", where, why)
    raise refused(
        f"the graph calls {text[:80]}", where, "only operators of tensors and sizes are called"
    )


@cache
def _trouble(library: str, name: str, overload: str) -> str | None:
    """Why an operator may do more than compute; None if it may not."""
    if not library.isidentifier() or hasattr(type(torch.ops), library):
        return "there is no such operator"
    packet = getattr(getattr(torch.ops, library), name, None)
    found = getattr(packet, overload, None) if isinstance(packet, OpOverloadPacket) else None
    if not isinstance(found, OpOverload):
        return "no library that has been imported has such an operator"
    arguments = found._schema.arguments
    if library in _NUMERIC:
        files = any(argument.name == "filename" for argument in arguments)
        return "it reads or writes a file" if files else None
    if any("str" in str(argument.type) for argument in arguments):
        return f"{library} is no library of ours or PyTorch's, and the operator takes text"
    return None


def treespec(text: str, where: str) -> None:
    """The nesting of inputs or outputs; of some kinds, classes are imported by their names."""
    try:
        _, spec = json.loads(text)
        _nesting(spec, where)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise refused(
            "the nesting of inputs or outputs can't be read", where, f"{type(error).__name__}"
        ) from error


def _nesting(spec: Any, where: str) -> None:
    kind, context = spec["type"], spec["context"]
    if kind == "collections.defaultdict":
        names = _FACTORIES.get(context["default_factory_module"], frozenset())
        if context["default_factory_name"] not in names:
            raise refused(
                "the inputs or outputs import a function",
                where,
                f"{context['default_factory_module']}.{context['default_factory_name']}"[:80],
            )
    elif kind not in _TYPED and isinstance(context, str):
        json.loads(context, object_hook=lambda data: _check_enum(data, where))
    for child in spec["children_spec"]:
        _nesting(child, where)


def _check_enum(data: dict[str, Any], where: str) -> None:
    """See that what is imported is a member of an enumeration that is there already."""
    if "__enum__" not in data:
        return
    module, _, names = str(data["fqn"]).partition(":")
    found: Any = sys.modules.get(module)
    for name in names.split("."):
        found = vars(found).get(name) if found is not None else None
    if not (isinstance(found, type) and issubclass(found, enum.Enum)):
        raise refused("the inputs or outputs import a class", where, str(data["fqn"])[:80])


def keywords(text: str, where: str) -> None:
    """The nesting of inputs, the keywords of which are written into the code of the graph."""
    treespec(text, where)
    children = json.loads(text)[1]["children_spec"]
    for child in children[1:2]:
        if child["type"] == "builtins.dict":
            for key in json.loads(child["context"]):
                identifier(str(key), where)
