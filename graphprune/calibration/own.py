"""What a function of the user's returned, as calibration samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphprune.analysis.program import BaseProgram
from graphprune.analysis.signature import Input
from graphprune.calibration.fit import check_ids, checked, enough
from graphprune.calibration.programs import batches
from graphprune.calibration.result import Samples
from graphprune.calibration.sources.contents import Own
from graphprune.calibration.sources.read import bounded
from graphprune.calibration.sources.section import Calibration
from graphprune.errors import LoadError


def own_samples(
    program: BaseProgram,
    inputs: Sequence[Input],
    content: Own,
    source: str,
    wanted: Calibration,
    count: int,
) -> Samples:
    """The first samples of what a function returned, as many as are wanted.

    Raises:
        LoadError: there are too few, the function raises as an iterator, or tokens or numbers are
            no model's.
        PlanError: it returned no samples that fit the model.
    """
    try:
        data = bounded(content.data, count)
    except Exception as error:  # the function's own code runs on here
        raise LoadError(
            "the function raised an error",
            where=source,
            why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
        ) from error
    data = pytree.tree_map_only(np.ndarray, torch.from_numpy, data)
    if isinstance(data, Mapping):
        data = checked(inputs, data, source)
    available = _available(data)
    if available is not None:
        enough(available, wanted, source, count)
        if isinstance(data, Mapping):
            data = {name: value[:count] for name, value in data.items()}
        else:
            data = data[:count]
    made = batches(program, data)
    for batch in made:
        for one in inputs:
            value = batch.kwargs.get(one.name)
            if one.bound is not None and isinstance(value, Tensor):
                check_ids(value, one, f"{source}, sample {batch.first}")
    windows = isinstance(data, Tensor) and data.dim() == 2 and not data.is_floating_point()
    return Samples(
        data=program.as_inputs(data) if isinstance(data, Tensor | Mapping) else made,
        source=source,
        kind="function",
        count=sum(batch.count for batch in made),
        available=available,
        length=data.shape[1] if windows else None,
        tokens=data.numel() if windows else None,
    )


def _available(data: Any) -> int | None:
    if isinstance(data, Mapping):
        return len(next(iter(data.values())))
    return len(data) if isinstance(data, Tensor | Sequence) else None
