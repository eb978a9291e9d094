"""Gradual pruning: the schedule's values, exact counts, and zeros that stay under any optimiser."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from graphprune.errors import RecipeError, TrainingError
from graphprune.training import GradualPruner, GradualPruning
from training.gloo import together
from training.pruning_workers import Net, gradual, train

# Zhu and Gupta's cubic with half of everything gone in the end, a tenth of 100 steps before it
# begins and a tenth after it has ended.
TABLE = {0: 0, 5: 0, 10: 0, 11: 0.018517, 15: 0.088013, 20: 0.165039, 30: 0.289062, 40: 0.37793,
         50: 0.4375, 60: 0.473633, 70: 0.492188, 80: 0.499023, 89: 0.499999, 90: 0.5, 91: 0.5,
         100: 0.5}  # fmt: skip


def bits(tensor):
    return tensor.detach().view(torch.int32)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 7))


def loss_of(module, step, count=5):
    generator = torch.Generator().manual_seed(step)
    return module(torch.randn(count, 12, generator=generator)).square().mean()


OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.03),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.03, fused=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.03),
}


def test_values_of_the_schedule():
    options = GradualPruning(sparsity=0.5, initial=0.1, final=0.1)
    for step, wanted in TABLE.items():
        assert options.sparsity_at(step, 100) == pytest.approx(wanted, abs=1e-6)


def test_when_it_is_time():
    options = GradualPruning(sparsity=0.5)
    assert [n for n in range(101) if options.is_due(n, 100, n - 1)] == list(range(10, 91, 10))
    # Short runs have as many events, where one every ten steps would be a single one.
    assert [n for n in range(21) if options.is_due(n, 20, n - 1)] == list(range(2, 19, 2))
    # A look at every third step misses none.
    assert [n for n in range(0, 101, 3) if options.is_due(n, 100, n - 3)] == [
        12, 21, 30, 42, 51, 60, 72, 81, 90,
    ]  # fmt: skip


@pytest.mark.parametrize(("steps", "heads", "channels"), [(100, 16, 5504), (400, 16, 5504)])
def test_half_of_32_and_half_of_11008_are_gone_in_the_end(steps, heads, channels):
    """The original ends with 15 heads and 5493 or 5503 channels removed."""
    module = nn.ModuleList([nn.Linear(32, 2, bias=False), nn.Linear(5504, 2, bias=False)])
    pruner = GradualPruner(module, GradualPruning(sparsity=0.5))
    for step in range(1, steps + 1):
        pruner.update(step, steps)
    assert pruner.finish().zeros == {"0.weight": 2 * heads, "1.weight": channels}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("given", [True, False])
def test_zeros_are_held_and_only_grow(optimiser, given):
    module = net()
    optimizer = OPTIMISERS[optimiser](module.parameters())
    options = GradualPruning(sparsity=0.7, every=3)
    pruner = GradualPruner(module, options, optimizer if given else None)
    before = {n: m.clone() for n, m in pruner.masks.items()}
    for step in range(1, 41):
        loss_of(module, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.update(step, 40)
        for name, mask in pruner.masks.items():
            weight = module.get_parameter(name)
            assert not bits(weight)[~mask].any()
            assert not (mask & ~before[name]).any()  # what has gone stays gone
        before = pruner.masks
    pruned = pruner.finish()
    assert pruned.zeros == {"0.weight": round(0.7 * 384), "2.weight": round(0.7 * 224)}
    assert pruned.notes == ()
    steps = [step for step, _ in pruned.events]
    assert steps == [7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 36]
    for step, zeros in pruned.events:
        share = options.sparsity_at(step, 40)
        assert zeros == round(share * 384) + round(share * 224)


def test_masks_by_hand():
    """Of |1 2 3 4 5 6 7 8| a quarter, then half; what went first stays, however it is scored."""
    module = nn.Linear(8, 1, bias=False)
    weight = module.weight
    weight.data = torch.tensor([[1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0]])
    options = GradualPruning(sparsity=0.5, initial=0, final=0, every=1, include=["weight"])
    pruner = GradualPruner(module, options)
    assert pruner.update(1, 4)  # .5 (1 - .75^3) = .289: 2 of 8
    assert weight.tolist() == [[0, 0, 3, -4, 5, -6, 7, -8]]
    weight.data[0, 2:4] = torch.tensor([-9.0, 9.0])
    weight.data[0, 4] = 0.0  # a kept weight that is 0 goes before others, and after those gone
    assert pruner.update(4, 4)
    assert pruner.masks["weight"].tolist() == [[False, False, True, True, False, False, True, True]]
    assert weight.tolist() == [[0, 0, -9, 9, 0, 0, 7, -8]]


def test_equal_weights_go_by_their_index():
    module = nn.Linear(4, 3, bias=False)
    nn.init.ones_(module.weight)
    pruner = GradualPruner(module, GradualPruning(sparsity=0.5))
    pruner.finish()
    assert module.weight.flatten().tolist() == [0] * 6 + [1] * 6


def test_all_layers_together():
    module = net()
    with torch.no_grad():
        module[2].weight.mul_(100)
    options = GradualPruning(sparsity=0.5, scope="global")
    wanted = torch.cat([module[i].weight.detach().abs().flatten() for i in (0, 2)])
    threshold = wanted.sort().values[303]
    pruner = GradualPruner(module, options)
    zeros = pruner.finish().zeros
    assert zeros == {
        f"{i}.weight": int((wanted.split([384, 224])[i // 2] <= threshold).sum()) for i in (0, 2)
    }
    assert sum(zeros.values()) == 304
    assert zeros["0.weight"] > zeros["2.weight"]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_two_of_four(scope):
    module = net()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.03)
    options = GradualPruning(pattern="2:4", scope=scope, every=2)
    pruner = GradualPruner(module, options, optimizer)
    counts = []
    for step in range(1, 31):
        loss_of(module, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if pruner.update(step, 30):
            groups = [(~m).reshape(-1, 4).sum(1) for m in pruner.masks.values()]
            assert torch.cat(groups).max() <= 2
            counts.append(sum(int(g.sum()) for g in groups))
    assert counts == sorted(counts)
    pruned = pruner.finish()
    for name, mask in pruned.masks.items():
        assert (mask.reshape(-1, 4).sum(1) == 2).all()
        assert not bits(module.get_parameter(name))[~mask].any()
    wanted = [round(options.sparsity_at(s, 30) / 0.5 * n) for s, _ in pruned.events
              for n in ((304,) if scope == "global" else (192, 112))]  # fmt: skip
    assert sum(zeros for _, zeros in pruned.events) == sum(wanted)


def test_two_of_four_of_a_weight_that_is_stored_the_other_way_round():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(3, 8)
    nn.init.normal_(conv1d.weight)
    dense = conv1d.weight.detach().clone()
    GradualPruner(conv1d, GradualPruning(pattern="2:4")).finish()
    kept = (conv1d.weight != 0).T.reshape(3, 2, 4)
    best = dense.abs().T.reshape(3, 2, 4).topk(2).indices.sort().values
    assert torch.equal(kept.nonzero()[:, 2].reshape(3, 2, 2), best)


@pytest.mark.parametrize("given", [True, False])
def test_accumulation_that_leaves_gradients_over(given):
    """Groups of 3 in 10 micro-batches: one is left over when the next epoch prunes more."""
    module = net()
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-2, weight_decay=2e-4)
    options = GradualPruning(sparsity=0.6, every=1, initial=0, final=0.2)
    pruner = GradualPruner(module, options, optimizer if given else None)
    done, left = 0, 0
    for epoch in range(5):
        for micro in range(10):
            (loss_of(module, 10 * epoch + micro) / 3).backward()
            if micro % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
                done += 1
        left += module[0].weight.grad is not None
        pruned = pruner.update(done, 15)
        assert pruned is (epoch < 4)
        pruner.check()
        for name, mask in pruner.masks.items() if pruned else ():
            assert not bits(module.get_parameter(name).grad)[~mask].any()
    assert left == 5
    optimizer.step()  # with what is left over
    zeros = pruner.finish().zeros
    assert zeros == {"0.weight": round(0.6 * 384), "2.weight": round(0.6 * 224)}
    for name, count in zeros.items():
        weight = module.get_parameter(name)
        assert int((bits(weight) == 0).sum()) == count
        assert int((weight == 0).sum()) == count  # none of them -0.0


def test_moments_of_what_goes_are_gone():
    module = net()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.03)
    pruner = GradualPruner(module, GradualPruning(sparsity=0.5), optimizer)
    for step in range(1, 21):
        loss_of(module, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.update(step, 20)
        for name, mask in pruner.masks.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                value = optimizer.state[module.get_parameter(name)][moment]
                assert not bits(value)[~mask].any()
                assert value[mask].all()


@pytest.mark.parametrize("stop", [5, 14, 25, 38])
def test_going_on_from_a_saved_state(stop, tmp_path):
    """To the same bits, wherever it was interrupted, through a file."""

    def begun():
        module = net()
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.03)
        options = GradualPruning(sparsity=0.6, every=3)
        return module, optimizer, GradualPruner(module, options, optimizer)

    def run(parts, start, end):
        module, optimizer, pruner = parts
        for step in range(start + 1, end + 1):
            loss_of(module, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            pruner.update(step, 40)

    whole = begun()
    run(whole, 0, 40)
    first = begun()
    run(first, 0, stop)
    first[0][0].weight.data[0, 0] = 0.0  # a kept weight that is 0 is no pruned one
    torch.save([part.state_dict() for part in first], tmp_path / "state.pt")
    second = begun()
    for part, state in zip(second, torch.load(tmp_path / "state.pt"), strict=True):
        part.load_state_dict(state)
    run(second, stop, 40)
    run(first, stop, 40)
    one, two = first[2].finish(), second[2].finish()
    assert one.events == two.events == whole[2].finish().events
    for name, tensor in first[0].state_dict().items():
        assert torch.equal(bits(tensor), bits(second[0].state_dict()[name]))
    for name, mask in one.masks.items():
        assert torch.equal(mask, two.masks[name])


def test_a_state_of_something_else():
    state = GradualPruner(net(), GradualPruning(sparsity=0.5))
    state.update(50, 100)
    state = state.state_dict()
    with pytest.raises(TrainingError, match=r"other options[^$]*sparsity"):
        GradualPruner(net(), GradualPruning(sparsity=0.6)).load_state_dict(state)
    small = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 7))
    with pytest.raises(TrainingError, match="doesn't fit its parameter"):
        GradualPruner(small, GradualPruning(sparsity=0.5)).load_state_dict(state)
    with pytest.raises(TrainingError, match="of another model"):
        GradualPruner(nn.Linear(3, 4), GradualPruning(sparsity=0.5)).load_state_dict(state)


def test_training_that_ends_early():
    module = net()
    pruner = GradualPruner(module, GradualPruning(sparsity=0.5))
    for step in range(1, 50):
        pruner.update(step, 100)
    pruned = pruner.finish()
    assert pruned.sparsity == 0.5
    assert "training ended before the schedule did" in pruned.notes[0]


def test_weights_that_come_back():
    module = net()
    pruner = GradualPruner(module, GradualPruning(sparsity=0.5))
    before = copy.deepcopy(module.state_dict())
    for step in range(1, 101):
        pruner.update(step, 100)
    module.load_state_dict(before)
    with pytest.raises(TrainingError, match="weights that were pruned are not 0"):
        pruner.finish()


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_two_processes_prune_as_one(wrap, scope, tmp_path):
    together(gradual, tmp_path, wrap, scope)
    masks, weights, events = torch.load(tmp_path / "found.pt")
    module = Net()
    alone = train(module, module, GradualPruning(sparsity=0.6, every=2, scope=scope))
    assert events == alone.events
    stored = load_file(tmp_path / "sparse" / "model.safetensors")
    for name, mask in alone.masks.items():
        assert torch.equal(mask, masks[name].bool())
        assert not bits(stored[name])[~mask].any()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=0, atol=1e-5)
        assert torch.equal(stored[name], weights[name])
    assert sum(alone.zeros.values()) == (230 if scope == "global" else 154 + 77)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.positions = nn.Parameter(torch.randn(1, 6, 8))
        self.decay = nn.Parameter(torch.randn(8, 4))
        self.experts = nn.Parameter(torch.randn(3, 8, 8))
        self.conv = nn.Conv1d(8, 8, 3)
        self.depthwise = nn.Conv1d(8, 8, 3, groups=8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.lstm = nn.LSTM(8, 4)
        self.value = nn.Linear(8, 1)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, 40)
        self.head.weight = self.embed.weight


def masked(module, **options):
    return list(GradualPruner(module, GradualPruning(sparsity=0.5, **options)).masks)


def test_what_is_pruned():
    assert masked(Model()) == [
        "experts",
        "conv.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
    ]
    assert masked(Model(), exclude=["lstm.*", "attention.*", "experts"]) == ["conv.weight"]
    assert masked(Model(), include=["frozen.weight", "decay"]) == ["decay", "frozen.weight"]
    # Tied weights are one, under whichever of their names.
    assert masked(Model(), include=["head.weight", "embed.weight"]) == ["embed.weight"]


def test_the_head_of_a_language_model_stays():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    names = masked(transformers.LlamaForCausalLM(config))
    assert len(names) == 7
    assert all(".layers.0." in name for name in names)


def test_a_score_of_ones_own():
    module = net()
    seen = []

    def last_rows(name, weight):
        seen.append(name)
        return -torch.arange(weight.numel(), dtype=torch.float32).reshape(weight.shape)

    GradualPruner(module, GradualPruning(sparsity=0.25, score=last_rows)).finish()
    assert seen == ["0.weight", "2.weight"]
    assert not module[0].weight[24:].any()
    assert module[0].weight[:24].all()
    wrong = GradualPruning(sparsity=0.5, score=lambda name, weight: weight[0])
    with pytest.raises(TrainingError, match="scores don't fit"):
        GradualPruner(net(), wrong).finish()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a sparsity or a pattern"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "a sparsity or a pattern"),
        ({"sparsity": 1.5}, "1.5 is not a fraction to remove"),
        ({"pattern": "2 of 4"}, "write 2:4"),
        ({"pattern": "4:2"}, "4:2 is no pattern"),
        ({"sparsity": 0.5, "every": 0}, "'every': input should be greater"),
        ({"sparsity": 0.5, "scope": "row"}, "'scope'"),
        ({"sparsity": 0.5, "score": "wanda"}, "'score'"),
        ({"sparsity": 0.2, "start": 0.3}, "begin with more zeros"),
        ({"sparsity": 0.5, "initial": 0.7, "final": 0.7}, "end before it begins"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(RecipeError, match=message):
        GradualPruning(**options)


def diverged():
    module = net()
    module[0].weight.data[0, 0] = torch.nan
    return module


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (net, {"include": ["4.*"]}, "a glob fits no parameter"),
        (net, {"exclude": ["*"]}, "nothing to prune"),
        (lambda: nn.LayerNorm(4), {}, "nothing to prune"),
        (diverged, {}, "NaN or infinite"),
        (Model, {"sparsity": None, "pattern": "2:4"}, r"can't be chosen[^$]*experts"),
        (lambda: nn.Linear(4, 4, device="meta"), {}, "on the meta device"),
    ],
)
def test_models_that_cannot_be_pruned_so(module, options, message):
    with pytest.raises(TrainingError, match=message):
        GradualPruner(module(), GradualPruning(**{"sparsity": 0.5, **options})).finish()
