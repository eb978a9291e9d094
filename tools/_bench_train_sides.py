"""The two sides of tools/bench train: graphprune's engine, and transformers' Trainer.

A process of one of them. After each step it writes a line of JSON and waits for one.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _bench_train import Settings
from torch import Tensor, nn

RANK, ALPHA, SEED = 8, 16.0, 0
BETAS = (0.9, 0.95)
_SHARE = 0.5  # of the weights that masks remove


class Turns:
    """Tells the other process how long a step took, and waits until it may go on."""

    def __init__(self) -> None:
        """What libraries print goes elsewhere."""
        self._out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._began = time.process_time()
        self.losses: list[float] = []

    def after_step(self) -> None:
        """A step is over."""
        self._say(seconds=time.process_time() - self._began)
        if not sys.stdin.readline():
            raise SystemExit("the process that asked has ended")
        self._began = time.process_time()

    def end(self, loss: float) -> None:
        """Training is over."""
        self._say(peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, loss=loss)

    def _say(self, **found: float) -> None:
        print(json.dumps(found), file=self._out, flush=True)


def main(text: str) -> None:
    """Train as the first process says."""
    given = json.loads(text)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    turns, settings = Turns(), Settings(**given["settings"])
    work = {"ours": _ours, "trainer": _trainer}[given["side"]]
    turns.end(work(given["part"], settings, turns))


def _windows(settings: Settings) -> Tensor:
    """As many windows of text as there are samples; a text that is too short repeats."""
    from graphprune.calibration.text.read import load_tokenizer, read_text

    tokenizer = load_tokenizer(Path(settings.model))
    found = tokenizer(read_text(settings.text), add_special_tokens=False, verbose=False)
    tokens = torch.tensor(found["input_ids"])
    count = (settings.steps + 1) * settings.windows * settings.length
    return tokens.repeat(-(-count // len(tokens)))[:count].view(-1, settings.length)


def _masks(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Half of each matrix in the layers, by magnitude."""
    found = {}
    for name, weight in weights.items():
        if ".layers." in name and weight.dim() == 2:
            size = weight.detach().abs()
            found[name] = size > size.flatten().kthvalue(int(_SHARE * size.numel())).values
    return found


def _ours(part: str, settings: Settings, turns: Turns) -> float:
    """Train with graphprune."""
    from graphprune.frontends import load_traced
    from graphprune.training import Training, recover

    program = load_traced(settings.model)
    training = Training(
        train="lora" if part == "lora" else "full",
        loss="ce",
        batch=settings.windows,
        lr=1e-4,
        precision="bfloat16",
        rank=RANK,
        alpha=ALPHA,
        dropout=0.0,
        seed=SEED,
    )
    masks = _masks(dict(program.weights)) if part == "masks" else None
    found = recover(
        program,
        _windows(settings),
        training,
        masks=masks,
        progress=lambda _: turns.after_step(),
    )
    return found.losses[0]


def _trainer(part: str, settings: Settings, turns: Turns) -> float:
    """Train with transformers."""
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=torch.float32, trust_remote_code=False
    )
    masks = _masks(dict(model.named_parameters())) if part == "masks" else {}
    if part == "lora":
        _adapt(model)

    class Held(TrainerCallback):
        """Keeps zeros, as a plain loop does, and takes turns."""

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            with torch.no_grad():
                for name, mask in masks.items():
                    model.get_parameter(name).mul_(mask)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.after_step()

    held = Held()
    held.on_optimizer_step()
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        arguments = TrainingArguments(
            folder,
            use_cpu=True,
            bf16=True,
            per_device_train_batch_size=settings.windows,
            max_steps=settings.steps + 1,
            learning_rate=1e-4,
            optim="adamw_torch_fused",
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            weight_decay=0.0,
            max_grad_norm=1.0,
            lr_scheduler_type="cosine",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=_Ordered(settings), callbacks=[held])
        trainer.train()
    return float(trainer.state.log_history[0]["loss"])


class _Ordered(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """The windows in the order in which graphprune takes them."""

    def __init__(self, settings: Settings) -> None:
        """All of them, once."""
        from graphprune.training.core.order import Order

        windows = _windows(settings)
        order = Order(len(windows), len(windows), settings.windows, SEED)
        numbers = [n for step in range(order.steps) for n in order.samples(step)]
        self._windows = windows[numbers]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for window in self._windows:
            yield {"input_ids": window, "labels": window}


def _adapt(model: nn.Module) -> None:
    """Adapters beside all linear layers but the last, by peft where it is installed."""
    layers = [n for n, m in model.named_modules() if type(m) is nn.Linear and ".layers." in n]
    try:
        import peft
    except ImportError:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for name in layers:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, _Adapted(model.get_submodule(name)))
        return
    config = peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=layers)
    peft.inject_adapter_in_model(config, model)


class _Adapted(nn.Module):
    """A linear layer with a product of two thin matrices beside it, as in the paper."""

    def __init__(self, layer: nn.Module) -> None:
        """Its second matrix is 0 at first."""
        super().__init__()
        assert isinstance(layer, nn.Linear)
        self.layer = layer
        self.a = nn.Linear(layer.in_features, RANK, bias=False)
        self.b = nn.Linear(RANK, layer.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's result and the adapter's."""
        beside: Tensor = self.b(self.a(x))
        result: Tensor = self.layer(x)
        return result + beside * (ALPHA / RANK)


if __name__ == "__main__":
    main(sys.argv[1])
