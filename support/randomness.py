"""Random numbers: seeds of independent streams, and layers drawn anew."""

import numpy as np
import torch
import torch.nn as nn


def stream_seed(seed: int, stream: int, key: int = 0) -> int:
    """A seed in [0, 2³⁰) for one use; neighbouring run seeds, streams and keys give unrelated ones."""
    return int(np.random.SeedSequence([seed, stream, key]).generate_state(1)[0]) >> 2


@torch.no_grad()
def redraw(module: nn.Module, generator: torch.Generator | None = None, keep: float = 0.0) -> None:
    """w ← keep · w + (1 − keep) · new for every layer in `module`, the new ones distributed as PyTorch's own: U(±1/√fan_in)."""
    device = "cpu" if generator is None else generator.device
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            bound = layer.weight[0].numel() ** -0.5
            for parameter in layer.parameters():
                new = torch.empty(parameter.shape, device=device).uniform_(-bound, bound, generator=generator)
                parameter.copy_(keep * parameter + (1 - keep) * new.to(parameter.device))
