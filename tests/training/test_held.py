"""Zeros that stay under any optimiser, to the bit."""

import copy
import math

import pytest
import torch
from torch import nn

from graphprune.errors import TrainingError
from graphprune.training import hold
from graphprune.training.core.zeros import fill_zeros


def bits(tensor):
    return tensor.detach().view(torch.int32)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def masks_of(module, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{i}.weight": torch.rand(module[i].weight.shape, generator=generator) > 0.5 for i in (0, 2)
    }


def steps(module, optimizer, count=5, seed=2):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        module(torch.randn(7, 6, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "lion-like": lambda p: torch.optim.Rprop(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_zeros_stay_zeros(optimiser, given):
    module = net()
    masks = masks_of(module)
    optimizer = OPTIMISERS[optimiser](module.parameters())
    steps(module, optimizer, 2)  # with moments of what is pruned now
    before = copy.deepcopy(module)
    with hold(module, masks, optimizer if given else None) as handle:
        steps(module, optimizer)
        handle.check()
    for name, mask in masks.items():
        weight = module.get_parameter(name)
        assert torch.equal(bits(weight)[~mask], torch.zeros_like(bits(weight)[~mask]))
        assert (weight != before.get_parameter(name))[mask].all()
        assert handle.zeros()[name] == int((~mask).sum())
    steps(module, optimizer)  # let go of
    with pytest.raises(TrainingError, match="weights that were pruned are not 0"):
        handle.check()


def test_a_removed_weight_is_zero_and_not_minus_zero():
    """-1.5 times a mask would be -0.0, whose sign bit is set."""
    module = nn.Linear(2, 1, bias=False)
    module.weight.data = torch.tensor([[-1.5, 2.0]])
    hold(module, {"weight": torch.tensor([[False, True]])})
    assert bits(module.weight).tolist() == [[0, 1073741824]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zeros_replace_anything_and_leave_the_rest(dtype):
    x = torch.tensor([[-1.5, math.nan, math.inf], [-0.0, math.nan, 3.0]], dtype=dtype)
    kept = torch.tensor([[False, False, False], [True, True, True]])
    weight = nn.Parameter(x.T.contiguous().T)  # and in any order in memory
    fill_zeros(weight, kept)
    assert not weight.detach()[0].contiguous().view(torch.uint8).any()
    assert torch.equal(*(y[1].contiguous().view(torch.uint8) for y in (weight.detach(), x)))


def test_a_kept_weight_that_is_zero_may_train():
    module = nn.Linear(2, 1, bias=False)
    module.weight.data = torch.tensor([[0.0, 2.0]])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    hold(module, {"weight": torch.tensor([[True, False]])}, optimizer)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert module.weight.tolist() == [[pytest.approx(-0.1), 0.0]]


def test_a_new_mask_stops_the_moments_of_what_it_removes():
    """w = (1, 1) falls by .1 a step; held from the fourth on, its second weight is 0 at once.

    An optimiser that kept its moments, with gradients masked only, would bring it back to -.081914,
    -.15115 and -.210822.
    """
    w = nn.Parameter(torch.ones(2))
    module = nn.Module()
    module.register_parameter("w", w)
    optimizer = torch.optim.AdamW([w], lr=0.1, betas=(0.9, 0.999), weight_decay=0)
    seen = []
    for step in range(6):
        if step == 3:
            handle = hold(module, {"w": torch.tensor([True, False])}, optimizer)
            assert float(optimizer.state[w]["exp_avg"][1]) == 0.0
        w.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(w.tolist())
    wanted = [[1 - 0.1 * n, 1 - 0.1 * n if n < 4 else 0.0] for n in range(1, 7)]
    assert seen == [pytest.approx(row, abs=1e-5) for row in wanted]
    assert float(optimizer.state[w]["exp_avg"][1]) == 0.0
    handle.remove()


@pytest.mark.parametrize("optimiser", ["kept", "new"])
@pytest.mark.parametrize("micro_batches", [100, 97, 96])
def test_rounds_with_gradients_that_are_left_over(micro_batches, optimiser):
    """Rounds of a notebook that lost each round's sparsity.

    It stepped at every sixteenth micro-batch, and what was left of the last group was applied to
    the weights that the next round had pruned by then.
    """
    module = net()
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3, weight_decay=2e-4)
    generator = torch.Generator().manual_seed(3)
    for sparsity in (0.1, 0.3, 0.5, 0.7, 0.8):
        masks = {}
        for name in ("0.weight", "2.weight"):
            size = module.get_parameter(name).detach().abs()
            masks[name] = size > size.flatten().quantile(sparsity)
        if optimiser == "new":
            optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3, weight_decay=2e-4)
        with hold(module, masks, optimizer) as handle:
            for step in range(micro_batches):
                (module(torch.randn(4, 6, generator=generator)).square().mean() / 16).backward()
                if step % 16 == 0:
                    optimizer.step()
                    optimizer.zero_grad()
            handle.check()
            assert handle.zeros() == {name: int((~m).sum()) for name, m in masks.items()}


@pytest.mark.parametrize("given", [True, False])
def test_masks_change_in_the_middle_of_a_group_of_micro_batches(given):
    module = net()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    first, second = masks_of(module), masks_of(module, seed=5)
    with hold(module, first, optimizer if given else None) as handle:
        steps(module, optimizer, 3)
        module(torch.ones(2, 6)).sum().backward()  # left over from here
        handle.change(second)
        for name, mask in second.items():
            weight = module.get_parameter(name)
            assert not bits(weight)[~mask].any()
            assert not bits(weight.grad)[~mask].any()
        module(torch.ones(2, 6)).sum().backward()
        optimizer.step()
        for name, mask in second.items():
            weight = module.get_parameter(name)
            assert not bits(weight)[~mask].any()
            assert weight[mask & ~first[name]].count_nonzero()  # what is held no longer trains
            for moment in ("exp_avg", "exp_avg_sq"):
                assert not optimizer.state[weight][moment][~mask].any()
        with pytest.raises(TrainingError, match="belongs to no parameter"):
            handle.change({"3.weight": torch.ones(2, dtype=torch.bool)})


def test_an_optimiser_that_is_wrapped():
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    module = net()
    masks = masks_of(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module, wrapped = accelerator.prepare(module, optimizer)
    assert wrapped is not optimizer
    with hold(module, masks, wrapped) as handle:
        steps(module, wrapped)
        handle.check()


def test_an_optimiser_that_is_none():
    class Own:
        def step(self):
            pass

    with pytest.raises(TrainingError, match=r"no torch\.optim\.Optimizer[^$]*call fill"):
        hold(net(), {}, Own())


def test_an_optimiser_that_calls_the_model_itself():
    module, x = net(), torch.randn(7, 6, generator=torch.Generator().manual_seed(2))
    masks = masks_of(module)
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=5)

    def closure():
        optimizer.zero_grad()
        loss = module(x).square().sum()
        loss.backward()
        return loss

    with hold(module, masks, optimizer) as handle:
        optimizer.step(closure)
        handle.check()


def test_gradients_of_a_few_rows():
    embedding = nn.Embedding(6, 3, sparse=True)
    mask = torch.rand(6, 3, generator=torch.Generator().manual_seed(0)) > 0.5
    optimizer = torch.optim.SparseAdam(embedding.parameters(), lr=0.1)
    with hold(embedding, {"weight": mask}, optimizer):
        for _ in range(3):
            before = embedding.weight.detach().clone()
            embedding(torch.tensor([1, 4])).sum().backward()
            assert embedding.weight.grad.is_sparse
            optimizer.step()
            optimizer.zero_grad()
            assert not bits(embedding.weight)[~mask].any()
            assert (embedding.weight != before)[1][mask[1]].all()


def test_a_compiled_module():
    module = net()
    masks = masks_of(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    with hold(module, masks, optimizer) as handle:
        steps(torch.compile(module, backend="aot_eager"), optimizer)
        handle.check()


def test_nothing_is_hooked_on_parameters():
    """Round after round would add another hook to each."""
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        with hold(module, masks_of(module), optimizer):
            steps(module, optimizer, 1)
    for parameter in module.parameters():
        assert not parameter._backward_hooks
        assert not parameter._post_accumulate_grad_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_parameters_by_identity_not_by_name():
    """Names change with a wrapper; what the module has under its own names is what counts."""
    module = net()
    masks = masks_of(module)
    handle = hold(module, masks)
    wrapped = nn.DataParallel(module)
    assert next(n for n, _ in wrapped.named_parameters()) == "module.0.weight"
    steps(wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.1))
    handle.check()
    handle.remove()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"1.weight": torch.ones(2, dtype=torch.bool)}, "belongs to no parameter"),
        ({"0.weight": torch.ones(2, dtype=torch.bool)}, "doesn't fit its parameter"),
        ({"0.weight": torch.ones(8, 6)}, "doesn't fit its parameter"),
    ],
)
def test_masks_that_do_not_fit(masks, message):
    with pytest.raises(TrainingError, match=message):
        hold(net(), masks)
