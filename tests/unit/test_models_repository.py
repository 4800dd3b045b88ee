"""Versions are found by listing, verified byte by byte before anything is parsed, and appear whole."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from inferfleet.errors import ChecksumMismatchError, ModelRepositoryError
from inferfleet.models.repository import Repository
from inferfleet.ports import ModelVersion
from inferfleet.records import Signature, TensorSpec

SETTINGS = """
[[input]]
name = "x"
datatype = "FP32"
shape = [4]
[[output]]
name = "y"
datatype = "FP32"
shape = []
[batching]
max_batch_size = 8
sort_by_length = true
[parameters]
scale = 2.5
"""
SIGNATURE = Signature((TensorSpec("x", "FP32", (4,)),), (TensorSpec("y", "FP32", ()),))


@pytest.fixture
def repository(tmp_path):
    """A repository with versions 2 and 10 of one Python model."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.py").write_text("raise AssertionError('never executed here')\n")
    made = Repository(tmp_path / "models")
    made.add("digits", "10", [source / "model.py"], settings=SETTINGS)
    made.add("digits", "2", [source / "model.py"], settings=SETTINGS)
    return made


def reseal(folder: Path) -> None:
    """Write a manifest that fits what lies in the folder now."""
    files = {
        path.relative_to(folder).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size": path.stat().st_size,
        }
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    document = json.dumps({"files": files, "format": 1}, sort_keys=True, separators=(",", ":"))
    (folder / "manifest.json").write_text(document + "\n")


def test_versions_are_in_numeric_order(repository):
    """Version 10 comes after version 2."""
    assert repository.models() == ["digits"]
    assert repository.versions("digits") == ["2", "10"]


def test_a_fetched_version_says_what_its_description_says(repository):
    """Runtime and file come from the file names, all else from the settings."""
    version: ModelVersion = repository.fetch("digits", "2")

    assert (
        version.name,
        version.version,
        version.runtime,
        version.file,
    ) == ("digits", "2", "python", "model.py")
    assert version.signature == SIGNATURE
    assert version.options == {"parameters": {"scale": 2.5}}
    assert (
        version.batching.max_batch_size,
        version.batching.max_rows,
        version.batching.sort_by_length,
    ) == (8, None, True)
    assert hashlib.sha256((version.path / "manifest.json").read_bytes()).hexdigest() == version.digest


def test_what_the_author_wrote_is_kept_as_written(tmp_path):
    """Missing keys are put around the given text; its comments stay."""
    (tmp_path / "model.py").write_text("")
    version = Repository(tmp_path / "models").add(
        "m", "1", [tmp_path / "model.py"], settings="# why\n" + SETTINGS
    )
    text = (version.path / "model.toml").read_text()

    assert text.startswith('runtime = "python"\nfile = "model.py"\n# why\n')


@pytest.mark.parametrize("position", [0, -1])
def test_a_flipped_byte_is_refused_before_anything_is_parsed(repository, position):
    """A wrong byte in model.toml is a checksum error, even where it would not parse."""
    path = repository.fetch("digits", "2").path / "model.toml"
    raw = bytearray(path.read_bytes())
    raw[position] ^= 0xFF
    path.write_bytes(raw)

    with pytest.raises(ChecksumMismatchError, match=r"model digits version 2: model\.toml differs") as caught:
        repository.fetch("digits", "2")

    assert hashlib.sha256(raw).hexdigest() == caught.value.found


@pytest.mark.parametrize("change", [lambda raw: raw[:-1], lambda raw: raw + b"#", lambda raw: raw[:0]])
def test_a_cut_or_grown_file_is_refused(repository, change):
    """A file of another length differs."""
    path = repository.fetch("digits", "2").path / "model.py"
    path.write_bytes(change(path.read_bytes()))

    with pytest.raises(ChecksumMismatchError, match=r"model\.py"):
        repository.fetch("digits", "2")


def test_reading_verifies_again(repository):
    """A file that changes after the fetch is not what a runtime loads."""
    version = repository.fetch("digits", "2")
    (version.path / "model.py").write_text("other")

    with pytest.raises(ChecksumMismatchError):
        version.read("model.py")


@pytest.mark.parametrize("file", ["../2/model.py", "/etc/hostname", "manifest.json", "other.py"])
def test_only_listed_files_can_be_read(repository, file):
    """A name that is not in the manifest is never opened."""
    with pytest.raises(ModelRepositoryError, match="is not listed"):
        repository.fetch("digits", "2").read(file)


def test_an_added_file_is_refused(repository):
    """A file that the manifest does not list makes the folder another version."""
    (repository.fetch("digits", "2").path / "numpy.py").write_text("")

    with pytest.raises(ModelRepositoryError, match=r"numpy\.py is not listed"):
        repository.fetch("digits", "2")


def test_a_missing_file_is_refused(repository):
    """Every listed file must be there."""
    (repository.fetch("digits", "2").path / "model.py").unlink()

    with pytest.raises(ModelRepositoryError, match=r"model\.py is listed in manifest\.json and missing"):
        repository.fetch("digits", "2")


@pytest.mark.parametrize("kind", ["symlink", "hard link", "fifo", "folder link"])
def test_anything_but_a_plain_file_is_refused(repository, tmp_path, kind):
    """Links and devices are refused even where their bytes would match."""
    folder = repository.fetch("digits", "2").path
    same = tmp_path / "same.py"
    same.write_bytes((folder / "model.py").read_bytes())
    if kind == "folder link":
        (folder / "extra").symlink_to(tmp_path)
    else:
        (folder / "model.py").unlink()
    if kind == "symlink":
        (folder / "model.py").symlink_to(same)
    elif kind == "hard link":
        os.link(same, folder / "model.py")
    elif kind == "fifo":
        os.mkfifo(folder / "model.py")

    with pytest.raises(ModelRepositoryError, match=r"link|regular"):
        repository.fetch("digits", "2")


@pytest.mark.parametrize(
    "name",
    [
        "../digits",
        "digits/2",
        "/etc",
        "..",
        ".",
        "",
        "file:///models/digits",
        "s3://b/digits",
        "Digits",
        "digits\0",
    ],
)
def test_a_model_is_looked_up_never_opened_by_name(repository, name):
    """Whatever is not a listed name is unknown, however it might resolve."""
    with pytest.raises(ModelRepositoryError, match="is not in the repository"):
        repository.fetch(name, "2")


@pytest.mark.parametrize("version", ["../2", "02", "0", "-1", "2/", "", "latest", "２", "2\n"])
def test_a_version_is_looked_up_never_opened_by_name(repository, version):
    """Positive integers without leading zeros are versions, if they are listed."""
    with pytest.raises(ModelRepositoryError, match="has no version"):
        repository.fetch("digits", version)


def test_an_unknown_name_is_answered_with_the_nearest(repository):
    """The mend is in the message."""
    with pytest.raises(ModelRepositoryError, match=r'did you mean "digits"\?'):
        repository.fetch("digit", "1")


def test_a_half_copied_folder_is_not_a_version(repository):
    """Without a manifest nothing vouches for the bytes, and the message says so."""
    folder = repository.root / "digits" / "3"
    folder.mkdir()
    (folder / "model.py").write_text("")

    assert repository.versions("digits") == ["2", "10"]
    with pytest.raises(ModelRepositoryError, match=r"the folder 3 has no manifest\.json"):
        repository.fetch("digits", "3")


def test_a_linked_folder_is_not_a_version(repository):
    """Folders that are links are not listed, neither models nor versions."""
    (repository.root / "digits" / "4").symlink_to(repository.root / "digits" / "2")
    (repository.root / "other").symlink_to(repository.root / "digits")

    assert repository.versions("digits") == ["2", "10"]
    assert repository.models() == ["digits"]


@pytest.mark.parametrize(
    "path", ["../model.py", "/model.py", "a/../model.py", "a\\model.py", "a//b", "", ".hidden"]
)
def test_a_manifest_may_list_plain_paths_only(repository, path):
    """Nothing that could leave the folder is even looked at."""
    folder = repository.fetch("digits", "2").path
    entry = {"sha256": "0" * 64, "size": 0}
    document = json.dumps({"files": {path: entry}, "format": 1}, separators=(",", ":"))
    (folder / "manifest.json").write_text(document + "\n")

    with pytest.raises(ModelRepositoryError, match="is not a plain file path"):
        repository.fetch("digits", "2")


@pytest.mark.parametrize(
    "document",
    [
        "",
        "{}",
        "[]",
        '{"files":{},"format":2}\n',
        '{"files": {}, "format": 1}\n',
        '{"files":{},"files":{},"format":1}\n',
        '{"files":{},"format":1,"url":"x"}\n',
        '{"files":{"a":{"sha256":"abc","size":1}},"format":1}\n',
        "[" * 100_000,
    ],
)
def test_a_manifest_has_one_form(repository, document):
    """Only the canonical document of a known format is read."""
    (repository.root / "digits" / "2" / "manifest.json").write_text(document)

    with pytest.raises(ModelRepositoryError, match=r"model digits version 2: manifest\.json"):
        repository.fetch("digits", "2")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ('runtme = "onnx"\n' + SETTINGS, r'unknown key "runtme"; did you mean "runtime"\?'),
        (SETTINGS.replace("_size", "size"), r'in \[batching\]; did you mean "max_batch_size"'),
        (SETTINGS.replace('"FP32"', '"FLOAT32"'), 'input x has unknown datatype "FLOAT32"'),
        (SETTINGS.replace('"FP32"', '"fp32"'), r'did you mean "FP32"'),
        (SETTINGS.replace("[4]", "[0]"), "sizes are positive, or -1"),
        (SETTINGS.replace("[4]", "[-2]"), r"input\[0\]\.shape"),
        (SETTINGS.replace("datatype", "dtype", 1), r'unknown key "dtype" in \[input\]'),
        ('runtime = "tensorflow"\n' + SETTINGS, "unknown runtime 'tensorflow'; there is: onnx"),
        ('file = "../other.py"\n' + SETTINGS, "not a plain file path"),
        ('file = "other.py"\n' + SETTINGS, "which the version does not have"),
        ('entry_point = "os:system"\n' + SETTINGS, r"has no os\.py"),
        ('entry_point = "model"\n' + SETTINGS, 'must be "module:Class"'),
        ("max_batch_size = \n", "is not TOML"),
        ("", r"runtime python needs \[\[input\]\] and \[\[output\]\]"),
        (SETTINGS.split("[[output]]")[0], "declare both"),
        (SETTINGS + '[[input]]\nname = "x"\ndatatype = "BOOL"\nshape = []', "input x is declared twice"),
    ],
)  # fmt: skip
def test_a_wrong_description_is_refused_by_name_and_nothing_is_left(tmp_path, settings, said):
    """The key at fault is named, and the repository is as it was."""
    (tmp_path / "model.py").write_text("")
    repository = Repository(tmp_path / "models")

    with pytest.raises(ModelRepositoryError, match=said) as caught:
        repository.add("m", "1", [tmp_path / "model.py"], settings=settings)

    assert "\n" not in str(caught.value)
    assert list((tmp_path / "models").rglob("*")) == []


def test_an_existing_version_is_never_replaced(repository, tmp_path):
    """Versions do not change; even a half-copied folder is not written over."""
    (repository.root / "digits" / "3").mkdir()
    for version in ("2", "3"):
        with pytest.raises(ModelRepositoryError, match="exists; versions never change"):
            repository.add("digits", version, [tmp_path / "source" / "model.py"], settings=SETTINGS)


@pytest.mark.parametrize(
    ("name", "version"), [("../x", "1"), ("Digits", "1"), ("a" * 64, "1"), ("m", "01"), ("m", "v1")]
)
def test_names_are_checked_before_a_folder_is_made(tmp_path, name, version):
    """Only the contract's names and versions become paths."""
    with pytest.raises(ModelRepositoryError, match="is no"):
        Repository(tmp_path / "models").add(name, version, [])

    assert not (tmp_path / "models").exists()


def test_a_missing_source_file_is_named(tmp_path):
    """The path at fault is in the message."""
    with pytest.raises(ModelRepositoryError, match=r"gone\.py: No such file"):
        Repository(tmp_path / "models").add("m", "1", [tmp_path / "gone.py"])


def test_a_folder_is_added_with_its_name(tmp_path):
    """Packages beside the handler keep their place; caches stay behind."""
    (tmp_path / "tools" / "__pycache__").mkdir(parents=True)
    (tmp_path / "tools" / "__pycache__" / "x.pyc").write_text("")
    (tmp_path / "tools" / "words.py").write_text("")
    (tmp_path / "model.py").write_text("")
    version = Repository(tmp_path / "models").add(
        "m", "1", [tmp_path / "model.py", tmp_path / "tools"], settings=SETTINGS
    )

    assert sorted(version.files) == ["model.py", "model.toml", "tools/words.py"]


@pytest.mark.parametrize("trusted", [[], ["other"], ["digits-2"], ["digits@sha256:" + "0" * 64]])
def test_code_is_not_trusted_unless_listed(repository, trusted):
    """Trust belongs to the whole name, or to exactly the bytes that were listed."""
    assert not Repository(repository.root, trusted).fetch("digits", "2").trusted


def test_trust_is_by_name_or_by_bytes(repository):
    """The entry that is printed for a version trusts that version and no other."""
    entry = repository.trust_entry(repository.fetch("digits", "2"))
    (repository.root / "digits" / "10" / "model.py").write_text("other")
    reseal(repository.root / "digits" / "10")

    assert Repository(repository.root, ["digits"]).fetch("digits", "10").trusted
    assert Repository(repository.root, [entry]).fetch("digits", "2").trusted
    assert not Repository(repository.root, [entry]).fetch("digits", "10").trusted


def test_a_trust_entry_that_could_never_match_is_refused(tmp_path):
    """A typing error must not look like trust given."""
    for entry in ("digits@sha256:123", "digits:2", "*", "digits@"):
        with pytest.raises(ModelRepositoryError, match="trusted"):
            Repository(tmp_path, [entry])
