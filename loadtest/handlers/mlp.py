"""The network of the workloads ``tiny`` and ``raw``: 32 floats in, 10 out."""

import torch


class Mlp(torch.nn.Module):  # type: ignore[misc]
    """A 32-64-10 perceptron: so small that everything around the model is what gets measured."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[n, 10]`` for ``[n, 32]``."""
        return self.layers(x)
