"""Compile kernels to machine code for GPUs that aren't there, and count what came out.

Triton brings the assembler and the disassembler of CUDA, so neither a GPU nor a driver is needed.
What can be known without running: that a kernel compiles for an architecture, that its registers
suffice and its shared memory fits, and how many instructions its main loop takes. The last bounds
the speed of kernels that unpack weights: a GPU with HBM has some 10 to 20 instructions per weight
in the time in which memory delivers a dense one.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import gluon_api

WARP = 32
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes per block
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class CubinError(RuntimeError):
    """A kernel can't be compiled, or its machine code isn't what is expected."""


@dataclass(frozen=True)
class Cubin:
    """Machine code of a kernel and what is known of it.

    Attributes:
        architecture: 80, 90 or 100, for sm_80, ...
        code: the ELF file.
        ptx: the assembly that it was made of.
        threads: per block.
        registers: per thread.
        stack: bytes per thread in local memory, spilled registers among them.
        spills: instructions that read or write local memory.
        shared: bytes of shared memory per block.
        loop: instructions of the longest loop, without padding, by their name up to the first dot.
    """

    architecture: int
    code: bytes
    ptx: str
    threads: int
    registers: int
    stack: int
    spills: int
    shared: int
    loop: Counter[str]

    @property
    def mma(self) -> int:
        """Tensor core instructions of the loop."""
        return sum(n for name, n in self.loop.items() if "MMA" in name)

    @property
    def barriers(self) -> int:
        """Barriers of the loop."""
        return self.loop["BAR"]

    def per_weight(self, weights: int) -> float:
        """Thread instructions per weight, for a block that does so many in an iteration."""
        return self.loop.total() * self.threads / weights


def build(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    architecture: int,
    aligned: frozenset[str] | set[str] = frozenset(),
    warps: int = 4,
    stages: int = 3,
) -> Cubin:
    """Compile a kernel.

    Args:
        kernel: from `triton.jit` or `gluon.jit`.
        types: of arguments by name, like ``*bf16``, ``i32``.
        constants: the other arguments.
        architecture: 80 for sm_80, and so on.
        aligned: arguments that are a multiple of 16; loads are narrow without it.
        warps: per block.
        stages: of Triton's own pipelining.

    Raises:
        CubinError: Arguments are missing, or it doesn't compile.
    """
    names = list(kernel.arg_names)
    missing = set(names) ^ (set(types) | set(constants))
    if missing:
        raise CubinError(f"{kernel.__name__}: arguments {sorted(missing)} are missing or unknown")
    source = ASTSource
    if "gluon" in type(kernel).__name__.lower():
        source = gluon_api.GluonASTSource
    signature = {name: types.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in sorted(aligned)}
    try:
        compiled = triton.compile(
            source(kernel, signature, constexprs=dict(constants), attrs=attributes),
            target=GPUTarget("cuda", architecture, WARP),
            options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
        )
        code, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    except Exception as e:  # Triton's are of many types
        raise CubinError(f"{kernel.__name__} doesn't compile for sm_{architecture}: {e}") from e
    usage = _run("cuobjdump", code, "--dump-resource-usage")
    listing = _instructions(_run("nvdisasm", code, "-c"))
    return Cubin(
        architecture,
        code,
        ptx,
        warps * WARP,
        _number(r"REG:(\d+)", usage),
        _number(r"STACK:(\d+)", usage),
        sum(name in ("LDL", "STL") for name in map(_name, listing[0])),
        int(compiled.metadata.shared),
        _longest_loop(*listing),
    )


def _run(tool: str, code: bytes, *options: str) -> str:
    """What a tool of Triton's says of machine code.

    Raises:
        CubinError: It fails or isn't there.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(code)
        command = [str(_TOOLS / tool), *options, str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except OSError as e:
            raise CubinError(f"{tool} of triton {triton.__version__} can't be run: {e}") from e
        except subprocess.CalledProcessError as e:
            raise CubinError(f"{tool} failed: {e.stderr.strip()}") from e
    return done.stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if not found:
        raise CubinError(f"no {pattern} in what cuobjdump says: {text.strip()}")
    return int(found[1])


def _instructions(listing: str) -> tuple[list[str], dict[str, int]]:
    """Instructions, and the place of each label among them."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(found[1])
    return instructions, labels


def _name(instruction: str) -> str:
    """Name of an instruction, without its guard and modifiers."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def _longest_loop(instructions: list[str], labels: dict[str, int]) -> Counter[str]:
    """Names of the instructions between the farthest jump back and its target."""
    loop: list[str] = []
    for i, instruction in enumerate(instructions):
        jump = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction)
        if jump and (begin := labels.get(jump[1], i)) < i and i + 1 - begin > len(loop):
            loop = instructions[begin : i + 1]
    return Counter(name for name in map(_name, loop) if name != "NOP")
