"""The digits network of version 2 as a torch module: its weights come from ``model.safetensors``."""

from __future__ import annotations

from itertools import pairwise

import torch

PIXEL_MAX = 16.0


class Network(torch.nn.Module):  # type: ignore[misc]  # torch is not there for mypy
    """``image`` FP32 [64], pixels 0 to 16, to ``probabilities`` FP32 [10] and ``label`` INT64 [1]."""

    def __init__(self, hidden: list[int]) -> None:
        super().__init__()
        sizes = [64, *hidden, 10]
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(size, following) for size, following in pairwise(sizes)
        )

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return probabilities and the best class of each row."""
        found = image / PIXEL_MAX
        for number, layer in enumerate(self.layers):
            found = layer(found if number == 0 else torch.relu(found))
        return {
            "probabilities": torch.softmax(found, dim=1),
            "label": found.argmax(dim=1, keepdim=True),
        }
