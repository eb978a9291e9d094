"""``.pt2`` files that would run code, leave their archive or fill the memory: all are refused.

Each is a good file, of which one thing has been changed. Code would make a file, the canary.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.cli import app as cli
from graphprune.frontends.pt2 import schema as pt2_schema
from graphprune.frontends.pt2.read import load_pt2

Entries = dict[str, bytes]
Edit = Callable[[Entries, Path], object]

PROGRAM = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
INPUTS = "data/sample_inputs/model.pt"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.constant = torch.ones(4)

    def forward(self, x: torch.Tensor, mode: str = "") -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(x), approximate=mode)) + self.constant


class Bait:
    """What a pickle runs when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.canary), "w")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "good.pt2"
    shapes = {"x": {0: torch.export.Dim.AUTO}, "mode": None}
    args = (torch.ones(3, 4),)
    exported = torch.export.export(Net(), args, {"mode": "tanh"}, dynamic_shapes=shapes)
    torch.export.save(exported, path)
    return path


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def edited(good: Path, path: Path, edit: Edit, canary: Path, *, method: int = 0) -> Path:
    """A file with other entries, written as PyTorch can read it."""
    with zipfile.ZipFile(good) as archive:
        entries = {n.partition("/")[2]: archive.read(n) for n in archive.namelist()}
    edit(entries, canary)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(f"good/{name}", data)
    return path


def run_of(canary: Path) -> str:
    """Python that makes the canary."""
    return f"__import__('pathlib').Path({str(canary)!r}).touch()"


def change(entries: Entries, name: str, edit: Callable[[Any], object]) -> None:
    data = json.loads(entries[name])
    edit(data)
    entries[name] = json.dumps(data).encode()


def replaced(old: str, new: Callable[[Path], str], name: str = PROGRAM) -> Edit:
    """The edit of a text wherever it stands in an entry, as JSON writes it."""

    def edit(entries: Entries, canary: Path) -> None:
        before = entries[name].decode()
        fresh = json.dumps(new(canary))[1:-1]
        entries[name] = before.replace(old, fresh).encode()
        assert entries[name].decode() != before

    return edit


def node(edit: Callable[[Any, Path], object]) -> Edit:
    """The edit of the first operator of the graph."""
    return lambda entries, canary: change(
        entries, PROGRAM, lambda data: edit(data["graph_module"]["graph"]["nodes"][0], canary)
    )


def size(text: Callable[[Path], str]) -> Edit:
    """The edit of the first size that is an expression."""

    def edit(data: Any, canary: Path) -> None:
        values = data["graph_module"]["graph"]["tensor_values"]
        sizes = [s for value in values.values() for s in value["sizes"] if "as_expr" in s]
        sizes[0]["as_expr"]["expr_str"] = text(canary)

    return lambda entries, canary: change(entries, PROGRAM, lambda data: edit(data, canary))


def nesting(side: str, edit: Callable[[Any, Path], object]) -> Edit:
    def change_spec(data: Any, canary: Path) -> None:
        signature = data["graph_module"]["module_call_graph"][0]["signature"]
        spec = json.loads(signature[side])
        edit(spec[1], canary)
        signature[side] = json.dumps(spec)

    return lambda entries, canary: change(entries, PROGRAM, lambda data: change_spec(data, canary))


def weight(**changes: object) -> Edit:
    def edit(data: Any) -> None:
        meta = data["config"]["up.weight"]
        meta.update({k: v for k, v in changes.items() if k in meta})
        meta["tensor_meta"].update({k: v for k, v in changes.items() if k in meta["tensor_meta"]})

    return lambda entries, canary: change(entries, WEIGHTS, edit)


def both(*edits: Edit) -> Edit:
    def edit(entries: Entries, canary: Path) -> None:
        for one in edits:
            one(entries, canary)

    return edit


def add(name: str, data: Callable[[Path], bytes]) -> Edit:
    return lambda entries, canary: entries.update({name: data(canary)})


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def payload(canary: Path) -> bytes:
    return saved(Bait(canary))


def whole(*values: int) -> list[dict[str, int]]:
    return [{"as_int": value} for value in values]


def factory(spec: Any, canary: Path) -> None:
    """A default dictionary, whose factory is imported from a module that makes the canary."""
    (canary.parent / "canary_module.py").write_text(f"open({str(canary)!r}, 'w')\nmake = list")
    context = {"default_factory_module": "canary_module", "default_factory_name": "make",
               "dict_context": ["x"]}  # fmt: skip
    leaf: dict[str, object] = {"type": None, "context": None, "children_spec": []}
    spec.update(type="collections.defaultdict", context=context, children_spec=[leaf])


def enumeration(spec: Any, canary: Path) -> None:
    (canary.parent / "canary_module.py").write_text(f"open({str(canary)!r}, 'w')")
    context = {"__enum__": True, "fqn": "canary_module:E", "name": "A"}
    spec.update(type="builtins.dict", context=json.dumps([context]))


CODE: dict[str, Edit] = {
    "pickled weight": both(weight(use_pickle=True), add("data/weights/weight_0", payload)),
    "pickled constant": both(
        lambda entries, canary: change(
            entries, "data/constants/model_constants_config.json",
            lambda data: data["config"]["constant"].update(use_pickle=True),
        ),
        add("data/constants/tensor_0", payload),
    ),
    "custom object": add("data/constants/custom_obj_0", payload),
    "opaque object": both(
        lambda entries, canary: change(
            entries, "data/constants/model_constants_config.json",
            lambda data: data["config"]["constant"].update(path_name="opaque_obj_0"),
        ),
        add("data/constants/opaque_obj_0", lambda canary: pickle.dumps(Bait(canary))),
    ),
    "older weights": add("data/weights/model.pt", payload),
    "older constants": add("data/constants/model.pt", payload),
    "example inputs": add(INPUTS, payload),
    "older pickle of example inputs": add(INPUTS, lambda canary: pickle.dumps(Bait(canary))),
    "another program": lambda entries, canary: entries.update({
        name.replace("/model", "/other"): data for name, data in entries.items() if "/model" in name
    } | {"data/sample_inputs/other.pt": payload(canary)}),
    "compiled library": add("data/aotinductor/model/a.so", lambda canary: b"\x7fELF"),
    "unknown entry": add("data/future/code.bin", lambda canary: b"x"),
    "size": size(run_of),
    "size by attribute": size(lambda canary: f"Integer(1).__class__({run_of(canary)})"),
    "size by sympy": size(lambda canary: f"sympify({run_of(canary)!r})"),
    "size by lambda": size(lambda canary: f"(lambda: {run_of(canary)})()"),
    "size by subscript": size(lambda canary: f"[{run_of(canary)}][0]"),
    "size in a format": size(lambda canary: f"f'{{{run_of(canary)}}}'"),
    "number": size(lambda canary: f"Float({run_of(canary)!r})"),
    "operator": node(lambda one, canary: one.update(target="torch.os.system", inputs=[
        {"name": "", "arg": {"as_string": f"touch {canary}"}, "kind": 1}])),
    "operator of a file": node(lambda one, canary: one.update(
        target="torch.ops.aten.from_file.default", inputs=[
            {"name": "filename", "arg": {"as_string": str(canary)}, "kind": 1},
            {"name": "shared", "arg": {"as_bool": True}, "kind": 1},
            {"name": "size", "arg": {"as_int": 8}, "kind": 1}])),
    "operator that loads a library": node(lambda one, canary: one.update(
        target="torch.ops.load_library", inputs=[
            {"name": "", "arg": {"as_string": str(canary)}, "kind": 1}])),
    "operator that takes an operator": node(lambda one, canary: one["inputs"].append(
        {"name": "", "arg": {"as_operator": "torch.os.system"}, "kind": 1})),
    "name of an input": lambda entries, canary: entries.update({
        PROGRAM: entries[PROGRAM].replace(b'"mode"', json.dumps(f"m={run_of(canary)}").encode())}),
    "name of a value": replaced("linear_1", lambda canary: f"a\n    {run_of(canary)}\n    b"),
    "name of a keyword": node(lambda one, canary: one["inputs"][0].update(
        name=f"a={run_of(canary)}, b")),
    "name of a weight": both(*(
        replaced("up.weight", lambda canary: f'up.", open({str(canary)!r}, "w") and "', name=one)
        for one in (PROGRAM, WEIGHTS))),
    "names of arguments": lambda entries, canary: change(
        entries, PROGRAM,
        lambda data: data["graph_module"]["module_call_graph"][0]["signature"].update(
            forward_arg_names=["x", f"mode={run_of(canary)}"]),
    ),
    "keyword of the inputs": both(
        nesting("in_spec", lambda spec, canary: spec["children_spec"][1].update(
            context=json.dumps([f"mode={run_of(canary)}"]))),
        lambda entries, canary: change(
            entries, PROGRAM,
            lambda data: data["graph_module"]["module_call_graph"][0]["signature"].update(
                forward_arg_names=None),
        ),
    ),
    "text as input": replaced("tanh", lambda canary: f"' or {run_of(canary)} or '"),
    "factory of a dictionary": nesting("out_spec", factory),
    "enumeration": nesting("out_spec", enumeration),
}  # fmt: skip


def refused(path: Path, canary: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one message that a file is refused with, in Python and on the command line."""
    with pytest.raises(gp.LoadError) as caught:
        gp.load(path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", str(path), "--json"])
    captured = capsys.readouterr()
    assert ended.value.code == 1
    assert json.loads(captured.out)["error"]["kind"] == "LoadError"
    assert captured.err.count("error: ") == 1
    assert "Traceback" not in captured.err
    assert "internal error" not in captured.err
    assert not canary.exists()
    return str(caught.value)


@pytest.mark.parametrize("kind", CODE)
def test_code_is_refused(
    kind: str,
    good: Path,
    canary: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    path = edited(good, tmp_path / "bad.pt2", CODE[kind], canary)
    assert "trust=True" in refused(path, canary, capsys)


def test_trust_lets_it_run(good: Path, canary: Path, tmp_path: Path) -> None:
    """The same bytes as above, so that the tests above test something."""
    path = edited(good, tmp_path / "bad.pt2", CODE["size"], canary)
    with pytest.raises(gp.LoadError):
        gp.load(path, trust=True)
    assert canary.exists()


def test_a_good_file_opens(good: Path, canary: Path, tmp_path: Path) -> None:
    path = edited(good, tmp_path / "same.pt2", lambda entries, canary: None, canary)
    x = torch.randn(5, 4)
    found, wanted = load_pt2(path), torch.export.load(good)
    torch.testing.assert_close(
        found.exported.module()(x, mode="tanh"), wanted.module()(x, mode="tanh")
    )


def test_checks_that_are_code_are_dropped(good: Path, canary: Path, tmp_path: Path) -> None:
    """PyTorch runs them when the program becomes a module."""
    edit: Edit = lambda entries, canary: change(  # noqa: E731
        entries, PROGRAM, lambda data: data.update(guards_code=[run_of(canary)])
    )
    path = edited(good, tmp_path / "bad.pt2", edit, canary)
    load_pt2(path).exported.module()(torch.randn(5, 4), mode="tanh")
    assert not canary.exists()


LIES: dict[str, Edit] = {
    "shape": weight(sizes=whole(4000, 4000), strides=whole(4000, 1)),
    "stride": weight(strides=whole(1_000_000, 1)),
    "offset": weight(storage_offset={"as_int": 10_000}),
    "negative stride": weight(strides=whole(-4, 1)),
    "nothing stored": both(
        weight(sizes=whole(2**20, 2**20), strides=whole(2**20, 1)),
        add("data/weights/weight_0", lambda canary: b""),
    ),
    "repeated": weight(sizes=whole(2**30, 2**30), strides=whole(0, 0)),
    "no entry": weight(path_name="weight_77"),
    "entry elsewhere": weight(path_name="../../models/model.json"),
    "symbolic": weight(sizes=[{"as_expr": {"expr_str": "s0", "hint": None}}, {"as_int": 4}]),
    "repeated example": add(INPUTS, lambda canary: saved(
        ((torch.ones(1).expand(2**20, 2**20),), {}))),
}  # fmt: skip


@pytest.mark.parametrize("kind", LIES)
def test_sizes_that_lie_are_refused(
    kind: str, good: Path, canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(edited(good, tmp_path / "bad.pt2", LIES[kind], canary), canary, capsys)


SLOW = {
    "powers": "9**9**9**9",
    "power": "Pow(Integer(9), Pow(Integer(9), Integer(9)))",
    "shift": "LShift(Integer(1), Integer(1000000000000))",
    "products": "Mul(" + ", ".join(["Integer(10000000000000000000)"] * 200) + ")",
    "sum": "Pow(Add(" + ", ".join(f"Symbol('s{i}')" for i in range(9)) + "), Integer(60))",
    "nested": "(" * 5000 + "s0" + ")" * 5000,
    "long": "s0 + " * 100_000 + "s0",
}


@pytest.mark.parametrize("kind", SLOW)
def test_sizes_that_take_for_ever_are_refused(
    kind: str, good: Path, canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = edited(good, tmp_path / "bad.pt2", size(lambda canary: SLOW[kind]), canary)
    assert "isn't arithmetic" in refused(path, canary, capsys)


def test_a_far_symbol_is_refused(
    good: Path, canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PyTorch counts up to its number, one by one."""
    bounds = {"u999999999999": {"min_val": 0, "max_val": 9}}
    edit: Edit = lambda entries, canary: change(  # noqa: E731
        entries, PROGRAM, lambda data: data["range_constraints"].update(bounds)
    )
    refused(edited(good, tmp_path / "bad.pt2", edit, canary), canary, capsys)


def raw(good: Path, names: list[str], change: Callable[[zipfile.ZipInfo], object]) -> bytes:
    """The good file with more entries, whose descriptions are changed."""
    buffer = io.BytesIO(good.read_bytes())
    with zipfile.ZipFile(buffer, "a") as archive:
        for name in names:
            info = zipfile.ZipInfo(name)
            change(info)
            archive.writestr(info, b"[]")
    return buffer.getvalue()


def linked(info: zipfile.ZipInfo) -> None:
    info.external_attr = 0o120777 << 16


def _keep(info: zipfile.ZipInfo) -> None:
    pass


def lying_header(good: Path) -> bytes:
    """The name of an entry beside its data is another one than in the directory."""
    data = bytearray(good.read_bytes())
    start = data.index(b"good/models/model.json")
    data[start : start + 22] = b"good/models/other.json"
    return bytes(data)


def overlapping(good: Path) -> bytes:
    """Two entries share their data, as in bombs that need no compression."""
    data = bytearray(good.read_bytes())
    first = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", first + 4)
    offset = struct.unpack_from("<I", data, second + 42)[0]
    struct.pack_into("<I", data, first + 42, offset)
    return bytes(data)


ARCHIVES: dict[str, Callable[[Path], bytes]] = {
    "parent": lambda good: raw(good, ["good/../../x"], _keep),
    "absolute": lambda good: raw(good, ["/etc/x"], _keep),
    "backslash": lambda good: raw(good, ["good/extra\\..\\x"], _keep),
    "two folders": lambda good: raw(good, ["other/extra/x"], _keep),
    "link": lambda good: raw(good, ["good/extra/x"], linked),
    "same name": lambda good: raw(good, ["good/models/model.json"], _keep),
    "same name but for case": lambda good: raw(good, ["good/Models/MODEL.json"], _keep),
    "something behind": lambda good: good.read_bytes() + b"PK\x05\x06" + bytes(30),
    "something before": lambda good: b"#!/bin/sh\n" + good.read_bytes(),
    "two names": lying_header,
    "overlap": overlapping,
    "truncated": lambda good: good.read_bytes()[:-200],
    "no archive": lambda good: b"PK" + bytes(1000),
    "empty": lambda good: b"",
}


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_odd_archives_are_refused(
    kind: str, good: Path, canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.pt2"
    path.write_bytes(ARCHIVES[kind](good))
    refused(path, canary, capsys)


BOMB = """
import resource, sys
import torch, torch.export, graphprune as gp
from graphprune.frontends import pt2
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    gp.load(sys.argv[1])
except gp.LoadError as error:
    print("compressed" in str(error), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_bomb_takes_no_memory(good: Path, canary: Path, tmp_path: Path) -> None:
    zeros = add("data/weights/weight_0", lambda canary: bytes(2**28))
    path = edited(good, tmp_path / "bomb.pt2", zeros, canary, method=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    command = [sys.executable, "-c", BOMB, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    compressed, kilobytes = done.stdout.split()
    assert compressed == "True"
    assert int(kilobytes) < 50_000


def test_every_text_of_the_schema_has_been_looked_at() -> None:
    """Of a new PyTorch, this names the fields that somebody has to look at; see `TEXTS`."""
    texts, keys = pt2_schema.texts_and_keys()
    assert texts <= pt2_schema.TEXTS.keys()
    assert keys <= pt2_schema.KEYS.keys()
