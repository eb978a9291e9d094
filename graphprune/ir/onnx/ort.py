"""ONNX Runtime's files, types and providers, as far as graphprune uses them.

ONNX Runtime is an extra, and imported on first use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.errors import EvaluationError, LoadError
from graphprune.files.paths import usable
from graphprune.ops.registry import find_libraries

if TYPE_CHECKING:
    from numpy.typing import NDArray

# ONNX Runtime's name of an element type to numpy's and torch's, and to ONNX's number.
_TYPES = {
    "float": ("float32", 1),
    "uint8": ("uint8", 2),
    "int8": ("int8", 3),
    "uint16": ("uint16", 4),
    "int16": ("int16", 5),
    "int32": ("int32", 6),
    "int64": ("int64", 7),
    "bool": ("bool", 9),
    "float16": ("float16", 10),
    "double": ("float64", 11),
    "uint32": ("uint32", 12),
    "uint64": ("uint64", 13),
    "bfloat16": ("bfloat16", 16),
}
NUMBERS = dict(_TYPES.values())
MADE_UP = NUMBERS.keys() - {"bfloat16"}  # which numpy lacks
_SHORT = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

Provider = str | tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class TensorType:
    """What a model declares of one input or output.

    Attributes:
        dtype: As numpy and torch name it, ``float32``; ONNX Runtime's own name of what is no
            tensor of numbers, such as ``tensor(string)``.
        shape: Sizes; a name or None for one that the model leaves open.
    """

    dtype: str
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join('?' if s is None else str(s) for s in self.shape)}]"


def open_raw(
    path: str | Path,
    threads: int,
    providers: Sequence[Provider] | None = None,
    *,
    spin: bool = False,
    mapped: bool = False,
    kernels: bool = True,
) -> Any:
    """Open an ONNX file as an ``onnxruntime.InferenceSession``.

    Args:
        path: The ``.onnx`` file.
        threads: Threads within an operator; 0 leaves it to ONNX Runtime.
        providers: See `session`.
        spin: Whether idle threads wait actively: faster, and they take the processor from others.
        mapped: Leave external weights in their file, mapped into memory. Otherwise kernels keep
            copies in an order of their own, which makes calls faster.
        kernels: Register our library.

    Raises:
        LoadError: See `session`.
    """
    try:
        import onnxruntime
    except ImportError:
        raise LoadError(
            "ONNX Runtime is not installed", hint="pip install 'graphprune[cpu]'"
        ) from None
    if not usable(path).is_file():
        raise LoadError("the ONNX file does not exist", where=str(path))
    wanted = _providers(providers, onnxruntime.get_available_providers())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if mapped:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if kernels:
        _register_ours(options)
    register_libraries(options)
    try:
        raw = onnxruntime.InferenceSession(str(path), options, providers=wanted)
    except Exception as error:  # ONNX Runtime raises a class of its own for each status code.
        why = " ".join(str(error).split())
        raise LoadError("ONNX Runtime can't open the file", where=str(path), why=why) from error
    first = wanted[0] if isinstance(wanted[0], str) else wanted[0][0]
    if providers is not None and first not in raw.get_providers():
        raise LoadError(
            f"{first} doesn't start here",
            where=str(path),
            why=f"ONNX Runtime fell back to {', '.join(raw.get_providers())}",
            hint="check the driver and its libraries, or leave the provider out",
        )
    return raw


def register_libraries(options: Any) -> None:
    """Tell ONNX Runtime of the kernels of operators that other packages register.

    Args:
        options: ``onnxruntime.SessionOptions``.

    Raises:
        LoadError: it doesn't take a library.
        GraphPruneError: see `graphprune.ops.registry.Operators.find`.
    """
    for library in find_libraries():
        try:
            options.register_custom_ops_library(library)
        except Exception as error:  # as below
            raise LoadError(
                "ONNX Runtime can't load a library of operators",
                where=library,
                why=" ".join(str(error).split())[:300],
                hint="mend or remove the package that registers an operator with it",
            ) from error


def _register_ours(options: Any) -> None:
    """Tell ONNX Runtime of our kernels; a file that wants them computes the same without."""
    from graphprune.kernels import native

    library = native.path()
    if library is None:
        return
    # An ONNX Runtime that is too old for the library is the other case.
    with contextlib.suppress(Exception):
        options.register_custom_ops_library(str(library))


def example_feeds(session: Any, length: int) -> dict[str, NDArray[Any]]:
    """Makes inputs for a raw session: a batch of one, ``length`` along other open dimensions.

    Integers are all one, which is a valid token, position and mask; floats are standard normal.
    Dimensions of one name have one size, and the sum of two names has the sum of their sizes.

    Raises:
        EvaluationError: An input is no tensor of numbers that numpy has.
    """
    import numpy as np

    generator = np.random.default_rng(0)
    feeds: dict[str, NDArray[Any]] = {}
    named: dict[str, int] = {}
    for entry in session.get_inputs():
        declared = declared_type(entry)
        if declared.dtype not in MADE_UP:
            raise EvaluationError(
                "no example input can be made", where=entry.name, why=f"its type is {entry.type}"
            )
        shape = []
        for axis, size in enumerate(declared.shape):
            usual = 1 if axis == 0 else length
            if isinstance(size, str):
                usual = sum(named.setdefault(part, usual) for part in size.split(" + "))
            shape.append(size if isinstance(size, int) else usual)
        floating = declared.dtype.startswith("float")
        values = generator.standard_normal(shape) if floating else np.ones(shape)
        feeds[entry.name] = values.astype(declared.dtype)
    return feeds


def declared_type(entry: Any) -> TensorType:
    """An input or output as ONNX Runtime describes it."""
    inner = entry.type.removeprefix("tensor(").removesuffix(")")
    dtype = _TYPES[inner][0] if inner in _TYPES else entry.type
    return TensorType(dtype, tuple(s if isinstance(s, int | str) else None for s in entry.shape))


def _providers(wanted: Sequence[Provider] | None, available: Sequence[str]) -> list[Any]:
    """ONNX Runtime's names of providers that it has."""
    if wanted is None:
        return [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in available]
    if isinstance(wanted, str):
        wanted = [wanted]
    found: list[Any] = []
    for one in wanted:
        name, *options = (one,) if isinstance(one, str) else one
        full = _SHORT.get(name.lower(), name)
        if full not in available:
            raise LoadError(
                f"ONNX Runtime has no provider {name!r} here",
                why=f"it has {', '.join(available)}",
                hint="CUDA comes with onnxruntime-gpu: pip install 'graphprune[gpu]'",
            )
        found.append((full, dict(options[0])) if options else full)
    if not found:
        raise LoadError("a session needs at least one provider", why="providers is empty")
    return found


@cache
def saturates() -> bool:
    """Whether products of unsigned and signed bytes are wrong on this processor.

    Without VNNI, ONNX Runtime adds them two by two in int16, where large ones don't fit.
    """
    import numpy as np
    import onnxruntime
    from onnx import parser
    from onnx.numpy_helper import from_array

    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> '
        "g (uint8[1,2] x) => (int32[1,1] y) { y = MatMulInteger(x, w) }"
    )
    model.graph.initializer.append(from_array(np.full((2, 1), 127, np.int8), "w"))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"x": np.full((1, 2), 255, np.uint8)})
    return int(found[0, 0]) != 2 * 255 * 127


def onnx_session(path: str | Path, threads: int = 0, *, mapped: bool = False) -> Any:
    """Opens an ONNX file in ONNX Runtime on the CPU.

    Args:
        path: The ``.onnx`` file.
        threads: Threads within an operator; 0 leaves it to ONNX Runtime.
        mapped: Leave external weights in their file, mapped into memory. Otherwise kernels keep
            copies in an order of their own, which makes calls faster.

    Raises:
        LoadError: The file is missing or not ONNX, or ONNX Runtime is not installed.
    """
    return open_raw(path, threads, ["cpu"], mapped=mapped)
