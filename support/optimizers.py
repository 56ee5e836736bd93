"""The optimizer of the paper's agent, and what becomes of an optimizer's moments."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn

Moments = dict[str, dict[str, Any]]  # {name of a parameter: its moments}, of those that have any


class CenteredRMSProp(torch.optim.Optimizer):
    """w ← w − lr · g / √(E[g²] − E[g]² + eps), with running means that start at zero (Graves 2013; DQN Zoo).

    `torch.optim.RMSprop` adds eps outside the root, where 0.01/32² is a 320 times smaller floor.

    Args:
        weight_decay: c of c·w, which is added to g, as in `torch.optim.Adam`
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        decay: float = 0.95,
        eps: float = 0.01 / 32**2,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "decay": decay, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in trained:
                if not self.state[parameter]:
                    self.state[parameter]["mean"] = torch.zeros_like(parameter)
                    self.state[parameter]["square"] = torch.zeros_like(parameter)
            grads = [parameter.grad for parameter in trained]
            if group["weight_decay"] > 0:
                grads = list(torch._foreach_add(grads, trained, alpha=group["weight_decay"]))
            means = [self.state[parameter]["mean"] for parameter in trained]
            squares = [self.state[parameter]["square"] for parameter in trained]
            torch._foreach_lerp_(means, grads, 1 - group["decay"])
            torch._foreach_mul_(squares, group["decay"])
            torch._foreach_addcmul_(squares, grads, grads, value=1 - group["decay"])
            roots = torch._foreach_sub(squares, torch._foreach_mul(means, means))
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_sqrt_(roots)
            torch._foreach_addcdiv_(trained, grads, roots, value=-group["lr"])


def moments_by_name(optimizer: torch.optim.Optimizer, network: nn.Module) -> Moments:
    """The moments of an optimizer over all of a network's parameters; of those that have any."""
    names = [name for name, _ in network.named_parameters()]
    return {names[i]: moments for i, moments in optimizer.state_dict()["state"].items()}


def load_moments(optimizer: torch.optim.Optimizer, network: nn.Module, moments: Moments) -> None:
    """Takes up what `moments_by_name` gave, also of a network that had other parameters besides."""
    names = [name for name, _ in network.named_parameters()]
    state = {i: copy.deepcopy(moments[name]) for i, name in enumerate(names) if name in moments}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def copy_moments(optimizer: torch.optim.Optimizer, old: nn.Module, new: nn.Module) -> None:
    """Gives the parameters of `new` a copy of the moments that those of `old`, of the same shapes, have."""
    for source, target in zip(old.parameters(), new.parameters(), strict=True):
        if source in optimizer.state:
            optimizer.state[target] = copy.deepcopy(optimizer.state[source])


def empty_moments(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Deletes the optimizer's state of these parameters, including their step counts."""
    for parameter in module.parameters():
        optimizer.state.pop(parameter, None)


def num_trainable(network: nn.Module) -> int:
    """Number of trainable parameters, counted as scalars, not tensors."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
