"""A Python handler for a text classifier: cut head and tail, run the network, name the best class.

The network is magika's, from its wheel; what it wants to see is written in the configuration beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

NETWORK = "model.onnx"
SETTINGS = "config.min.json"


class Model:
    """``text`` BYTES [1] to ``label`` BYTES [1], such as ``python``, and ``score`` FP32 [1]."""

    def load(self, folder: Path, device: str, parameters: dict[str, Any]) -> None:  # noqa: ARG002
        """Load the network and its configuration from the version's folder."""
        said = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        self.head, self.tail = said["beg_size"], said["end_size"]
        self.block, self.padding = said["block_size"], said["padding_token"]
        self.labels = [label.encode() for label in said["target_labels_space"]]
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(parameters.get("threads", 1))
        self.session = ort.InferenceSession(
            str(folder / NETWORK), options, providers=["CPUExecutionProvider"]
        )

    def prepare(self, tensors: dict[str, Any]) -> Any:
        """Return the first and last bytes of each text, blanks stripped: int32 [rows, head + tail]."""
        texts = tensors["text"][:, 0]
        rows = np.full((len(texts), self.head + self.tail), self.padding, dtype=np.int32)
        for row, text in zip(rows, texts, strict=True):
            head = text[: self.block].lstrip()[: self.head]
            tail = text[-self.block :].rstrip()[-self.tail :]
            row[: len(head)] = np.frombuffer(head, dtype=np.uint8)
            if tail:
                row[-len(tail) :] = np.frombuffer(tail, dtype=np.uint8)
        return rows

    def predict(self, items: Any) -> dict[str, Any]:
        """Return the best class of each text and how sure the network is."""
        (scores,) = self.session.run(None, {self.session.get_inputs()[0].name: items})
        best = scores.argmax(axis=1)
        labels = np.array([[self.labels[each]] for each in best], dtype=object)
        return {"label": labels, "score": scores.max(axis=1, keepdims=True).astype(np.float32)}

    def sample(self) -> dict[str, Any]:
        """Two texts of different length, for the self-check."""
        return {
            "text": np.array([[b"import sys\nprint(sys.path)\n"], [b"<p>a page</p>\n" * 9]], dtype=object)
        }
