"""What a run holds, runs, refuses and reports."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.errors import PlanError
from graphprune.frontends.hf.load import trace_model
from graphprune.streaming import batches, find_sites, stream
from graphprune.streaming.torch.runner import Runner
from streaming.oracle import Halving, tokens, traced
from zoo import decoders, encoders, mixtures
from zoo.case import randomise


@pytest.fixture(scope="module")
def llama():
    return traced(decoders.llama_gqa_4)[0]


def run(program, data, batch=1, **options):
    steps = []
    treatment = Halving()
    sites = find_sites(program)
    new = stream(
        program, sites, batches(program, data, batch), treatment, progress=steps.append, **options
    )
    return new, treatment, steps


def test_a_barrier_holds_the_residual_stream_and_one_more_value(llama):
    _, _, steps = run(llama, tokens())
    nodes = {n.name: n for n in llama.exported.graph.nodes}
    tables = {n for s in steps for n in s.held if nodes[n].meta["val"] is not None
              and _is_table(llama, nodes[n])}  # fmt: skip
    sizes = [sorted(tuple(nodes[n].meta["val"].shape)[-1] for n in s.held - tables
                    if isinstance(nodes[n].meta["val"], torch.Tensor)) for s in steps]  # fmt: skip
    # queries, keys, values | output | gate, up | down: the stream and what the weights read. After
    # the last group nothing runs, so that the stream ends where the last weights have read it.
    layer = [[32, 32], [32, 64], [32, 32], [32, 48]]
    assert sizes == [*layer, *layer[:2], [32], []]
    assert len(tables) <= 5  # cosines, sines, the mask
    assert not steps[-1].held & tables


def _is_table(program, node):
    """Whether a value is the same for all tokens."""
    seen, waiting = set(), [node]
    while waiting:
        n = waiting.pop()
        if n.name == "input_ids" or n.op == "placeholder":
            if n.name == "input_ids":
                return False
            continue
        for operand in n.all_input_nodes if "sym_size" not in str(n.target) else ():
            if operand not in seen:
                seen.add(operand)
                waiting.append(operand)
    return True


def test_held_memory_is_that_of_the_held_values(llama):
    count, length = 3, 7
    _, _, steps = run(llama, tokens(count, length))
    tables = length * length + 2 * length * 8 * 4 + 3 * 8
    for step, widths in zip(steps, [64, 96, 64, 80, 64, 96, 32, 0], strict=True):
        own = count * length * widths * 4
        assert own <= step.held_bytes <= own + tables + 64


def test_every_operator_runs_once_per_sample_and_tables_once(llama, monkeypatch):
    runs = Counter()
    original = Runner.execute

    def counted(self, node, values, sizes=None):
        runs[node.name] += 1
        return original(self, node, values, sizes)

    monkeypatch.setattr(Runner, "execute", counted)
    run(llama, tokens(4))
    nodes = {n.name: n for n in llama.exported.graph.nodes}
    per_sample = {n for n in runs if not _is_table(llama, nodes[n])}
    assert {runs[n] for n in per_sample} == {4}
    assert {runs[n] for n in runs.keys() - per_sample} == {1}
    products = [n for n in nodes if n.startswith("linear")]
    assert sum(n in runs for n in products) == len(products) - 2  # no last down_proj, no head


class Looking(Halving):
    """Changes nothing."""

    def treat(self, group, observers, weights):
        self.moments[group.name] = list(observers)
        return ()


def test_half_precision_holds_half_the_memory_and_changes_little(llama):
    sites, data = find_sites(llama), batches(llama, tokens())
    moments, memory = [], []
    for held in (None, torch.bfloat16):
        treatment, steps = Looking(), []
        assert not stream(llama, sites, data, treatment, held=held, progress=steps.append)
        moments.append(treatment.moments)
        memory.append([s.held_bytes for s in steps])
    tables = 7 * 7 + 2 * 7 * 8 * 4 + 3 * 8 + 64
    assert all(b <= a / 2 + tables for a, b in zip(*memory, strict=True))
    differences = [
        float((moments[0][n][0].total - moments[1][n][0].total).norm()
              / moments[0][n][0].total.norm())
        for n in moments[0]
    ]  # fmt: skip
    assert differences[0] == 0  # nothing has been held yet
    assert all(0 < d < 0.01 for d in differences[1:])


@pytest.mark.parametrize("build", [decoders.gpt2, mixtures.mixtral])
def test_two_runs_are_equal_to_the_last_bit(build):
    program = traced(build)[0]
    first, _, _ = run(program, tokens())
    second, _, _ = run(program, tokens())
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_a_checkpoint_in_half_precision_is_computed_in_the_dtype_of_the_run():
    torch.manual_seed(0)
    module = randomise(decoders.llama_gqa_4()).bfloat16()
    wide = trace_model(copy.deepcopy(module).float())
    narrow = trace_model(module)
    expected, seen, _ = run(wide, tokens(), dtype=torch.float64)
    new, own, _ = run(narrow, tokens(), dtype=torch.float64)
    assert {w.dtype for w in new.values()} == {torch.bfloat16}
    for name, weight in new.items():
        assert torch.equal(weight.float(), expected[name])
        torch.testing.assert_close(own.moments[name][0].total, seen.moments[name][0].total)


def test_weights_are_asked_for_one_at_a_time(llama):
    class Watching(Halving):
        def treat(self, group, observers, weights):
            assert list(weights) == list(group.parameters)
            with pytest.raises(KeyError):
                weights["lm_head.weight"]
            yield from super().treat(group, observers, weights)

    stream(llama, find_sites(llama), batches(llama, tokens()), Watching())


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = F.relu(self.mid(torch.log(self.up(x).abs() + x.sum(-1, keepdim=True))))
        return self.head(self.down(x))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_nan_names_the_operator_its_module_and_the_sample(batch):
    torch.manual_seed(0)
    program = gp.trace(Broken().eval(), (torch.ones(2, 6),))
    x = torch.ones(6, 6)
    x[4] = -20.0  # the logarithm of a negative number
    with pytest.raises(PlanError) as caught:
        run(program, x, batch)
    text = str(caught.value)
    assert "mid.weight" in caught.value.what
    assert "log (log)" in text
    assert "sample 4" in text
    assert "NaN" in text


def test_nan_in_a_weight_names_the_weight():
    module = Broken().eval()
    with torch.no_grad():
        module.up.bias[3] = torch.nan
    program = gp.trace(module, (torch.ones(2, 6),))
    with pytest.raises(PlanError, match=r"the weight up\.bias holds NaN") as caught:
        run(program, torch.ones(2, 6))
    assert "linear (linear) in up, sample 0" in str(caught.value)


def test_nan_in_an_input_names_the_input():
    program = gp.trace(Broken().eval(), (torch.ones(2, 6),))
    x = torch.ones(3, 6)
    x[2, 1] = torch.inf
    with pytest.raises(PlanError, match="the input x, sample 2"):
        run(program, x)


def test_new_weights_are_checked(llama):
    class Bad(Halving):
        def __init__(self, change):
            super().__init__()
            self.change = change

        def treat(self, group, observers, weights):
            yield self.change(group.name, weights[group.name])

    def broken(change):
        stream(llama, find_sites(llama), batches(llama, tokens(1)), Bad(change))

    with pytest.raises(PlanError, match="not finite"):
        broken(lambda n, w: (n, w / 0))
    with pytest.raises(PlanError, match="another shape"):
        broken(lambda n, w: (n, w[:3]))
    with pytest.raises(PlanError, match="the treatment changed lm_head"):
        broken(lambda n, w: ("lm_head.weight", w))


def test_padding_never_enters_a_statistic():
    program = traced(encoders.bert)[0]
    whole, short = tokens(1, 9), tokens(1, 5, seed=8)
    padded = torch.cat([short, torch.full((1, 4), 7)], 1)
    ids = torch.cat([whole, padded])
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    _, together, _ = run(
        program, {"input_ids": ids, "attention_mask": mask}, 2, dtype=torch.float64
    )
    apart = [{"input_ids": t, "attention_mask": torch.ones_like(t)} for t in (whole, short)]
    _, alone, _ = run(program, apart, dtype=torch.float64)
    assert together.moments.keys() == alone.moments.keys()
    for name, (own,) in together.moments.items():
        assert own.rows == alone.moments[name][0].rows == 14
        torch.testing.assert_close(own.total, alone.moments[name][0].total, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("build", [decoders.gpt2, decoders.llama_gqa_4, mixtures.mixtral])
def test_padding_on_the_right_of_a_causal_model(build):
    program = traced(build)[0]
    ids = tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    _, padded, _ = run(program, {"input_ids": ids, "attention_mask": mask}, 2, dtype=torch.float64)
    _, apart, _ = run(program, [ids[:1, :5], ids[1:]], dtype=torch.float64)
    for name, parts in padded.moments.items():
        for own, wanted in zip(parts, apart.moments[name], strict=True):
            assert own.rows == wanted.rows
            if own.rows:
                torch.testing.assert_close(own.total, wanted.total, rtol=1e-9, atol=1e-9)
    with pytest.raises(PlanError, match="padding on the left"):
        run(program, {"input_ids": ids, "attention_mask": mask.flip(1)})


def test_padding_of_both_sides_of_an_encoder_decoder():
    program = traced(encoders.t5)[0]
    ids, targets = tokens(2, 9), tokens(2, 6, seed=9)
    mask, own = torch.ones_like(ids), torch.ones_like(targets)
    mask[1, 4:], own[0, 3:] = 0, 0
    data = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": targets,
            "decoder_attention_mask": own}  # fmt: skip
    _, padded, _ = run(program, data, 2, dtype=torch.float64)
    apart = [
        {"input_ids": i[None, m], "attention_mask": mask[:1, : int(m.sum())],
         "decoder_input_ids": t[None, o]}
        for i, m, t, o in zip(ids, mask.bool(), targets, own.bool(), strict=True)
    ]  # fmt: skip
    _, wanted, _ = run(program, apart, dtype=torch.float64)
    for name, (seen,) in padded.moments.items():
        crossing = "EncDecAttention.k" in name or "EncDecAttention.v" in name
        rows = 9 if "decoder" in name and not crossing else 13
        assert seen.rows == wanted.moments[name][0].rows == rows
        torch.testing.assert_close(seen.total, wanted.moments[name][0].total, rtol=1e-9, atol=1e-9)


def test_padding_that_is_mixed_with_tokens_is_refused():
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.conv = nn.Embedding(20, 6), nn.Conv1d(6, 8, 3, padding=1)
            self.head = nn.Linear(8, 2)

        def forward(self, input_ids):
            x = self.conv(self.embed(input_ids).transpose(1, 2)).relu()
            return self.head(x.mean(-1))

    ids = torch.randint(0, 20, (2, 7))
    program = gp.trace(Pairs().eval(), (), {"input_ids": ids})
    mask = torch.ones_like(ids)
    run(program, {"input_ids": ids, "attention_mask": mask})
    mask[0, 4:] = 0
    with pytest.raises(PlanError, match="padding can't be told from tokens"):
        run(program, {"input_ids": ids, "attention_mask": mask})


def test_a_program_without_weights_is_refused():
    with torch.device("meta"):
        module = Broken().eval()
    program = gp.trace(module, (torch.ones(2, 6, device="meta"),))
    with pytest.raises(PlanError, match="no weights to treat"):
        run(program, torch.ones(2, 6))
