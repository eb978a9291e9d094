"""Modules that are pruned and then trained, in whatever loop."""

import copy

import pytest
import torch
from torch import nn

import graphprune as gp
from integrations.nets import HEADS, INNER, inputs, switched_off, tagger
from training.gloo import together
from training.pruning_workers import distributed

OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.second(self.dropout(torch.relu(self.first(x))))


class Counting(Net):
    """Takes a factor from a size, so that no smaller one of its class computes the same."""

    def forward(self, x):
        return super().forward(x) / len(self.first.weight)


def slim_of(module, **settings):
    return gp.prune(module, (torch.randn(2, 8),), remove={"ffn": 0.5}, **settings)


def loss_of(module, seed):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
    return (module(x) - x[:, :4]).square().mean()


def test_it_computes_what_the_module_without_these_units_does():
    dense = tagger()
    before = copy.deepcopy(dense.state_dict())
    slim = gp.prune(dense, inputs(), remove={"ffn": 0.25})
    assert type(slim) is type(dense)
    kept = dense.up.weight.detach().square().sum(1) + dense.up.bias.detach().square()
    kept = (kept + dense.down.weight.detach().square().sum(0)).topk(INNER * 3 // 4).indices
    for batch in (inputs(), inputs(3, 11, seed=5)):
        wanted = switched_off(dense, kept.tolist(), range(HEADS))(*batch)
        torch.testing.assert_close(slim(*batch), wanted, rtol=0, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    with torch.no_grad():  # its weights are its own
        for parameter in slim.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_it_trains(optimiser):
    slim = slim_of(Net())
    assert all(p.requires_grad and p.is_leaf for p in slim.parameters())
    optimizer = OPTIMISERS[optimiser](slim.parameters())
    losses = []
    for _ in range(60):
        loss = loss_of(slim.eval(), 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_gradients_are_those_of_the_source(training):
    module = Net().train(training)
    module.dropout.eval()
    module.second.bias.requires_grad_(False)
    slim = slim_of(module)
    for one in (module, slim):
        assert one.training is one.first.training is training
        assert not one.dropout.training
        assert [n for n, p in one.named_parameters() if not p.requires_grad] == ["second.bias"]
    slim.train()
    x = torch.randn(4, 8)
    assert not torch.equal(slim(x), slim(x))  # dropout is still there


def test_it_compiles():
    slim = slim_of(Net().eval())
    compiled = torch.compile(slim, backend="aot_eager")
    optimizer = torch.optim.SGD(slim.parameters(), lr=0.1)
    same = copy.deepcopy(slim)
    other = torch.optim.SGD(same.parameters(), lr=0.1)
    for step in range(3):
        for module, one in ((compiled, optimizer), (same, other)):
            loss_of(module, step).backward()
            one.step()
            one.zero_grad()
    for name, parameter in slim.named_parameters():
        torch.testing.assert_close(parameter, same.get_parameter(name))
    assert slim_of(compiled).first.weight.shape == (8, 8)  # and can be pruned again


def test_it_is_saved_and_loaded(tmp_path):
    slim = slim_of(Net())
    torch.save(slim.state_dict(), tmp_path / "state.pt")
    torch.save(slim, tmp_path / "module.pt")
    again = torch.load(tmp_path / "module.pt", weights_only=False)
    fresh = slim_of(Net())
    with torch.no_grad():
        fresh.first.weight.zero_()
    fresh.load_state_dict(torch.load(tmp_path / "state.pt"))
    x = torch.randn(3, 8)
    for one in (again, fresh):
        assert torch.equal(one.eval()(x), slim.eval()(x))


def test_a_graph_trains_too():
    module = Counting()
    module.second.bias.requires_grad_(False)
    with pytest.warns(UserWarning, match="the exported graph instead of Counting"):
        slim = slim_of(module)
    assert [n for n, p in slim.named_parameters() if not p.requires_grad] == ["second.bias"]
    optimizer = torch.optim.SGD(slim.parameters(), lr=0.1)
    bias, before = slim.second.bias.clone(), slim.first.weight.detach().clone()
    slim.eval()
    slim.train()
    loss_of(slim, 0).backward()
    optimizer.step()
    assert torch.equal(slim.second.bias, bias)
    assert (slim.first.weight != before).any()


def test_several_processes(tmp_path):
    """Two that take half of a batch each train to what one does with all of it."""
    together(distributed, tmp_path)
    found = torch.load(tmp_path / "weights.pt")
    alone = slim_of(Net().eval())
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for step in range(3):
        loss_of(alone, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=0, atol=1e-6)


def language_model(**sizes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    given = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**given, **sizes}))


@pytest.mark.parametrize("example", [None, {"input_ids": torch.arange(18).reshape(2, 9)}])
def test_a_model_of_transformers(example, tmp_path):
    dense = language_model()
    widths = {"ffn": 0.5, "heads": 0.5, "layers": 0.5}
    slim = gp.prune(dense, example, remove=widths, score="magnitude")
    assert slim.training
    assert slim.config.use_cache is dense.config.use_cache is True
    sizes = slim.config.intermediate_size, slim.config.num_attention_heads
    assert (*sizes, slim.config.num_hidden_layers) == (24, 2, 1)
    ids = torch.arange(10)[None]
    optimizer = torch.optim.AdamW(slim.parameters(), lr=1e-2)
    for _ in range(2):
        slim(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    slim.save_pretrained(tmp_path)
    again = type(dense).from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, slim.eval()(ids).logits)


def test_experts_are_computed_as_before():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    dense = MixtralForCausalLM(config)
    before = dense.config._experts_implementation
    slim = gp.prune(dense, remove={"experts": 0.5}, score="magnitude")
    assert slim.config._experts_implementation == dense.config._experts_implementation == before
    assert slim.config.num_local_experts == 2


def test_what_is_refused():
    with pytest.raises(gp.LoadError, match="needs example inputs"):
        gp.prune(Net(), remove={"ffn": 0.5})
    with pytest.raises(gp.RecipeError, match="single weights"):
        slim_of(Net(), recipe={"sparsify": {"method": "magnitude", "sparsity": 0.5}})
    module = Net()
    with pytest.raises(gp.TraceError):
        gp.prune(module, (torch.randn(2, 9),), remove={"ffn": 0.5})
    assert module.training
