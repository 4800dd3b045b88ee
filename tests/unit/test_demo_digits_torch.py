"""The digits network as a torch version: weights written without torch are the ones that torch loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from inferfleet.demo import digits_torch
from inferfleet.demo.digits import Layer
from inferfleet.models.repository import Repository
from inferfleet.runtimes import registry


def test_the_torch_version_says_what_its_layers_say(tmp_path: Path) -> None:
    """Dense layers go through the file into the module; its answers are those of plain arithmetic."""
    random = np.random.default_rng(3)
    sizes = [(64, 128), (128, 64), (64, 10)]
    layers = [
        Layer(
            random.normal(0, 0.2, size).astype(np.float32), random.normal(0, 0.1, size[1]).astype(np.float32)
        )
        for size in sizes
    ]
    weights = tmp_path / "model.safetensors"
    digits_torch.write_safetensors(layers, weights)
    repository = Repository(tmp_path / "models", [digits_torch.MODEL])
    files = [weights, digits_torch.CLASS]
    version = repository.add(digits_torch.MODEL, "1", files, settings=digits_torch.SETTINGS)
    images = random.uniform(0, 16, (5, 64)).astype(np.float32)

    model = registry.load(version, "cpu", 1)
    try:
        found = model.run({"image": images}, 5)
    finally:
        model.close()

    sums = images / 16
    for number, layer in enumerate(layers):
        sums = (np.maximum(sums, 0) if number else sums) @ layer.weights + layer.bias
    shares = np.exp(sums) / np.exp(sums).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found["probabilities"], shares, rtol=1e-4)
    assert found["label"][:, 0].tolist() == sums.argmax(axis=1).tolist()
