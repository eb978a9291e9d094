"""What takes part in a run: when it is called, what of it trains, what is saved."""

import pytest
import torch
from torch import nn

from graphprune.errors import LoadError
from graphprune.training import Callback, Saving, Training, recover
from training.nets import data, program

OPTIONS = Training(steps=4, batch=4, lr=1e-2, micro_batch=2, precision="float32")


class Temperature(Callback):
    """A number that the optimiser draws towards 1, and one that counts steps."""

    def __init__(self, name="first"):
        self.name, self.calls = name, []
        self.number = nn.Parameter(torch.zeros(()))
        self.count = torch.zeros(1, dtype=torch.int64)

    def identity(self):
        return self.name

    def attach(self, run):
        self.run = run

    def parameters(self):
        return {"number": self.number}

    def groups(self):
        return [{"params": [self.number], "peak": 0.1}]

    def tensors(self):
        return {"count": self.count}

    def on_gradients(self, step, scale):
        (one, *_) = self.run.trainable.parameters().values()
        self.sum = one.grad.clone() * scale
        self.calls.append(("gradients", step))

    def before_step(self, step):
        (one, *_) = self.run.trainable.parameters().values()
        self.clipped = one.grad.norm() <= self.sum.norm() * (1 + 1e-6)
        self.number.grad = 2 * (self.number.detach() - 1)
        self.calls.append(("before", step))

    def after_step(self, step, optimizer):
        (one, *_) = self.run.trainable.parameters().values()
        assert one.grad is None
        assert self.number in optimizer.state
        self.count += 1
        self.calls.append(("after", step))
        return False


def test_callbacks_are_called_around_each_step():
    one, two = Temperature("first"), Temperature("second")
    recover(program(), data(), OPTIONS, callbacks=[one, two])
    right = [(what, step) for step in range(4) for what in ("gradients", "before", "after")]
    assert one.calls == two.calls == right
    assert one.clipped
    assert 0 < float(one.number.detach()) == float(two.number.detach()) < 1


def test_a_stopped_run_goes_on_with_its_callbacks_to_the_same_bits(tmp_path):
    class Stopped(Exception):
        pass

    def stop(now):
        if now.step == 2:
            raise Stopped

    whole = Temperature()
    recover(program(), data(), OPTIONS, callbacks=[whole, Temperature()])
    with pytest.raises(Stopped):
        recover(
            program(), data(), OPTIONS, callbacks=[Temperature(), Temperature()], progress=stop,
            state=Saving(tmp_path, every=1),
        )  # fmt: skip
    again = Temperature()
    recover(
        program(), data(), OPTIONS, callbacks=[again, Temperature()],
        state=Saving(tmp_path, resume=True),
    )  # fmt: skip
    assert [step for _, step in again.calls] == [2] * 3 + [3] * 3
    assert torch.equal(again.number, whole.number)
    assert again.count.tolist() == [4]


def test_other_callbacks_are_another_run(tmp_path):
    recover(program(), data(), OPTIONS, callbacks=[Temperature()], state=Saving(tmp_path))
    with pytest.raises(LoadError, match="pruned or learned beside the weights"):
        recover(program(), data(), OPTIONS, state=Saving(tmp_path, resume=True))
