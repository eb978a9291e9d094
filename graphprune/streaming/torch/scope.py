"""Which products of a traced graph are its outputs."""

from __future__ import annotations

import torch
from torch import fx


def is_output(node: fx.Node) -> bool:
    """Whether a result reaches the model's outputs without meeting another tensor."""
    waiting, seen = [node], {node}
    while waiting:
        value = waiting.pop()
        for user in value.users:
            if user.op == "output":
                return True
            tensors = [n for n in user.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor | list | tuple)]  # fmt: skip  # noqa: E501
            if len(tensors) == 1 and user not in seen:
                seen.add(user)
                waiting.append(user)
    return False
