"""Pruning inside Lightning: exact zeros at each step, in checkpoints and in the end."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import nn

from graphprune.errors import EmitError, TrainingError
from graphprune.training import GradualPruning

lightning: Any = pytest.importorskip("lightning.pytorch")

from graphprune.integrations.lightning import PruningCallback  # noqa: E402  (needs Lightning)

OPTIONS = GradualPruning(sparsity=0.6, every=2)
SIZES = {"model.0.weight": 384, "model.2.weight": 224}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def bits(tensor):
    return tensor.detach().view(torch.int32)


class Module(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 7))
        self.seen = []

    def training_step(self, batch, number):
        self.seen.append({n: bits(p).clone() for n, p in self.named_parameters()})
        return self.model(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.03)


class ByHand(Module):
    """Two optimisers, of which each takes a step in every batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, number):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.model(batch).square().mean())
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.AdamW(self.model[i].parameters(), lr=0.03) for i in (0, 2)]


def batches(count=10):
    data = torch.randn(4 * count, 12, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(data, batch_size=4)


def trainer(folder, *callbacks, **settings):
    given = {
        "max_epochs": 4,
        "accumulate_grad_batches": 3,
        "gradient_clip_val": 1.0,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
    }
    return lightning.Trainer(callbacks=list(callbacks), **{**given, **settings})


def test_zeros_after_each_step_and_in_the_files(tmp_path):
    module = Module()
    callback = PruningCallback(OPTIONS, tmp_path / "sparse")
    trainer(tmp_path, callback).fit(module, batches())
    wanted = {name: round(0.6 * size) for name, size in SIZES.items()}
    assert callback.pruned.zeros == wanted
    assert callback.pruned.notes == ()
    zeros = [sum(int((b[n] == 0).sum()) for n in SIZES) for b in module.seen]
    assert zeros == sorted(zeros)
    assert zeros[-1] == sum(wanted.values())
    assert len(set(zeros)) > 6
    assert all(not (b[n] == -(2**31)).any() for b in module.seen for n in SIZES)  # -0.0
    stored = load_file(tmp_path / "sparse" / "model.safetensors")
    for name, count in wanted.items():
        assert int((bits(stored[name]) == 0).sum()) == count
    again = Module()
    load_model(again, tmp_path / "sparse" / "model.safetensors")
    assert torch.equal(again.model(torch.ones(12)), module.model(torch.ones(12)))
    report = json.loads((tmp_path / "sparse" / "sparsity.json").read_text())
    assert {n: found["zeros"] for n, found in report["parameters"].items()} == wanted
    # 4 epochs of 10 batches in groups of 3 are 16 steps of the optimiser.
    assert [event["step"] for event in report["events"]] == [2, 4, 6, 8, 10, 12, 14, 15]


def test_a_module_inside(tmp_path):
    callback = PruningCallback(OPTIONS, tmp_path / "sparse", path="model")
    trainer(tmp_path, callback).fit(Module(), batches())
    assert set(callback.pruned.masks) == {"0.weight", "2.weight"}
    stored = load_file(tmp_path / "sparse" / "model.safetensors")
    assert set(stored) == {"0.weight", "0.bias", "2.weight", "2.bias"}


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_ends_with_the_same_bits(stop, tmp_path):
    saving = lightning.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, callback = Module(), PruningCallback(OPTIONS)
    trainer(tmp_path, callback, saving, enable_checkpointing=True).fit(whole, batches())
    again, second = Module(), PruningCallback(OPTIONS)
    trainer(tmp_path, second).fit(
        again, batches(), ckpt_path=tmp_path / f"epoch={stop - 1}.ckpt", weights_only=True
    )
    assert second.pruned.events == callback.pruned.events
    for name, tensor in whole.state_dict().items():
        assert torch.equal(bits(tensor), bits(again.state_dict()[name])), name


def test_gradients_of_what_is_pruned_count_in_no_norm(tmp_path):
    class Norms(lightning.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            for name, mask in callback._pruner.masks.items():
                assert not module.get_parameter(name).grad[~mask].any()

    callback = PruningCallback(OPTIONS)
    trainer(tmp_path, callback, Norms()).fit(Module(), batches())


def test_optimisation_by_hand(tmp_path):
    callback = PruningCallback(OPTIONS)
    settings = {"accumulate_grad_batches": 1, "gradient_clip_val": None, "max_epochs": 2}
    trainer(tmp_path, callback, **settings).fit(ByHand(), batches())
    assert callback.pruned.notes == ()
    assert callback.pruned.events[-1][0] == 18  # of 20 batches, in each of which two steps are done
    assert callback.pruned.zeros == {name: round(0.6 * size) for name, size in SIZES.items()}


def test_trainings_without_an_end(tmp_path):
    settings = {"max_epochs": -1, "max_time": {"seconds": 1}}
    with pytest.raises(TrainingError, match="nobody knows how many steps"):
        trainer(tmp_path, PruningCallback(OPTIONS), **settings).fit(Module(), batches())
    callback = PruningCallback(OPTIONS, steps=12)
    trainer(tmp_path, callback, **settings).fit(Module(), batches())
    assert callback.pruned.zeros == {name: round(0.6 * size) for name, size in SIZES.items()}


def test_an_error_lets_the_weights_go(tmp_path):
    class Failing(Module):
        def training_step(self, batch, number):
            if len(self.seen) > 20:
                raise RuntimeError("no more")
            return super().training_step(batch, number)

    module = Failing()
    with pytest.raises(RuntimeError, match="no more"):
        trainer(tmp_path, PruningCallback(OPTIONS)).fit(module, batches())
    assert (module.model[0].weight == 0).any()
    torch.optim.SGD([nn.Parameter(torch.ones(1))]).step()  # of something else
    module.model[0].weight.data.fill_(1.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module.model(torch.ones(12)).sum().backward()
    optimizer.step()
    assert module.model[0].weight.all()


def test_an_output_that_exists(tmp_path):
    (tmp_path / "sparse").mkdir()
    (tmp_path / "sparse" / "mine").touch()
    with pytest.raises(EmitError, match="the output exists already"):
        trainer(tmp_path, PruningCallback(OPTIONS, tmp_path / "sparse")).fit(Module(), batches())


OTHER = """
import sys
import torch
import pytorch_lightning as lightning
from graphprune.integrations.lightning import PruningCallback

assert "lightning.pytorch" not in sys.modules
assert issubclass(PruningCallback, lightning.Callback)

class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)

    def training_step(self, batch, number):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

callback = PruningCallback({"sparsity": 0.5})
data = torch.utils.data.DataLoader(torch.randn(32, 8), batch_size=2)
lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                  enable_progress_bar=False, callbacks=[callback]).fit(Module(), data)
assert callback.pruned.zeros == {"layer.weight": 32}
"""


@pytest.mark.slow  # another process imports torch and Lightning
def test_the_other_lightning(tmp_path):
    pytest.importorskip("pytorch_lightning")
    done = subprocess.run(
        [sys.executable, "-c", OTHER], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
