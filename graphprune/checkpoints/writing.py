"""Safetensors files written tensor by tensor, so that no second copy of a model is in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from graphprune.errors import EmitError

SHARD = 5_000_000_000
"""Bytes after which a new file is begun, as in transformers."""

DTYPES = {  # as safetensors names them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_weights(
    directory: Path,
    names: Iterable[str],
    tensor: Callable[[str], torch.Tensor],
    shard: int = SHARD,
) -> None:
    """Write `model.safetensors`, or shards with their index if that gets larger than `shard`.

    Args:
        directory: Where to.
        names: What to write, in this order.
        tensor: Gives a tensor by its name; each is asked for once and let go of again.
        shard: The size of a file in bytes from which on another one is begun.

    Raises:
        EmitError: The format has no name for the dtype of a tensor.
    """
    names = list(names)
    shards = [Shard.open(directory / "1.part", names)]
    try:
        for name in names:
            value = tensor(name)
            if shards[-1].entries and shards[-1].end + value.nbytes > shard:
                shards[-1].finish()
                shards.append(Shard.open(directory / f"{len(shards) + 1}.part", names))
            shards[-1].add(name, value)
        shards[-1].finish()
    finally:
        for part in shards:
            part.file.close()
    if len(shards) == 1:
        shards[0].path.rename(directory / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, part in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        part.path.rename(directory / file)
        places |= dict.fromkeys(part.entries, file)
    index = {
        "metadata": {"total_size": sum(part.end for part in shards)},
        "weight_map": dict(sorted(places.items())),
    }
    text = json.dumps(index, indent=2) + "\n"
    (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


@dataclass
class Shard:
    """One file under construction.

    The format begins with a header that tells where every tensor lies. Room for it is left at
    first, enough for every name with long numbers, and what it doesn't need is filled with
    spaces, which the format allows.
    """

    path: Path
    file: BinaryIO
    room: int
    end: int = 0
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, names: Iterable[str]) -> Shard:
        """Begin a file that may hold all of the names."""
        room = sum(len(json.dumps(name)) + 160 for name in names) + 64
        room += -room % 8
        file = path.open("wb")
        file.seek(8 + room)
        return cls(path, file, room)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor."""
        if tensor.dtype not in DTYPES:
            raise EmitError(
                "a weight can't be stored in a safetensors file",
                where=name,
                why=f"the format knows no {tensor.dtype}",
                hint="convert the weight before the model is compiled, or write a .pt2",
            )
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        self.file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        self.entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.end, self.end + tensor.nbytes],
        }
        self.end += tensor.nbytes

    def finish(self) -> None:
        """Write the header."""
        header = json.dumps({"__metadata__": {"format": "pt"}, **self.entries}).encode()
        assert len(header) <= self.room
        self.file.seek(0)
        self.file.write(self.room.to_bytes(8, "little"))
        self.file.write(header.ljust(self.room))
        self.file.close()
