"""Deployment: ONNX files in ONNX Runtime, called with arrays or tensors by name.

    model = graphprune.runtime.session("slim.onnx", threads=4, example=inputs)
    outputs = model(**inputs)                     # numpy in, numpy out; torch in, torch out
    print(model.latency(repeats=50).milliseconds)

And checkpoints whose linear layers are sparse, in PyTorch:

    model = graphprune.runtime.model("packed")
    model.generate(**tokenizer("Once", return_tensors="pt"))

ONNX Runtime is an extra (``graphprune[cpu]`` or ``[gpu]``) and imported on first use.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.errors import LoadError
from graphprune.ir.onnx.ort import (
    MADE_UP,
    NUMBERS,
    Provider,
    TensorType,
    declared_type,
    example_feeds,
    open_raw,
)
from graphprune.quality.timing import Latency, in_turns

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

_LENGTH = 128


class Session:
    """An ONNX file that ONNX Runtime has opened; see `session`. Calls may come from any thread.

    Attributes:
        path: The file.
        inputs: What it takes, by name.
        outputs: What it returns, by name.
        providers: ONNX Runtime's execution providers, the preferred one first.
        threads: Threads within an operator, on the CPU.
    """

    def __init__(self, path: Path, raw: Any, threads: int, *, bind: bool = True) -> None:
        """Wrap an ``onnxruntime.InferenceSession``."""
        self.path = path
        self.threads = threads
        self.inputs = {v.name: declared_type(v) for v in raw.get_inputs()}
        self.outputs = {v.name: declared_type(v) for v in raw.get_outputs()}
        self.providers: tuple[str, ...] = tuple(raw.get_providers())
        self._raw = raw
        self._example: dict[str, Any] | None = None
        numeric = {t.dtype in NUMBERS for t in (*self.inputs.values(), *self.outputs.values())}
        self._bind = bind and numeric == {True}

    def __call__(self, /, **inputs: Any) -> dict[str, Any]:
        """Run the model.

        Args:
            inputs: A numpy array or torch tensor for every input.

        Returns:
            Every output by name: torch tensors if any input is one, on its device, numpy arrays
            otherwise. With binding they are the memory that ONNX Runtime wrote to.

        Raises:
            LoadError: The inputs are not those that the model declares, or it can't run on them.
        """
        tensors = {name: _Tensor(name, value) for name, value in inputs.items()}
        self._check(tensors)
        of_torch = any(t.device for t in tensors.values())
        try:
            return (self._bound if self._bind else self._copied)(tensors, of_torch)
        except Exception as error:  # ONNX Runtime raises a class of its own for each status code
            raise LoadError(
                "ONNX Runtime can't run the model on these inputs",
                where=str(self.path),
                why=" ".join(str(error).split())[:500],
            ) from error

    def latency(
        self, example: Mapping[str, Any] | None = None, *, repeats: int | None = None
    ) -> Latency:
        """Time a call.

        Args:
            example: Inputs by name; None for those that the session was opened with, or made-up
                ones: a batch of one, 128 along other open dimensions.
            repeats: Calls to measure, after one that isn't; None for nine or half a second.

        Returns:
            Median and quartiles in seconds, and the number of threads.

        Raises:
            LoadError: See `__call__`.
            EvaluationError: No inputs can be made up.
        """
        given = example if example is not None else self._example
        inputs = dict(given if given is not None else example_feeds(self._raw, _LENGTH))
        (result,) = in_turns([lambda: self(**inputs)], repeats, self.threads, "onnxruntime")
        return result

    def warm_up(self, runs: int, example: Mapping[str, Any] | None) -> None:
        """Run on an example and keep it for `latency`.

        Args:
            runs: How often.
            example: Inputs by name; None for made-up ones, where the model leaves no size open.
        """
        if example is None:
            if any(not isinstance(s, int) for t in self.inputs.values() for s in t.shape):
                return
            if any(t.dtype not in MADE_UP for t in self.inputs.values()):
                return
        inputs = dict(example if example is not None else example_feeds(self._raw, _LENGTH))
        for _ in range(runs):
            self(**inputs)
        self._example = inputs

    def _check(self, tensors: Mapping[str, _Tensor]) -> None:
        """Refuse what ONNX Runtime would refuse in its own words, or misread."""
        wrong = [f"{n} is missing" for n in self.inputs if n not in tensors]
        wrong += [f"there is no input {name}" for name in tensors if name not in self.inputs]
        cuda = "CUDAExecutionProvider" in self.providers
        for name, tensor in tensors.items():
            declared = self.inputs.get(name)
            if declared is None:
                continue
            if tensor.device and tensor.device not in ("cpu", "cuda" if cuda else "cpu"):
                wrong.append(f"{name} is on {tensor.device}, where the session doesn't compute")
            fits = len(declared.shape) == len(tensor.shape) and all(
                a == b for a, b in zip(declared.shape, tensor.shape, strict=True)
                if isinstance(a, int)
            )  # fmt: skip
            strings = declared.dtype == "tensor(string)" and tensor.dtype == "string"
            if not fits or not (tensor.dtype == declared.dtype or strings):
                found = TensorType(tensor.dtype, tensor.shape)
                wrong.append(f"{name} is {found} instead of {declared}")
        if wrong:
            raise LoadError(
                "the inputs are not the model's",
                where=str(self.path),
                why="; ".join(wrong),
                hint="the model takes " + ", ".join(f"{n}: {t}" for n, t in self.inputs.items()),
            )

    def _bound(self, tensors: Mapping[str, _Tensor], of_torch: bool) -> dict[str, Any]:
        """Let ONNX Runtime read the callers' memory, and hand out what it wrote to."""
        import torch
        from torch.utils.dlpack import from_dlpack

        device, index = "cpu", 0
        binding = self._raw.io_binding()
        for name, tensor in tensors.items():
            if tensor.device == "cuda":
                device, index = "cuda", tensor.index
                # ONNX Runtime computes on a stream of its own.
                torch.cuda.current_stream(index).synchronize()
            place = (tensor.device or "cpu", tensor.index)
            number = NUMBERS[self.inputs[name].dtype]
            binding.bind_input(name, *place, number, list(tensor.shape), tensor.pointer)
        for name in self.outputs:
            binding.bind_output(name, device, index)
        binding.synchronize_inputs()
        self._raw.run_with_iobinding(binding)
        binding.synchronize_outputs()
        borrowed = {tensor.pointer for tensor in tensors.values()}
        found: dict[str, Any] = {}
        for name, value in zip(self.outputs, binding.get_outputs(), strict=True):
            result = from_dlpack(value._ortvalue)
            if result.data_ptr() in borrowed:  # an input that is an output too is the caller's
                result = result.clone()
            found[name] = result if of_torch else _to_numpy(result)
        return found

    def _copied(self, tensors: Mapping[str, _Tensor], of_torch: bool) -> dict[str, Any]:
        results = self._raw.run(None, {n: t.numpy() for n, t in tensors.items()})
        found = dict(zip(self.outputs, results, strict=True))
        return {n: _to_torch(v) for n, v in found.items()} if of_torch else found


def session(
    path: str | Path,
    *,
    threads: int | None = None,
    providers: Sequence[Provider] | None = None,
    bind: bool = True,
    kernels: bool = True,
    warm_up: int = 1,
    example: Mapping[str, Any] | None = None,
) -> Session:
    """Open an ONNX file for inference.

    All graph optimisations are on, and operators run one after another, each on `threads` threads.

    Args:
        path: The ``.onnx`` file.
        threads: Threads within an operator; None for OMP_NUM_THREADS, or every processor that
            this process may use.
        providers: ONNX Runtime's execution providers in order of preference, ``"cpu"``,
            ``"cuda"``, full names, or pairs of a name and its options; None for CUDA where
            onnxruntime-gpu is installed, with the CPU for the rest.
        bind: Whether ONNX Runtime reads inputs where they are and outputs are handed out where it
            wrote them; False copies them. What isn't a tensor of numbers is copied in any case.
        kernels: Whether packed weights (`graphprune.packing.pack`) are read by our kernels; False
            has ONNX Runtime decode them once, now, and multiply dense ones.
        warm_up: Calls made now, so that the first one of yours is as fast as the others.
        example: Inputs by name for these calls, of the sizes that you will use; None for made-up
            ones if the model leaves no size open, and for no warm-up otherwise.

    Raises:
        LoadError: The file is missing or not ONNX; a provider is unknown or doesn't start; the
            model doesn't run on the example; ONNX Runtime is not installed.
    """
    count = threads if threads is not None else _processors()
    if count < 1:
        raise LoadError("a session needs at least one thread", why=f"threads={count}")
    raw = open_raw(path, count, providers, spin=True, kernels=kernels)
    found = Session(Path(path), raw, count, bind=bind)
    if warm_up:
        found.warm_up(warm_up, example)
    return found


def model(
    path: str | Path,
    *,
    format: str = "auto",
    tokens: Sequence[int] = (1,),
    device: str | torch.device = "cpu",
    progress: Callable[[str], None] | None = None,
    trust: bool = False,
    allow_unused_weights: bool = False,
) -> torch.nn.Module:
    """Open a checkpoint with zeros, packed or not, as the transformers model that it is.

    Args:
        path: A directory that `graphprune.packing.pack` or ``save_pretrained`` wrote.
        format: Of linear layers: ``auto`` for the fastest one of each, by measurement on this
            machine (which is kept, see `graphprune.kernels.choose`); ``file`` for what the file
            has; ``dense``; or the name of a format.
        tokens: Numbers of tokens at once that the fastest one is chosen for.
        device: Where the model is to be.
        progress: Called with the names of stages.
        trust: Whether the checkpoint may run code of its own.
        allow_unused_weights: Leave out what its files have and the model doesn't.

    Returns:
        The model in evaluation mode, whose sparse layers are `graphprune.kernels.linear`'s.

    Raises:
        LoadError: The directory is no checkpoint, or its files are damaged.
        EmitError: There is no such format.
    """
    import torch

    from graphprune.runtime.formats import check_tokens
    from graphprune.runtime.packed import open_packed

    told = progress or (lambda _: None)
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise LoadError(f"there is no device {device}", hint="cpu, cuda or cuda:1") from error
    return open_packed(
        Path(path),
        format,
        check_tokens(tokens),
        place,
        told,
        trust=trust,
        allow_unused_weights=allow_unused_weights,
    )


class _Tensor:
    """An array or tensor of a caller, whose memory lives as long as this does.

    Attributes:
        dtype: Its name; ``string`` for numpy's kinds of text.
        shape: Its sizes.
        device: ``cpu`` or ``cuda`` for torch tensors, "" for numpy arrays.
        index: Number of the device.
        pointer: Address of its first element.
    """

    def __init__(self, name: str, value: Any) -> None:
        import numpy as np

        self.device, self.index = "", 0
        if isinstance(value, np.ndarray):
            # Scalars stay scalars, which np.ascontiguousarray would not leave them.
            self._value: Any = np.asarray(value, order="C")
            self.dtype = "string" if value.dtype.kind in "UO" else str(value.dtype)
            self.pointer: int = self._value.ctypes.data
        elif hasattr(value, "data_ptr"):
            self._value = value.detach().contiguous()
            self.dtype = str(value.dtype).removeprefix("torch.")
            self.device, self.index = value.device.type, value.device.index or 0
            self.pointer = self._value.data_ptr()
        else:
            raise LoadError(
                "an input is neither a numpy array nor a torch tensor",
                where=name,
                why=f"it is a {type(value).__name__}",
            )
        self.shape = tuple(self._value.shape)

    def numpy(self) -> NDArray[Any]:
        """The values in memory that numpy can read."""
        return _to_numpy(self._value.cpu()) if self.device else self._value


def _to_numpy(tensor: Any) -> NDArray[Any]:
    """The same memory as a numpy array; bfloat16 has a type that onnx brings along."""
    import torch

    if tensor.dtype != torch.bfloat16:
        found: NDArray[Any] = tensor.numpy()
        return found
    import ml_dtypes

    whole: NDArray[Any] = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return whole


def _to_torch(value: Any) -> Any:
    """An array as a tensor; what isn't one, such as text, stays."""
    import numpy as np
    import torch

    if not isinstance(value, np.ndarray) or value.dtype.kind in "UO":
        return value
    return torch.from_numpy(value)


def _processors() -> int:
    """How many threads a process should use that nobody has told."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


__all__ = ["Provider", "Session", "TensorType", "model", "open_raw", "session"]
