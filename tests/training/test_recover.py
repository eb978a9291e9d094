"""Recovery of small models: what stays to the bit, what trains, and what is refused."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.errors import TrainingError
from graphprune.training import Training, recover, recover_module
from graphprune.training.model.adapters import Adapter, Draw, Flat
from streaming.oracle import tokens, traced
from zoo import convolutional, decoders
from zoo.case import randomise

DATA = tokens(8, 9)
FAST = {"steps": 3, "batch": 4, "lr": 1e-2}


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8)


def masks_of(program, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(program.weights[name].shape, generator=generator) > 0.4
        for name in sorted(program.trainable)
        if "layers.0" in name and program.weights[name].dim() == 2
    }


def graph_of(program):
    """The same program without its module."""
    return dataclasses.replace(program, module=None)


@pytest.mark.parametrize("options", [{"lr": 0.0, "steps": 2}, {"steps": 0}])
@pytest.mark.parametrize("train", ["full", "norms", "lora"])
def test_training_that_changes_nothing_leaves_every_byte(train, options):
    program = traced(decoders.llama_gqa_4)[0]
    found = recover(program, DATA, Training(train=train, batch=4, **options))
    assert found.weights
    for name in program.weights:
        assert torch.equal(bits(found.program.weights[name]), bits(program.weights[name]))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("train", ["full", "norms", "lora"])
def test_zeros_after_training_are_those_of_before(train, form, precision):
    program = traced(decoders.llama_tied)[0]
    masks = masks_of(program)
    given = program if form == "module" else graph_of(program)
    found = recover(given, DATA, Training(train=train, precision=precision, **FAST), masks=masks)
    assert found.zeros == {name: int((~mask).sum()) for name, mask in masks.items()}
    for name, mask in masks.items():
        weight = found.program.weights[name]
        assert not bits(weight[~mask]).any()  # +0.0
        changed = (weight != program.weights[name])[mask]
        assert changed.float().mean() > 0.9 if train != "norms" else not changed.any()
    if form == "module":
        weights = dict(found.program.module.named_parameters())
        assert all(torch.equal(weights[n], found.weights[n]) for n in found.weights)
        assert weights["model.embed_tokens.weight"] is found.program.module.lm_head.weight


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("loss", ["ce", "kd", "hidden"])
def test_a_graph_trains_as_its_module_does(train, loss):
    program = traced(decoders.llama_gqa_4)[0]
    training = Training(train=train, loss=loss, precision="float32", **FAST)
    masks = masks_of(program)
    a = recover(program, DATA, training, masks=masks, teacher=program)
    b = recover(graph_of(program), DATA, training, masks=masks, teacher=graph_of(program))
    assert a.losses == pytest.approx(b.losses, rel=1e-5)
    for name in a.weights:
        torch.testing.assert_close(a.weights[name], b.weights[name], rtol=1e-4, atol=1e-5)


def test_full_training_is_plain_training():
    """Against a loop of four lines: mean cross-entropy, AdamW, the gradient's norm limited."""
    program, _ = traced(decoders.llama_gqa_4)
    training = Training(steps=2, batch=8, lr=1e-2, precision="float32")
    found = recover(program, DATA, training)
    module = copy_of(program)
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(2):
        logits = module(input_ids=DATA).logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, DATA[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = training.rate(step, 2)
        optimizer.step()
        optimizer.zero_grad()
        assert found.losses[step] == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found.weights[name], parameter, rtol=1e-3, atol=1e-4)
    assert found.tokens == 2 * 8 * 8


def copy_of(program):
    """A module of one's own with a program's weights."""
    return copy.deepcopy(program.module).requires_grad_()


@pytest.mark.parametrize("micro_batch", [1, 3, None])
def test_micro_batches_do_not_matter(micro_batch):
    """A mean of means over micro-batches of 1 and 3 tokens would be 2.5 where 1.75 is right."""
    program = traced(decoders.llama_gqa_4)[0]
    valid = torch.ones_like(DATA)
    for row, length in enumerate((2, 9, 4, 3, 9, 7, 2, 5)):
        valid[row, length:] = 0
    data = {"input_ids": DATA, "attention_mask": valid}
    options = Training(steps=3, batch=8, lr=1e-2, precision="float32", micro_batch=micro_batch)
    found = recover(program, data, options)
    whole = recover(program, data, dataclasses.replace(options, micro_batch=8))
    assert found.losses == pytest.approx(whole.losses, rel=1e-5)
    assert found.tokens == 3 * int((valid.sum(1) - 1).sum())
    for name in whole.weights:
        torch.testing.assert_close(found.weights[name], whole.weights[name], rtol=1e-3, atol=1e-4)


class TokenLosses(nn.Module):
    """Whose token losses are the numbers in the data times a weight of 1."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.w


def test_a_mean_over_tokens():
    data = [torch.tensor([4.0]), torch.tensor([1.0, 1.0, 1.0])]

    def loss(model, x):
        return model(x).sum(), x.numel()

    found = recover_module(TokenLosses(), data, Training(steps=1, batch=2, lr=0.0), loss=loss)
    assert found.losses == (pytest.approx(1.75),)
    assert found.tokens == 4


def test_samples_without_labels_count_nothing():
    program = traced(decoders.llama_gqa_4)[0]
    labels = DATA.clone()
    labels[:4] = -100
    training = Training(steps=1, batch=8, lr=0.0, precision="float32", micro_batch=1)
    found = recover(program, {"input_ids": DATA, "labels": labels}, training)
    rest = dataclasses.replace(training, batch=4)
    wanted = recover(program, DATA[4:], rest)
    assert found.losses == pytest.approx(wanted.losses, rel=1e-6)
    assert found.tokens == wanted.tokens
    labels[:] = -100
    with pytest.raises(TrainingError, match="no token of a step counts"):
        recover(program, {"input_ids": DATA, "labels": labels}, training)


@pytest.mark.parametrize("loss", ["kd", "hidden", "values"])
@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_model_that_is_its_own_teacher_stays(train, loss):
    program = traced(decoders.llama_gqa_4)[0]
    options = Training(train=train, loss=loss, steps=2, batch=4, dropout=0.0, precision="float32")
    found = recover(program, DATA, options, teacher=program)
    assert max(found.losses) < 1e-6
    if loss != "kd":  # whose gradient is rounding, and a step of Adam doesn't depend on its size
        for name in found.weights:
            assert torch.equal(found.weights[name], program.weights[name])


def test_teacher_with_a_larger_vocabulary():
    program = traced(decoders.llama_gqa_4)[0]
    kept = torch.arange(0, 96, 2)
    whole = copy_of(program)
    small = copy_of(program)
    small.lm_head = nn.Linear(32, 48, bias=False)
    small.lm_head.weight.data = whole.lm_head.weight.data[kept].clone()
    options = Training(loss="kd", steps=1, batch=4, lr=0.0, precision="float32")
    found = recover_module(small, [{"input_ids": x[None]} for x in DATA], options, teacher=whole,
                           vocabulary=kept)  # fmt: skip
    assert found.losses[0] == pytest.approx(0.0, abs=1e-6)


def test_merged_weights_are_what_was_trained():
    """W + 2 B A inside a mask: three zeros, whose bits are 0; a plain sum would leave none."""
    module = nn.Sequential(nn.Linear(3, 2, bias=False))
    module[0].weight.data = torch.tensor([[1.0, 0.0, -2.0], [0.0, 3.0, 0.0]])
    mask = module[0].weight != 0
    adapter = Adapter("w", module[0].weight, Flat(), 1, 2.0, ~mask, 0.0, Draw(), 0)
    adapter.a.data[:] = torch.tensor([[0.2, -0.4, 0.1]])
    adapter.b.data[:] = torch.tensor([[0.5], [-1.0]])
    found = adapter(module[0].weight)
    torch.testing.assert_close(found, torch.tensor([[1.2, 0.0, -1.9], [0.0, 3.8, 0.0]]))
    assert not bits(found[~mask]).any()
    adapter.removed = None
    plain = adapter(module[0].weight)
    torch.testing.assert_close(plain, torch.tensor([[1.2, -0.4, -1.9], [-0.4, 3.8, -0.2]]))
    assert plain.count_nonzero() == 6


def test_adapters_train_no_other_weights():
    program = traced(decoders.gpt2)[0]
    training = Training(train="lora", include=("*.c_attn.weight",), also=("biases",), **FAST)
    found = recover(program, DATA, training)
    new, old = found.program.weights, program.weights
    changed = {n for n in program.trainable if not torch.equal(new[n], old[n])}
    assert all(n.endswith((".c_attn.weight", "bias")) for n in changed)
    assert {n for n in changed if n.endswith("weight")} == {
        f"transformer.h.{i}.attn.c_attn.weight" for i in range(2)
    }
    difference = found.weights["transformer.h.0.attn.c_attn.weight"]
    difference = difference - program.weights["transformer.h.0.attn.c_attn.weight"]
    assert torch.linalg.matrix_rank(difference.double(), rtol=1e-4) <= 8


@pytest.mark.parametrize("build", [decoders.gpt2, decoders.gemma2, decoders.mamba, decoders.bloom])
def test_other_language_models(build):
    program = traced(build)[0]
    options = {"steps": 6, "batch": 8, "lr": 3e-3, "warmup": 0.0}
    for train in ("full", "lora"):
        losses = recover(program, DATA, Training(train=train, **options)).losses
        assert losses[-1] < losses[0]


def test_convolutions_learn_from_their_teacher():
    program = convolutional_program()
    images = torch.randn(8, *program.example[0][0].shape[1:])
    masks = {
        n: torch.rand(program.weights[n].shape) > 0.6
        for n in sorted(program.trainable)
        if program.weights[n].dim() == 4
    }
    statistics = {n: t.clone() for n, t in program.module.named_buffers()}
    for train in ("full", "lora"):
        options = Training(
            train=train, loss="kd", steps=16, batch=8, lr=1e-3, warmup=0.0, precision="float32"
        )
        found = recover(program, images, options, masks=masks, teacher=program)
        assert found.losses[-1] < found.losses[0]
        for name, mask in masks.items():
            assert not found.weights[name][~mask].any()
        for name, tensor in found.program.module.named_buffers():
            assert torch.equal(tensor, statistics[name])


def convolutional_program():
    torch.manual_seed(0)
    return gp.trace(randomise(convolutional.resnet_basic()), (torch.randn(2, 3, 16, 16),))


def test_a_module_of_ones_own_with_a_loss_of_its_own():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1)).train()
    x = torch.randn(64, 4)
    data = {"x": x, "y": x.sum(1, keepdim=True)}
    mask = torch.rand(16, 4) > 0.5

    def loss(model, batch):
        return (model(batch["x"]) - batch["y"]).square().mean()

    options = Training(steps=60, batch=16, lr=3e-2)
    found = recover_module(module, data, options, masks={"0.weight": mask}, loss=loss)
    assert found.losses[-1] < found.losses[0] / 4
    assert not bits(module[0].weight[~mask]).any()
    assert module.training
    assert all(p.requires_grad for p in module.parameters())


def test_classes_with_labels():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    program = gp.trace(module.eval(), (torch.randn(2, 4),))
    x = torch.randn(32, 4)
    data = {"input": x, "labels": x[:, :3].argmax(1)}
    options = Training(steps=40, batch=16, lr=3e-2)
    found = recover(program, data, options)
    assert found.losses[-1] < found.losses[0] / 2
    assert found.tokens == 40 * 16


def test_recomputed_activations_change_nothing():
    program = traced(decoders.llama_gqa_4)[0]
    options = Training(precision="float32", **FAST)
    a = recover(program, DATA, options)
    b = recover(program, DATA, dataclasses.replace(options, checkpointing=True))
    assert a.losses == b.losses
    assert all(torch.equal(a.weights[n], b.weights[n]) for n in a.weights)


def test_the_program_stays():
    program = traced(decoders.llama_gqa_4)[0]
    before = {n: program.weights[n].clone() for n in program.weights}
    for given, train in itertools.product((program, graph_of(program)), ("full", "lora")):
        recover(given, DATA, Training(train=train, **FAST), masks=masks_of(program))
        assert all(torch.equal(before[n], program.weights[n]) for n in before)
    assert not any(p.requires_grad and p.grad is not None for p in program.module.parameters())
    assert program.module.config.use_cache


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "kd"}, "loss kd needs a teacher"),
        ({"batch": 9}, "fewer samples than a step takes"),
        ({"include": ("nothing*",)}, "no parameter matches 'nothing\\*'"),
    ],
)
def test_what_cannot_be_trained(options, message):
    program = traced(decoders.llama_gqa_4)[0]
    with pytest.raises(TrainingError, match=message):
        recover(program, DATA, Training(**options))


def test_a_mask_of_a_tied_name_is_refused():
    program = traced(decoders.llama_tied)[0]
    masks = {"lm_head.weight": torch.ones(96, 32, dtype=torch.bool)}
    with pytest.raises(TrainingError, match="a mask belongs to no weight"):
        recover(program, DATA, Training(**FAST), masks=masks)


def test_checkpointing_of_a_graph_is_refused():
    program = graph_of(traced(decoders.llama_gqa_4)[0])
    with pytest.raises(TrainingError, match="needs layers that are modules"):
        recover(program, DATA, Training(checkpointing=True, **FAST))


def test_a_model_that_looks_ahead_needs_labels():
    module = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20)).eval()

    class Ahead(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = module

        def forward(self, ids):
            return self.body(ids.flip(1))

    program = gp.trace(Ahead().eval(), (torch.randint(0, 20, (2, 6)),))
    with pytest.raises(TrainingError, match="the loss needs labels"):
        recover(program, torch.randint(0, 20, (8, 6)), Training(steps=1, batch=4))


def test_a_loss_without_gradients_is_refused():
    module = nn.Linear(3, 2)
    with pytest.raises(TrainingError, match="doesn't depend on the weights"):
        recover_module(
            module,
            torch.randn(8, 3),
            Training(steps=1),
            loss=lambda model, x: model(x).argmax(1).float().mean(),
        )
