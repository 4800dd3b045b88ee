"""The digits network as a torch version: its class, and its weights as safetensors, written without torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from inferfleet.demo.digits import Layer

MODEL = "digits-torch"
CLASS = Path(__file__).with_name("digits_network.py")
SETTINGS = """\
runtime = "torch"
file = "model.safetensors"
entry_point = "digits_network:Network"

[[input]]
name = "image"
datatype = "FP32"
shape = [64]

[[output]]
name = "probabilities"
datatype = "FP32"
shape = [10]

[[output]]
name = "label"
datatype = "INT64"
shape = [1]

[parameters]
hidden = [128, 64]
"""


def write_safetensors(layers: list[Layer], path: Path) -> None:
    """Write dense layers as ``layers.<n>.weight`` and ``.bias``, which a ``torch.nn.Linear`` loads.

    The format is a length of eight bytes, a JSON head that says where each tensor lies, and the tensors.
    """
    head: dict[str, object] = {}
    blobs: list[bytes] = []
    at = 0
    for number, layer in enumerate(layers):
        for name, array in (("weight", layer.weights.T), ("bias", layer.bias)):
            blob = array.astype("<f4", order="C").tobytes()
            head[f"layers.{number}.{name}"] = {
                "dtype": "F32",
                "shape": list(array.shape),
                "data_offsets": [at, at + len(blob)],
            }
            blobs.append(blob)
            at += len(blob)
    said = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(said)) + said + b"".join(blobs))
