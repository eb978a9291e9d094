"""What a streamed run over an ONNX graph sees, holds, refuses and saves."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import graphprune as gp
from graphprune.errors import EmitError, LoadError, PlanError
from graphprune.streaming import State, apply_weights, find_sites, in_streams
from graphprune.streaming.onnx.adapter import OnnxModel
from onnx_graphs import graph, initialisers, run, weights
from streaming.onnx_oracle import Looking, go, images, program_of, value_of
from streaming.oracle import Halving

# Every layout, a weight that is used twice, two that share a value, and a bias that is trained.
MIXED = """m (float[b, 6, 8, 8] x) => (float[b, 10] z) {
    c = Conv <group = 2, pads = [1, 0, 1, 0], strides = [2, 1]> (x, kernel, shift)
    r = Relu (c)
    flat = Constant <value = int64[3] {0, 8, -1}> ()
    tokens = Reshape (r, flat)
    t1 = MatMul (tokens, twice)
    t2 = Tanh (t1)
    t3 = MatMul (t2, twice)
    u = Tanh (t3)
    q = MatMul (u, wq)
    k = MatMul (u, wk)
    qs = Sigmoid (q)
    m = Mul (qs, k)
    f = MatMul (mix, m)
    n = LayerNormalization (f, scale, offset)
    axes = Constant <value = int64[1] {1}> ()
    p = ReduceMean <axes = [1], keepdims = 0> (n)
    h = Gemm <transB = 1> (p, hidden, bias)
    a = Relu (h)
    z = MatMul (a, head)
}"""


@pytest.fixture(scope="module")
def mixed():
    return graph(
        MIXED,
        kernel=weights(8, 3, 3, 3),
        shift=weights(8),
        twice=weights(24, 24) / 5,
        wq=weights(24, 16) / 5,
        wk=weights(24, 16, seed=1) / 5,
        mix=weights(8, 8),
        scale=weights(16),
        offset=weights(16, seed=1),
        hidden=weights(12, 16),
        bias=weights(12),
        head=weights(12, 10),
    )


@pytest.fixture(scope="module")
def program(mixed, tmp_path_factory):
    return program_of(mixed, tmp_path_factory.mktemp("mixed"))


def patches(x):
    """Rows of the grouped convolution, written out."""
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))
    places = [(i, j) for i in range(0, x.shape[2] - 2, 2) for j in range(x.shape[3] - 2)]
    return [
        np.stack([
            image[3 * part : 3 * part + 3, i : i + 3, j : j + 3].reshape(-1)
            for image in x for i, j in places
        ])
        for part in range(2)
    ]  # fmt: skip


ROWS = {
    "kernel": [("x", patches)],
    "twice": [("tokens", lambda x: [x.reshape(-1, 24)]), ("t2", lambda x: [x.reshape(-1, 24)])],
    "wq": [("u", lambda x: [x.reshape(-1, 24)])],
    "wk": [("u", lambda x: [x.reshape(-1, 24)])],
    "mix": [("m", lambda x: [x.transpose(0, 2, 1).reshape(-1, 8)])],
    "hidden": [("p", lambda x: [x])],
}


@pytest.mark.parametrize("batch", [1, 2])
def test_every_statistic_is_that_of_the_model_as_it_has_become(mixed, program, batch):
    data = np.concatenate([d["x"] for d in images(6, 8, 8)])
    new, treatment = go(program, data, batch=batch)
    assert [g.parameters for g in treatment.groups] == [
        ("kernel",), ("twice",), ("wq", "wk"), ("mix",), ("hidden",)
    ]  # fmt: skip
    # The first use of a weight that is used twice has run with the weight as it was.
    apart = onnx.ModelProto()
    apart.CopyFrom(mixed)
    second = [n for n in apart.graph.node if "twice" in n.input][1]
    second.input[1] = "later"
    apart.graph.initializer.append(numpy_helper.from_array(weights(24, 24) / 5, "later"))
    treated: dict[str, torch.Tensor] = {}
    for group in treatment.groups:
        for name in group.parameters:
            parts = [0.0] * group.parts
            for value, rows in ROWS[name]:
                found = rows(value_of(apart, treated, {"x": data}, value))
                parts = [total + r.T @ r for total, r in zip(parts, found, strict=True)]
            for seen, expected in zip(treatment.moments[name], parts, strict=True):
                np.testing.assert_allclose(
                    seen.total.numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()
                )
        names = {name: "later" if name == "twice" else name for name in group.parameters}
        treated |= {own: new[name] for name, own in names.items()}
    assert all(int((w == 0).sum()) == w.numel() // 2 for n, w in new.items() if n != "kernel")


def test_the_result_is_saved_with_exactly_the_zeros(program, tmp_path):
    before = {n: program.weights[n].clone() for n in program.weights}
    new, _ = go(program, images(6, 8, 8))
    pruned = apply_weights(program, new)
    assert all(torch.equal(program.weights[n], before[n]) for n in before)
    assert pruned.fingerprint == program.fingerprint
    file = tmp_path / "pruned.onnx"
    gp.apply(pruned, gp.Plan(pruned.fingerprint, {})).save(file)
    stored = initialisers(onnx.load(file))
    for name, weight in before.items():
        expected = new.get(name, weight) if name in new else weight
        assert np.array_equal(stored[name], expected.numpy())
    feeds = images(6, 8, 8)[0]
    (found,) = run(file, **feeds)
    model = onnx.load(program.path)
    np.testing.assert_allclose(found, value_of(model, new, feeds, "z"), rtol=1e-3, atol=1e-4)


def test_what_was_treated_can_be_pruned_and_verified(program, tmp_path):
    """Numbers that are known of small weights follow the new ones."""
    new, _ = go(program, images(6, 8, 8))
    pruned = apply_weights(program, new)
    plan = gp.select(pruned, remove={"ffn": 0.25})
    slim = gp.apply(pruned, plan)
    gp.verify(pruned, plan, slim).raise_if_failed()
    assert np.array_equal(pruned.known["mix"].values[0], new["mix"].numpy())


def test_an_output_never_replaces_the_model_that_it_was_made_from(program):
    new, _ = go(program, images(6, 8, 8))
    pruned = apply_weights(program, new)
    with pytest.raises(EmitError, match="the source itself"):
        gp.apply(pruned, gp.Plan(pruned.fingerprint, {})).save(program.path)


def test_new_weights_of_other_shapes_are_refused(program):
    with pytest.raises(PlanError, match="another shape"):
        apply_weights(program, {"mix": torch.zeros(8, 7)})
    with pytest.raises(PlanError, match="no weight 'mixed'"):
        apply_weights(program, {"mixed": torch.zeros(8, 7)})


class Interrupted(Exception):
    """What stops a run."""


class Stopping(Halving):
    """Fails in the middle of one group, after its first weight."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def treat(self, group, observers, weights):
        for item in super().treat(group, observers, weights):
            yield item
            if group.index == self.at:
                raise Interrupted


@pytest.mark.parametrize(("every", "held"), [(0, None), (1, None), (2, None), (1, torch.bfloat16)])
def test_resuming_gives_the_same_bits(program, tmp_path, every, held):
    data = images(6, 8, 8)
    expected, whole = go(program, data, held=held)
    for at in range(len(whole.groups)):
        folder = tmp_path / str(at)
        with pytest.raises(Interrupted):
            go(program, data, Stopping(at), state=State(folder, every=every), held=held)
        steps = []
        state = State(folder, every=every, resume=True)
        new, again = go(program, data, state=state, held=held, progress=steps.append)
        assert set(new) == set(expected)
        assert all(torch.equal(new[n], expected[n]) for n in expected)
        for name, moments in again.moments.items():
            for a, b in zip(moments, whole.moments[name], strict=True):
                assert torch.equal(a.total, b.total)
        assert [g.index for g in again.groups] == list(range(at, len(whole.groups)))
        assert len(steps) < len(whole.groups) or every == 0 or at <= 1


def test_a_finished_run_runs_nothing_again(program, tmp_path, monkeypatch):
    data = images(6, 8, 8)
    expected, _ = go(program, data, state=State(tmp_path))
    monkeypatch.setattr(OnnxModel, "forward", None)
    new, again = go(program, data, state=State(tmp_path, resume=True))
    assert not again.groups
    assert set(new) == set(expected)
    assert all(torch.equal(new[n], expected[n]) for n in expected)


def test_a_directory_of_another_model_is_refused(program, mixed, tmp_path):
    data = images(6, 8, 8)
    with pytest.raises(Interrupted):
        go(program, data, Stopping(1), state=State(tmp_path / "run"))
    other = onnx.ModelProto()
    other.CopyFrom(mixed)
    next(n for n in other.graph.node if n.op_type == "Tanh").op_type = "Sigmoid"
    changed = program_of(other, tmp_path)
    with pytest.raises(LoadError, match="another run") as caught:
        go(changed, data, state=State(tmp_path / "run", resume=True))
    assert caught.value.why == "the model computes something else"


def test_half_precision_holds_half_the_memory(program):
    data = images(6, 8, 8)
    steps: dict = {None: [], torch.bfloat16: [], torch.float16: []}
    for held, own in steps.items():
        go(program, data, Looking(), held=held, progress=own.append)
    sizes = {h: [s.held_bytes for s in own] for h, own in steps.items()}
    tokens = 3 * 8 * 24 * 4  # of three samples: 8 channels of 4 x 6 places
    assert sizes[None][1] == tokens  # t2: the weight before it was seen twice
    assert sizes[torch.bfloat16][1] == sizes[torch.float16][1] == tokens // 2
    assert sizes[None][-1] == 0  # nothing runs any more


def test_masks_that_all_samples_share_are_held_once(tmp_path):
    model = graph(
        """m (float[b, n, 6] x, int64[b, n] attention_mask) => (float[b, n, 4] z) {
            m = Cast <to = 1> (attention_mask)
            axis = Constant <value = int64[1] {2}> ()
            wide = Unsqueeze (m, axis)
            h = MatMul (x, first)
            a = Mul (h, wide)
            g = MatMul (a, second)
            c = Mul (g, wide)
            y = MatMul (c, third)
            t = Tanh (y)
            z = MatMul (t, head)
        }""",
        first=weights(6, 6), second=weights(6, 6, seed=1), third=weights(6, 4), head=weights(4, 4),
    )  # fmt: skip
    program = program_of(model, tmp_path)
    data = {"x": weights(4, 5, 6), "attention_mask": np.ones((4, 5), dtype=np.int64)}
    steps = []
    go(program, data, Looking(), progress=steps.append)
    assert [set(s.held) for s in steps] == [{"wide"}, {"wide", "a"}, set()]
    assert [s.held_bytes for s in steps] == [5 * 4, 5 * 4 + 4 * 5 * 6 * 4, 0]


def test_padding_never_enters_a_statistic(tmp_path):
    model = graph(
        """m (int64[b, n] input_ids, int64[b, n] attention_mask) => (float[b, n, 4] z) {
            x = Gather (table, input_ids)
            s = Constant <value = int64[2] {-1, 6}> ()
            r = Reshape (x, s)
            h = MatMul (r, first)
            a = Tanh (h)
            g = Gemm <transB = 1> (a, second)
            t = Shape (x)
            b = Reshape (g, t)
            m = Cast <to = 1> (attention_mask)
            axis = Constant <value = int64[1] {2}> ()
            wide = Unsqueeze (m, axis)
            c = Mul (b, wide)
            z = MatMul (c, head)
        }""",
        table=weights(20, 6), first=weights(6, 6), second=weights(6, 6, seed=1), head=weights(6, 4),
    )  # fmt: skip
    program = program_of(model, tmp_path)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 20, (3, 7))
    mask = np.ones((3, 7), dtype=np.int64)
    mask[0, 5:] = mask[2, :3] = 0
    padded, seen = {"input_ids": tokens, "attention_mask": mask}, Looking()
    go(program, padded, seen, batch=3)
    rows = weights(20, 6)[tokens[mask == 1]]
    np.testing.assert_allclose(seen.observers["first"][0].rows.numpy(), rows)
    inner = np.tanh(rows @ weights(6, 6))
    np.testing.assert_allclose(seen.observers["second"][0].rows.numpy(), inner, atol=1e-6)
    alone = Looking()
    go(program, tokens, alone)
    assert len(alone.observers["first"][0].rows) == tokens.size


def test_padding_that_is_mixed_with_tokens_is_refused(tmp_path):
    model = graph(
        """m (int64[b, n] input_ids, int64[b, n] attention_mask) => (float[b, n, 4] z) {
            x = Gather (table, input_ids)
            t = Transpose <perm = [0, 2, 1]> (x)
            c = Conv <pads = [1, 1]> (t, kernel)
            m = Cast <to = 1> (attention_mask)
            axis = Constant <value = int64[1] {1}> ()
            wide = Unsqueeze (m, axis)
            d = Mul (c, wide)
            y = Transpose <perm = [0, 2, 1]> (d)
            z = MatMul (y, head)
        }""",
        table=weights(20, 6), kernel=weights(6, 6, 3), head=weights(6, 4),
    )  # fmt: skip
    program = program_of(model, tmp_path)
    data = {"input_ids": np.ones((2, 7), np.int64), "attention_mask": np.ones((2, 7), np.int64)}
    data["attention_mask"][0, 4:] = 0
    with pytest.raises(PlanError, match="padding can't be told from tokens"):
        go(program, data, Looking())


def test_transposed_copies_follow_the_weight_that_they_are_made_of(tmp_path):
    """The copy is computed long before the barrier where the weight is treated."""
    model = graph(
        """m (float[1, 4, 6] x) => (float[1, 4, 3] z) {
            t = Transpose (second)
            a = MatMul (x, first)
            b = Tanh (a)
            g = MatMul (b, t)
            h = MatMul (g, third)
            u = Tanh (h)
            z = MatMul (u, head)
        }""",
        first=weights(6, 6), second=weights(6, 6, seed=1), third=weights(6, 6, seed=2),
        head=weights(6, 3),
    )  # fmt: skip
    program = program_of(model, tmp_path)
    data = images(4, 6)
    new, treatment = go(program, data)
    treated = {n: new[n] for n in ("first", "second")}
    rows = np.concatenate([value_of(model, treated, d, "g") for d in data]).reshape(-1, 6)
    np.testing.assert_allclose(
        treatment.moments["third"][0].total.numpy(), rows.T @ rows, rtol=1e-4, atol=1e-4
    )


class Gaps(Halving):
    """Halves weights, and keeps what their outputs lack."""

    def __init__(self):
        super().__init__()
        self.missing = {}
        self.streams = {}
        self.in_stream = {}

    def observer(self, group, part):
        owner = self
        moments = super().observer(group, part)

        class Seen(type(moments)):
            def wants_gap(self, parameter, in_stream):
                owner.in_stream[parameter] = in_stream
                return True

            def gap(self, parameter, x, missing, stream):
                owner.missing.setdefault(parameter, []).append(missing.clone())
                owner.streams.setdefault(parameter, []).append(stream)

        return Seen()


def test_gaps_are_those_to_the_dense_model(tmp_path):
    model = graph(
        """m (float[b, 4, 6] x) => (float[b, 4, 3] z) {
            s = Tanh (x)
            a = MatMul (s, first)
            b = Tanh (a)
            g = MatMul (b, second)
            gb = Add (g, bias)
            r = Add (s, gb)
            h = MatMul (r, third)
            hb = Tanh (h)
            k = MatMul (hb, fourth)
            r2 = Add (k, r)
            z = MatMul (r2, head)
        }""",
        first=weights(6, 8), second=weights(8, 6), bias=weights(6), third=weights(6, 8, seed=1),
        fourth=weights(8, 6, seed=1), head=weights(6, 3),
    )  # fmt: skip
    program = program_of(model, tmp_path)
    data = images(4, 6)
    new, treatment = go(program, data, Gaps(), reference=True)
    streams = in_streams(program, find_sites(program))
    assert streams == {"second", "fourth"}
    assert treatment.in_stream == {n: n in streams for n in ("first", "second", "third", "fourth")}

    def value(name, treated, sample):
        return value_of(model, {n: new[n] for n in treated}, sample, name).reshape(4, -1)

    for at, sample in enumerate(data):
        # Of `second` nothing but its own input differs; the stream before it is dense.
        wanted = value("g", [], sample) - value("g", ["first"], sample)
        np.testing.assert_allclose(treatment.missing["second"][at].numpy(), wanted, atol=1e-4)
        wanted = value("h", [], sample) - value("h", ["first", "second"], sample)
        np.testing.assert_allclose(treatment.missing["third"][at].numpy(), wanted, atol=1e-4)
        # What `fourth` writes is added to a stream that lacks something, too.
        before = ["first", "second", "third"]
        wanted = value("r2", [], sample) - value("r2", before, sample)
        np.testing.assert_allclose(treatment.missing["fourth"][at].numpy(), wanted, atol=1e-4)
        # The streams are those of the dense model, without what is added behind the product.
        stream = treatment.streams["fourth"][at].numpy()
        np.testing.assert_allclose(stream, value("r2", [], sample), atol=1e-4)
        wanted = value("s", [], sample) + value("g", [], sample)
        np.testing.assert_allclose(treatment.streams["second"][at].numpy(), wanted, atol=1e-4)
        assert treatment.streams["third"][at] is None


def test_biases_may_be_changed_with_their_weights(tmp_path):
    class Moving(Halving):
        def treat(self, group, observers, weights):
            yield from super().treat(group, observers, weights)
            for name in set(weights) - set(group.parameters):
                yield name, weights[name] + 1

    model = graph(
        """m (float[1, 4, 6] x) => (float[1, 4, 3] z) {
            a = MatMul (x, first)
            ab = Add (ba, a)
            b = Tanh (ab)
            g = MatMul (b, second)
            z = MatMul (g, head)
        }""",
        first=weights(6, 6), ba=weights(6), second=weights(6, 6, seed=1), head=weights(6, 3),
    )  # fmt: skip
    program = program_of(model, tmp_path)
    new, treatment = go(program, images(4, 6), Moving())
    np.testing.assert_allclose(new["ba"].numpy(), weights(6) + 1)
    assert set(new) == {"first", "second", "ba"}
    rows = np.concatenate([value_of(model, dict(new), d, "b") for d in images(4, 6)])
    rows = rows.reshape(-1, 6)
    np.testing.assert_allclose(
        treatment.moments["second"][0].total.numpy(), rows.T @ rows, rtol=1e-4, atol=1e-4
    )
