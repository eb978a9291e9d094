"""Deployment: see `graphprune.runtime.sessions` and `graphprune.runtime.generation`.

model = graphprune.runtime.session("slim.onnx", threads=4)
model = graphprune.runtime.model("packed")
"""

from graphprune.ir.onnx.ort import Provider
from graphprune.runtime.sessions import Session, model, session

__all__ = ["Provider", "Session", "model", "session"]
