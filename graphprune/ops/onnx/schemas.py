"""Operators of ONNX Runtime in ONNX's own domain, which ONNX's checker has to be told of."""

from __future__ import annotations

import onnx.defs
from onnx.defs import OpSchema

_FLOATS = [f"tensor({kind})" for kind in ("float16", "float", "double", "bfloat16")]


def register_schemas() -> None:
    """Let ONNX's checker accept the operators that ONNX Runtime has put in ONNX's own domain.

    That is for the whole process, and changes nothing about other operators. Files with them come
    from ONNX Runtime's optimisers, and run nowhere else.
    """
    name = "SimplifiedLayerNormalization"
    if onnx.defs.has(name):
        return
    integer, number = OpSchema.AttrType.INT, OpSchema.AttrType.FLOAT
    defaults = [("axis", integer, -1), ("epsilon", number, 1e-5), ("stash_type", integer, 1)]
    onnx.defs.register_schema(
        OpSchema(
            name,
            "",
            1,
            doc="RMSNormalization of opset 23.",
            type_constraints=[(kind, _FLOATS, "") for kind in ("T", "V", "U")],
            inputs=[OpSchema.FormalParameter("X", "T"), OpSchema.FormalParameter("scale", "V")],
            outputs=[
                OpSchema.FormalParameter("Y", "V"),
                OpSchema.FormalParameter(
                    "inv_std_var", "U", param_option=OpSchema.FormalParameterOption.Optional
                ),
            ],
            attributes=[
                OpSchema.Attribute(n, onnx.helper.make_attribute(n, value))
                for n, _, value in defaults
            ],
        )
    )
