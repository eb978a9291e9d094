"""Plans that take layers out of ONNX graphs, and the slim files of such plans, checked."""

from __future__ import annotations

import numpy as np
import onnx

import graphprune as gp
from graphprune.oracle.verification_onnx import verify_onnx
from graphprune.rewrite.slim_onnx import SlimOnnx


def layers_plan(program, gone, stack="layers"):
    size = program.by_name[stack].size
    kept = tuple(i for i in range(size) if i not in gone)
    return gp.Plan(program.fingerprint, {stack: kept}, {stack: size})


def slimmed(program, plan, file):
    """The slim file, which the masked model, the checker and the plan's figures agree with."""
    slim = SlimOnnx(program, plan)
    slim.save(file)
    certificate = verify_onnx(program, plan, file)
    certificate.raise_if_failed()
    assert certificate.dense_difference > 1e-3
    onnx.checker.check_model(str(file), full_check=True)
    left = {t.name: int(np.prod(t.dims)) for t in onnx.load(file).graph.initializer}
    assert sum(n for name, n in left.items() if name in program.trainable) == slim.cost.params
    return file
