"""An interpreter of as much PTX as the strip kernel is compiled to.

All threads of a block execute an instruction together, as arrays. Memory is checked: each access to
global memory must lie in a buffer, each to shared memory in the block's own, at a multiple of its
size. Bytes of shared memory that one thread writes and another reads or overwrites with something
else, with no barrier between, are an error: what a GPU makes of them depends on its timing. There
are NaNs where an asynchronous copy goes, until its thread waits for it.
Semantics are those of the PTX ISA, 9.7.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

BASE = 1 << 32  # where the first buffer begins; buffers are as far from each other
THREADS = 128
_TYPES = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


class Block:
    """One block of 128 threads."""

    def __init__(
        self, program: list[tuple], labels: dict[str, int], arguments: list, place, shared
    ):
        self.program, self.labels, self.arguments, self.place = program, labels, arguments, place
        self.registers: dict[str, np.ndarray] = {}
        self.buffers = [a for a in arguments if isinstance(a, np.ndarray)]
        self.shared = np.full(shared, 0xFF, dtype=np.uint8)
        self.copies: list[tuple] = []  # asynchronous ones, as (destination, source, active)
        self.committed = 0  # how many of them
        self.barrier()

    def barrier(self) -> None:
        self.writer = np.full(len(self.shared), -1)
        self.reader = np.full(len(self.shared), -1)

    def value(self, name: str, bits: int = 32) -> Any:
        """An operand as an array of unsigned numbers, one per thread."""
        if name in self.registers:
            return self.registers[name].astype(_TYPES[bits], copy=False)
        special = {f"%ctaid.{a}": p for a, p in zip("xyz", self.place, strict=True)}
        if name == "%tid.x":
            return np.arange(THREADS, dtype=_TYPES[bits])
        if name == "global_smem":
            return np.zeros(THREADS, dtype=_TYPES[bits])
        if name in special:
            number = special[name]
        elif name.startswith("%"):  # never written: anything
            number = 0xDEADBEEFDEADBEEF
        else:
            number = float_or_int(name)
        return np.full(THREADS, number & ((1 << bits) - 1), dtype=_TYPES[bits])

    def predicate(self, name: str) -> np.ndarray:
        known = name in self.registers
        return self.registers[name] if known else np.full(THREADS, int(name) != 0)

    def address(self, operand: str) -> np.ndarray:
        name, _, offset = operand.strip("[] ").partition("+")
        return self.value(name.strip(), 64).astype(np.int64) + int(offset or 0)

    def run(self) -> None:
        at, steps = 0, 0
        while True:
            guard, name, operands = self.program[at]
            at, steps = at + 1, steps + 1
            active = np.ones(THREADS, dtype=bool)
            if guard:
                active = self.registers[guard.strip("@!")] ^ guard.startswith("@!")
            if name.startswith("ret"):
                assert active.all()
                assert not self.copies
                return
            if name.startswith("bra"):
                assert active.all() or not active.any(), "threads part ways"
                at = self.labels[operands[0]] if active.all() else at
                continue
            self.step(name, operands, active)

    def step(self, name: str, operands: list, active: np.ndarray) -> None:
        """Any instruction but jumps."""
        kind, *modifiers = name.split(".")
        if kind == "bar":
            self.barrier()
        elif kind == "cp":
            self.copy(modifiers, operands, active)
        elif kind in ("ld", "st"):
            self.memory(kind, modifiers, operands, active)
        elif kind == "ldmatrix":
            self.ldmatrix(modifiers, operands)
        elif kind == "mma":
            self.mma(modifiers, operands)
        else:
            result = self.compute(kind, modifiers, operands[1:])
            targets = vector(operands[0])
            if len(targets) == 2:  # halves of a word
                half = np.dtype(f"uint{4 * result.itemsize}")
                for target, part in zip(targets, result[:, None].view(half).T, strict=True):
                    self.set(target, part, active)
            else:
                self.set(targets[0], result, active)

    def set(self, name: str, value: np.ndarray, active: np.ndarray) -> None:
        if name == "_":
            return
        old = self.registers.get(name, np.zeros(THREADS, dtype=value.dtype))
        self.registers[name] = np.where(active, value, old.astype(value.dtype))

    def compute(self, kind: str, modifiers: list[str], operands: list[str]) -> np.ndarray:
        kept = next((m for m in reversed(modifiers) if re.fullmatch(r"[busf]\d+|pred", m)), "pred")
        if kept == "pred":
            a, b = (self.predicate(o) for o in (operands[0], operands[-1]))
            return {"and": a & b, "or": a | b, "xor": a ^ b, "not": ~a, "mov": a}[kind]
        bits, signed = int(kept[1:]), kept[0] == "s"
        if kind == "mov" and operands[0].startswith("{"):
            low, high = (self.value(o, bits // 2) for o in vector(operands[0]))
            return np.stack([low, high], 1).view(_TYPES[bits])[:, 0]
        if kind == "cvt":
            source = self.value(operands[0], bits)
            to = next(m for m in modifiers if re.fullmatch(r"[us]\d+", m))
            return (as_signed(source) if signed else source).astype(_TYPES[int(to[1:])])
        if kind == "selp":
            yes, no = (self.value(o, bits) for o in operands[:2])
            return np.where(self.predicate(operands[2]), yes, no)
        wide = "wide" in modifiers
        unsigned = [self.value(o, bits) for o in operands[:2]]
        # Numbers of any size, so that nothing is cut off too early; results are cut at the end.
        numbers = [(as_signed(u) if signed else u).astype(object) for u in unsigned]
        if kind == "setp":
            compare = {"lt": "__lt__", "gt": "__gt__", "le": "__le__", "ge": "__ge__"}
            compare |= {"eq": "__eq__", "ne": "__ne__"}
            numbers = [n.astype(np.int64) for n in numbers]
            return getattr(numbers[0], compare[modifiers[0]])(numbers[1])
        a, b = numbers[0], numbers[-1]
        if kind == "mad":
            result = a * b + self.value(operands[2], 64 if wide else bits).astype(object)
        elif kind == "div":
            assert (a >= 0).all(), "division rounds toward zero"
            result = a // b
        elif kind == "dp4a":
            assert modifiers == ["u32", "u32"]
            result = self.value(operands[2]).astype(object)
            for i in range(0, 32, 8):
                result = result + (numbers[0] >> i & 255) * (numbers[1] >> i & 255)
        elif kind == "bfe":
            length = int(operands[2])
            result = (a >> b) & ((1 << length) - 1)
        elif kind == "prmt":
            selector, both = int(operands[2].rstrip("U"), 0), a | b << 32
            result = sum((both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i for i in range(4))
        else:
            table = {"add": a + b, "sub": a - b, "mul": a * b, "mov": a, "neg": -a, "not": ~a}
            table |= {"and": a & b, "or": a | b, "xor": a ^ b, "min": np.minimum(a, b)}
            table["max"] = np.maximum(a, b)
            if kind in ("shl", "shr"):
                table = {"shl": a << b, "shr": a >> b}
            result = table[kind]
        size = bits * 2 if wide else bits
        return (result & ((1 << size) - 1)).astype(_TYPES[size])

    def memory(self, kind: str, modifiers: list[str], operands: list[str], active) -> None:
        size = int(modifiers[-1][1:]) // 8
        if modifiers[0] == "param":
            index = int(operands[1].strip("[]").rpartition("_")[2])
            value = self.arguments[index]
            if isinstance(value, np.ndarray):
                value = BASE * (1 + next(i for i, b in enumerate(self.buffers) if b is value))
            full = np.full(THREADS, value, dtype=np.int64)
            self.set(operands[0], full.astype(_TYPES[8 * size]), active)
            return
        names, place = operands if kind == "ld" else operands[::-1]
        address = self.address(place)
        for i, name in enumerate(vector(names)):
            at = address + i * size
            if kind == "ld":
                self.set(name, self.access(modifiers[0], at, size, active), active)
            else:
                self.access(modifiers[0], at, size, active, self.value(name, 8 * size))
        whole = size * len(vector(names))
        assert (address[active] % whole == 0).all(), "misaligned"

    def copy(self, modifiers: list[str], operands: list[str], active) -> None:
        """cp.async: 16 bytes, or the end of a group, or the wait for all groups."""
        if "commit_group" in modifiers:
            self.committed = len(self.copies)
        elif "wait_group" in modifiers:
            assert int(operands[0]) == 0
            for to, source, who in self.copies[: self.committed]:
                for i in range(0, 16, 4):
                    word = self.access("global", source + i, 4, who)
                    self.access("shared", to + i, 4, who, word)
            del self.copies[: self.committed]
            self.committed = 0
        else:
            assert modifiers == ["async", "cg", "shared", "global"]
            assert [int(o, 0) for o in operands[2:]] == [16, 16]
            to, source = (self.address(o) for o in operands[:2])
            assert (to[active] % 16 == 0).all()
            assert (source[active] % 16 == 0).all()
            for i in range(0, 16, 4):
                self.access("shared", to + i, 4, active, np.full(THREADS, 2**32 - 1, np.uint32))
            self.copies.append((to, source, active))

    def access(
        self, space: str, address, size: int, active, stored=None, readers=None
    ) -> np.ndarray:
        """Load numbers, or store them; places of threads that aren't active aren't looked at."""
        result = np.zeros(len(address), dtype=_TYPES[8 * size])
        threads = np.arange(len(address)) if readers is None else readers
        for buffer, memory in enumerate([self.shared] if space == "shared" else self.buffers):
            begin = 0 if space == "shared" else BASE * (buffer + 1)
            raw = memory.view(np.uint8).reshape(-1)
            inside = active & (address >= begin) & (address + size <= begin + len(raw))
            where = (address - begin)[inside]
            active = active & ~inside
            places = where[:, None] + np.arange(size)
            if stored is None:
                result[inside] = raw[places].copy().view(result.dtype)[:, 0]
                if space == "shared":
                    self.check(places, threads[inside], None)
            else:
                new = np.ascontiguousarray(stored[inside])[:, None].view(np.uint8)
                if space == "shared":
                    self.check(places, threads[inside], new)
                raw[places] = new
                if space == "shared":
                    assert (raw[places] == new).all(), "threads write different values to a place"
        assert not active.any(), f"outside of {space} memory: {address[active][:4]}"
        return result

    def check(self, places: np.ndarray, threads: np.ndarray, new: np.ndarray | None) -> None:
        """Look for races, and remember who was there."""
        me = np.broadcast_to(threads[:, None], places.shape)
        others = (self.writer[places] >= 0) & (self.writer[places] != me)
        if new is None:
            assert not others.any(), "read without a barrier after another thread's write"
            seen = self.reader[places]
            self.reader[places] = np.where((seen >= 0) & (seen != me), THREADS, me)
        else:
            changed = self.shared[places] != new
            assert not (others & changed).any(), "overwritten without a barrier"
            late = (self.reader[places] >= 0) & (self.reader[places] != me)
            assert not late.any(), "written without a barrier after another thread's read"
            self.writer[places] = me

    def ldmatrix(self, modifiers: list[str], operands: list[str]) -> None:
        assert modifiers[2] == "m8n8"
        targets, address = vector(operands[0]), self.address(operands[1])
        assert (address % 16 == 0).all()
        for i, target in enumerate(targets):
            value = np.zeros(THREADS, dtype=np.uint32)
            for warp in range(0, THREADS, 32):
                lanes = np.arange(32)
                rows = address[warp + 8 * i : warp + 8 * i + 8]
                halves = []
                for h in range(2):
                    row, column = lanes // 4, lanes % 4 * 2 + h
                    if "trans" in modifiers:
                        row, column = column, row
                    at, me = rows[row] + 2 * column, warp + lanes
                    ones = np.ones(32, dtype=bool)
                    halves.append(self.access("shared", at, 2, ones, readers=me).astype(np.uint32))
                value[warp : warp + 32] = halves[0] | halves[1] << np.uint32(16)
            self.set(target, value, np.ones(THREADS, dtype=bool))

    def mma(self, modifiers: list[str], operands: list[str]) -> None:
        assert modifiers[2] == "m16n8k16"
        a, b, c = (np.stack([self.value(r) for r in vector(o)], 1) for o in operands[1:])
        read = half if modifiers[6] == "f16" else brain
        lane = np.arange(32)
        group, member = lane // 4, lane % 4 * 2
        out = np.zeros((THREADS, 4), dtype=np.float32)
        for warp in range(0, THREADS, 32):
            me = slice(warp, warp + 32)
            left, right, acc = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
            for h in range(2):
                for r in range(4):
                    left[group + r % 2 * 8, member + h + r // 2 * 8] = read(a[me, r], h)
                    acc[group + r // 2 * 8, member + r % 2] = c[me, r].copy().view(np.float32)
                for r in range(2):
                    right[member + h + r * 8, group] = read(b[me, r], h)
            acc += left @ right
            for r in range(4):
                out[me, r] = acc[group + r // 2 * 8, member + r % 2]
        for r, target in enumerate(vector(operands[0])):
            self.set(target, out[:, r].copy().view(np.uint32), np.ones(THREADS, dtype=bool))


def float_or_int(text: str) -> int:
    """A literal; 0f... are the bits of a float."""
    return int(text[2:], 16) if text.startswith("0f") else int(text, 0)


def as_signed(x: np.ndarray) -> np.ndarray:
    return x.view(np.dtype(f"int{8 * x.itemsize}"))


def half(word: np.ndarray, index: int) -> np.ndarray:
    return (word >> np.uint32(16 * index)).astype(np.uint16).view(np.float16)


def brain(word: np.ndarray, index: int) -> np.ndarray:
    bits = word >> np.uint32(16) if index else word & np.uint32(0xFFFF)
    return (bits << np.uint32(16)).view(np.float32)


def vector(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{} ").split(",")]


def parse(text: str) -> tuple[list[tuple], dict[str, int]]:
    """Instructions as (guard, name, operands), and the places of labels."""
    program: list[tuple] = []
    labels: dict[str, int] = {}
    body = text[text.index("\n{") + 2 : text.rindex("ret;") + 4]
    for raw in body.splitlines():
        line = raw.split("//")[0].strip()
        if found := re.match(r"(\$\w+):", line):
            labels[found[1]] = len(program)
        elif line and line[0] != "." and line not in "{}":
            guard, name, rest = re.findall(r"(@!?%p\d+)?\s*([\w.:]+)\s*(.*?);", line)[0]
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
            program.append((guard, name.replace("::cta", ""), operands))
    return program, labels


def launch(text: str, grid: tuple[int, int, int], arguments: list, shared: int) -> None:
    """Run a kernel on its arguments: arrays, which it may write to, and numbers."""
    program, labels = parse(text)
    for place in np.ndindex(grid):
        Block(program, labels, [*arguments, 0, 0], place, shared).run()
