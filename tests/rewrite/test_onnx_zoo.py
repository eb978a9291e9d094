"""Models as exporters write them: every prunable role at once, judged by the oracle."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging

import numpy as np
import pytest
import torch

import graphprune as gp
from graphprune.frontends.hf.load import trace_model
from graphprune.frontends.onnx.load import load_onnx
from graphprune.oracle.verification_onnx import verify_onnx
from graphprune.rewrite.slim_onnx import SlimOnnx
from models.cache import model_path
from zoo.case import prunable_fraction, randomise
from zoo.expected import CASES
from zoo.pretrained import randomised

# Not imported by statements: mypy would follow them into the zoo, which it is to leave out.
decoders, encoders = (importlib.import_module(f"zoo.{n}") for n in ("decoders", "encoders"))

# What exporters say of the sources is not of interest here.
pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]
OPSET = 17
CHOSEN = {
    "torchscript": (
        "resnet_basic resnext mobilenet densenet unet_batch_norm unet_group_norm shufflenet "
        "diffusion_unet permuted in_place encoder_pre_norm multihead reused"
    ).split(),
    "dynamo": "resnet_basic mobilenet shufflenet permuted in_place".split(),
}
# What an exporter can't write, or writes as operators that freeze more than torch's own do.
UNWRITTEN = {
    "torchscript": {
        "attention_grouped_kernel",  # scaled_dot_product_attention with enable_gqa
        "dict_output",
        "spectral_norm",  # vdot
        "low_rank",  # bilinear
        "lstm_projected",
    },
    "dynamo": {"dict_output", "patch_merging", "lstm_projected"},  # of the last, an invalid file
}
# Assignments to slices are ScatterND at computed places, bags of embeddings are loops.
LESS = {"in_place": 0.4, "embeddings": 0.0}


def quiet():
    stack = contextlib.ExitStack()
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
    logging.disable(logging.WARNING)
    stack.callback(logging.disable, logging.NOTSET)
    return stack


def export(module, args, file, exporter):
    with quiet():  # without gradients torch's encoder layers take a path that can't be exported
        if exporter == "dynamo":
            torch.onnx.export(module, args, str(file), dynamo=True, verbose=False)
        else:
            torch.onnx.export(module, args, str(file), dynamo=False, opset_version=OPSET)
    return file


def judge(file, wanted):
    """Prune half of all that can be pruned; the certificate is for random inputs."""
    program = load_onnx(file)
    assert prunable_fraction(program) >= wanted, program.frozen()
    plan = gp.select(program, remove={"*": 0.5}, score="random", seed=3)
    slim = SlimOnnx(program, plan)
    slim.save(file.with_name("slim.onnx"))
    certificate = verify_onnx(program, plan, file.with_name("slim.onnx"))
    certificate.raise_if_failed()
    assert not plan.kept_units or certificate.dense_difference > 0
    found = load_onnx(file.with_name("slim.onnx"))
    counted = sum(found.weights[n].numel() for n in program.trainable if n in found.weights)
    assert counted == slim.cost.params
    return program


def cases():
    for exporter in ("torchscript", "dynamo"):
        for case in CASES:
            name = case.build.__name__
            if name not in UNWRITTEN[exporter]:
                marks = () if name in CHOSEN[exporter] else (pytest.mark.slow,)
                yield pytest.param(case, exporter, id=f"{name}-{exporter}", marks=marks)


@pytest.mark.parametrize(("case", "exporter"), cases())
def test_module(tmp_path, case, exporter):
    generator = torch.Generator().manual_seed(1)
    if callable(case.inputs):
        args = case.inputs()
    else:
        args = tuple(torch.randn(s, generator=generator) for s in case.inputs)
    file = export(randomise(case.build()), args, tmp_path / "dense.onnx", exporter)
    name = case.build.__name__
    judge(file, LESS.get(name, 0.95) * case.fraction)


class Logits(torch.nn.Module):
    """A transformer as a function of one tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        options = {"use_cache": False} if self.model.config.model_type != "bert" else {}
        return self.model(input_ids=input_ids, **options).logits


TRANSFORMERS = [
    (decoders.llama_gqa_4, "dynamo"),  # the old exporter has no torch.diff
    (decoders.gpt2, "dynamo"),
    (encoders.bert, "dynamo"),
    (encoders.bert, "torchscript"),
]


@pytest.mark.parametrize(("build", "exporter"), TRANSFORMERS)
def test_transformer(tmp_path, build, exporter):
    model = randomised(build()).eval()
    ids = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    file = export(Logits(model).eval(), (ids,), tmp_path / "dense.onnx", exporter)
    judge(file, 0.95 * prunable_fraction(trace_model(model)))


REAL = {
    "ppocr/ppocrv5_det.onnx": 0.95,
    "ppocr/ppocrv5_rec.onnx": 0.5,
    "ppocr/ppocrv5_cls.onnx": 0.95,
    "open-nsfw/open_nsfw.onnx": 0.95,
    "magika/model.onnx": 0.95,
}


def page(shape):
    """Dark strokes on a light page: a text detector answers noise with zeros, whatever is cut."""
    rng = np.random.default_rng(0)
    image = np.full(shape, 2, np.float32)
    for y in range(12, shape[2] - 16, 24):
        strokes = np.repeat(rng.random(shape[3] // 2) < 0.5, 2)
        image[:, :, y : y + 14, 8:-8] = np.where(strokes[8:-8], -2, 2)
    return image


@pytest.mark.parametrize("name", REAL)
def test_real_model(tmp_path, name):
    folder, _, file = name.partition("/")
    program = load_onnx(model_path(folder) / file)
    assert prunable_fraction(program) >= REAL[name], program.frozen()
    plan = gp.select(program, remove={"channels": 0.25})
    slim = SlimOnnx(program, plan)
    slim.save(tmp_path / "slim.onnx")
    feeds = {"x": page(program.known["x"].shapes[0])} if "det" in name else None
    certificate = verify_onnx(program, plan, tmp_path / "slim.onnx", feeds)
    certificate.raise_if_failed()
    assert certificate.dense_difference > 1e-3
    assert slim.cost.params < 0.9 * program.costs.total().params


def test_a_model_within_an_if_is_frozen():
    program = load_onnx(model_path("silero-vad") / "silero_vad.onnx")
    assert not any(s.prunable for s in program.structures)
    reasons = set(program.frozen().values())
    assert any("If" in reason for reason in reasons), reasons
    assert any("If has a body" in str(r) for r in program.typing.opaque.values())
    with pytest.raises(gp.GraphPruneError):
        gp.select(program, remove={"channels": 0.25})
