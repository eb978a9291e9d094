"""Read the binary model file of CTranslate2, an inference engine for Transformers.

Layout: https://github.com/OpenNMT/CTranslate2, ``python/ctranslate2/specs/model_spec.py``.
"""

from __future__ import annotations

import struct

import numpy as np

DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
VERSION = 6


class _Bytes:
    def __init__(self, content: bytes) -> None:
        self.content = content
        self.position = 0

    def take(self, size: int) -> bytes:
        if self.position + size > len(self.content):
            raise ValueError("the CTranslate2 file is cut short")
        self.position += size
        return self.content[self.position - size : self.position]

    def number(self, kind: str) -> int:
        return int(struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0])

    def text(self) -> str:
        return self.take(self.number("H")).removesuffix(b"\0").decode("utf-8")


def read(content: bytes, spec: str) -> dict[str, np.ndarray]:
    """Return the variables of a model by name, under their aliases too.

    Args:
        content: The whole file.
        spec: The kind of model it must be, such as ``WhisperSpec``.

    Raises:
        ValueError: It is another kind or version, or incomplete.
    """
    file = _Bytes(content)
    version, found, _ = file.number("I"), file.text(), file.number("I")
    if (version, found) != (VERSION, spec):
        raise ValueError(f"expected CTranslate2 {spec} version {VERSION}: {found} {version}")
    variables = {}
    for _ in range(file.number("I")):
        name = file.text()
        shape = [file.number("I") for _ in range(file.number("B"))]
        dtype = DTYPES[file.number("B")]
        variables[name] = np.frombuffer(file.take(file.number("I")), dtype).reshape(shape)
    for _ in range(file.number("I")):
        alias, name = file.text(), file.text()
        variables[alias] = variables[name]
    if file.position != len(content):
        raise ValueError("the CTranslate2 file goes on after its end")
    return variables
