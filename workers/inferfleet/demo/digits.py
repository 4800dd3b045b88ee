"""Two versions of a digits classifier, trained in a second on scikit-learn's 1,797 images, as ONNX.

Version 1 is linear and learned from 100 images, as a first version would; version 2 is a network with
two hidden layers that learned from half of all. Both take ``image`` FP32 [64] (pixels 0 to 16, row by
row) and give ``probabilities`` FP32 [10] and ``label`` INT64 [1]. Neither has seen the other half of the
images, so accuracy on it is worth something.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MODEL = "digits"
VERSIONS = {"1": "linear, 100 images", "2": "network, 898 images"}
BROKEN = "3"
"""Version 2 with its classes mixed up, as by a label file in another order: it loads, runs, and is wrong."""
_MIXED_UP = (0, 7, 2, 8, 9, 5, 6, 1, 3, 4)
FIRST_IMAGES = 100
PIXEL_MAX = 16.0
_SEED = 7
_OPSET = 17
_IR_VERSION = 8

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Digits:
    """All images with their digits; ``learned`` are the rows that models may learn from, shuffled."""

    images: Floats
    digits: npt.NDArray[np.int64]
    learned: npt.NDArray[np.int64]

    @property
    def unseen(self) -> npt.NDArray[np.bool_]:
        """True for every image that no model learned from."""
        mask = np.ones(len(self.digits), dtype=np.bool_)
        mask[self.learned] = False
        return mask


@dataclass(frozen=True, slots=True)
class Layer:
    """A dense layer: ``x @ weights + bias``."""

    weights: Floats
    bias: Floats


def load_digits() -> Digits:
    """Return the data set with its fixed split into images to learn from and unseen ones."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    images, digits = load(return_X_y=True)
    rows = np.arange(len(digits))
    learned, _ = train_test_split(rows, train_size=0.5, random_state=_SEED, stratify=digits)
    return Digits(images.astype(np.float32), digits.astype(np.int64), learned)


def train(data: Digits) -> dict[str, Any]:
    """Return the fitted scikit-learn classifier of each version; they expect pixels divided by 16."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits

    images, digits = data.images[data.learned] / PIXEL_MAX, data.digits[data.learned]
    linear = LogisticRegression(max_iter=500)
    network = MLPClassifier((128, 64), alpha=1e-3, max_iter=300, random_state=_SEED)
    # These matrices are too small to share: on a busy machine more threads take ten times as long.
    with threadpool_limits(1), warnings.catch_warnings():
        # Where it stops is fixed by the seed and the limit; that it could go on is no news.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return {
            "1": linear.fit(images[:FIRST_IMAGES], digits[:FIRST_IMAGES]),
            "2": network.fit(images, digits),
        }


def layers_of(classifier: Any) -> list[Layer]:
    """Return the dense layers of a fitted linear or multi-layer classifier, first layer first."""
    if hasattr(classifier, "coefs_"):
        pairs = zip(classifier.coefs_, classifier.intercepts_, strict=True)
    else:
        pairs = zip([classifier.coef_.T], [classifier.intercept_], strict=True)
    return [Layer(weights.astype(np.float32), bias.astype(np.float32)) for weights, bias in pairs]


def broken(layers: list[Layer]) -> list[Layer]:
    """Return the layers with the classes of the last one in another order."""
    order = list(_MIXED_UP)
    last = layers[-1]
    return [*layers[:-1], Layer(last.weights[:, order], last.bias[order])]


def write_onnx(layers: list[Layer], path: Path) -> None:
    """Write dense layers as ONNX: divide by 16, Gemm + Relu for each, Softmax and ArgMax at the end."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = [numpy_helper.from_array(np.array(PIXEL_MAX, dtype=np.float32), "pixel_max")]
    nodes = [helper.make_node("Div", ["image", "pixel_max"], ["layer_0"])]
    last = len(layers)
    for number, layer in enumerate(layers, start=1):
        weights.append(numpy_helper.from_array(layer.weights, f"weights_{number}"))
        weights.append(numpy_helper.from_array(layer.bias, f"bias_{number}"))
        result = "logits" if number == last else f"sum_{number}"
        nodes.append(
            helper.make_node("Gemm", [f"layer_{number - 1}", f"weights_{number}", f"bias_{number}"], [result])
        )
        if number < last:
            nodes.append(helper.make_node("Relu", [result], [f"layer_{number}"]))
    nodes.append(helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1))
    nodes.append(helper.make_node("ArgMax", ["logits"], ["label"], axis=1, keepdims=1))

    pixels, classes = layers[0].weights.shape[0], layers[-1].weights.shape[1]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["rows", pixels])],
        [
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["rows", classes]),
            helper.make_tensor_value_info("label", TensorProto.INT64, ["rows", 1]),
        ],
        weights,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="inferfleet",
    )
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def expected_probabilities(classifiers: dict[str, Any], data: Digits) -> dict[str, Floats]:
    """Return what each version must answer to every image: float32 [images, 10]."""
    scaled = data.images / PIXEL_MAX
    return {
        version: classifier.predict_proba(scaled).astype(np.float32)
        for version, classifier in classifiers.items()
    }
