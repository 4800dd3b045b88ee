"""The ONNX runtime: verified bytes, signatures compared by name, every datatype there and back, devices."""

from __future__ import annotations

import os

import numpy as np
import onnxruntime
import pytest
from onnx import SparseTensorProto, TensorProto, helper

from inferfleet.datatypes import DATATYPES, fp32_to_bf16
from inferfleet.errors import (
    ChecksumMismatchError,
    Code,
    DeviceError,
    DeviceOutOfMemoryError,
    ModelLoadError,
    RequestError,
)
from inferfleet.models.repository import Repository
from inferfleet.onnx_file import DATATYPE_OF_ELEMENT
from inferfleet.records import Signature, TensorSpec
from inferfleet.runtimes import registry
from inferfleet.runtimes.onnx import OnnxRuntime

SETTINGS = """
input = [{{name = "x", datatype = "{datatype}", shape = {shape}}}]
output = [{{name = "y", datatype = "{datatype}", shape = {out}}}]
"""


def settings(shape="[4]", out=None, datatype="FP32"):
    return SETTINGS.format(shape=shape, out=out or shape, datatype=datatype)


def tensor(name, element=TensorProto.FLOAT, shape=("n", 4)):
    return helper.make_tensor_value_info(name, element, shape)


def file(nodes, inputs=None, outputs=None, weights=(), sparse=()):
    """The bytes of a model with these nodes; x and y are FP32 [n, 4] unless given."""
    graph = helper.make_graph(nodes, "g", inputs or [tensor("x")], outputs or [tensor("y")], list(weights))
    graph.sparse_initializer.extend(sparse)
    opset = helper.make_opsetid("", 17)
    return helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString()


def identity(element=TensorProto.FLOAT, shape=("n", 4)):
    node = helper.make_node("Identity", ["x"], ["y"])
    return file([node], [tensor("x", element, shape)], [tensor("y", element, shape)])


def elsewhere(location="weights.bin"):
    """A weight of four numbers, whose bytes are in another file."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        weight.external_data.add(key=key, value=value)
    return weight


ADD = helper.make_node("Add", ["x", "w"], ["y"])
WEIGHTS = np.arange(4, dtype=np.float32).tobytes()


@pytest.fixture
def add(tmp_path):
    """Adds a model file, and others beside it, as version 1 of `net`; nothing of it is trusted."""

    def added(raw, settings=None, **others):
        (tmp_path / "net.onnx").write_bytes(raw)
        files = [tmp_path / "net.onnx"]
        for name, content in others.items():
            files.append(tmp_path / name.replace("_", "."))
            files[-1].write_bytes(content)
        return Repository(tmp_path / "models").add("net", "1", files, settings=settings)

    return added


def test_a_model_answers_with_the_filled_signature(add):
    """`model add` reads the tensors from the file; the runtime compares them with the session's."""
    model = registry.load(add(identity()), "auto", 1)
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)

    assert model.signature == Signature((TensorSpec("x", "FP32", (4,)),), (TensorSpec("y", "FP32", (4,)),))
    np.testing.assert_array_equal(model.run({"x": rows}, 2)["y"], rows)


def test_a_model_need_not_be_declared(add, monkeypatch):
    """A description without tensors takes them from the session."""
    version = add(identity(shape=("n", "width", 3)))
    bare = type(version)(**(version.__dict__ | {"signature": None}))

    assert OnnxRuntime().load(bare, "cpu", 1).signature.inputs == (TensorSpec("x", "FP32", (-1, 3)),)


@pytest.mark.parametrize(("element", "datatype"), [*DATATYPE_OF_ELEMENT.items()])
def test_every_datatype_goes_in_and_out(add, element, datatype):
    """What comes out of an identity is what went in, bit by bit."""
    model = registry.load(add(identity(element, ("n", 3))), "cpu", 1)
    if datatype == "BYTES":
        rows = np.array([[b"a", "ü".encode(), b"x\0y"], [b"", b" ", b"long" * 50]], object)
    elif datatype == "BF16":
        rows = fp32_to_bf16(np.array([[1, -2.5, 3e38], [0, -0.0, np.inf]], np.float32))
    else:
        rows = np.array([[0, 1, 2], [1, 0, 3]]).astype(DATATYPES[datatype].numpy)
    given = model.run({"x": rows}, 2)["y"]

    assert given.dtype == DATATYPES[datatype].numpy
    assert given.tolist() == rows.tolist()


def test_bytes_that_are_no_text_are_the_rows_own_fault(add):
    """ONNX strings are text: the error is a request's, so bisecting finds the row."""
    model = registry.load(add(identity(TensorProto.STRING, ("n",))), "cpu", 1)

    with pytest.raises(RequestError, match="input x") as caught:
        model.run({"x": np.array([b"good", b"\xff"], object)}, 2)
    assert caught.value.code is Code.DTYPE


def test_read_only_rows_are_taken_as_they_are(add):
    """Arrays over a request's own bytes need no copy."""
    rows = np.frombuffer(WEIGHTS, np.float32).reshape(1, 4)

    np.testing.assert_array_equal(registry.load(add(identity()), "cpu", 1).run({"x": rows}, 1)["y"], rows)


TOTAL = file([helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)], outputs=[tensor("y", shape=None)])
NONZERO = file(
    [helper.make_node("NonZero", ["x"], ["y"])], outputs=[tensor("y", TensorProto.INT64, ("a", "b"))]
)
COUNTS = """
input = [{name = "x", datatype = "FP32", shape = [4]}]
output = [{name = "y", datatype = "INT64", shape = [-1]}]
"""


@pytest.mark.parametrize(
    ("raw", "said_settings", "said"),
    [
        (identity(), settings("[5]"), r"input x is declared FP32 \[-1, 5\], and net.onnx has FP32 \[-1, 4\]"),
        (identity(), settings("[4, 1]"), r"input x is declared FP32 \[-1, 4, 1\], and .* FP32 \[-1, 4\]"),
        (identity(), settings("[-1]"), r"input x is declared FP32 \[-1, -1\], and .* FP32 \[-1, 4\]"),
        (identity(), settings(datatype="FP64"), r"input x is declared FP64 \[-1, 4\], and .* FP32"),
        (identity(), settings(out="[3]"), r"output y is declared FP32 \[-1, 3\], and .* FP32 \[-1, 4\]"),
        (identity(), settings().replace('"x"', '"z"'), "needs input x, which is not declared"),
        (identity(), settings().replace('"y"', '"z"'), "output z is declared, net.onnx has y"),
        (identity(shape=(1, 4)), settings(), "input x of net.onnx has a fixed batch of 1; export it with"),
        (b"not a model", settings(), "it is not a complete ONNX model"),
        (file([helper.make_node("NoSuch", ["x"], ["y"])]), settings(), "reading net.onnx failed: .*NoSuch"),
        (TOTAL, settings(out="[1]"), r"output y is declared FP32 \[1, 1\], given float32 \[\]"),
        (NONZERO, COUNTS, r"1 row failed: output y is declared INT64 \[1, -1\], given int64 \[2, 0\]"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit_is_refused_in_one_line(add, raw, said_settings, said):
    """The tensor at fault is named, with what is declared and what there is."""
    with pytest.raises(ModelLoadError, match=said) as caught:
        registry.load(add(raw, said_settings), "cpu", 1)

    assert str(caught.value).startswith("model net version 1: ")
    assert "\n" not in str(caught.value)


def test_an_input_may_be_declared_narrower_than_the_file(add):
    """A file with an open size serves a route that fixes it."""
    model = registry.load(add(identity(shape=("n", "any")), settings("[4]", "[-1]")), "cpu", 1)

    assert model.signature.inputs[0].shape == (4,)


def test_only_declared_outputs_are_computed(add):
    """Outputs that model.toml leaves out are not given."""
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["z"])]
    model = registry.load(add(file(nodes, outputs=[tensor("y"), tensor("z")]), settings()), "cpu", 1)

    assert list(model.run({"x": np.zeros((1, 4), np.float32)}, 1)) == ["y"]


def test_weights_in_another_file_come_from_verified_memory(add):
    """A listed file is read once, compared, and handed over as bytes."""
    version = add(file([ADD], weights=[elsewhere()]), settings(), weights_bin=WEIGHTS)

    assert registry.load(version, "cpu", 1).run({"x": np.ones((1, 4), np.float32)}, 1)["y"].tolist() == [
        [1, 2, 3, 4]
    ]
    (version.path / "weights.bin").write_bytes(bytes(16))
    with pytest.raises(ChecksumMismatchError, match=r"weights\.bin"):
        registry.load(version, "cpu", 1)


@pytest.mark.parametrize(
    "location", ["gone.bin", "../net/weights.bin", "{outside}", "/etc/hostname", "manifest.json"]
)
def test_weights_outside_the_version_are_never_opened(add, tmp_path, monkeypatch, location):
    """A location is looked up in the manifest; the working directory and absolute paths are out of reach."""
    outside = tmp_path / "outside.bin"
    outside.write_bytes(WEIGHTS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone.bin").write_bytes(WEIGHTS)
    raw = file([ADD], weights=[elsewhere(location.replace("{outside}", str(outside)))])

    with pytest.raises(ModelLoadError, match=r"net\.onnx refers to .* which the version does not have"):
        registry.load(add(raw, settings()), "cpu", 1)


@pytest.mark.parametrize("way", ["sparse", "nested"])
def test_references_that_the_runtime_would_follow_by_itself_are_refused(add, tmp_path, monkeypatch, way):
    """ONNX Runtime reads these from the working directory, even for a model given as bytes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.bin").write_bytes(WEIGHTS)
    if way == "sparse":
        indices = helper.make_tensor("w_indices", TensorProto.INT64, [4], [0, 1, 2, 3])
        raw = file([ADD], sparse=[SparseTensorProto(values=elsewhere(), indices=indices, dims=[4])])
    else:
        branch = helper.make_graph(
            [helper.make_node("Add", ["x", "w"], ["b"])], "branch", [], [tensor("b")], [elsewhere()]
        )
        condition = helper.make_tensor("c", TensorProto.BOOL, [], [True])
        node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
        raw = file([node], weights=[condition])
    session = onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.ones((1, 4), np.float32)})[0].tolist() == [[1, 2, 3, 4]]

    with pytest.raises(ModelLoadError, match="refers to another file and is no weight"):
        registry.load(add(raw, settings(), weights_bin=WEIGHTS), "cpu", 1)


def test_the_loaded_bytes_are_the_verified_ones(add):
    """A file that changes between the fetch and the load is refused."""
    version = add(identity())
    os.truncate(version.path / "net.onnx", 10)

    with pytest.raises(ChecksumMismatchError, match=r"net\.onnx"):
        registry.load(version, "cpu", 1)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_is_refused_where_there_is_none(add, device):
    """Asking for a device that the installed package cannot use is an error, never a silent fallback."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(DeviceError, match=f"device {device} is asked for.*onnxruntime-gpu"):
        registry.load(add(identity()), device, 1)


@pytest.mark.parametrize("device", ["gpu", "cpu:1", "cuda:", "cuda:x", "auto:0", ""])
def test_an_unknown_device_is_refused(add, device):
    """The four forms are named."""
    with pytest.raises(DeviceError, match="none of auto, cpu, cuda, cuda:N"):
        registry.load(add(identity()), device, 1)


def test_a_batch_without_memory_is_told_apart(add):
    """The allocator's refusal says that a smaller batch may fit: here 2 TiB a row cannot be had."""
    nodes = [
        helper.make_node("Cast", ["x"], ["size"], to=TensorProto.INT64),
        helper.make_node("ReduceMax", ["size"], ["most"], keepdims=1, axes=[0]),
        helper.make_node("Reshape", ["most", "one"], ["wide"]),
        helper.make_node("Shape", ["x"], ["rows"], end=1),
        helper.make_node("Concat", ["rows", "wide"], ["shape"], axis=0),
        helper.make_node("Expand", ["x", "shape"], ["y"]),
    ]
    one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
    raw = file(nodes, [tensor("x", shape=("n", 1))], [tensor("y", shape=("n", "m"))], [one])
    model = registry.load(add(raw), "cpu", 1)

    assert model.run({"x": np.full((1, 1), 3, np.float32)}, 1)["y"].tolist() == [[3, 3, 3]]
    with pytest.raises(DeviceOutOfMemoryError, match="no memory for a batch of 1 rows"):
        model.run({"x": np.full((1, 1), 2.0**39, np.float32)}, 1)


def test_a_closed_model_does_not_run(add):
    """Its session is gone."""
    model = registry.load(add(identity()), "cpu", 1)
    model.close()

    with pytest.raises(RuntimeError, match="closed"):
        model.run({"x": np.zeros((1, 4), np.float32)}, 1)
