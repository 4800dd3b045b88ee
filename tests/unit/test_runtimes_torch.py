"""The torch runtime: safetensors with a class, exported programs, trust, and arrays that are shared."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from inferfleet.datatypes import DATATYPES, fp32_to_bf16
from inferfleet.errors import DeviceError, DeviceOutOfMemoryError, ModelLoadError, UntrustedModelError
from inferfleet.models.repository import Repository
from inferfleet.runtimes import registry

NETWORK = """
import torch
from .parts import scaled

class Network(torch.nn.Module):
    def __init__(self, width=2, scale=1.0):
        super().__init__()
        self.linear = torch.nn.Linear(4, width)
        self.drop = torch.nn.Dropout(0.9)
        self.scale = scale
    def forward(self, x):
        return scaled(self.drop(self.linear(x)), self.scale)
"""
PARTS = "def scaled(tensor, scale):\n    return tensor * scale\n"
SETTINGS = """
entry_point = "network:Network"
input = [{name = "x", datatype = "FP32", shape = [4]}]
output = [{name = "y", datatype = "FP32", shape = [2]}]
[parameters]
scale = 3.0
"""
ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)


class Folder:
    """Writes files and adds them as versions of one trusted model."""

    def __init__(self, path):
        self.path = path
        self.repository = Repository(path / "models", ["net"])

    def add(self, files, settings, version="1"):
        source = self.path / f"source-{version}"
        source.mkdir()
        for name, content in files.items():
            (source / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return self.repository.add("net", version, sorted(source.iterdir()), settings=settings)

    def module(self, forward, settings, version="1"):
        """A module without weights, from the body of its forward."""
        lines = ["import torch", "class Network(torch.nn.Module):", f"    def forward(self, {forward}"]
        files = {"model.safetensors": safetensors.torch.save({}), "network.py": "\n".join(lines)}
        return self.add(files, 'entry_point = "network:Network"\n' + settings, version)


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


@pytest.fixture
def weights():
    """The weights of a linear layer from four to two."""
    return {"linear.weight": torch.arange(8.0).reshape(2, 4), "linear.bias": torch.tensor([1.0, -1.0])}


@pytest.fixture
def exported():
    """A program with a dynamic batch, exported from an example of two rows."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU()).eval()
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(module, (torch.zeros(2, 4),), dynamic_shapes=({0: batch},))
    out = io.BytesIO()
    torch.export.save(program, out)
    with torch.inference_mode():
        expected = module(torch.from_numpy(ROWS)).numpy()
    return out.getvalue(), expected


def whole(weights):
    return {"model.safetensors": safetensors.torch.save(weights), "network.py": NETWORK, "parts.py": PARTS}


def test_a_class_with_its_weights_answers_in_evaluation_mode(folder, weights):
    """Parameters construct it, the weights are the file's, dropout is off, neighbours are imported."""
    model = registry.load(folder.add(whole(weights), SETTINGS), "auto", 1)
    linear = ROWS @ weights["linear.weight"].numpy().T + weights["linear.bias"].numpy()

    np.testing.assert_allclose(model.run({"x": ROWS}, 2)["y"], linear * 3)
    np.testing.assert_allclose(model.run({"x": ROWS[1:]}, 1)["y"], linear[1:] * 3)


def test_an_exported_program_answers(folder, exported):
    """A `.pt2` needs no class; any number of rows runs."""
    raw, expected = exported
    model = registry.load(folder.add({"net.pt2": raw}, SETTINGS.split("\n", 2)[2]), "cpu", 1)

    np.testing.assert_allclose(model.run({"x": ROWS}, 2)["y"], expected, rtol=1e-6)
    np.testing.assert_allclose(model.run({"x": ROWS[:1]}, 1)["y"], expected[:1], rtol=1e-6)
    assert len(model.run({"x": np.zeros((33, 4), np.float32)}, 33)["y"]) == 33


def test_neither_form_loads_untrusted(folder, weights, exported):
    """A class is code, and so may a `.pt2` be."""
    folder.add(whole(weights), SETTINGS)
    folder.add({"net.pt2": exported[0]}, SETTINGS.split("\n", 2)[2], "2")
    for version in ("1", "2"):
        with pytest.raises(UntrustedModelError, match=r"\[models\] trusted"):
            registry.load(Repository(folder.repository.root).fetch("net", version), "cpu", 1)


def test_native_code_in_an_archive_is_refused(folder, exported):
    """A shared object of AOTInductor would be loaded and run."""
    out = io.BytesIO(exported[0])
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("net/data/aotinductor/model/wrapper.so", b"\x7fELF")
    version = folder.add({"net.pt2": out.getvalue()}, SETTINGS.split("\n", 2)[2])

    with pytest.raises(ModelLoadError, match=r"net\.pt2 holds native code"):
        registry.load(version, "cpu", 1)


def test_a_pickle_in_place_of_an_archive_is_refused(folder):
    """What is no zip archive is never given to torch."""
    with pytest.raises(ModelLoadError, match=r"reading net\.pt2 failed: BadZipFile"):
        registry.load(folder.add({"net.pt2": b"cos\nsystem\n."}, SETTINGS.split("\n", 2)[2]), "cpu", 1)


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        ({"linear.bias": None}, SETTINGS, "loading the weights into Network failed: .*linear.bias"),
        ({"other": torch.zeros(1)}, SETTINGS, "loading the weights into Network failed: .*other"),
        ({"linear.bias": torch.zeros(3)}, SETTINGS, "size mismatch for linear.bias"),
        ({}, SETTINGS.replace("scale", "scales"), "constructing Network failed: TypeError: .*scales"),
        ({}, SETTINGS.replace(":Network", ":Missing"), "network.py has no class Missing"),
        ({}, SETTINGS.replace('entry_point = "network:Network"', ""), "with entry_point"),
        ({}, SETTINGS.replace("[2]", "[3]"), r"output y is declared FP32 \[1, 3\], given float32 \[1, 2\]"),
        ({}, SETTINGS.replace("[4]", "[5]"), "self-check with 1 row failed: RuntimeError: .*shapes"),
        ({}, SETTINGS.replace('"FP32"', '"BYTES"'), "x is BYTES, which torch has no tensors of"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(folder, weights, change, settings, said):
    """Weights, parameters and shapes are named."""
    given = {name: each for name, each in (weights | change).items() if each is not None}
    with pytest.raises(ModelLoadError, match=said) as caught:
        registry.load(folder.add(whole(given), settings), "cpu", 1)

    assert "\n" not in str(caught.value)


def test_damaged_weights_are_refused_by_name(folder, weights):
    """A header that lies about its length never becomes a tensor."""
    files = whole(weights) | {"model.safetensors": b"\xff" * 16}
    with pytest.raises(ModelLoadError, match=r"reading model\.safetensors failed"):
        registry.load(folder.add(files, SETTINGS), "cpu", 1)


TWO = """
input = [{name = "a", datatype = "FP32", shape = [2]}, {name = "b", datatype = "INT64", shape = []}]
output = [{name = "total", datatype = "FP32", shape = []}, {name = "b", datatype = "INT64", shape = []}]
"""


@pytest.mark.parametrize(
    "returned",
    ["(total, b)", "[total, b]", "{'b': b, 'total': total, 'hidden': a}"],
    ids=["tuple", "list", "dict"],
)
def test_outputs_are_mapped_by_order_or_by_name(folder, returned):
    """Inputs go in by declared order, whatever the order of the request."""
    forward = f"first, b):\n        a, total = first, first.sum(1)\n        return {returned}"
    model = registry.load(folder.module(forward, TWO), "cpu", 1)
    outputs = model.run({"b": np.array([5, 6]), "a": np.array([[1, 2], [3, 4]], np.float32)}, 2)

    assert outputs["total"].tolist() == [3, 7]
    assert outputs["b"].tolist() == [5, 6]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("(b,)", "returned 1 tensors, 2 are declared"),
        ("b", "returned 1 tensors, 2 are declared"),
        ("{'b': b}", "returned b, not total"),
        ("None", "returned a NoneType, must be tensors"),
    ],
)
def test_outputs_that_cannot_be_mapped_are_refused(folder, returned, said):
    """Nothing is guessed: an answer must never stand under another name."""
    with pytest.raises(ModelLoadError, match=said):
        registry.load(folder.module(f"first, b):\n        return {returned}", TWO), "cpu", 1)


SAME = """
input = [{{name = "x", datatype = "{0}", shape = [3]}}]
output = [{{name = "y", datatype = "{0}", shape = [3]}}]
"""


@pytest.mark.parametrize("datatype", [name for name in DATATYPES if name != "BYTES"])
def test_every_datatype_goes_in_and_out(folder, datatype):
    """What comes out of an identity is what went in, bit by bit; modules see BF16 as such."""
    check = "        assert x.dtype == torch.bfloat16\n" if datatype == "BF16" else ""
    model = registry.load(folder.module(f"x):\n{check}        return x", SAME.format(datatype)), "cpu", 1)
    rows = np.array([[0, 1, 2], [1, 0, 3]]).astype(np.float32)
    rows = fp32_to_bf16(rows) if datatype == "BF16" else rows.astype(DATATYPES[datatype].numpy)
    given = model.run({"x": rows}, 2)["y"]

    assert given.dtype == DATATYPES[datatype].numpy
    np.testing.assert_array_equal(given, rows)


def test_memory_is_shared_unless_it_is_read_only(folder):
    """An array goes in without a copy; a request's own bytes are copied, for torch could write to them."""
    version = folder.module("x):\n        return x", SAME.format("FP32"))
    model = registry.load(version, "cpu", 1)
    rows = np.zeros((2, 3), np.float32)
    locked = np.frombuffer(bytes(24), np.float32).reshape(2, 3)

    assert np.shares_memory(model.run({"x": rows}, 2)["y"], rows)
    assert not np.shares_memory(model.run({"x": locked}, 2)["y"], locked)


WIDE = """x):
        wide = torch.empty(int(x.max()) + 1, dtype=torch.uint8, device=x.device)
        return x + wide[0] * 0
"""


def test_a_batch_without_memory_is_told_apart(folder):
    """The allocator's refusal says that a smaller batch may fit."""
    forward = WIDE
    model = registry.load(folder.module(forward, SAME.format("FP32")), "cpu", 1)

    with pytest.raises(DeviceOutOfMemoryError, match="no memory for a batch of 1 rows"):
        model.run({"x": np.full((1, 3), 2.0**55, np.float32)}, 1)


def test_other_errors_of_a_module_come_out_as_they_are(folder):
    """A failing row is not a memory problem."""
    forward = "x):\n        if x.max() > 8: raise ValueError('bad row')\n        return x"
    model = registry.load(folder.module(forward, SAME.format("FP32")), "cpu", 1)

    with pytest.raises(ValueError, match="bad row"):
        model.run({"x": np.full((1, 3), 9, np.float32)}, 1)


def test_cuda_is_refused_where_there_is_none(folder):
    """Asking for a device that torch does not see is an error, never a silent fallback."""
    version = folder.module("x):\n        return x", SAME.format("FP32"))
    count = torch.cuda.device_count()
    with pytest.raises(DeviceError, match=f"torch sees {count} CUDA devices"):
        registry.load(version, f"cuda:{count}", 1)
    with pytest.raises(DeviceError, match="none of auto, cpu"):
        registry.load(version, "gpu", 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_answers_as_the_cpu_does(folder, weights, exported):
    """The same code runs on a device's own stream, for both forms."""
    class_version = folder.add(whole(weights), SETTINGS)
    program_version = folder.add({"net.pt2": exported[0]}, SETTINGS.split("\n", 2)[2], "2")
    for version in (class_version, program_version):
        on_cpu, on_cuda = (registry.load(version, device, 1) for device in ("cpu", "cuda"))
        for rows in (ROWS, ROWS[:1], np.frombuffer(ROWS.tobytes(), np.float32).reshape(2, 4)):
            expected = on_cpu.run({"x": rows}, len(rows))["y"]
            np.testing.assert_allclose(on_cuda.run({"x": rows}, len(rows))["y"], expected, rtol=1e-4)
        on_cuda.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_batch_without_memory_leaves_room_for_the_next(folder):
    """After the device ran out of memory a smaller batch runs."""
    forward = WIDE
    model = registry.load(folder.module(forward, SAME.format("FP32")), "cuda", 1)

    with pytest.raises(DeviceOutOfMemoryError):
        model.run({"x": np.full((1, 3), 2.0**43, np.float32)}, 1)
    assert len(model.run({"x": np.zeros((1, 3), np.float32)}, 1)["y"]) == 1


def test_a_closed_model_does_not_run(folder):
    """Its module is gone."""
    model = registry.load(folder.module("x):\n        return x", SAME.format("FP32")), "cpu", 1)
    model.close()

    with pytest.raises(RuntimeError, match="closed"):
        model.run({"x": np.zeros((1, 3), np.float32)}, 1)
