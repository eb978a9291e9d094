"""Small changes to files that somebody might hand us: one seed, one change or a few.

Structured data is changed as data, so that most of what comes out gets past the parser, and as
bytes, which finds what the parser does.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor as Field

ODD = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**31, 2**62, 2**63, 2**64, -(2**63), 10**30, 0.5,
    1.0, -0.0, 1e308, float("nan"), float("inf"), "", "0", "0123", "nan", "*", "ffn", "a" * 256,
    "0-3", "3-0", "0, 2, 5-7", "0-5, 3", "\x00", "é", "\ud800", "../x", [], [[]], [0], [0, 0],
    [1, 0], [0.5, 1.7], ["0-1", "0-1"], {}, {"kept": []}, {"": None},
)  # fmt: skip
"""Values that stand where others belong."""


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in plain data."""
    yield path
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from places(value, (*path, key))


def changed_data(data: Any, rng: random.Random) -> Any:
    """Plain data with one to three values replaced, removed, renamed or added."""
    data = copy.deepcopy(data)
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(list(places(data)))
        if not path:
            if rng.random() < 0.1:
                return copy.deepcopy(rng.choice(ODD))
            continue
        holder = data
        for key in path[:-1]:
            holder = holder[key]
        key, odd = path[-1], copy.deepcopy(rng.choice(ODD))
        kind = rng.randrange(5)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[str(odd)] = holder.pop(key)
        elif kind == 2 and isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), odd)
        elif kind == 3 and isinstance(holder, dict):
            holder[str(rng.choice(ODD))] = odd
        else:
            holder[key] = odd
    return data


def changed_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Bytes of which some are replaced, cut out, repeated or added."""
    found = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(found) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            found[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del found[at : at + rng.randint(1, 8)]
        elif kind == 2:
            found[at:at] = found[at : at + rng.randint(1, 20)]
        elif kind == 3:
            found[at:at] = rng.choice([b"\xff", b"\x00", b"\xed\xa0\x80", b"{", b"[", b'"', b"-"])
        else:
            found[at : at + 4] = rng.choice([2**31 - 1, 2**32 - 1, 0, 1]).to_bytes(4, "little")
    return bytes(found)


def json_text(data: Any, rng: random.Random) -> bytes:
    """Data as JSON, sometimes with a key twice, a byte changed, or far too deep."""
    text = json.dumps(data, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    kind = rng.randrange(10)
    if kind == 0:
        return changed_bytes(text, rng)
    if kind == 1 and text.startswith(b"{") and b":" in text:
        key = text[1 : text.index(b":")]
        return b"{" + key + b": 1, " + text[1:]
    if kind == 2:
        return text.replace(b"[", b"[" * 10_000, 1).replace(b"]", b"]" * 10_000, 1)
    return text


NUMBERS = (0, 1, -1, 2, 3, 64, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))
WORDS = ("", "x", "y", "w", "n" * 256, "\x00", "Relu", "Loop", "If", "nowhere", "../../etc/passwd")


def changed_model(model: onnx.ModelProto, rng: random.Random) -> onnx.ModelProto:
    """An ONNX model with one to three fields of its messages changed."""
    model = copy.deepcopy(model)
    for _ in range(rng.randint(1, 3)):
        message = rng.choice(list(messages(model)))
        _change(message, rng)
    return model


def messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all that are in it."""
    yield message
    for field, value in message.ListFields():
        if field.type == Field.TYPE_MESSAGE:
            for one in value if _is_repeated(field) else [value]:
                yield from messages(one)


def _is_repeated(field: Any) -> bool:
    repeated = getattr(field, "is_repeated", None)  # protobuf before 6 has labels
    return bool(field.label == field.LABEL_REPEATED if repeated is None else repeated)


def _change(message: Any, rng: random.Random) -> None:
    fields = [field for field, _ in message.ListFields()] or list(message.DESCRIPTOR.fields)
    if rng.random() < 0.2:
        fields = list(message.DESCRIPTOR.fields)
    field = rng.choice(fields)
    made = _made(field, rng)
    if rng.random() < 0.15:
        message.ClearField(field.name)
    elif _is_repeated(field):
        _change_list(getattr(message, field.name), field, made, rng)
    elif made is not None:
        setattr(message, field.name, made())


def _change_list(
    values: Any, field: Any, made: Callable[[], Any] | None, rng: random.Random
) -> None:
    at = rng.randrange(len(values)) if len(values) else None
    kind = rng.randrange(3)
    if kind == 0 and at is not None:
        del values[at]
    elif kind == 1 and at is not None:  # twice
        values.append(values[at])
    elif made is not None:
        if at is not None and rng.random() < 0.6:
            values[at] = made()
        else:
            values.append(made())


def _made(field: Any, rng: random.Random) -> Callable[[], Any] | None:
    """What may stand in a field; None for a message."""
    if field.type == Field.TYPE_MESSAGE:
        return None
    if field.type == Field.TYPE_STRING:
        return lambda: rng.choice(WORDS)
    if field.type == Field.TYPE_BYTES:
        return lambda: rng.choice([b"", b"\xff" * 3, b"x" * 64, bytes(32)])
    if field.type in (Field.TYPE_FLOAT, Field.TYPE_DOUBLE):
        return lambda: rng.choice([0.0, -1.0, float("nan"), float("inf"), 1e30])
    if field.type == Field.TYPE_ENUM:
        return lambda: rng.choice([v.number for v in field.enum_type.values])
    if field.type == Field.TYPE_INT32:
        return lambda: rng.choice([n for n in NUMBERS if -(2**31) <= n < 2**31])
    if field.type == Field.TYPE_UINT64:
        return lambda: rng.choice([abs(n) for n in NUMBERS])
    return lambda: rng.choice(NUMBERS)
