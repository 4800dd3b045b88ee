"""A Python handler for a sentence encoder: tokenize, run, average over the tokens, scale to length 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

MAX_TOKENS = 256


class Model:
    """``text`` BYTES [1] to ``embedding`` FP32 [384]."""

    def load(self, folder: Path, device: str, parameters: dict[str, Any]) -> None:  # noqa: ARG002
        """Load tokenizer and network from the version's folder, never from elsewhere."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.network = AutoModel.from_pretrained(folder, local_files_only=True).eval().to(self.device)

    def prepare(self, tensors: dict[str, Any]) -> Any:
        """Tokenize; the batch is padded to its longest text."""
        texts = [text.decode("utf-8", "replace") for text in tensors["text"][:, 0]]
        return self.tokenizer(
            texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)

    def predict(self, items: Any) -> dict[str, Any]:
        """Return one embedding a text."""
        with torch.inference_mode():
            states = self.network(**items).last_hidden_state
            mask = items["attention_mask"].unsqueeze(-1).to(states.dtype)
            mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
            return {"embedding": torch.nn.functional.normalize(mean, dim=1).float().cpu().numpy()}

    def sample(self) -> dict[str, Any]:
        """Two texts of different length, for the self-check."""
        return {"text": np.array([[b"a short text"], [b"and one that is a little longer"]], dtype=object)}
