"""Choosing a runtime, executing verified sources, the self-check, and what marks an error as retryable."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest

from inferfleet.errors import ChecksumMismatchError, ModelLoadError, UntrustedModelError
from inferfleet.models.repository import Repository
from inferfleet.ports import LoadedModel
from inferfleet.records import Signature, TensorSpec
from inferfleet.runtimes import is_retryable, registry, selfcheck
from inferfleet.runtimes.loading import granted_threads
from inferfleet.testing.checksum import expected_checksum, write_checksum_model
from inferfleet.testing.puppet import PuppetError, PuppetModel, PuppetRuntime, Script

SETTINGS = """
[[input]]
name = "text"
datatype = "BYTES"
shape = []
[[output]]
name = "length"
datatype = "INT64"
shape = []
[[output]]
name = "upper"
datatype = "BYTES"
shape = [1]
[parameters]
start = 10
"""
HANDLER = """
from .tools.words import upper

class Model:
    def load(self, folder, device, parameters):
        self.start = parameters["start"] + len((folder / "table.txt").read_text())
        self.device = device
    def prepare(self, tensors):
        return tensors["text"].tolist()
    def predict(self, items):
        if b"fail" in items:
            raise TimeoutError("upstream")
        lengths = [self.start + len(each) for each in items]
        return {"length": lengths, "upper": [[upper(each)] for each in items]}
"""


class Folder:
    """Writes files and adds them as versions of one trusted model."""

    def __init__(self, path):
        self.path = path
        self.repository = Repository(path / "models", ["words"])

    def add(self, files, settings=SETTINGS, version="1", **more):
        source = self.path / f"source-{version}"
        for name, text in files.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_text(text)
        return self.repository.add("words", version, sorted(source.iterdir()), settings=settings, **more)


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


WHOLE = {
    "model.py": HANDLER,
    "tools/words.py": "def upper(each): return each.upper().decode()\n",
    "table.txt": "abc",
}


def modules():
    """The modules of handlers that are importable now."""
    return {name for name in sys.modules if name.startswith("inferfleet_model_")}


def simple(body, name="Model"):
    """A handler whose predict has this body."""
    return f"class {name}:\n    def predict(self, tensors):\n        {body}\n"


def test_a_handler_with_neighbours_and_data_answers(folder):
    """Relative imports, data files and lists as outputs work; str becomes bytes."""
    model: LoadedModel = registry.load(folder.add(WHOLE), "cpu", 1)
    outputs = model.run({"text": np.array([b"a", b"bcd"], object)}, 2)

    np.testing.assert_array_equal(outputs["length"], np.array([14, 16], np.int64))
    assert outputs["upper"].tolist() == [[b"A"], [b"BCD"]]


def test_nothing_of_a_handler_stays_behind(folder):
    """sys.path is as it was, no cache is written, and the modules go when the model is closed."""
    before = list(sys.path), list(sys.meta_path), modules()
    version = folder.add(WHOLE)
    model = registry.load(version, "cpu", 1)
    model.close()

    assert before == (list(sys.path), list(sys.meta_path), modules())
    assert not list(version.path.rglob("*.pyc"))
    folder.repository.fetch("words", "1")
    with pytest.raises(RuntimeError, match="closed"):
        model.run({"text": np.array([b"a"], object)}, 1)


def test_two_versions_of_a_handler_live_side_by_side(folder):
    """Each version's modules have names of their own."""
    first = registry.load(folder.add(WHOLE), "cpu", 1)
    other = WHOLE | {"tools/words.py": "def upper(each): return b'second'\n"}
    second = registry.load(folder.add(other, version="2"), "cpu", 1)

    assert [m.run({"text": np.array([b"a"], object)}, 1)["upper"].tolist() for m in (first, second)] == [
        [[b"A"]],
        [[b"second"]],
    ]


def test_a_neighbour_is_not_importable_by_its_bare_name(folder):
    """An absolute import means an installed package; the folder is never searched."""
    version = folder.add({"model.py": "import words\n", "words.py": ""})

    with pytest.raises(ModelLoadError, match=r"executing model\.py failed: ModuleNotFoundError.*'words'"):
        registry.load(version, "cpu", 1)


def test_untrusted_code_is_refused_before_it_runs(folder):
    """The error holds the very line that would trust it."""
    version = folder.add({"model.py": "raise SystemExit('executed')"})
    untrusted = Repository(folder.repository.root).fetch("words", "1")

    with pytest.raises(UntrustedModelError, match=f"words@sha256:{version.digest}"):
        registry.load(untrusted, "cpu", 1)


def test_code_that_changes_after_the_fetch_is_refused(folder):
    """What is executed are bytes that match the manifest, or nothing."""
    version = folder.add(WHOLE)
    (version.path / "tools" / "words.py").write_text("raise SystemExit('executed')")

    with pytest.raises(ChecksumMismatchError, match=r"tools/words\.py"):
        registry.load(version, "cpu", 1)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("class Other: pass", r"model\.py has no class Model"),
        ("class Model: pass", "has no method predict"),
        ("def broken(:", r"compiling model\.py failed: SyntaxError"),
        ("1 / 0", r"executing model\.py failed: ZeroDivisionError"),
        ("raise SystemExit(3)", r"executing model\.py failed: SystemExit: 3"),
        (simple("raise ValueError('two\\nlines')"), "self-check with 1 row failed: ValueError: two lines"),
        (simple("raise SystemExit"), "the handler called exit"),
        (simple("return [1]"), "predict returned a list"),
        (simple("return {}"), "outputs length, upper declared, none given"),
        (
            simple("return {'length': [1, 2], 'upper': [['a']]}"),
            r"length is declared INT64 \[1\], given int64 \[2\]",
        ),
        (simple("return {'length': [1], 'upper': [['a']]}"), r"with 3 rows failed: output length"),
        (
            simple("return {'length': [1], 'upper': ['a']}"),
            r"upper is declared BYTES \[1, 1\], given object \[1\]",
        ),
        (simple("return {'length': [1], 'upper': [[1]]}"), "a BYTES output holds a int"),
        (
            "import numpy\n" + simple("return {'length': numpy.zeros(1), 'upper': [['a']]}"),
            "length is declared INT64 .* given float64",
        ),
    ],
)
def test_a_handler_that_does_not_fit_is_refused_in_one_line(folder, source, said):
    """Whatever goes wrong while loading names the model, the file and the reason."""
    before = modules()
    with pytest.raises(ModelLoadError, match=said) as caught:
        registry.load(folder.add({"model.py": source}), "cpu", 1)

    assert str(caught.value).startswith("model words version 1: ")
    assert "\n" not in str(caught.value)
    assert modules() == before


def test_another_class_can_be_the_entry_point(folder):
    """`entry_point` names module and class."""
    body = "return {'length': [0] * len(tensors['text']), 'upper': [['']] * len(tensors['text'])}"
    files = {"model.py": "", "other.py": simple(body, "Handler")}
    model = registry.load(folder.add(files, entry_point="other:Handler"), "cpu", 1)

    assert model.run({"text": np.array([b"a"], object)}, 1)["upper"].tolist() == [[b""]]


def test_a_sample_replaces_the_zeros_of_the_self_check(folder):
    """A handler to which empty text makes no sense offers text of its own, repeated as needed."""
    source = HANDLER.replace('if b"fail"', 'if b""').replace("TimeoutError", "ValueError")
    files = WHOLE | {"model.py": source}
    with pytest.raises(ModelLoadError, match="ValueError: upstream"):
        registry.load(folder.add(files), "cpu", 1)
    files["model.py"] += "    def sample(self):\n        return {'text': ['hello', b'you']}\n"
    registry.load(folder.add(files, version="2"), "cpu", 1).close()


def test_errors_of_a_handler_come_out_as_they_are(folder):
    """The worker sees the handler's own exception and its marks."""
    model = registry.load(folder.add(WHOLE), "cpu", 1)

    with pytest.raises(TimeoutError) as caught:
        model.run({"text": np.array([b"fail"], object)}, 1)
    assert is_retryable(caught.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (TimeoutError(), True),
        (ConnectionResetError(), True),
        (PuppetError("", retryable=True), True),
        (PuppetError(""), False),
        (ValueError(), False),
        (MemoryError(), False),
    ],
)
def test_what_is_retryable(error, expected):
    """Timeouts, OSErrors and what is marked; nothing else."""
    assert is_retryable(error) is expected


def test_a_mark_overrules_the_type():
    """A handler knows better than its exception's class."""
    error = FileNotFoundError()
    error.retryable = False

    assert not is_retryable(error)


def test_the_registry_imports_neither_torch_nor_onnxruntime():
    """Extras are imported when a version asks for them; checked in a fresh interpreter."""
    code = (
        "import sys, inferfleet.runtimes.registry, inferfleet.models.repository, inferfleet.testing.checksum;"
        "sys.exit(bool({'torch', 'onnxruntime', 'onnx'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_missing_extra_is_named(folder, monkeypatch):
    """The error holds the command that mends it."""
    (folder.path / "net.onnx").write_bytes(b"")
    settings = SETTINGS.split("[parameters]")[0]
    version = folder.repository.add("words", "1", [folder.path / "net.onnx"], settings=settings)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "inferfleet.runtimes.onnx", raising=False)

    with pytest.raises(ModelLoadError, match=r"pip install '\.\[onnx\]'"):
        registry.load(version, "cpu", 1)


def test_threads_are_at_least_one():
    """0 asks the machine; a number is taken as it is."""
    assert granted_threads(0) >= 1
    assert granted_threads(7) == 7


def test_the_checksum_model_names_its_version_and_row(tmp_path):
    """The handler in numpy and the expectation in plain integers agree on any row."""
    repository = Repository(tmp_path / "models", ["check"])
    model = registry.load(write_checksum_model(repository, "check", "3", delay_ms_per_batch=0.1), "cpu", 1)
    rows = np.random.default_rng(7).normal(size=(50, 4)).astype(np.float32)
    rows[0] = [0.0, -0.0, np.inf, 1e-45]
    outputs = model.run({"x": rows}, 50)

    assert [tuple(each) for each in outputs["check"].tolist()] == [
        expected_checksum("3", row) for row in rows
    ]
    assert len({each[1] for each in outputs["check"].tolist()}) == 50


def batch(*firsts):
    """Rows of four numbers that begin with these."""
    return {"x": np.array([[first, 1, 2, 3] for first in firsts], np.float32)}


def test_a_puppet_answers_with_checksums():
    """Unless told otherwise it is the checksum model."""
    outputs = PuppetModel("5").run(batch(1, 2), 2)

    assert [tuple(each) for each in outputs["check"].tolist()] == [
        expected_checksum(5, (1, 1, 2, 3)),
        expected_checksum(5, (2, 1, 2, 3)),
    ]


def test_a_puppet_runs_only_when_told():
    """A held run waits for its permit; one permit is one run."""
    puppet = PuppetModel()
    puppet.hold()
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(puppet.run(batch(1), 1))) for _ in range(2)]
    for thread in threads:
        thread.start()
    puppet.wait_until_held(2)
    assert answers == []
    puppet.release(1)
    puppet.wait_until_held(1)
    puppet.release()
    for thread in threads:
        thread.join(10)

    assert len(answers) == 2
    assert puppet.runs == [1, 1]


def test_a_puppet_fails_as_it_is_told():
    """Rows, memory and the lock on a closed one."""
    error = PuppetError("row", retryable=True)
    puppet = PuppetModel(script=Script(fail_on=frozenset({7}), error=error, oom_above=2))

    with pytest.raises(PuppetError, match="row"):
        puppet.run(batch(1, 7), 2)
    with pytest.raises(Exception, match="no memory for more than 2 rows"):
        puppet.run(batch(1, 2, 3), 3)
    puppet.close()
    with pytest.raises(RuntimeError, match="closed"):
        puppet.run(batch(1), 1)


SCORE = Signature((TensorSpec("x", "FP32", (4,)),), (TensorSpec("y", "FP32", (2,)),))


@pytest.mark.parametrize(
    ("script", "shape"),
    [
        (Script(missing_rows=1), (1, 2)),
        (Script(missing_rows=-2), (4, 2)),
        (Script(row_shape=(5,)), (2, 5)),
    ],
)
def test_a_puppet_answers_wrong_as_it_is_told(script, shape):
    """Count and shape can be spoilt, and the self-check sees it."""
    script.answer = lambda tensors: {"y": tensors["x"][:, :2]}
    puppet = PuppetModel(script=script, signature=SCORE)

    assert puppet.run(batch(1, 2), 2)["y"].shape == shape
    with pytest.raises(ModelLoadError, match="self-check"):
        selfcheck.check(puppet, "model m version 1", None)


def test_a_puppet_puts_nan_into_the_rows_it_is_told():
    """Only the rows that hold the value are spoilt."""
    script = Script(answer=lambda tensors: {"y": tensors["x"][:, :2]}, nan_on=frozenset({7}))
    outputs = PuppetModel(script=script, signature=SCORE).run(batch(1, 7, 2), 3)

    assert np.isnan(outputs["y"]).any(axis=1).tolist() == [False, True, False]


def test_a_puppet_runtime_remembers_what_it_gave_out(tmp_path):
    """A test finds each loaded puppet by name and version, or has its load fail."""
    version = write_checksum_model(Repository(tmp_path / "models"), "check", "3")
    runtime = PuppetRuntime()
    model = runtime.load(version, "cpu", 1)

    assert runtime.models["check", "3"] is model
    runtime.broken["check", "3"] = "told to fail"
    with pytest.raises(ModelLoadError, match="told to fail"):
        runtime.load(version, "cpu", 1)


def test_the_self_check_respects_the_largest_batch():
    """A version that wants single rows is never asked for three."""
    puppet = PuppetModel()
    selfcheck.check(puppet, "model m version 1", 1)
    selfcheck.check(puppet, "model m version 1", 2)

    assert puppet.runs == [1, 1, 2]


NUMBERS = """
runtime = "python"
file = "model.py"
[[input]]
name = "x"
datatype = "FP32"
shape = [2]
[[output]]
name = "y"
datatype = "FP32"
shape = [2]
"""
IN_PLACE = """
import numpy as np

class Model:
    def load(self, folder, device, parameters):
        self.out = np.zeros((64, 2), np.float32)
    def predict(self, tensors):
        x = tensors["x"]
        x *= 10
        self.out[:len(x)] = x
        return {"y": self.out[:len(x)]}
"""


def test_a_handler_may_write_to_its_inputs_and_reuse_its_outputs(folder):
    """Requests stay what they are for a second try, and answers what they were when they are written."""
    model = registry.load(folder.add({"model.py": IN_PLACE}, settings=NUMBERS), "cpu", 1)
    x = np.array([[1, 2]], np.float32)
    first = model.run({"x": x}, 1)
    second = model.run({"x": x}, 1)
    model.run({"x": x + 1}, 1)

    assert x.tolist() == [[1, 2]]
    assert first["y"].tolist() == second["y"].tolist() == [[10, 20]]
