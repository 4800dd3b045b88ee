"""The demo's file types: features and answers are those of magika itself."""

from __future__ import annotations

import io
import sysconfig
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from magika import Magika
from magika.types import Seekable

from inferfleet.demo import files


@pytest.fixture(scope="module")
def types() -> files.FileTypes:
    return files.load_file_types()


@pytest.mark.parametrize(
    "content",
    [
        b"import os\n" * 3,
        b"  \n\t leading and trailing blanks \r\n  ",
        bytes(range(256)) * 40,
        b" " * 5000 + b"x" * 100,
        b"a" * 4096,
        b"b" * 1024 + b" " * 8000 + b"end",
    ],
)
def test_features_are_those_that_magika_extracts(
    content: bytes, types: files.FileTypes, tmp_path: Path
) -> None:
    """Head, tail, blanks and padding are cut as magika cuts them, at any size."""
    file = tmp_path / "file"
    file.write_bytes(content)
    own = Magika._extract_features_from_seekable(
        Seekable(io.BytesIO(content)),
        beg_size=types.head_bytes,
        mid_size=0,
        end_size=types.tail_bytes,
        padding_token=types.padding,
        block_size=types.block_bytes,
        use_inputs_at_offsets=False,
    )

    features = types.features(file)

    if own.beg[types.least_bytes - 1] == types.padding:
        assert features is None
    else:
        assert features is not None
        assert features.tolist() == own.beg + own.end


@pytest.mark.parametrize("content", [b"", b"tiny", b"      tiny"])
def test_a_file_that_says_too_little_has_no_features(
    content: bytes, types: files.FileTypes, tmp_path: Path
) -> None:
    """Magika does not ask its network about fewer than eight bytes after leading blanks."""
    file = tmp_path / "file"
    file.write_bytes(content)

    assert types.features(file) is None


def test_samples_are_many_kinds_of_installed_files_with_magikas_own_answers(types: files.FileTypes) -> None:
    """The network fed with the features says what ``Magika().identify_path`` says."""
    samples = files.sample_files(types, 40)
    session = onnxruntime.InferenceSession(types.onnx, providers=["CPUExecutionProvider"])
    (scores,) = session.run(["target_label"], {"bytes": np.stack([each.features for each in samples])})

    roots = {Path(sysconfig.get_path(name)).name for name in ("stdlib", "purelib")}
    assert len({sample.name for sample in samples}) == 40
    assert {sample.name.partition("/")[0] for sample in samples} <= roots
    assert [types.labels[best] for best in scores.argmax(axis=1)] == [sample.label for sample in samples]
    assert len({sample.label for sample in samples}) >= 10
