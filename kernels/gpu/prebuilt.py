r"""Machine code of the bitmap kernel for where there is no Triton: ONNX Runtime's operator on CUDA.

`cubins/` holds one file per variant and a manifest that the C++ code reads. They are generated, and
in the repository so that an installation needs neither Triton nor CUDA's tools. After a change of
the kernel, write them again:

    export TRITON_PTXAS_BLACKWELL_PATH=<triton>/backends/nvidia/bin/ptxas
    python -c 'from graphprune.kernels import prebuilt; prebuilt.build(prebuilt.FOLDER)'

The variable is for drivers of CUDA 12: Triton 3.9 has an assembler of CUDA 12.9 too, but takes that
of CUDA 13 for all devices since Hopper, whose files are of a newer kind.

The kernel is `bitmap_triton.bitmap_kernel` with one split, whose "partial" sums are then the whole
ones; a pointer to elements of the type of x makes it round and store the result itself. So there is
one launch, and no memory beside the operands but a zero per row for `before_ptr`.

The manifest is lines of words. `parameters` names what the kernel takes, in order; `constants` is
what all variants were compiled with. A `cubin` line has the columns of `Variant`.
"""

from __future__ import annotations

import re
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import triton

from . import bitmap_triton, cubin

FOLDER = Path(__file__).resolve().parents[1] / "cubins"
MANIFEST = "manifest.txt"
FORMAT = 1  # kManifestFormat in native/cuda_driver.cpp
DTYPES = ("fp16", "bf16", "fp32")
# By architecture, the tokens of a block. A few tokens are as fast as 16, the least of a tensor
# core. With 64, Triton takes tensor memory on Blackwell, which is code twice as large.
TOKENS = {80: (16, 64), 90: (16, 64), 100: (16, 32)}
WARPS = 4
POINTERS = ("x_ptr", "words_ptr", "offsets_ptr", "before_ptr", "values_ptr", "partials_ptr")
NUMBERS = ("M", "N", "K", "stride")


@dataclass(frozen=True)
class Variant:
    """A cubin.

    Attributes:
        file: beside the manifest.
        architecture: like 80, for devices of 8.0 and later 8.x; 90a is for 9.0 alone.
        dtype: of x, the values and the result.
        tokens: of a block.
        rows: of a block.
        warps: of a block.
        shared: bytes of shared memory.
        multiple: all pointers, and N, K and stride, must be multiples of it.
        extra: null pointers that Triton wants behind the parameters.
        entry: name of the kernel.
    """

    file: str
    architecture: str
    dtype: str
    tokens: int
    rows: int
    warps: int
    shared: int
    multiple: int
    extra: int
    entry: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of cubins holds.

    Attributes:
        parameters: names, in order.
        constants: by name, as text.
        variants: the cubins.
    """

    parameters: tuple[str, ...]
    constants: dict[str, str]
    variants: tuple[Variant, ...]


def build(directory: Path, architectures: tuple[int, ...] = tuple(TOKENS)) -> Manifest:
    """Compile all variants and write them, with a manifest.

    Args:
        directory: made if it isn't there; cubins in it are removed first.
        architectures: of `TOKENS`.

    Raises:
        CubinError: A variant doesn't compile, or needs what a plain launch doesn't give.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*.cubin"):
        old.unlink()
    variants = []
    # Lines of the source are of no use there, and name folders of this machine.
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True
        for architecture in architectures:
            for dtype in DTYPES:
                for tokens in TOKENS[architecture]:
                    for multiple in (16, 1):
                        variant, code = _variant(architecture, dtype, tokens, multiple)
                        variants.append(variant)
                        (directory / variant.file).write_bytes(code)
    constants = {key: str(value) for key, value in (_constants(0) | {"splits": 1}).items()}
    del constants["TOKENS"], constants["ROWS"]
    made = Manifest((*POINTERS, *NUMBERS), constants, tuple(variants))
    (directory / MANIFEST).write_text(_text(made), encoding="ascii")
    return made


def read(directory: Path = FOLDER) -> Manifest:
    """Read a manifest.

    Raises:
        ValueError: It is of another format.
    """
    parameters: tuple[str, ...] = ()
    constants: dict[str, str] = {}
    variants = []
    text = (directory / MANIFEST).read_text(encoding="ascii")
    for key, *words in map(str.split, text.splitlines()):
        if key == "format" and words != [str(FORMAT)]:
            raise ValueError(f"{directory / MANIFEST} is of format {words}, not {FORMAT}")
        if key == "parameters":
            parameters = tuple(words)
        elif key == "constants":
            constants = dict(word.split("=") for word in words)
        elif key == "cubin":
            numbers = {"int": int, "str": str}
            each = zip(fields(Variant), words, strict=True)
            variants.append(Variant(*(numbers[str(field.type)](word) for field, word in each)))
    return Manifest(parameters, constants, tuple(variants))


def _text(manifest: Manifest) -> str:
    lines = [
        "# Written by kernels/gpu/prebuilt.py.",
        f"format {FORMAT}",
        f"triton {triton.__version__}",
        f"parameters {' '.join(manifest.parameters)}",
        f"constants {' '.join(f'{key}={value}' for key, value in manifest.constants.items())}",
        f"# cubin {' '.join(field.name for field in fields(Variant))}",
        *(f"cubin {' '.join(map(str, astuple(variant)))}" for variant in manifest.variants),
    ]
    return "\n".join(lines) + "\n"


def _constants(tokens: int) -> dict[str, Any]:
    return {
        "TOKENS": tokens,
        "ROWS": bitmap_triton.BLOCK_ROWS,
        "COLUMNS": bitmap_triton.BLOCK_COLUMNS,
        "UPCAST": False,
    }


def _variant(architecture: int, dtype: str, tokens: int, multiple: int) -> tuple[Variant, bytes]:
    """Compile one."""
    elements = dict.fromkeys(("x_ptr", "values_ptr", "partials_ptr"), f"*{dtype}")
    masks = {"words_ptr": "*i32", "offsets_ptr": "*i64", "before_ptr": "*i32"}
    types = elements | masks | dict.fromkeys(NUMBERS, "i32")
    aligned = {*POINTERS, "N", "K", "stride"} if multiple == 16 else set()
    kernel = bitmap_triton.bitmap_kernel
    built = cubin.build(kernel, types, _constants(tokens), architecture, aligned, WARPS)
    name = f"bitmap_sm{architecture}_{dtype}_{tokens}_{'aligned' if aligned else 'any'}.cubin"
    target, entry, parameters = _interface(built.ptx)
    order = [name for name in kernel.arg_names if name in types]
    if order != [*POINTERS, *NUMBERS]:
        raise cubin.CubinError(f"the parameters of {entry} are {order}")
    extra = parameters - len(order)
    # Triton's own pointers are null here, so a kernel that reads them can't be launched.
    if any(f"{entry}_param_{len(order) + i}]" in built.ptx for i in range(extra)):
        raise cubin.CubinError(f"{entry} for sm_{architecture} uses memory of Triton's")
    variant = Variant(
        name,
        target,
        dtype,
        tokens,
        bitmap_triton.BLOCK_ROWS,
        WARPS,
        built.shared,
        multiple,
        extra,
        entry,
    )
    return variant, built.code


def _interface(ptx: str) -> tuple[str, str, int]:
    """Architecture, name of the kernel, and the number of its parameters."""
    target = re.search(r"^\.target sm_(\w+)", ptx, re.MULTILINE)
    entry = re.search(r"\.visible \.entry (\w+)\((.*?)\)\s*\.reqntid (\d+)", ptx, re.DOTALL)
    if not target or not entry or int(entry[3]) != WARPS * cubin.WARP:
        raise cubin.CubinError(f"this PTX is none that Triton used to write: {ptx[:200]}")
    return target[1], entry[1], entry[2].count(".param")
