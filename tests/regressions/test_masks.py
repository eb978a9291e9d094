"""Defects of published code for one-shot masks (methods.md, sections 1, 2, 6 and 8), on programs.

Layers alone are in solvers/test_defects.py (D below); these tests go through `gp.sparsify`.

    SparseGPT
    S1   a weight too many per block     D half_of_the_weights_is_half; counts_are_exact
    S2   two weights go at sparsity 0    D no_sparsity_leaves_the_layer_alone; counts_are_exact
    S3   IndexError at sparsity 1        D sparsity_out_of_range_is_told
    S4   all go where all are equal      D ties_go_by_index; equals_are_not_all_pruned
    S5   n of n:m counts what goes       D n_of_m_are_kept; n_of_every_m_inputs_stay
    S6   a tail is emptied               D a_tail_stays_dense_and_is_told; a_tail_stays_dense
    S7   a short tail is an error        the same
    S8   groups start anew at a block    D groups_do_not_start_anew_at_a_block
    S9   no token: all weights go        D a_layer_without_data_is_pruned_by_magnitude;
                                         a_dead_layer_is_pruned_by_magnitude
    S10  dead inputs set the damping     D dead_inputs_do_not_set_the_damping
    S11  NaN is "not positive-definite"  D bad_activations_are_named; nan_names_its_origin
    S12  no damping, no factor           D damping_grows_where_the_hessian_has_no_factor
    S13  no layer of GPT-2 is found      transposed_layers_are_found, no_layer_is_an_error
    Wanda
    W1   128 samples, whatever is asked  any_number_of_samples
    W2   windows of 131072 tokens        streaming/test_data.py: default_window
    W3   counts are cut, not rounded     D counts_are_rounded_not_cut; counts_are_exact
    W4   NaN is never pruned, or told    D a_weight_that_is_nan_is_told; nan_names_its_origin
    W5   the first of a batch is taken   samples_in_a_batch_all_count
    W6   every ValueError is swallowed   errors_of_the_caller_come_out; any_number_of_samples
    W7   devices go by the model's name  names_mean_nothing
    W8   magnitude: equals, +1           D magnitude_of_tied_weights_is_exact;
                                         equals_are_not_all_pruned
    W9   the wrong axis of square layers transposed_layers_are_found
    Section 6, by row
    5    Conv2d: columns do not match    convolutions_are_unfolded
    7    few samples: no factor          few_samples_are_told_of
    8    half precision                  half_precision_is_solved_in_single
    10   NaN is told as ill-conditioned  nan_names_its_origin
    11   3:4                             n_of_every_m_inputs_stay
    12   what "80 %" is of               what_a_sparsity_is_of
    13   a glob hits nothing; not twice  a_glob_that_hits_nothing_is_an_error, twice_the_same_bits
    14   rounding undoes zeros           zeros_survive_quantisation
    15   2:4 undoes zeros                test_oneshot.py: zeros_stay_on_request
    20   windows as long as the model's  streaming/test_data.py: default_window
    21   mask of None                    every program here: the graph has its own masks
    25   GPT-2                           transposed_layers_are_found
    43   experts without tokens          test_oneshot.py: an_expert_without_tokens_...
    44   NaN before experts              nan_names_its_origin
    47   padding                         streaming/test_run.py: padding_never_enters_a_statistic
    Section 7
    5    groups along the stored inputs  n_of_every_m_inputs_stay
    6    tied weights                    a_tied_output_layer_is_refused
    17   the caller's weights            twice_the_same_bits
    Section 8: OWL (equal ratios, densities, sizes) is in test_layer_budgets.py.
"""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphprune as gp
from graphprune.errors import GraphPruneError, PlanError
from graphprune.passes.masks.alps import ALPS
from graphprune.passes.masks.dsnot import DSnoT
from graphprune.passes.masks.magnitude import Magnitude
from graphprune.passes.masks.oneshot import sparsify
from graphprune.passes.masks.ria import RIA
from graphprune.passes.masks.sparsegpt import SparseGPT
from graphprune.passes.masks.wanda import Wanda
from graphprune.solvers import NM, SecondMoment, Unstructured
from graphprune.streaming import batches
from streaming.oracle import inputs_of, tokens, traced
from zoo import decoders, mixtures
from zoo.case import randomise

SOLVERS = [Magnitude(), Magnitude("row"), Wanda(), RIA(), SparseGPT(), ALPS(), DSnoT()]
HALF = Unstructured(0.5)


def named(solver):
    return type(solver).__name__


def by_row(solver):
    return isinstance(solver, Wanda | DSnoT) or getattr(solver, "group", "") == "row"


def weights(found):
    return {e.parameter: found.program.weights[e.parameter] for e in found.layers}


def chain(*sizes, seed=0):
    """Linear layers with ReLU between them, and samples."""
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    module = randomise(nn.Sequential(*layers[:-1]))
    generator = torch.Generator().manual_seed(seed)
    data = [torch.randn(30, sizes[0], generator=generator) for _ in range(4)]
    return module, gp.trace(module, (data[0],)), data


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.29, 0.5, 0.9])
def test_counts_are_exact(solver, sparsity):
    program, _ = traced(decoders.llama_gqa_4)
    found = sparsify(program, tokens(), solver, Unstructured(sparsity))
    for name, weight in weights(found).items():
        rows, columns = weight.shape
        whole = (
            round(sparsity * columns) * rows if by_row(solver) else round(sparsity * rows * columns)
        )
        assert int((weight == 0).sum()) == whole
        if sparsity == 0:
            assert torch.equal(weight, program.weights[name])


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
def test_equals_are_not_all_pruned(solver):
    module, program, data = chain(16, 24, 8, 3)
    with torch.no_grad():
        for layer in (module[0], module[2]):
            layer.weight.copy_(torch.where(layer.weight > 0, 0.125, -0.125))
    for found in (sparsify(program, data, solver, HALF), sparsify(program, data, solver, NM(2, 4))):
        assert {n: int((w == 0).sum()) for n, w in weights(found).items()} == {
            "0.weight": 192,
            "2.weight": 96,
        }
    if solver == Magnitude():
        found = sparsify(program, data, solver, HALF, budget="global")
        assert [e.zeros for e in found.layers] == [288, 0]  # equals go in order


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (2, 8)])
def test_n_of_every_m_inputs_stay(solver, n, m):
    for build, transposed in ((decoders.llama_gqa_4, False), (decoders.gpt2, True)):
        found = sparsify(traced(build)[0], tokens(), solver, NM(n, m))
        for weight in weights(found).values():
            kept = (weight.T if transposed else weight) != 0
            assert bool((kept.reshape(-1, m).sum(1) == n).all())
        assert found.sparsity == 1 - n / m
        assert {e.target for e in found.layers} == {1 - n / m}


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
@pytest.mark.parametrize("width", [5, 6])
def test_a_tail_stays_dense(solver, width):
    _, program, data = chain(width, 8, 3, 2)
    found = sparsify(program, data, solver, NM(2, 4))
    kept = weights(found)["0.weight"] != 0
    assert bool(kept[:, 4:].all())
    assert bool((kept[:, :4].sum(1) == 2).all())
    first, second = found.layers
    note = f"the last {width - 4} of {width} columns stay dense: no whole group"
    assert note in first.notes
    assert not any("dense" in n for n in second.notes)
    assert first.sparsity == 2 / width


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
def test_a_dead_layer_is_pruned_by_magnitude(solver):
    module, program, data = chain(6, 8, 8, 4, 2)
    with torch.no_grad():
        module[0].bias.fill_(-1e3)  # nothing passes the first ReLU
    found = sparsify(program, data, solver, HALF)
    dead, after = (e for e in found.layers if e.parameter != "0.weight")
    wanted = Magnitude("row" if by_row(solver) else "layer").solve(
        module[2].weight.detach(), None, HALF
    )
    assert torch.equal(weights(found)["2.weight"], wanted.weight)
    if not isinstance(solver, Magnitude):
        assert dead.notes[-1] == "all 120 input vectors are zero: pruned by magnitude"
    assert not any("magnitude" in n for n in after.notes)
    assert dead.sparsity == after.sparsity == 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("solver", [Wanda(), SparseGPT()], ids=named)
def test_nan_names_its_origin(solver, bad):
    module, program, data = chain(6, 8, 8, 2)
    broken = [x.clone() for x in data]
    broken[2][5, 1] = bad
    with pytest.raises(PlanError, match="is not finite") as caught:
        sparsify(program, broken, solver, HALF)
    assert "sample 65" in str(caught.value)  # the sixth row of the third batch of 30
    with torch.no_grad():
        module[2].weight[3, 3] = bad
    with pytest.raises(GraphPruneError, match="1 of 64 weights are NaN or infinite") as caught:
        sparsify(program, data, solver, HALF)
    assert caught.value.where == "2.weight"


def test_nan_before_experts_is_told():
    program, _ = traced(mixtures.mixtral)
    name = "model.layers.1.post_attention_layernorm.weight"
    state = dict(program.weights)
    before = state[name].clone()
    with torch.no_grad():
        program.weights[name][3] = float("nan")
    try:
        with pytest.raises(PlanError, match="is not finite") as caught:
            sparsify(program, tokens(), Wanda(), HALF)
    finally:
        with torch.no_grad():
            program.weights[name].copy_(before)
    assert name in str(caught.value)


def test_transposed_layers_are_found():
    """GPT-2 stores [in, out]; the attention's output projection is square."""
    program, module = traced(decoders.gpt2)
    found = sparsify(program, tokens(), Wanda(), HALF)
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert {e.parameter for e in found.layers} == {
        f"transformer.h.{i}.{kind}.weight" for i in range(2) for kind in kinds
    }
    pruned = copy.deepcopy(module)
    samples = [((), {"input_ids": ids[None]}) for ids in tokens()]
    for entry in found.layers:
        path = entry.parameter.removesuffix(".weight")
        rows = torch.cat([x.flatten(0, -2) for x in inputs_of(pruned, [path], samples)[path]])
        weight = pruned.get_parameter(entry.parameter)
        dense = weight.detach().clone()
        scores = dense.T.abs() * rows.square().mean(0).sqrt()
        gone = scores.argsort(dim=1, stable=True)[:, : scores.shape[1] // 2]
        wanted = dense.T.scatter(1, gone, 0).T
        assert torch.equal(weights(found)[entry.parameter].double(), wanted)
        if "attn.c_proj" in path:
            assert weight.shape[0] == weight.shape[1]
        weight.data = wanted


def test_no_layer_is_an_error():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return x * self.scale

    program = gp.trace(Plain().eval(), (torch.randn(2, 8),))
    with pytest.raises(PlanError, match="there is no weight to treat"):
        sparsify(program, [torch.randn(2, 8)], Wanda(), HALF)


def test_a_glob_that_hits_nothing_is_an_error():
    program, _ = traced(decoders.llama_gqa_4)
    for glob in ("model.layers.?", "model.layers.*.layernorm*", r"re:model.layers\.\d*$"):
        for options in ({"include": [glob]}, {"exclude": [glob]}):
            with pytest.raises(PlanError, match="no parameter matches"):
                sparsify(program, tokens(), Wanda(), HALF, **options)
    with pytest.raises(PlanError, match="is to be treated"):
        sparsify(program, tokens(), Wanda(), HALF, include=["*norm*"])


@pytest.mark.parametrize("count", [1, 3, 130])
def test_any_number_of_samples(count):
    program, _ = traced(decoders.llama_gqa_4)
    steps = []
    found = sparsify(program, tokens(count, 4), Wanda(), HALF, progress=steps.append)
    assert {step.tokens for step in steps} == {(4 * count,)}
    assert found.sparsity == 0.5


@pytest.mark.parametrize("solver", [Wanda(), SparseGPT()], ids=named)
def test_samples_in_a_batch_all_count(solver):
    program, _ = traced(decoders.llama_gqa_4)
    ids = tokens(6)
    one = weights(sparsify(program, ids, solver, HALF))
    three = weights(sparsify(program, batches(program, ids, batch=3), solver, HALF))
    first = weights(sparsify(program, ids[:1], solver, HALF))
    for name in one:
        torch.testing.assert_close(three[name], one[name], rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(first[n], one[n]) for n in one)


def test_errors_of_the_caller_come_out():
    program, _ = traced(decoders.llama_gqa_4)

    class Mine(ValueError):
        pass

    def failing():
        raise Mine

    with pytest.raises(Mine):
        sparsify(program, failing, Wanda(), HALF)

    def third(step):
        if step.group.index == 2:
            raise Mine

    with pytest.raises(Mine):
        sparsify(program, tokens(), Wanda(), HALF, progress=third)

    class Failing:
        def solve(self, weight, statistic, pattern):
            raise Mine

    with pytest.raises(Mine):
        sparsify(program, tokens(), Failing(), HALF)
    with pytest.raises(PlanError, match="there is no calibration data"):
        sparsify(program, tokens()[:0], Wanda(), HALF)


def test_names_mean_nothing(tmp_path):
    _, module = traced(decoders.llama_gqa_4)
    found = []
    for name in ("model", "opt-66b-llama-65b-70b"):
        copy.deepcopy(module).float().save_pretrained(tmp_path / name)
        program = gp.load(tmp_path / name)
        found.append(weights(sparsify(program, tokens(), SparseGPT(), HALF)))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("pattern", [HALF, NM(2, 4)], ids=str)
def test_convolutions_are_unfolded(pattern):
    module = randomise(Images())
    data = torch.randn(5, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    program = gp.trace(module, (data[:2],))
    found = sparsify(program, data, SparseGPT(), pattern)
    x = data
    for name, geometry in (("first", {}), ("second", {"stride": 2, "padding": 1})):
        layer = module.get_submodule(name)
        statistic = SecondMoment(layer.weight[0].numel())
        statistic.add(F.unfold(x, 3, **geometry).movedim(1, 2))
        solved = SparseGPT().solve(layer.weight.detach().flatten(1), statistic, pattern)
        new = weights(found)[f"{name}.weight"]
        torch.testing.assert_close(new.flatten(1), solved.weight, rtol=1e-3, atol=1e-5)
        assert torch.equal(new.flatten(1) == 0, ~solved.mask)
        x = torch.relu(F.conv2d(x, new, layer.bias.detach(), **geometry))
    if pattern is not HALF:  # 27 columns
        assert any("the last 3 of 27 columns stay dense" in n for n in found.layers[0].notes)


def test_few_samples_are_told_of():
    _, program, _ = chain(64, 96, 32, 2)
    for solver in (SparseGPT(), SparseGPT(damping=0.0), ALPS()):
        found = sparsify(program, [torch.randn(10, 64)], solver, HALF)
        assert "10 tokens for 64 inputs" in found.layers[0].notes
        assert "10 tokens for 96 inputs" in found.layers[1].notes
        assert all(bool(torch.isfinite(w).all()) for w in weights(found).values())
        assert found.sparsity == 0.5
    assert any(
        note.startswith("damping raised from 0")
        for note in sparsify(program, [torch.randn(10, 64)], SparseGPT(damping=0.0), HALF)
        .layers[0]
        .notes
    )


def test_half_precision_is_solved_in_single():
    """Sums in bfloat16 would be wrong by per cents, and many of its weights are equal."""
    module, _, data = chain(32, 48, 32, 4)
    data = [x.bfloat16() for x in data]
    half = gp.trace(copy.deepcopy(module).bfloat16(), (data[0],))
    single = gp.trace(copy.deepcopy(module).bfloat16().float(), (data[0].float(),))
    for solver in (Wanda(), SparseGPT()):
        narrow = sparsify(half, data, solver, HALF)
        wide = sparsify(single, [x.float() for x in data], solver, HALF)
        first = narrow.layers[0].parameter
        own, wanted = weights(narrow)[first], weights(wide)[first]
        assert own.dtype == torch.bfloat16
        assert torch.equal(own, wanted.bfloat16())
        for name, weight in weights(narrow).items():
            assert int((weight == 0).sum()) == weight.numel() // 2
            alike = (weight == 0) == (weights(wide)[name] == 0)
            assert float(alike.float().mean()) > 0.95


def test_what_a_sparsity_is_of():
    program, module = traced(decoders.llama_gqa_4)
    found = sparsify(program, tokens(), Wanda(), Unstructured(0.75), exclude=["*.layers.1.*"])
    zeros = sum(int((w == 0).sum()) for w in weights(found).values())
    assert found.sparsity == zeros / sum(w.numel() for w in weights(found).values()) == 0.75
    assert found.sparsity_of_model == zeros / sum(p.numel() for p in module.parameters())
    assert found.sparsity_of_model < 0.4
    matrices = {n for n, p in module.named_parameters() if p.dim() > 1}
    assert {e.parameter for e in found.layers} | set(found.skipped) == matrices
    assert found.skipped["model.layers.1.mlp.up_proj.weight"] == "excluded"


def test_twice_the_same_bits():
    program, _ = traced(decoders.llama_gqa_4)
    before = {n: w.clone() for n, w in program.weights.items()}
    for solver in (Wanda(), SparseGPT(), ALPS()):
        torch.manual_seed(1)
        one = weights(sparsify(program, tokens(), solver, HALF))
        torch.manual_seed(2)
        two = weights(sparsify(program, tokens(), solver, HALF))
        assert all(torch.equal(one[n], two[n]) for n in one)
    assert all(torch.equal(program.weights[n], w) for n, w in before.items())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("pattern", [HALF, NM(2, 4)], ids=str)
def test_zeros_survive_quantisation(bits, pattern):
    program, _ = traced(decoders.llama_gqa_4)
    found = sparsify(program, tokens(), SparseGPT(bits=bits), pattern)
    for name, weight in weights(found).items():
        assert int((weight == 0).sum()) >= weight.numel() // 2
        if pattern is not HALF:
            assert int((weight != 0).reshape(-1, 4).sum(1).max()) <= 2
        dense = program.weights[name].detach()
        step = (dense.amax(1).clamp_min(0) - dense.amin(1).clamp_max(0)) / (2**bits - 1)
        codes = np.asarray(weight / step[:, None])
        assert np.abs(codes - codes.round()).max() < 1e-3
        assert all(len(np.unique(row)) <= 2**bits for row in codes.round())
    # Quantising what is sparse already leaves every zero where it is.
    again = sparsify(
        sparsify(program, tokens(), Wanda(), pattern).program,
        tokens(), SparseGPT(bits=bits), Unstructured(0.0), keep_zeros=True,
    )  # fmt: skip
    sparse = weights(sparsify(program, tokens(), Wanda(), pattern))
    for name, weight in weights(again).items():
        assert not bool(weight[sparse[name] == 0].any())
        assert not torch.equal(weight, sparse[name])


def test_a_tied_output_layer_is_refused():
    program, _ = traced(decoders.llama_tied)
    for include in (["lm_head.weight"], ["*.mlp.*", "lm_head.weight"], ["model.embed_tokens.*"]):
        with pytest.raises(PlanError, match="is to be treated") as caught:
            sparsify(program, tokens(), Wanda(), HALF, include=include)
        assert "embedding reads it too" in str(caught.value)
        if "lm_head.weight" in include:
            assert "lm_head.weight, tied to model.embed_tokens.weight" in str(caught.value)
    found = sparsify(program, tokens(), Wanda(), HALF)
    assert "model.embed_tokens.weight" in found.skipped
    tied = found.program.weights
    assert torch.equal(tied["lm_head.weight"], tied["model.embed_tokens.weight"])
    assert not bool((tied["lm_head.weight"] == 0).any())
