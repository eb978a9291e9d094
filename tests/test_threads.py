"""Several threads that compile, beside others that go on with their own work."""

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune as gp
from graphprune.exclusive import alone, default_dtype
from graphprune.frontends.hf.weightless import parameters_on_meta
from zoo.case import randomise

TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 32,
}


class Counting(nn.Module):
    """Integers that become floating numbers of torch's default dtype, and a hidden layer."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x, ids):
        scale = torch.where(ids > 3, 0.1, 1.7) + (ids / 7) + torch.arange(5) * 0.3 + (ids < 2) * 0.7
        return self.down(torch.relu(self.up(x))) * scale.sum(-1, keepdim=True)


class Refusing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x)[x > 0.5].tolist()


@contextmanager
def making_layers():
    """Another thread that makes layers all the while; gives how many of which kind it has made."""
    made, done = Counter(), threading.Event()

    def make():
        while not done.is_set():
            weight = nn.Linear(2, 2).weight
            made[weight.device.type, weight.dtype, torch.get_default_dtype()] += 1
            time.sleep(0.001)

    thread = threading.Thread(target=make)
    thread.start()
    try:
        yield made
    finally:
        done.set()
        thread.join()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "llama"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(folder)
    ids = torch.arange(10).view(2, 5)
    counting = randomise(Counting())
    return [
        (folder, None),
        (counting, (torch.randn(2, 8), ids)),
        (Refusing().eval(), (torch.randn(2, 8),)),
    ]


def compiled(source, output):
    """The plan that was written; the kind of the error where nothing was."""
    model, example = source
    recipe = {"remove": {"ffn" if example is None else "*": 0.5}, "score": "magnitude"}
    try:
        gp.compile(model, recipe, output, ["pt2"], example=example)
    except gp.GraphPruneError as error:
        return type(error)
    return gp.Plan.load(f"{output}.graphprune_plan.json")


def test_threads_compile_what_one_does(sources, tmp_path):
    wanted = [compiled(source, tmp_path / f"alone{i}.pt2") for i, source in enumerate(sources)]
    assert [type(plan) for plan in wanted] == [gp.Plan, gp.Plan, type]
    with making_layers() as made, ThreadPoolExecutor(4) as pool:
        turns = [pool.submit(compiled, s, tmp_path / f"{i}.pt2") for i, s in enumerate(sources)]
        more = pool.submit(compiled, sources[1], tmp_path / "more.pt2")
        assert [turn.result() for turn in turns] == wanted
        assert more.result() == wanted[1]
    assert made.total() > 20
    assert made.keys() == {("cpu", torch.float32, torch.float32)}
    for one, other in (("0", "alone0"), ("1", "alone1"), ("more", "alone1")):
        found = torch.export.load(tmp_path / f"{one}.pt2").state_dict
        weights = torch.export.load(tmp_path / f"{other}.pt2").state_dict
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_only_the_calling_thread_builds_without_memory():
    with parameters_on_meta(), ThreadPoolExecutor(1) as pool:
        here, there = nn.BatchNorm1d(3), pool.submit(nn.BatchNorm1d, 3).result()
        assert here.weight.is_meta
        assert not here.running_mean.is_meta
        assert not there.weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


def test_a_run_in_float64_leaves_torch_as_it_is():
    """What a graph computes of integers alone is exact to float64, the default being float32."""
    module, ids = randomise(Counting()), torch.arange(10).view(2, 5)
    program = gp.trace(module, (torch.randn(2, 8), ids))
    plan = gp.select(program, remove={"*": 0.5}, score="magnitude")
    defaults = []
    original = torch.set_default_dtype
    torch.set_default_dtype = lambda dtype: (defaults.append(dtype), original(dtype))
    try:
        from graphprune.ir.torch.interpreter import run_graph

        x = torch.randn(2, 8, dtype=torch.float64)
        (found,) = run_graph(program.exported, program.weights, ((x, ids), {}))
        gp.verify(program, plan, gp.apply(program, plan)).raise_if_failed()
    finally:
        torch.set_default_dtype = original
    assert not defaults
    with default_dtype(torch.float64), torch.no_grad():
        wanted = module.double()(x, ids)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


def test_a_forked_process_does_not_wait_for_a_thread_of_its_parent(tmp_path):
    import os

    held, done = threading.Event(), threading.Event()

    def hold():
        with alone():
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if not child:  # nothing of pytest may run here
        with alone():
            os._exit(7)
    deadline = time.monotonic() + 5
    status = (0, 0)
    while status == (0, 0) and time.monotonic() < deadline:
        status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    done.set()
    thread.join()
    if status == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status[1]) == 7
