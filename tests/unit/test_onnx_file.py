"""Tensors and file references of an ONNX file are read without any ONNX library."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import SparseTensorProto, TensorProto, helper

from inferfleet.errors import ModelRepositoryError
from inferfleet.models.repository import Repository
from inferfleet.onnx_file import DATATYPE_OF_ELEMENT, external_files, read_signature
from inferfleet.records import Signature, TensorSpec


def model_bytes(inputs, outputs, initializers=()):
    """A model without nodes: only its tensors matter here."""
    graph = helper.make_graph([], "g", inputs, outputs, list(initializers))
    return helper.make_model(graph).SerializeToString()


def value(name, element=TensorProto.FLOAT, shape=("n", 4)):
    return helper.make_tensor_value_info(name, element, shape)


def test_every_datatype_has_its_v2_name():
    """The element types of ONNX that V2 knows, by the numbers of onnx.proto."""
    names = {"FP32": "FLOAT", "FP64": "DOUBLE", "FP16": "FLOAT16", "BF16": "BFLOAT16", "BYTES": "STRING"}
    for element, datatype in DATATYPE_OF_ELEMENT.items():
        raw = model_bytes([value("x", element)], [value("y", element)])

        assert TensorProto.DataType.Value(names.get(datatype, datatype)) == element
        assert datatype == read_signature(raw).inputs[0].datatype


def test_named_and_missing_dimensions_vary():
    """Per row: the batch is left out, a dimension without a size is -1."""
    raw = model_bytes([value("x", shape=(None, 3, "width", None))], [value("y", shape=("n",))])

    assert Signature(
        (TensorSpec("x", "FP32", (3, -1, -1)),), (TensorSpec("y", "FP32", ()),)
    ) == read_signature(raw)


def test_weights_that_are_listed_as_inputs_are_not_inputs():
    """Files of IR version 3 name their initializers twice."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    raw = model_bytes([value("x"), value("w", shape=(2,))], [value("y")], [weight])

    assert [spec.name for spec in read_signature(raw).inputs] == ["x"]


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        (value("x", shape=(1, 4)), "x has a fixed batch of 1"),
        (value("x", shape=()), "x is a scalar"),
        (value("x", shape=None), "x has no shape"),
        (value("x", TensorProto.COMPLEX64), "x has ONNX element type 14"),
        (helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, None), "x is not a tensor"),
    ],
)
def test_what_cannot_be_batched_is_named(odd, said):
    """The tensor at fault and the mend are in the message."""
    with pytest.raises(ValueError, match=said):
        read_signature(model_bytes([odd], [value("y")]))


WHOLE = model_bytes([value("x")], [value("y")])


@given(st.binary(max_size=200) | st.integers(0, len(WHOLE)).map(lambda end: WHOLE[:end] + b"\xff"))
def test_what_is_not_a_whole_model_is_refused_or_read_but_never_crashes(raw):
    """Arbitrary bytes and cut files end in one kind of error."""
    for read in (read_signature, external_files):
        with contextlib.suppress(ValueError):
            read(raw)


def test_adding_an_onnx_file_fills_its_tensors(tmp_path):
    """`model.toml` says what the file says, quotes and all."""
    raw = model_bytes([value('in"\\put', shape=("n", 64))], [value("y", shape=("n", 10))])
    (tmp_path / "net.onnx").write_bytes(raw)
    version = Repository(tmp_path / "models").add("digits", "1", [tmp_path / "net.onnx"])

    assert (version.runtime, version.file) == ("onnx", "net.onnx")
    assert (
        Signature((TensorSpec('in"\\put', "FP32", (64,)),), (TensorSpec("y", "FP32", (10,)),))
        == version.signature
    )


def test_tensors_that_are_declared_are_left_alone(tmp_path):
    """Settings win; the file is read only for what they leave out."""
    (tmp_path / "net.onnx").write_bytes(b"not read")
    settings = """
    input = [{name = "a", datatype = "INT64", shape = [-1]}]
    output = [{name = "b", datatype = "BOOL", shape = []}]
    """
    version = Repository(tmp_path / "models").add("digits", "1", [tmp_path / "net.onnx"], settings=settings)

    assert Signature((TensorSpec("a", "INT64", (-1,)),), (TensorSpec("b", "BOOL", ()),)) == version.signature


def test_two_files_that_could_be_the_main_one_are_a_question(tmp_path):
    """The choice is the author's."""
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_bytes(model_bytes([value("x")], [value("y")]))
    with pytest.raises(ModelRepositoryError, match=r"any of a\.onnx, b\.onnx could be the main file"):
        Repository(tmp_path / "models").add("digits", "1", [tmp_path / "a.onnx", tmp_path / "b.onnx"])


def elsewhere(location="w.bin"):
    """A weight whose bytes are in another file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="offset", value="0")
    return tensor


def constant(**attribute):
    """A node that holds a tensor."""
    return helper.make_node("Constant", [], ["w"], **attribute)


def sparse():
    """A sparse tensor whose values are in another file."""
    indices = helper.make_tensor("i", TensorProto.INT64, [4], [0, 1, 2, 3])
    return SparseTensorProto(values=elsewhere(), indices=indices, dims=[4])


def nested():
    """A branch of an If whose weight is in another file."""
    branch = helper.make_graph([], "then", [], [value("b")], [elsewhere()])
    return helper.make_node("If", ["c"], ["w"], then_branch=branch, else_branch=branch)


def test_files_of_the_weights_are_listed_once():
    """The locations stand as they are written; nobody has opened them."""
    graph = helper.make_graph([], "g", [], [], [elsewhere("a.bin"), elsewhere("../b"), elsewhere("a.bin")])

    assert external_files(helper.make_model(graph).SerializeToString()) == ["a.bin", "../b"]


def test_a_file_without_references_has_none():
    """Weights inside the file are no reference."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])

    assert external_files(model_bytes([value("x")], [value("y")], [weight])) == []


@pytest.mark.parametrize(
    "place", ["attribute", "nested graph", "sparse weight", "sparse attribute", "function"]
)
def test_a_reference_from_anywhere_else_is_refused(place):
    """ONNX Runtime would look for such a file in the working directory."""
    node = {
        "attribute": lambda: constant(value=elsewhere()),
        "nested graph": nested,
        "sparse attribute": lambda: constant(sparse_value=sparse()),
    }.get(place)
    graph = helper.make_graph([node()] if node else [], "g", [value("x")], [value("y")])
    if place == "sparse weight":
        graph.sparse_initializer.append(sparse())
    model = helper.make_model(graph)
    if place == "function":
        body = [constant(value=elsewhere())]
        model.functions.append(helper.make_function("d", "F", [], ["w"], body, [helper.make_opsetid("", 17)]))

    with pytest.raises(ValueError, match="tensor 'w' refers to another file"):
        external_files(model.SerializeToString())
