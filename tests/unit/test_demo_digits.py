"""The demo's digits models: what ONNX answers is what scikit-learn answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from inferfleet.demo import digits


@pytest.fixture(scope="module")
def data() -> digits.Digits:
    return digits.load_digits()


@pytest.fixture(scope="module")
def classifiers(data: digits.Digits) -> dict[str, Any]:
    return digits.train(data)


@pytest.mark.parametrize("version", list(digits.VERSIONS))
def test_onnx_gives_the_probabilities_and_labels_of_scikit_learn(
    version: str, data: digits.Digits, classifiers: dict[str, Any], tmp_path: Path
) -> None:
    """Both outputs equal the fitted classifier's, for every image and in one batch."""
    file = tmp_path / "model.onnx"
    digits.write_onnx(digits.layers_of(classifiers[version]), file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    probabilities, label = session.run(["probabilities", "label"], {"image": data.images})

    expected = digits.expected_probabilities(classifiers, data)[version]
    assert probabilities.dtype == np.float32
    assert np.allclose(probabilities, expected, atol=1e-5)
    assert label.shape == (len(data.digits), 1)
    assert (label[:, 0] == expected.argmax(axis=1)).all()


def test_training_twice_gives_the_same_models(data: digits.Digits, classifiers: dict[str, Any]) -> None:
    """Split and seeds are fixed, so every demo shows the same two models."""
    again = digits.expected_probabilities(digits.train(data), data)
    first = digits.expected_probabilities(classifiers, data)

    assert all(np.allclose(first[version], again[version], atol=1e-6) for version in digits.VERSIONS)


def test_the_network_is_better_on_images_that_neither_has_seen(
    data: digits.Digits, classifiers: dict[str, Any]
) -> None:
    """Version 2 is worth rolling out: it is right more often, by more than chance explains."""
    unseen = data.unseen
    accuracy = {
        version: float((expected.argmax(axis=1) == data.digits)[unseen].mean())
        for version, expected in digits.expected_probabilities(classifiers, data).items()
    }

    assert unseen.sum() == len(data.digits) - len(data.learned) == 899
    assert 0.85 < accuracy["1"] < accuracy["2"] - 0.04
    assert accuracy["2"] > 0.95
