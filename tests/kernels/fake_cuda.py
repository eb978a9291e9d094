"""A CUDA driver for tests: device memory is the host's, and kernels are done by torch.

`Fake.launch` does what a cubin is documented to do, from nothing but what it was launched with, so
a wrong pointer, number, grid or file shows in the result.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_char_p, c_int, c_int32, c_uint32, c_uint64, c_void_p
from pathlib import Path

import torch

from graphprune.kernels.formats.bitmap import Bitmap
from graphprune.kernels.gpu import prebuilt
from graphprune.kernels.native import bitmap_struct

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
Launch = ctypes.CFUNCTYPE(c_int, c_int, c_char_p, POINTER(c_uint32), c_void_p, POINTER(c_void_p))


@functools.cache
def driver():
    """Compile it; None without a compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    folder = tempfile.TemporaryDirectory(prefix="graphprune-cuda-")
    driver.folder = folder  # removed when the process ends
    library = Path(folder.name) / "libfake_cuda.so"
    source = Path(__file__).with_name("fake_cuda.cpp")
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-fPIC", "-shared"]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    return library


def memory(address, dtype, *shape):
    """A tensor at an address."""
    count = 1
    for size in shape:
        count *= size
    if not count:
        return torch.empty(shape, dtype=dtype)
    bytes_ = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(bytes_, dtype=dtype).view(shape)


class Fake:
    """The driver, as it is used by a native library.

    Attributes:
        launches: variant, stream and number of tokens of each.
        problems: what launches got that they shouldn't.
    """

    def __init__(self, library, capability, cubins=prebuilt.FOLDER):
        self.cubins = cubins
        self.manifest = prebuilt.read(cubins)
        self.launches = []
        self.problems = []
        self.driver = ctypes.CDLL(str(driver()))
        self.driver.fake_calls.restype = c_char_p
        self.driver.fake_image.restype = c_void_p
        self.driver.fake_context.argtypes = [c_void_p]
        self._callback = Launch(self._called)
        self.driver.fake_reset(*capability, self._callback)
        self.native = ctypes.CDLL(str(library))
        self.native.graphprune_cuda_release.argtypes = [c_void_p]
        self.native.graphprune_cuda_paths(str(driver()).encode(), str(cubins).encode())

    def calls(self):
        """What was called since the last time."""
        names = self.driver.fake_calls().decode().split()
        self.driver.fake_forget()
        return names

    def close(self):
        self.native.graphprune_cuda_paths(None, None)

    def variant(self, module):
        """Which one an image is, by its bytes."""
        size = c_uint64()
        image = ctypes.string_at(self.driver.fake_image(module, ctypes.byref(size)), size.value)
        for variant in self.manifest.variants:
            if (self.cubins / variant.file).read_bytes() == image:
                return variant
        raise ValueError("none of the cubins")

    def _called(self, module, name, numbers, stream, parameters):
        try:
            self.launch(self.variant(module), name.decode(), numbers[:7], stream, parameters)
        except Exception as e:  # can't pass the driver
            self.problems.append(repr(e))
            return 1
        return 0

    def launch(self, variant, name, numbers, stream, parameters):
        given = {}
        for at, parameter in enumerate(self.manifest.parameters):
            kind = c_uint64 if parameter.endswith("_ptr") else c_int32
            given[parameter] = kind.from_address(parameters[at]).value
        for at in range(variant.extra):
            where = parameters[len(self.manifest.parameters) + at]
            assert c_uint64.from_address(where).value == 0
        for parameter, value in given.items():
            assert value % variant.multiple == 0 or parameter == "M", parameter
        assert name == variant.entry
        assert numbers[3:] == [variant.warps * 32, 1, 1, variant.shared]
        blocks = numbers[:3]
        self.launches.append((variant, stream, given["M"]))
        M, N, K, dtype = given["M"], given["N"], given["K"], DTYPES[variant.dtype]
        assert given["stride"] == K
        assert blocks == [-(-N // variant.rows), 1, -(-M // variant.tokens)]
        width = -(-K // 64)
        words = memory(given["words_ptr"], torch.int32, N, 2 * width)
        places = torch.arange(32, dtype=torch.int32)
        kept = ((words[..., None] >> places) & 1).flatten(1).bool()
        assert not kept[:, K:].any()
        first = memory(given["offsets_ptr"], torch.int64, N)
        first = first + memory(given["before_ptr"], torch.int32, N)
        where = first[:, None] + kept.cumsum(1) - 1
        values = memory(given["values_ptr"], dtype, int(where.max()) + 1)
        weight = torch.zeros(N, 64 * width, dtype=torch.float64)
        weight[kept] = values[where[kept]].double()
        x = memory(given["x_ptr"], dtype, M, K).double()
        memory(given["partials_ptr"], dtype, M, N).copy_(x @ weight[:, :K].T)


class Product:
    """What the operator does, without ONNX Runtime."""

    def __init__(self, fake, packed: Bitmap, stream=None):
        self.fake, self.packed, self.made = fake, packed, c_void_p()
        self._why = ctypes.create_string_buffer(1000)
        weight = ctypes.byref(bitmap_struct(packed))
        made = ctypes.byref(self.made)
        self._check(
            fake.native.graphprune_cuda_prepare(
                weight, c_void_p(stream), made, self._why, c_uint64(len(self._why))
            )
        )

    def __call__(self, x, stream=None):
        y = x.new_full((len(x), self.packed.shape[0]), float("nan"))
        status = self.fake.native.graphprune_cuda_launch(
            self.made,
            ctypes.c_int64(len(x)),
            c_void_p(x.data_ptr()),
            c_void_p(y.data_ptr()),
            c_void_p(stream),
            self._why,
            c_uint64(len(self._why)),
        )
        assert not self.fake.problems
        self._check(status)
        return y

    def _check(self, status):
        if status:
            raise RuntimeError(self._why.value.decode())

    def release(self):
        self.fake.native.graphprune_cuda_release(self.made)
