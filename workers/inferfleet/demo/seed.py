"""``python -m inferfleet.demo.seed FOLDER``: models, and requests with the right answers, for compose.

Writes ``models/``, a repository with ``digits`` 1, 2 and 3 (the third is wrong on purpose), the second one as
``digits-torch`` too, and ``text`` 1; and ``samples/<route>.jsonl``, whose lines hold a V2 body and what each
version answers to it outside of a fleet. Needs the extra ``demo``; whoever uses what it wrote does not.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from inferfleet.demo import digits, digits_torch, texts
from inferfleet.demo.traffic import v2_json
from inferfleet.models.repository import Repository

TEXTS = 200


def write_seed(folder: Path) -> None:
    """Write models and samples below ``folder``, which must hold neither yet."""
    (folder / "models").mkdir(parents=True)
    (folder / "samples").mkdir()
    repository = Repository(folder / "models")
    _write_samples(folder, "digits", _digits(repository))
    repository.add(texts.MODEL, "1", texts.model_files(), settings=texts.SETTINGS)
    samples = texts.sample_texts(TEXTS)
    _write_samples(
        folder, texts.ROUTE, (_line("text", "BYTES", [each.text], {"1": each.label}) for each in samples)
    )


def _digits(repository: Repository) -> Iterable[dict[str, Any]]:
    """Add all versions of the digits, and yield their samples: the images that no version learned from."""
    data = digits.load_digits()
    classifiers = digits.train(data)
    layers = {version: digits.layers_of(each) for version, each in classifiers.items()}
    layers[digits.BROKEN] = digits.broken(layers["2"])
    with tempfile.TemporaryDirectory() as folder:
        for version, each in layers.items():
            file = Path(folder, "model.onnx")
            digits.write_onnx(each, file)
            repository.add(digits.MODEL, version, [file])
        weights = Path(folder, "model.safetensors")
        digits_torch.write_safetensors(layers["2"], weights)
        files = [weights, digits_torch.CLASS]
        repository.add(digits_torch.MODEL, "1", files, settings=digits_torch.SETTINGS)
    said = digits.expected_probabilities(classifiers, data)
    for row in data.unseen.nonzero()[0]:
        answers = {version: int(each[row].argmax()) for version, each in said.items()}
        yield _line("image", "FP32", data.images[row], answers)


def _line(name: str, datatype: str, row: Any, answers: dict[str, Any]) -> dict[str, Any]:
    body = json.loads(v2_json("", name, datatype, row))
    del body["id"]
    return {"body": body, "label": answers}


def _write_samples(folder: Path, route: str, lines: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    (folder / "samples" / f"{route}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_seed(Path(sys.argv[1]))
