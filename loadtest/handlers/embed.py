"""The sentence encoder of the workload ``embed``: all-MiniLM-L6-v2, mean pooling, unit length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


class Encoder:
    """Texts to ``[n, 384]`` FP32 vectors, with the model files of ``folder``."""

    def __init__(self, folder: Path) -> None:
        import torch
        from safetensors.torch import load_file
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel

        torch.set_num_threads(1)
        self._torch = torch
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(256)
        model = BertModel(BertConfig.from_json_file(str(folder / "config.json")), add_pooling_layer=False)
        weights = load_file(folder / "model.safetensors")
        model.load_state_dict(weights, strict=False)
        self._model = model.eval()

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return each text's token ids."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]

    def encode(self, tokens: list[list[int]]) -> npt.NDArray[np.float32]:
        """Return one unit vector per token list, ``[n, 384]``; shorter lists are padded to the longest."""
        torch = self._torch
        longest = max(map(len, tokens))
        ids = torch.zeros((len(tokens), longest), dtype=torch.long)
        mask = torch.zeros((len(tokens), longest), dtype=torch.long)
        for row, one in enumerate(tokens):
            ids[row, : len(one)] = torch.tensor(one)
            mask[row, : len(one)] = 1
        with torch.inference_mode():
            states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask.unsqueeze(-1).to(states.dtype)
            pooled = (states * weights).sum(1) / weights.sum(1)
            unit = torch.nn.functional.normalize(pooled, dim=1)
        result: npt.NDArray[np.float32] = unit.numpy()
        return result


class Model:
    """The handler of the worker: ``text`` BYTES [1] to ``embedding`` FP32 [384]."""

    def load(self, folder: Path, device: str, parameters: dict[str, Any]) -> None:  # noqa: ARG002
        """Load the encoder from the version's folder."""
        self._encoder = Encoder(folder)

    def prepare(self, tensors: dict[str, Any]) -> list[list[int]]:
        """Tokenize one batch."""
        return self._encoder.tokenize([text.decode() for text in tensors["text"][:, 0]])

    def predict(self, items: list[list[int]]) -> dict[str, Any]:
        """Return one unit vector a text."""
        return {"embedding": self._encoder.encode(items)}

    def sample(self) -> dict[str, Any]:
        """Two texts, for the self-check: an empty one has no token to average."""
        return {"text": np.array([[b"a short text"], [b"and one that is longer"]], dtype=object)}
