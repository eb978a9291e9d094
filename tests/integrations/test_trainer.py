"""Pruning inside transformers' Trainer: exact zeros at each step, in checkpoints and in the end."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from graphprune.errors import EmitError, RecipeError, TrainingError
from graphprune.integrations.trainer import PruningCallback
from graphprune.training import GradualPruning
from training.gloo import together
from training.pruning_workers import checkpoint

OPTIONS = GradualPruning(sparsity=0.6, every=2)


def bits(tensor):
    return tensor.detach().view(torch.int32)


def model(seed=0, **config):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "attention_dropout": 0.1,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **config}))


def data(count=30):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 64, (12,), generator=generator).tolist() for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(module, folder, *callbacks, **arguments):
    settings = {
        "max_steps": 16,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = TrainingArguments(str(folder / "run"), **{**settings, **arguments})
    return Trainer(module, args, train_dataset=data(), callbacks=list(callbacks))


class Watch(TrainerCallback):
    """Looks at weights after each step."""

    def __init__(self, pruning, stop=None):
        self.pruning, self.stop, self.seen = pruning, stop, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        masks = self.pruning._pruner.masks
        for name, mask in masks.items():
            assert not bits(model.get_parameter(name))[~mask].any()
        self.seen.append(sum(int((~m).sum()) for m in masks.values()))
        control.should_training_stop = state.global_step == self.stop


def test_zeros_after_each_step_and_in_the_files(tmp_path):
    module = model()
    callback = PruningCallback(OPTIONS, output=tmp_path / "sparse")
    watch = Watch(callback)
    trainer(module, tmp_path, callback, watch).train()
    sizes = {n: p.numel() for n, p in module.named_parameters() if ".layers." in n and p.dim() == 2}
    assert len(sizes) == 14
    wanted = {n: round(0.6 * size) for n, size in sizes.items()}
    assert callback.pruned.zeros == wanted
    assert watch.seen == sorted(watch.seen)
    assert watch.seen[-1] == sum(wanted.values())
    stored = load_file(tmp_path / "sparse" / "model.safetensors")
    for name, count in wanted.items():
        assert int((bits(stored[name]) == 0).sum()) == count
        assert int((stored[name] == 0).sum()) == count  # none is -0.0
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "sparse").eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, module.eval()(ids).logits)
    report = json.loads((tmp_path / "sparse" / "sparsity.json").read_text())
    assert {n: found["zeros"] for n, found in report["parameters"].items()} == wanted
    assert report["sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert [event["step"] for event in report["events"]] == [2, 4, 6, 8, 10, 12, 14, 15]


@pytest.mark.parametrize(
    ("stop", "restored"),
    [
        (3, False),
        pytest.param(3, True, marks=pytest.mark.slow),
        pytest.param(9, False, marks=pytest.mark.slow),
        (9, True),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(stop, restored, tmp_path):
    def begun(name, **arguments):
        module = model()
        with torch.no_grad():  # a kept weight that is 0, and that no gradient reaches
            module.model.layers[0].mlp.down_proj.weight[:, :8] = 0
            module.model.layers[0].mlp.up_proj.weight[:8] = 0
            module.model.layers[0].mlp.gate_proj.weight[:8] = 0
        callback = PruningCallback(OPTIONS, output=tmp_path / name / "sparse")
        folder = tmp_path / name
        saving = {"save_strategy": "steps", "save_steps": 3}
        return trainer(module, folder, callback, **saving, **arguments), folder

    whole, folder = begun("whole")
    whole.train()
    first = load_file(folder / "sparse" / "model.safetensors")
    shutil.rmtree(folder / "sparse")
    again, other = begun("again", restore_callback_states_from_checkpoint=restored)
    checkpoint = tmp_path / "elsewhere"
    shutil.move(folder / "run" / f"checkpoint-{stop}", checkpoint)
    again.train(resume_from_checkpoint=str(checkpoint))
    # Where transformers makes the callback anew, it has the output that was saved.
    second = load_file((folder if restored else other) / "sparse" / "model.safetensors")
    for name, tensor in first.items():
        assert torch.equal(bits(tensor), bits(second[name])), name


def test_checkpoints_hold_masks_in_little_space(tmp_path):
    callback = PruningCallback(OPTIONS)
    trainer(model(), tmp_path, callback, save_strategy="steps", save_steps=8).train()
    state = json.loads((tmp_path / "run" / "checkpoint-8" / "trainer_state.json").read_text())
    masks = state["stateful_callbacks"]["PruningCallback"]["attributes"]["saved"]["masks"]
    assert len(masks) == 14
    assert sum(len(m["bits"]) for m in masks.values()) < 14 * 40  # of 18,432 bits


def test_checkpoints_that_do_not_fit(tmp_path):
    trainer(
        model(), tmp_path, PruningCallback(OPTIONS), save_strategy="steps", save_steps=8
    ).train()
    checkpoint = tmp_path / "run" / "checkpoint-8"
    other = PruningCallback(GradualPruning(sparsity=0.5, every=2))
    with pytest.raises(TrainingError, match=r"other options[^$]*sparsity"):
        trainer(model(), tmp_path, other).train(resume_from_checkpoint=str(checkpoint))
    file = checkpoint / "model.safetensors"
    stored = load_file(file)
    save_file({n: t + 1 for n, t in stored.items()}, file, metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="don't belong to these weights"):
        trainer(model(), tmp_path, PruningCallback(OPTIONS)).train(
            resume_from_checkpoint=str(checkpoint)
        )


def test_a_checkpoint_of_a_training_without_pruning(tmp_path, caplog):
    trainer(model(), tmp_path, save_strategy="steps", save_steps=8).train()
    callback = PruningCallback(OPTIONS)
    arguments = {"save_strategy": "steps", "save_steps": 8}
    trainer(model(), tmp_path, callback, **arguments).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8")
    )
    assert "pruning begins at step 8" in caplog.text
    assert callback.pruned.events[0][0] == 8
    assert callback.pruned.sparsity == pytest.approx(0.6, abs=1e-3)
    assert (tmp_path / "run" / "checkpoint-16" / "trainer_state.json").exists()


def test_training_that_stops_early(tmp_path, caplog):
    callback = PruningCallback(OPTIONS, output=tmp_path / "sparse")
    trainer(model(), tmp_path, callback, Watch(callback, stop=5)).train()
    assert callback.pruned.sparsity == pytest.approx(0.6, abs=1e-3)
    assert "training ended before the schedule did" in caplog.text
    report = json.loads((tmp_path / "sparse" / "sparsity.json").read_text())
    assert report["notes"] == list(callback.pruned.notes)


def test_training_twice(tmp_path):
    callback = PruningCallback(OPTIONS)
    both = trainer(model(), tmp_path, callback)
    both.train()
    first = callback.pruned
    both.train()
    assert callback.pruned is not first
    assert callback.pruned.zeros == first.zeros


def test_bfloat16_and_two_of_four(tmp_path):
    module = model()
    callback = PruningCallback(GradualPruning(pattern="2:4"), output=tmp_path / "sparse")
    trainer(module, tmp_path, callback, bf16=True).train()
    stored = load_file(tmp_path / "sparse" / "model.safetensors")
    for name in callback.pruned.masks:
        assert ((bits(stored[name]) == 0).reshape(-1, 4).sum(1) == 2).all()


@pytest.mark.slow  # two processes import transformers
def test_weights_that_are_shared_among_processes(tmp_path):
    together(checkpoint, tmp_path)
    masks = torch.load(tmp_path / "masks.pt")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "sparse")
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    for name, mask in masks.items():
        weight = loaded.get_parameter(name)
        assert not bits(weight)[mask == 0].any()
        assert int((weight == 0).sum()) == round(0.6 * weight.numel())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 16)
        self.inner = nn.Linear(16, 16)
        self.head = nn.Linear(16, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, labels=None):
        logits = self.head(self.inner(self.embed(input_ids)).relu())
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def test_a_module_of_ones_own(tmp_path):
    module = Net()
    callback = PruningCallback(OPTIONS, output=tmp_path / "sparse")
    trainer(module, tmp_path, callback).train()
    stored = load_file(tmp_path / "sparse" / "model.safetensors")
    assert set(stored) == {"embed.weight", "inner.weight", "inner.bias"}
    assert int((bits(stored["inner.weight"]) == 0).sum()) == round(0.6 * 256)
    assert torch.equal(stored["inner.weight"], module.inner.weight)


def test_options_as_plain_data():
    assert PruningCallback({"sparsity": 0.6, "every": 2}).options == OPTIONS
    with pytest.raises(RecipeError, match="'every'"):
        PruningCallback({"sparsity": 0.6, "every": 0})
    with pytest.raises(RecipeError, match=r"unknown pruning option 'sparsty'[^$]*'sparsity'"):
        PruningCallback({"sparsty": 0.6})


def test_an_output_that_exists(tmp_path):
    (tmp_path / "sparse").mkdir()
    (tmp_path / "sparse" / "mine").touch()
    callback = PruningCallback(OPTIONS, output=tmp_path / "sparse")
    with pytest.raises(EmitError, match="the output exists already"):
        trainer(model(), tmp_path, callback).train()


def test_trainers_that_would_lose_zeros(tmp_path):
    callback = PruningCallback(OPTIONS)
    loading = trainer(model(), tmp_path, callback)
    loading.args.load_best_model_at_end = True
    with pytest.raises(TrainingError, match="load_best_model_at_end"):
        loading.train()
    with pytest.raises(TrainingError, match="one PruningCallback"):
        trainer(model(), tmp_path, callback, PruningCallback(OPTIONS)).train()
    module = model()
    module.peft_config = {}
    with pytest.raises(TrainingError, match="with adapters"):
        trainer(module, tmp_path, PruningCallback(OPTIONS)).train()
