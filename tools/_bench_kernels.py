"""tools/bench kernels: sparse layers against dense ones, in turns in one process.

Weights that a model reads once per token come from memory: every time is that of one product among
copies of its weight that together fit no cache.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from graphprune.kernels.choose import DENSE, MARGIN, Table, choose, device_name, measure

PARTS = ("cpu", "onnx", "decode", "gpu")
SIZE = 4096
SPARSITIES = (0.5, 0.7, 0.8, 0.9)
CPU_BARS = {0.5: 1.15, 0.8: 1.5}  # dense time over ours, at one token
ONNX_BARS = {0.7: 1.3, 0.9: 1.7}
_TURNS = 15

Row = dict[str, Any]


def main(parts: Sequence[str], model: str, write: Path | None) -> int:
    """Print what is found; 0 where every bar is reached, 1 otherwise.

    Args:
        parts: of `PARTS`.
        model: directory of a sparse language model, by `graphprune compile --format hf --format
            onnx-decoder`; "" leaves the part ``decode`` out.
        write: a JSON file whose entries for these parts are replaced.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, list[Row]] = {}
    for part in parts or PARTS:
        if part == "decode" and not model:
            print("decode: left out, give a sparse model with --model")
            continue
        if part == "gpu" and not torch.cuda.is_available():
            print("gpu: left out, there is none")
            continue
        found[part] = {"cpu": _cpu, "onnx": _onnx, "decode": lambda: _decode(model), "gpu": _gpu}[
            part
        ]()
        for row in found[part]:
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                            for k, v in row.items()), flush=True)  # fmt: skip
    if write is not None:
        _keep(write, found)
    missed = [
        r
        for rows in found.values()
        for r in rows
        if r["ratio"] < r.get("bar", 0) or not r.get("same_tokens", True)
    ]
    for row in missed:
        print("missed:", row)
    return 1 if missed else 0


def _misses(row: Row) -> bool:
    return row["ratio"] < row.get("bar", 0) or not row.get("same_tokens", True)


def pruned(rows: int, columns: int, sparsity: float, dtype: torch.dtype) -> torch.Tensor:
    """A weight whose smallest entries are zero."""
    weight = torch.randn(rows, columns)
    gone = round(sparsity * weight.numel())
    level = weight.abs().flatten().kthvalue(gone).values
    return weight.masked_fill(weight.abs() <= level, 0).to(dtype)


def _cpu() -> list[Row]:
    """One weight, one and four tokens, in float32 and bfloat16."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for sparsity in SPARSITIES:
            weight = pruned(SIZE, SIZE, sparsity, dtype)
            formats = ["bitmap"] + (["csr"] if dtype == torch.float32 else [])
            for tokens in (1, 4):
                times = measure(weight, tokens, formats)
                row: Row = {
                    "dtype": str(dtype).removeprefix("torch."),
                    "sparsity": sparsity,
                    "tokens": tokens,
                    "dense_ms": times[DENSE] * 1000,
                    "ms": times["bitmap"] * 1000,
                    "ratio": times[DENSE] / times["bitmap"],
                }
                if "csr" in times:
                    row["csr_ratio"] = times[DENSE] / times["csr"]
                if tokens == 1 and sparsity in CPU_BARS:
                    row["bar"] = CPU_BARS[sparsity]
                best = choose(weight, (tokens,), formats, Table(None))
                row["chosen"] = best
                rows.append(row)
    return rows


def _onnx() -> list[Row]:
    """An MLP of two layers in ONNX Runtime, at one token."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    import graphprune as gp
    from graphprune.packing import pack

    rows = []
    for sparsity in SPARSITIES:
        nodes, weights, x = [], [], "x"
        for i in range(4):  # two MLPs, so that a weight is out of the cache when it comes again
            weight = pruned(SIZE, SIZE, sparsity, torch.float32).numpy()
            weights.append(numpy_helper.from_array(weight, f"w{i}"))
            nodes.append(helper.make_node("MatMul", [x, f"w{i}"], [f"h{i}"]))
            nodes.append(helper.make_node("Relu", [f"h{i}"], [f"r{i}"]))
            x = f"r{i}"
        graph = helper.make_graph(
            nodes,
            "mlp",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, SIZE])],
            [helper.make_tensor_value_info(x, TensorProto.FLOAT, [1, SIZE])],
            initializer=weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        with tempfile.TemporaryDirectory(prefix="graphprune-") as holder:
            dense, packed = Path(holder) / "dense.onnx", Path(holder) / "packed.onnx"
            onnx.save(model, dense)
            pack(dense, packed)
            sessions = [gp.runtime.session(p, threads=1) for p in (dense, packed)]
            feed = {"x": np.random.default_rng(0).standard_normal((1, SIZE)).astype(np.float32)}
            calls = [_call(s, feed) for s in sessions]
            first, second = (c()[x] for c in calls)
            assert np.abs(first - second).max() <= 1e-4 * np.abs(first).max()
            times = _in_turns(calls)
            sizes = [p.stat().st_size for p in (dense, packed)]
        row = {"sparsity": sparsity, "tokens": 1, "dense_ms": times[0] * 1000,
               "ms": times[1] * 1000, "ratio": times[0] / times[1],
               "bytes": sizes[1] / sizes[0]}  # fmt: skip
        if sparsity in ONNX_BARS:
            row["bar"] = ONNX_BARS[sparsity]
        rows.append(row)
    return rows


def _call(session: Any, feed: Mapping[str, Any]) -> Callable[[], Any]:
    return lambda: session(**feed)


def _in_turns(calls: Sequence[Callable[[], Any]], turns: int = _TURNS) -> list[float]:
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(-2, turns):
        for call, kept in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if turn >= 0:
                kept.append(time.perf_counter() - start)
    return [statistics.median(each) for each in times]


def _decode(model: str) -> list[Row]:
    """A step of one token of a language model, sparse against dense with zeros."""
    import graphprune as gp
    from graphprune.packing import pack

    source = Path(model)

    (decoder,) = sorted(source.rglob("*decoder*.onnx")) or sorted(source.rglob("*.onnx"))
    with tempfile.TemporaryDirectory(prefix="graphprune-") as holder:
        packed = pack(source, Path(holder) / "hf")
        models = [gp.runtime.model(source, format=DENSE), gp.runtime.model(Path(holder) / "hf")]
        rows = [_decode_torch(models, packed.bytes_after / packed.bytes_before)]
        file = Path(holder) / "decoder.onnx"
        pack(decoder, file, format="auto")
        after, before = (
            sum(p.stat().st_size for p in f.parent.glob(f"{f.name}*")) for f in (file, decoder)
        )
        rows.append(_decode_onnx([decoder, file], after / before))
    return rows


PROMPT = list(range(100, 132))
NEW = 32


def _decode_torch(models: Sequence[Any], size: float) -> Row:
    prompt = torch.tensor([PROMPT])
    texts = []
    times: list[list[float]] = [[], []]
    with torch.inference_mode():
        states = []
        for model in models:
            output = model(prompt, use_cache=True)
            states.append((output.past_key_values, output.logits[:, -1:].argmax(-1)))
            texts.append([int(states[-1][1])])
        for turn in range(NEW):
            for i, model in enumerate(models):
                cache, token = states[i]
                start = time.perf_counter()
                output = model(token, past_key_values=cache, use_cache=True)
                if turn >= 2:
                    times[i].append(time.perf_counter() - start)
                token = output.logits[:, -1:].argmax(-1)
                states[i] = output.past_key_values, token
                texts[i].append(int(token))
    dense, ours = (statistics.median(t) for t in times)
    return {"runtime": "PyTorch", "same_tokens": texts[0] == texts[1], "dense_ms": dense * 1000,
            "ms": ours * 1000, "ratio": dense / ours, "bytes": size, "bar": 1.0}  # fmt: skip


def _decode_onnx(files: Sequence[Path], size: float) -> Row:
    import numpy as np

    from graphprune.ir.onnx.ort import open_raw
    from graphprune.runtime.generation import Decoder

    decoders = [Decoder(open_raw(f, 1, ["cpu"])) for f in files]
    tokens = [np.array([PROMPT]) for _ in files]
    texts: list[list[int]] = [[], []]
    times: list[list[float]] = [[], []]
    for turn in range(NEW):
        for i, decoder in enumerate(decoders):
            mask = np.ones((1, len(PROMPT) + turn), np.int64)
            start = time.perf_counter()
            logits = decoder.step(tokens[i], mask)
            if turn >= 3:
                times[i].append(time.perf_counter() - start)
            chosen = logits[:, -1].argmax(-1)
            texts[i].append(int(chosen[0]))
            tokens[i] = chosen.astype(np.int64)[:, None]
    dense, ours = (statistics.median(t) for t in times)
    return {"runtime": "ONNX Runtime", "same_tokens": texts[0] == texts[1],
            "dense_ms": dense * 1000, "ms": ours * 1000, "ratio": dense / ours, "bytes": size,
            "bar": 1 / MARGIN}  # fmt: skip


def _gpu() -> list[Row]:
    from _bench_kernels_gpu import rows

    return rows()


def _keep(file: Path, found: Mapping[str, list[Row]]) -> None:
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    where = device_name(torch.device("cuda" if "gpu" in found else "cpu"))
    for part, rows in found.items():
        known[part] = {
            "date": datetime.date.today().isoformat(),
            "device": where if part == "gpu" else device_name(torch.device("cpu")),
            "python": platform.python_version(),
            "rows": rows,
        }
    file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
