"""Texts and what they are written in: magika's network behind a handler that takes the text itself.

Unlike the route ``files``, whose callers must cut the bytes as the network wants them, here anybody can
ask with a line of JSON. The network and its configuration come from magika's wheel.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from inferfleet.demo.files import load_file_types, one_of_each_kind

MODEL = "text"
ROUTE = "text"
HANDLER = Path(__file__).with_name("text_handler.py")
SETTINGS = """\
runtime = "python"
file = "text_handler.py"

[[input]]
name = "text"
datatype = "BYTES"
shape = [1]

[[output]]
name = "label"
datatype = "BYTES"
shape = [1]

[[output]]
name = "score"
datatype = "FP32"
shape = [1]

[batching]
max_batch_size = 8

[parameters]
threads = 1
"""
_LEAST_BYTES, _MOST_BYTES = 64, 4_000


class SampleText(NamedTuple):
    """A text of the Python installation and magika's own answer to it."""

    text: str
    label: str


def model_files() -> list[Path]:
    """Return what a version consists of: the handler, the network and its configuration."""
    network = load_file_types().onnx
    return [HANDLER, network, network.with_name("config.min.json")]


def sample_texts(count: int) -> list[SampleText]:
    """Return ``count`` text files of the Python installation, of many kinds, at most 4,000 bytes each."""
    from magika import Magika

    judge = Magika()
    samples: list[SampleText] = []
    for _, path in one_of_each_kind():
        if len(samples) == count:
            break
        body = path.read_bytes()
        if not _LEAST_BYTES <= len(body) <= _MOST_BYTES:
            continue
        try:
            text = body.decode("utf-8")
        except UnicodeDecodeError:
            continue
        samples.append(SampleText(text, str(judge.identify_bytes(body).prediction.dl.label)))
    return samples
