"""The operator on CUDA: its cubins are in order, and are launched with the right arguments.

No GPU is needed, but for the last test; see `fake_cuda`.
"""

import ctypes
import dataclasses
import shutil
import struct

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

pytest.importorskip("triton", reason="Triton can't be imported", exc_type=ImportError)

import triton

from graphprune.kernels import onnx_function
from graphprune.kernels.formats.bitmap import Bitmap
from graphprune.kernels.gpu import prebuilt
from kernels import fake_cuda
from kernels.fake_cuda import DTYPES, Fake, Product
from kernels.native_build import library
from kernels.onnx_bitmap import model, session

__all__ = ["library"]

CAPABILITIES = {(8, 0): "80", (8, 9): "80", (9, 0): "90a", (10, 0): "100a"}
MANIFEST = prebuilt.read()


@pytest.fixture
def make(library):
    """Makes drivers for devices of a capability."""
    if fake_cuda.driver() is None:
        pytest.skip("no C++ compiler")
    made = []

    def one(capability=(9, 0), cubins=prebuilt.FOLDER, library=library):
        made.append(Fake(library, capability, cubins))
        return made[-1]

    yield one
    for fake in made:
        fake.close()


def drawn(rows, columns, dtype=torch.float32, density=0.5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=draw) < density
    return (torch.randn(rows, columns, generator=draw) * kept).to(dtype)


def expected(x, weight):
    return (x.double() @ weight.double().T).to(x.dtype)


def copied(tmp_path, change):
    """The cubins with a manifest that was changed."""
    target = tmp_path / "cubins"
    shutil.copytree(prebuilt.FOLDER, target)
    path = target / prebuilt.MANIFEST
    path.write_text(change(path.read_text()))
    return target


@pytest.mark.parametrize("variant", MANIFEST.variants, ids=lambda v: v.file)
def test_cubins_are_elf_files_for_their_device(variant):
    code = (prebuilt.FOLDER / variant.file).read_bytes()
    assert code[:5] == b"\x7fELF\x02"
    machine = struct.unpack_from("<H", code, 18)[0]
    sections, flags = struct.unpack_from("<Q", code, 40)[0], struct.unpack_from("<I", code, 48)[0]
    assert machine == 190  # EM_CUDA
    # The architecture moved with the version of the ABI.
    architecture = flags & 0xFF if code[8] < 8 else flags >> 8 & 0xFF
    assert str(architecture) == variant.architecture.rstrip("a")
    size, count = struct.unpack_from("<HH", code, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", code, sections + i * size) for i in range(count)]
    (symbols,) = [h for h in headers if h[1] == 2]
    names = headers[symbols[6]][4]
    functions = set()
    for at in range(symbols[4], symbols[4] + symbols[5], 24):
        name, info = struct.unpack_from("<IB", code, at)
        if info == 0x12:  # a global function
            begin = names + name
            functions.add(code[begin : code.index(b"\0", begin)].decode())
    assert functions == {variant.entry}


def test_the_folder_holds_what_the_manifest_says():
    files = {file.name for file in prebuilt.FOLDER.iterdir()}
    assert files == {prebuilt.MANIFEST, *(variant.file for variant in MANIFEST.variants)}
    assert sum((prebuilt.FOLDER / file).stat().st_size for file in files) < 1 << 20
    kinds = {(v.architecture, v.dtype, v.multiple) for v in MANIFEST.variants}
    assert len(kinds) == 3 * 3 * 2
    assert all(v.shared <= 48 << 10 for v in MANIFEST.variants)


@pytest.mark.slow
def test_the_kernel_still_compiles_to_what_is_there(tmp_path):
    """Code differs between versions of Triton, but how it is launched mustn't."""
    rebuilt = prebuilt.build(tmp_path)
    assert rebuilt == prebuilt.read(tmp_path)
    of_version = {"shared": 0, "extra": 0}

    def without(manifest):
        variants = tuple(dataclasses.replace(v, **of_version) for v in manifest.variants)
        return dataclasses.replace(manifest, variants=variants)

    assert without(rebuilt) == without(MANIFEST)
    (version,) = [
        line.split()[1]
        for line in (prebuilt.FOLDER / prebuilt.MANIFEST).read_text().splitlines()
        if line.startswith("triton ")
    ]
    if version == triton.__version__:
        assert rebuilt == MANIFEST


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "count"),
    [(48, 128, 1), (16, 64, 17), (32, 80, 64), (5, 37, 3), (17, 1, 200), (33, 65, 16), (1, 8, 33)],
)
def test_launches_compute_the_product(make, capability, dtype, rows, columns, count):
    fake = make(capability)
    weight = drawn(rows, columns, DTYPES[dtype])
    x = drawn(count, columns, DTYPES[dtype], 1.0, 1)
    product = Product(fake, Bitmap.pack(weight), 7)
    for _ in range(2):
        torch.testing.assert_close(product(x, stream=7), expected(x, weight))
    variant, stream, tokens = fake.launches[0]
    largest = max(v.tokens for v in MANIFEST.variants if v.architecture == CAPABILITIES[capability])
    assert (variant.architecture, variant.dtype) == (CAPABILITIES[capability], dtype)
    assert (stream, tokens) == (7, count)
    assert variant.tokens == (16 if count <= 16 else largest)
    product.release()


def test_wide_loads_need_aligned_operands(make):
    weight, x = drawn(16, 64), drawn(3, 64, density=1.0)
    product = Product(make(), Bitmap.pack(weight))
    assert x.data_ptr() % 16 == 0
    product(x)
    product(x.flatten()[1:].clone().new_empty(193)[1:].view(3, 64).copy_(x))
    narrow = [variant.multiple for variant, _, _ in product.fake.launches]
    assert narrow == [16, 1]
    product.release()


@pytest.mark.parametrize("columns", [64, 65])
def test_calls_after_the_first_only_launch(make, columns):
    fake = make()
    weight = drawn(16, columns)
    product = Product(fake, Bitmap.pack(weight))
    assert {"cuMemAlloc", "cuStreamSynchronize"} <= set(fake.calls())
    for count in (1, 16, 17, 64, 1000):
        product(drawn(count, columns))
    assert set(fake.calls()) == {"cuLaunchKernel"}
    product(drawn(0, columns))
    assert not fake.calls()
    product.release()
    assert fake.calls() == ["cuCtxPushCurrent", "cuMemFree", "cuCtxPopCurrent"]
    assert fake.driver.fake_allocated() == 0


def test_more_tokens_than_a_grid_has_blocks(make):
    fake = make()
    x = drawn(65535 * 64 + 5, 2, density=1.0)
    weight = torch.tensor([[2.0, -1.0]])
    product = Product(fake, Bitmap.pack(weight))
    torch.testing.assert_close(product(x), expected(x, weight))
    assert [tokens for _, _, tokens in fake.launches] == [65535 * 64, 5]
    product.release()


def test_a_weight_of_zeros(make):
    product = Product(make(), Bitmap.pack(torch.zeros(20, 70)))
    assert not product(drawn(3, 70)).any()
    product.release()


def test_products_share_modules(make):
    fake = make()
    packed = Bitmap.pack(drawn(16, 64))
    products = [Product(fake, packed) for _ in range(3)]
    assert fake.driver.fake_modules() == 4
    other = ctypes.create_string_buffer(8)
    fake.driver.fake_context(ctypes.addressof(other))
    products.append(Product(fake, packed))
    assert fake.driver.fake_modules() == 8
    for product in products:
        product.release()
    assert fake.driver.fake_allocated() == 0


def test_much_shared_memory_is_asked_for(make, tmp_path):
    fake = make(cubins=copied(tmp_path, lambda text: text.replace(" 26624 ", " 65536 ")))
    product = Product(fake, Bitmap.pack(drawn(16, 64, torch.float16)))
    assert "cuFuncSetAttribute:8:65536" in fake.calls()
    product(drawn(64, 64, torch.float16))  # `launch` compares with the manifest
    product.release()


def test_the_order_of_parameters_is_the_manifest_s(make, tmp_path):
    def swapped(text):
        return text.replace("x_ptr words_ptr", "words_ptr x_ptr").replace(" N K ", " K N ")

    fake = make(cubins=copied(tmp_path, swapped))
    weight, x = drawn(33, 65), drawn(2, 65)
    product = Product(fake, Bitmap.pack(weight))
    torch.testing.assert_close(product(x), expected(x, weight))
    product.release()


@pytest.mark.parametrize("capability", [(7, 5), (10, 3), (12, 0)])
def test_unknown_devices_are_named(make, capability):
    name = ".".join(map(str, capability))
    match = (
        rf"compute capability {name}, but for sm_80, sm_90a, sm_100a; leave graphprune's library"
    )
    with pytest.raises(RuntimeError, match=match):
        Product(make(capability), Bitmap.pack(drawn(16, 64)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda text: text.replace("format 1", "format 2"), "isn't of this library's version"),
        (lambda text: text.replace(" K ", " L "), "isn't of this library's version: parameters"),
        (lambda text: text.replace("splits=1", "splits=2"), "this library's version: constants"),
        (lambda text: text.replace(" fp16 ", " fp8 "), "isn't of this library's version: cubin"),
        (lambda text: text.replace("format 1", ""), "incomplete"),
        (lambda text: text.replace("_any.", "_no."), "_no.cubin can't be read"),
        (lambda text: text.replace(" 8320 ", " 200000 "), "more shared memory than the GPU"),
    ],
)
def test_other_cubins_are_refused(library, tmp_path, make, change, match):
    fake = make()  # whose own manifest stays good
    folder = copied(tmp_path, change)
    fake.native.graphprune_cuda_paths(str(fake_cuda.driver()).encode(), str(folder).encode())
    with pytest.raises(RuntimeError, match=match):
        Product(fake, Bitmap.pack(drawn(16, 64)))


def test_cubins_belong_beside_the_library(library, make, tmp_path):
    alone = tmp_path / "alone.so"
    shutil.copy(library, alone)
    fake = make(library=alone)
    fake.native.graphprune_cuda_paths(str(fake_cuda.driver()).encode(), None)
    with pytest.raises(RuntimeError, match=r"cubins/manifest.txt can't be read: .* beside the lib"):
        Product(fake, Bitmap.pack(drawn(16, 64)))
    shutil.copytree(prebuilt.FOLDER, tmp_path / "cubins")
    product = Product(fake, Bitmap.pack(drawn(16, 64)))
    product(drawn(1, 64))
    product.release()


@pytest.mark.parametrize(
    "name", ["cuInit", "cuModuleLoadData", "cuModuleGetFunction", "cuMemAlloc", "cuMemcpyDtoH"]
)
def test_failures_of_the_driver_are_named(make, name):
    fake = make()
    fake.driver.fake_fail(name.encode())
    with pytest.raises(RuntimeError, match=r"CUDA_ERROR_FAKE \(1\)"):
        Product(fake, Bitmap.pack(drawn(16, 64)))


def test_a_failed_launch_is_named(make):
    fake = make()
    product = Product(fake, Bitmap.pack(drawn(16, 64)))
    fake.driver.fake_fail(b"cuLaunchKernel")
    with pytest.raises(RuntimeError, match=r"cuLaunchKernel: CUDA_ERROR_FAKE"):
        product(drawn(1, 64))
    product.release()


def test_the_first_call_is_not_captured(make):
    fake = make()
    fake.driver.fake_capture(1)
    with pytest.raises(RuntimeError, match="can't be captured in a CUDA graph"):
        Product(fake, Bitmap.pack(drawn(16, 64)))
    assert "cuMemAlloc" not in fake.calls()


def test_there_is_no_driver(make):
    fake = make()
    fake.native.graphprune_cuda_paths(b"libno_such_cuda.so.1", None)
    with pytest.raises(RuntimeError, match=r"driver can't be opened: libno_such_cuda.so.1"):
        Product(fake, Bitmap.pack(drawn(16, 64)))


def test_no_context_is_current(make):
    fake = make()
    fake.driver.fake_context(None)
    with pytest.raises(RuntimeError, match="no CUDA context"):
        Product(fake, Bitmap.pack(drawn(16, 64)))


@pytest.mark.parametrize(
    ("field", "change", "match"),
    [
        ("bitmask", lambda t: t ^ 1, "the bits of row 0 are wrong"),
        ("row_offsets", lambda t: t + 1, "row_offsets of row 0 are wrong"),
    ],
)
def test_corrupt_weights_never_reach_the_device(make, field, change, match):
    parts = vars(Bitmap.pack(drawn(16, 64))).copy()
    parts[field] = change(parts[field])
    with pytest.raises(RuntimeError, match=match):
        Product(make(), Bitmap(**parts))


@pytest.fixture
def renamed(library, tmp_path):
    """The library with its CUDA kernels registered for the CPU: the runtime's side, without a GPU.

    The names of the providers are changed in the file, so the code is what is shipped.
    """
    code = library.read_bytes()
    cpu, cuda = b"\0CPUExecutionProvider\0", b"\0CUDAExecutionProvider\0"
    assert (code.count(cpu), code.count(cuda)) == (1, 1)
    code = code.replace(cpu, b"\0NoneExecutionProvide\0").replace(cuda, cpu + b"\0")
    target = tmp_path / "renamed.so"
    target.write_bytes(code)
    return target


@pytest.mark.parametrize(
    ("dtype", "elements", "near"),
    [
        ("fp32", TensorProto.FLOAT, 1e-5),
        ("fp16", TensorProto.FLOAT16, 2e-3),
        ("bf16", TensorProto.BFLOAT16, 2e-2),
    ],
)
@pytest.mark.parametrize(("rows", "columns"), [(48, 128), (33, 65)])
def test_onnx_runtime_calls_the_kernel(make, renamed, dtype, elements, near, rows, columns):
    fake = make(library=renamed)
    weight, x = drawn(rows, columns, DTYPES[dtype]), drawn(6, columns, density=1.0, seed=1)
    made = model(Bitmap.pack(weight))
    del made.graph.node[:]
    made.graph.node.extend(
        [
            helper.make_node("Cast", ["x"], ["half"], to=elements),
            onnx_function.node("half", "w", "product"),
            helper.make_node("Cast", ["product"], ["y"], to=TensorProto.FLOAT),
        ]
    )
    opened = session(made, renamed)
    fake.calls()
    for count in (6, 1, 0):
        (y,) = opened.run(None, {"x": x[:count].numpy()})
        right = (x[:count].to(DTYPES[dtype]).double() @ weight.double().T).numpy()
        np.testing.assert_allclose(y, right, rtol=near, atol=near)
        if count == 6:
            assert "cuMemAlloc" in fake.calls()
        else:
            assert set(fake.calls()) == ({"cuLaunchKernel"} if count else set())
    assert not fake.problems
    assert fake.native.graphprune_onnxruntime_calls() == 3
    del opened
    assert fake.driver.fake_allocated() == 0


def test_onnx_runtime_refuses_unknown_devices_when_a_model_is_loaded(make, renamed):
    make((12, 1), library=renamed)
    with pytest.raises(Exception, match=r"BitmapLinear: there is no kernel for .* 12\.1"):
        session(model(Bitmap.pack(drawn(16, 64))), renamed)


def test_onnx_runtime_says_that_there_is_no_driver(make, renamed):
    fake = make(library=renamed)
    fake.native.graphprune_cuda_paths(b"libno_such_cuda.so.1", None)
    with pytest.raises(Exception, match=r"BitmapLinear: CUDA's driver can't be opened"):
        session(model(Bitmap.pack(drawn(16, 64))), renamed)


def test_onnx_runtime_needs_constant_weights(make, renamed):
    make(library=renamed)
    made = model(Bitmap.pack(drawn(16, 64)))
    (offsets,) = [item for item in made.graph.initializer if item.name == "w.row_offsets"]
    made.graph.initializer.remove(offsets)
    made.graph.input.append(helper.make_tensor_value_info("w.row_offsets", TensorProto.INT64, [16]))
    with pytest.raises(Exception, match="made of initializers"):
        session(made, renamed)


def test_onnx_runtime_refuses_corrupt_weights_and_other_tokens(make, renamed):
    make(library=renamed)
    parts = vars(Bitmap.pack(drawn(16, 64))).copy()
    opened = session(model(Bitmap(**{**parts, "row_offsets": parts["row_offsets"] + 1})), renamed)
    with pytest.raises(Exception, match="row_offsets of row 0 are wrong"):
        opened.run(None, {"x": np.zeros((1, 64), np.float32)})
    made = model(Bitmap(**parts))
    made.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "any"
    with pytest.raises(Exception, match="isn't the 64 columns"):
        session(made, renamed).run(None, {"x": np.zeros((1, 63), np.float32)})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("graphs", [False, True])
def test_on_a_gpu(library, tmp_path, dtype, graphs):
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    target = tmp_path / "native.so"
    shutil.copy(library, target)
    shutil.copytree(prebuilt.FOLDER, tmp_path / "cubins")
    numpy_type = {"fp32": np.float32, "fp16": np.float16}[dtype]
    elements = helper.np_dtype_to_tensor_dtype(np.dtype(numpy_type))
    for rows, columns, count in [(256, 512, 1), (256, 512, 70), (33, 65, 16)]:
        weight = drawn(rows, columns, DTYPES[dtype])
        made = model(Bitmap.pack(weight), with_function=False, elements=elements)
        onnx.checker.check_model(made)
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(target))
        providers = [("CUDAExecutionProvider", {"enable_cuda_graph": str(int(graphs))})]
        opened = onnxruntime.InferenceSession(made.SerializeToString(), options, providers)
        x = drawn(count, columns, DTYPES[dtype], 1.0)
        on_gpu = onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy(), "cuda", 0)
        empty = np.zeros((count, rows), numpy_type)
        y = onnxruntime.OrtValue.ortvalue_from_numpy(empty, "cuda", 0)
        binding = opened.io_binding()
        binding.bind_ortvalue_input("x", on_gpu)
        binding.bind_ortvalue_output("y", y)
        for _ in range(3):  # with graphs: as usual, captured, replayed
            y.update_inplace(empty)
            opened.run_with_iobinding(binding)
            near = 1e-3 if dtype == "fp32" else 5e-2
            np.testing.assert_allclose(y.numpy(), expected(x, weight).numpy(), near, near)
