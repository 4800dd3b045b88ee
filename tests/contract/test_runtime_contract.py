"""What every runtime promises, held against all of them with the same model: y = 2x + 1, rows of four."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from inferfleet.errors import (
    ChecksumMismatchError,
    DeviceError,
    InferfleetError,
    ModelLoadError,
    UntrustedModelError,
)
from inferfleet.models.repository import Repository
from inferfleet.records import Signature, TensorSpec
from inferfleet.runtimes import registry
from inferfleet.testing.puppet import PuppetRuntime, Script

SETTINGS = """
input = [{{name = "x", datatype = "{datatype}", shape = {shape}}}]
output = [{{name = "{name}", datatype = "FP32", shape = {out}}}]
"""
HANDLER = """
class Model:
    def load(self, folder, device, parameters):
        if device not in ("auto", "cpu"):
            raise ValueError(f"no device {device}")
    def predict(self, tensors):
        x = tensors["x"]
        assert x.shape[1:] == (4,)
        return {"y": x * 2 + 1}
"""
NETWORK = """
import torch

class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
    def forward(self, x):
        return self.linear(x)
"""
CODE = ("python", "safetensors", "pt2")


def settings(datatype="FP32", shape="[4]", name="y", out="[4]"):
    return SETTINGS.format(datatype=datatype, shape=shape, name=name, out=out)


def onnx_file(folder: Path) -> list[Path]:
    def tensor(name):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4])

    weights = [
        numpy_helper.from_array(np.eye(4, dtype=np.float32) * 2, "w"),
        numpy_helper.from_array(np.ones(4, np.float32), "b"),
    ]
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"])], "g", [tensor("x")], [tensor("y")], weights
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return [folder / "model.onnx"]


def python_files(folder: Path) -> list[Path]:
    (folder / "model.py").write_text(HANDLER)
    return [folder / "model.py"]


def network():
    import torch

    module = torch.nn.Linear(4, 4).eval().requires_grad_(False)
    module.weight.copy_(torch.eye(4) * 2)
    module.bias.copy_(torch.ones(4))
    return module


def safetensors_files(folder: Path) -> list[Path]:
    import safetensors.torch

    weights = {f"linear.{name}": each for name, each in network().state_dict().items()}
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(weights))
    (folder / "network.py").write_text(NETWORK)
    return [folder / "model.safetensors", folder / "network.py"]


def pt2_file(folder: Path) -> list[Path]:
    import torch

    rows = torch.export.Dim("rows", min=1, max=100_000)
    program = torch.export.export(network(), (torch.zeros(2, 4),), dynamic_shapes=({0: rows},))
    torch.export.save(program, folder / "model.pt2")
    return [folder / "model.pt2"]


FORMS = {"onnx": onnx_file, "python": python_files, "safetensors": safetensors_files, "pt2": pt2_file}


class Shelf:
    """A repository that trusts its one model, and the files of one form of it."""

    def __init__(self, form, folder):
        self.form = form
        self.files = FORMS["python" if form == "puppet" else form](folder)
        self.repository = Repository(folder / "models", ["double"])

    def add(self, said=None, version="1"):
        entry_point = "network:Network" if self.form == "safetensors" else None
        return self.repository.add(
            "double", version, self.files, settings=said or settings(), entry_point=entry_point
        )

    def load(self, version, device="cpu"):
        if self.form != "puppet":
            return registry.load(version, device, 1)
        runtime = PuppetRuntime()
        runtime.scripts["double", version.version] = Script(answer=lambda given: {"y": given["x"] * 2 + 1})
        return runtime.load(version, device, 1)


@pytest.fixture(params=[*FORMS, "puppet"])
def any_shelf(request, tmp_path):
    """Every form, the puppet too."""
    return Shelf(request.param, tmp_path)


@pytest.fixture(params=FORMS)
def shelf(request, tmp_path):
    """Every form that loads real files."""
    return Shelf(request.param, tmp_path)


def rows_of(count):
    return np.random.default_rng(count).normal(size=(count, 4)).astype(np.float32)


def test_the_signature_is_what_is_declared(any_shelf):
    """Names, datatypes and shapes per row, in declared order."""
    model = any_shelf.load(any_shelf.add())

    assert model.signature == Signature((TensorSpec("x", "FP32", (4,)),), (TensorSpec("y", "FP32", (4,)),))


def test_each_row_has_its_own_answer_in_order(any_shelf):
    """Any number of rows comes back as as many, each at its place, alone or together."""
    model = any_shelf.load(any_shelf.add())
    for count in (1, 2, 7, 64, 500):
        rows = rows_of(count)
        outputs = model.run({"x": rows}, count)

        assert list(outputs) == ["y"]
        assert outputs["y"].shape == (count, 4)
        assert outputs["y"].dtype == np.float32
        np.testing.assert_allclose(outputs["y"], rows * 2 + 1, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            model.run({"x": rows[-1:]}, 1)["y"], outputs["y"][-1:], rtol=1e-5, atol=1e-6
        )


def test_inputs_are_as_they_were_and_answers_stay(any_shelf):
    """A batch may be run again after a failure, and its answers outlive the next run."""
    model = any_shelf.load(any_shelf.add())
    rows = rows_of(3)
    before = rows.copy()
    first = model.run({"x": rows}, 3)["y"]
    kept = first.copy()
    model.run({"x": rows_of(5)}, 5)

    np.testing.assert_array_equal(rows, before)
    np.testing.assert_array_equal(first, kept)


def test_read_only_and_strided_rows_run(any_shelf):
    """Arrays over a request's bytes, and views, are as good as any."""
    model = any_shelf.load(any_shelf.add())
    rows = rows_of(6)
    locked = np.frombuffer(rows.tobytes(), np.float32).reshape(6, 4)

    for given in (locked, rows[::2], np.asfortranarray(rows), rows[::-1]):
        outputs = model.run({"x": given}, len(given))
        np.testing.assert_allclose(outputs["y"], given * 2 + 1, rtol=1e-5, atol=1e-6)


def test_a_closed_model_does_not_run(any_shelf):
    """Closing twice is one close; a run afterwards fails."""
    model = any_shelf.load(any_shelf.add())
    model.close()
    model.close()

    with pytest.raises(RuntimeError, match="closed"):
        model.run({"x": rows_of(1)}, 1)


def test_closing_one_version_leaves_the_other(any_shelf):
    """Versions are loaded, replaced and closed side by side."""
    old = any_shelf.load(any_shelf.add())
    new = any_shelf.load(any_shelf.add(version="2"))
    old.close()

    np.testing.assert_allclose(new.run({"x": rows_of(2)}, 2)["y"], rows_of(2) * 2 + 1, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        partial(settings, out="[5]"),
        partial(settings, out="[]"),
        partial(settings, out="[4, 1]"),
        partial(settings, shape="[3]"),
    ],
    ids=["wider output", "scalar output", "deeper output", "narrower input"],
)
def test_a_wrong_declared_shape_is_refused(shelf, wrong):
    """A version that does not give what it declares is never served."""
    with pytest.raises(ModelLoadError, match="model double version 1: ") as caught:
        shelf.load(shelf.add(wrong()))

    assert "\n" not in str(caught.value)


def test_a_wrong_declared_datatype_is_refused(shelf):
    """Callers are promised a datatype; the self-check holds the model to it."""
    with pytest.raises(ModelLoadError, match="model double version 1: "):
        shelf.load(shelf.add(settings().replace('"y", datatype = "FP32"', '"y", datatype = "FP64"')))


def test_a_changed_byte_is_refused(shelf):
    """What was verified at the fetch is verified again as it is loaded."""
    version = shelf.add()
    path = version.path / version.file
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)

    with pytest.raises(ChecksumMismatchError, match=version.file):
        shelf.load(version)


def test_code_needs_trust(shelf):
    """ONNX is data; all else is refused with the line that would trust it."""
    shelf.add()
    version = Repository(shelf.repository.root).fetch("double", "1")
    if shelf.form not in CODE:
        shelf.load(version)
        return
    with pytest.raises(UntrustedModelError, match="double@sha256:"):
        shelf.load(version)


def test_a_device_that_is_not_there_is_an_error(shelf):
    """No silent fallback to another device than the one that was asked for."""
    with pytest.raises(InferfleetError, match="cuda:99") as caught:
        shelf.load(shelf.add(), "cuda:99")

    # A handler chooses its device itself, so its refusal is one of loading.
    assert isinstance(caught.value, ModelLoadError if shelf.form == "python" else DeviceError)


def test_a_failed_run_leaves_the_model_usable(shelf):
    """After an error the next batch runs."""
    model = shelf.load(shelf.add())
    with pytest.raises(Exception):  # noqa: B017 -- each library has its own
        model.run({"x": np.zeros((2, 0), np.float32), "y": None}, 2)

    np.testing.assert_allclose(model.run({"x": rows_of(2)}, 2)["y"], rows_of(2) * 2 + 1, rtol=1e-5, atol=1e-6)
