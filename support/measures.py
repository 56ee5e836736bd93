"""Measures of plasticity, as the literature defines them, and of learning. One that is undefined is NaN."""

import math
from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.nn as nn


def joint_norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """L2 norm, 0-d float64, of all numbers in these tensors together."""
    return torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors])
    )


class NormTracker:
    """Norms of modules when they were drawn, and of what learns together when it began to."""

    def __init__(self) -> None:
        self.initial: dict[str, float] = {}  # of every module, by name

    def begin(self, modules: dict[str, nn.Module], learning: list[nn.Module]) -> None:
        """Takes note of modules that are new, and of a new beginning of those that learn."""
        for name, module in modules.items():
            self.initial.setdefault(name, joint_norm(module.parameters()).item())
        self.at_begin = self.norm(learning)

    def forget(self, name: str) -> None:
        """This module is drawn anew."""
        del self.initial[name]

    def norm(self, learning: list[nn.Module]) -> float:
        """‖w‖ of these modules together."""
        return joint_norm([parameter for module in learning for parameter in module.parameters()]).item()

    def growth(self, learning: list[nn.Module]) -> float:
        """That norm as a multiple of what it was when they began: the adaptive criterion (paper, appendix)."""
        return self.norm(learning) / self.at_begin

    def state_dict(self) -> dict[str, Any]:
        return {"initial": dict(self.initial), "at_begin": self.at_begin}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.initial, self.at_begin = dict(state["initial"]), state["at_begin"]


class LossMeter:
    """Sums of losses and Q-values, on their device until they are asked for, so that learning waits for nothing."""

    def __init__(self, device: torch.device):
        self.totals = torch.zeros(3, device=device)  # of losses, Q-values and finite losses
        self.num_updates = 0

    def add(self, loss: torch.Tensor, q_values: torch.Tensor) -> None:
        """Of one update, both 0-d. `num_updates` is the caller's to count: a captured graph runs no Python."""
        self.totals += torch.stack((loss, q_values, loss.isfinite()))

    def means(self, newest: int, period: int) -> dict[str, float]:
        """Means since the last call; empty if there was no update. For the arguments and the error see `check_finite`."""
        self.check_finite(newest, period)
        loss, q_values, _ = self.totals.tolist()
        count, self.num_updates = self.num_updates, 0
        self.totals.zero_()
        return {"td_loss": loss / count, "q_values": q_values / count} if count else {}

    def check_finite(self, newest: int, period: int) -> None:
        """Updates fell due every `period` steps up to step `newest`.

        Raises:
            FloatingPointError: a loss was not finite. Then neither are the parameters, nor any later loss.
        """
        if (num_finite := int(self.totals[2])) < self.num_updates:
            first = newest // period - self.num_updates + num_finite + 1
            raise FloatingPointError(
                f"td_loss is not finite from step {first * period}: lower --learning-rate"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"totals": self.totals, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.totals.copy_(state["totals"])
        self.num_updates = state["num_updates"]


def dormant_units(activations: torch.Tensor, tau: float = 0.025) -> torch.Tensor:
    """Which units of a layer are dormant (Sokar et al. 2023): E|h_i| / (its mean over the layer's units + 1e-9) ≤ τ.

    Args:
        activations: (B, units), or (B, channels, H, W), where a channel is a unit, averaged over batch and space

    Returns:
        (units,) float32 of 1 and 0, all 1 where no unit of the layer is ever active; all NaN where they are not finite
    """
    sizes = activations.abs().transpose(0, 1).flatten(start_dim=1).mean(dim=1)  # (units,)
    scores = sizes / (sizes.mean() + 1e-9)
    return (scores <= tau).float().where(scores.isfinite(), math.nan)


def active_fraction(activations: torch.Tensor) -> torch.Tensor:
    """1 − mean(h = 0), 0-d, of activations of any shape; NaN where they are not finite."""
    return (activations != 0).float().where(activations.isfinite(), math.nan).mean()


def singular_values(features: torch.Tensor) -> torch.Tensor:
    """(min(B, d),) float64 in descending order, of features (B, d); all NaN where features are not finite or all 0."""
    if not features.isfinite().all() or not features.any():
        return torch.full((min(features.shape),), math.nan, dtype=torch.float64, device=features.device)
    return torch.linalg.svdvals(features.double())


def srank(sigma: torch.Tensor, delta: float = 0.01) -> float:
    """The number of largest singular values, of all given (r,), that make up 1 − δ of their sum (Kumar et al. 2021)."""
    if not sigma.sum() > 0:
        return math.nan
    return 1 + int((sigma.cumsum(0) < (1 - delta) * sigma.sum()).sum())


def effective_rank(sigma: torch.Tensor) -> float:
    """exp(−Σ p ln p) with p = σ / Σσ, of singular values (r,) (Roy & Vetterli 2007); NaN where they are NaN or all 0."""
    return torch.special.entr(sigma / sigma.sum()).sum().exp().item()


def share_of_q(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """E|new| / (E|old| + E|new|), 0-d: how much of Q = old + new, both (B, num_actions), the second part contributes."""
    return new.abs().mean() / (old.abs().mean() + new.abs().mean())


@torch.no_grad()
def activations(
    network: nn.Module, names: dict[str, str], obs: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The network's output for `obs`, and {name: output} of its submodules at these paths, {path: name}."""
    layers: dict[str, torch.Tensor] = {}

    def watch(path: str, name: str) -> torch.utils.hooks.RemovableHandle:
        return network.get_submodule(path).register_forward_hook(
            lambda _, __, output: layers.update({name: output})
        )

    hooks = [watch(path, name) for path, name in names.items()]
    outputs = network(obs)
    for hook in hooks:
        hook.remove()
    return outputs, layers


def norm_measures(
    network: nn.Module, names: dict[str, str], initial: dict[str, float], loss: torch.Tensor
) -> dict[str, float]:
    """Weight norms of modules, {path: name}, their ratios to the initial ones, and norms of the loss's gradient."""
    modules = {path: network.get_submodule(path) for path in names}
    norms = {path: joint_norm(module.parameters()).item() for path, module in modules.items()}
    trained = {path: [p for p in module.parameters() if p.requires_grad] for path, module in modules.items()}
    gradients = iter(
        torch.autograd.grad(loss, [parameter for of_one in trained.values() for parameter in of_one])
    )
    own = {path: [next(gradients) for _ in of_one] for path, of_one in trained.items() if of_one}
    return {
        **{f"weight_norm/{names[path]}": norm for path, norm in norms.items()},
        **{f"weight_norm_ratio/{names[path]}": norm / initial[path] for path, norm in norms.items()},
        **{f"gradient_norm/{names[path]}": joint_norm(tensors).item() for path, tensors in own.items()},
    }


def unit_measures(layers: dict[str, torch.Tensor], learning: Collection[str]) -> dict[str, torch.Tensor]:
    """Dormant and active fraction of every layer, {name: (B, units) or (B, channels, H, W)}, and of all that learn together."""
    dormant = {name: dormant_units(layer) for name, layer in layers.items()}
    return {
        "dormant_fraction": torch.cat([dormant[name] for name in learning]).mean(),
        "active_fraction": active_fraction(torch.cat([layers[name].flatten() for name in learning])),
        **{f"dormant_fraction/{name}": of_layer.mean() for name, of_layer in dormant.items()},
        **{f"active_fraction/{name}": active_fraction(layer) for name, layer in layers.items()},
    }


def rank_measures(features: dict[str, torch.Tensor]) -> dict[str, float]:
    """srank and effective rank of every one of these features, {name: (B, d)}."""
    sigmas = {name: singular_values(of_one) for name, of_one in features.items()}
    ranks = {f"srank/{name}": srank(sigma) for name, sigma in sigmas.items()}
    return ranks | {f"effective_rank/{name}": effective_rank(sigma) for name, sigma in sigmas.items()}


def plasticity(
    network: nn.Module,
    names: dict[str, str],
    relus: dict[str, str],
    old: str | None,
    initial: dict[str, float],
    loss: torch.Tensor,
    obs: torch.Tensor,
) -> dict[str, float]:
    """All measures of a network that has modules called `encoder` and `head`, the head that learns; none that is undefined.

    Args:
        names: {path: name} of its modules
        relus: {path: name} of the activations after its layers, among them conv1, conv2, conv3 and head
        old: path of a submodule that gives a part of Q, if the share of the rest in Q is asked for
        initial: norms of the modules when they were drawn, by path
        loss: 0-d, at `obs`
        obs: uint8 (B, 4, 84, 84)
    """
    outputs, layers = activations(network, relus | ({old: "old"} if old else {}), obs)
    old_outputs = layers.pop("old", None)
    measured: dict[str, Any] = unit_measures(layers, learning=("conv1", "conv2", "conv3", "head"))
    measured |= rank_measures({"encoder": layers["conv3"].flatten(start_dim=1), "head": layers["head"]})
    measured |= norm_measures(network, names, initial, loss)
    if old_outputs is not None:
        measured["new_heads_share_of_q"] = share_of_q(old_outputs, outputs - old_outputs)
    values = {name: float(value) for name, value in measured.items()}
    return {name: value for name, value in values.items() if math.isfinite(value)}
