"""ReDo: units that are dormant are recycled, every so often (Sokar et al. 2023, arXiv 2302.12902).

Which units are dormant is decided in one forward pass for all layers. Then all their incoming weights are
drawn anew, as each layer draws its own, with a bias of zero. After that all their outgoing weights are set to
zero. So recycled units add nothing to Q, and a weight between two of them is zero.

As in the authors' code (dopamine, `labs/redo/weight_recyclers.py`), except for what docs/arms.md lists. Most
important: here the outgoing weights of a channel of the last convolution are the columns that read it. That
code zeroes other columns, because it flattens the features in another order than the mask. And here the
period is given in steps, not in updates.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn as nn

from alternatives.alternative import AgentParts, Alternative, Words
from support.flags import PositivePeriod
from support.measures import dormant_units
from support.usage import OnlyWith, Share

WITH_REDO = OnlyWith("intervention", ("redo", "none"))


@dataclass(frozen=True)
class RedoSettings:
    """How often units are recycled, and which."""

    redo_frequency: Annotated[PositivePeriod, WITH_REDO] = 4_000
    """steps between two times that redo recycles units (Sokar et al. 2023: 1_000 updates)"""
    redo_threshold: Annotated[Share, WITH_REDO] = 0.025
    """activity, as a share of the layer's mean, up to which redo recycles a unit (Sokar et al. 2023)"""


def layers_of(*networks: nn.Module) -> list[list[torch.Tensor]]:
    """The parameters of each layer, in the order in which layers were made: weight, bias, normalisation's."""
    layers: list[list[torch.Tensor]] = []
    for network in networks:
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                layers.append(list(module.parameters()))
            elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
                layers[-1] += module.parameters()
    return layers


def choose(units: torch.Tensor, tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """A boolean mask, broadcastable to `tensor`, of the entries that belong to the units marked in `units`.

    Args:
        units: (units,) bool
        tensor: a parameter of the layer that makes the units, or of the next one
        axis: 0 for the layer that makes the units, 1 for the layer that reads them. After the encoder, one
            channel is read by H · W adjacent columns of a linear layer
    """
    mask = units.repeat_interleave(tensor.shape[axis] // len(units))
    shape = [1] * tensor.dim()
    shape[axis] = -1
    return mask.view(shape)


def empty_in_part(optimizer: torch.optim.Optimizer, weight: torch.Tensor, mask: torch.Tensor) -> None:
    """Sets the weight's moments to zero there. The count of its steps stays."""
    for moment in optimizer.state.get(weight, {}).values():
        if moment.shape == weight.shape:
            moment.masked_fill_(mask, 0)


def recycle(parts: AgentParts, settings: RedoSettings) -> dict[str, int]:
    """Recycles dormant units. The moments of their weights become zero, those of biases stay.

    Returns:
        {"recycled/conv1": how many of its units, ...}
    """
    layers = layers_of(parts.encoder, parts.head)
    new_layers = layers_of(parts.draw_encoder(), parts.draw_head())
    dormant = {}
    for name, activations in parts.activations.items():
        # NaN, where activations are not finite, is not dormant
        dormant[name] = dormant_units(activations, settings.redo_threshold) == 1

    # all layers but the last, whose units are the actions
    for units, layer, new_layer in zip(dormant.values(), layers[:-1], new_layers[:-1], strict=True):
        for old, new in zip(layer, new_layer, strict=True):
            old.copy_(torch.where(choose(units, old, axis=0), new.to(old.device), old))
        weight, bias, *_ = layer
        bias.masked_fill_(units, 0)
        empty_in_part(parts.optimizer, weight, choose(units, weight, axis=0))

    for units, layer in zip(dormant.values(), layers[1:], strict=True):
        outgoing, *_ = layer
        mask = choose(units, outgoing, axis=1)
        outgoing.masked_fill_(mask, 0)
        empty_in_part(parts.optimizer, outgoing, mask)

    return {f"recycled/{name}": int(units.sum()) for name, units in dormant.items()}


ALTERNATIVE = Alternative(
    name="redo",
    words=Words(
        log="dormant units recycled (ReDo)",
        noun="ReDo",
        plural="ReDo",
        deed="recycling dormant units",
    ),
    apply=recycle,
    draws_head=False,
    settings=RedoSettings,
    period="redo_frequency",
    batch_size=64,
)
