"""Measures of plasticity, most of them from the literature, and of learning. One that is undefined is NaN."""

import math
from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.nn as nn


def joint_norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """L2 norm, 0-d float64, of all numbers in these tensors together."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms))


class NormTracker:
    """Each module's norm when it was drawn, and the joint norm of those that are watched at `begin`."""

    def __init__(self) -> None:
        self.initial: dict[str, float] = {}  # of every module, by path

    def begin(self, modules: dict[str, nn.Module], learning: list[nn.Module]) -> None:
        """Records the norm of modules not seen before, and lets the growth of those that learn begin anew."""
        for path, module in modules.items():
            self.initial.setdefault(path, joint_norm(module.parameters()).item())
        self.at_begin = self.norm(learning)

    def forget(self, path: str) -> None:
        """Drops the initial norm of a module that was drawn anew; the next `begin` records it again."""
        del self.initial[path]

    def norm(self, learning: list[nn.Module]) -> float:
        """‖w‖ of these modules together."""
        return joint_norm(nn.ModuleList(learning).parameters()).item()

    def growth(self, learning: list[nn.Module]) -> float:
        """That norm as a multiple of what it was at the last `begin`: the adaptive criterion (paper)."""
        return self.norm(learning) / self.at_begin

    def state_dict(self) -> dict[str, Any]:
        return {"initial": dict(self.initial), "at_begin": self.at_begin}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.initial = dict(state["initial"])
        self.at_begin = state["at_begin"]


class LossMeter:
    """Sums of losses and Q-values, on their device until asked for: learning waits for nothing."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(2, device=device)  # of losses and of Q-values
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # of updates, and of finite losses

    def tensors(self) -> list[torch.Tensor]:
        """All that `add` changes."""
        return [self.sums, self.counts]

    @torch.no_grad()
    def add(self, loss: torch.Tensor, q_values: torch.Tensor) -> None:
        """Of one update, both 0-d."""
        self.sums += torch.stack((loss, q_values))
        self.counts[0] += 1
        self.counts[1] += loss.isfinite()

    def means(self, newest: int, period: int) -> dict[str, float]:
        """Means since the last call; empty if there was no update. See `check_finite`."""
        self.check_finite(newest, period)
        loss, q_values = self.sums.tolist()
        num_updates = int(self.counts[0])
        self.sums.zero_()
        self.counts.zero_()
        if num_updates == 0:
            return {}
        return {"td_loss": loss / num_updates, "q_values": q_values / num_updates}

    def check_finite(self, newest: int, period: int) -> None:
        """Raises FloatingPointError where a loss was not finite: then neither is any parameter or later loss.

        Updates fell due every `period` steps up to step `newest`.
        """
        num_updates, num_finite = self.counts.tolist()
        if num_finite < num_updates:
            first = newest // period - num_updates + num_finite + 1  # the first such update, from 1 on
            step = first * period
            raise FloatingPointError(
                f"td_loss is not finite from step {step}: lower --learning-rate, in a new run"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums.copy_(state["sums"])
        self.counts.copy_(state["counts"])


def dormant_units(activations: torch.Tensor, tau: float = 0.025) -> torch.Tensor:
    """Which units are dormant (Sokar et al. 2023): E|h_i| / (its mean over the layer's units + 1e-9) ≤ τ.

    Args:
        activations: (B, units), or (B, channels, H, W), where a channel is a unit

    Returns:
        (units,) float32 of 1 and 0, all 1 where no unit is ever active; all NaN where they are not finite
    """
    sizes = activations.abs().transpose(0, 1).flatten(start_dim=1).mean(dim=1)  # (units,)
    mean = sizes.mean()
    scores = sizes / (mean + 1e-9)
    return (scores <= tau).float().where(mean.isfinite(), math.nan)


def active_fraction(activations: torch.Tensor) -> torch.Tensor:
    """1 − mean(h = 0), 0-d, of activations of any shape; NaN where they are not finite."""
    return (activations != 0).float().where(activations.isfinite(), math.nan).mean()


def singular_values(features: torch.Tensor) -> torch.Tensor:
    """(min(B, d),) float64, on the CPU, descending, of features (B, d).

    All NaN where these are not finite or all 0, or where LAPACK finds no singular values.
    """
    unknown = torch.full((min(features.shape),), math.nan, dtype=torch.float64)
    if not features.isfinite().all() or not features.any():
        return unknown
    try:
        return torch.linalg.svdvals(features.cpu().double())  # a GPU's Jacobi method may not converge
    except torch.linalg.LinAlgError:
        return unknown


def srank(sigma: torch.Tensor, delta: float = 0.01) -> float:
    """How many of the largest singular values (r,) make up 1 − δ of their sum (Kumar et al. 2021)."""
    if not sigma.sum() > 0:
        return math.nan
    return 1 + int((sigma.cumsum(0) < (1 - delta) * sigma.sum()).sum())


def effective_rank(sigma: torch.Tensor) -> float:
    """exp(−Σ p ln p), p = σ / Σσ, of singular values (r,) (Roy & Vetterli 2007); NaN if all are NaN or 0."""
    entropy = torch.special.entr(sigma / sigma.sum()).sum()
    return math.exp(entropy.item())


def share_of_q(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """E|new| / (E|old| + E|new|), 0-d: how much `new` is in Q = old + new, both (B, num_actions)."""
    return new.abs().mean() / (old.abs().mean() + new.abs().mean())


def policy_churn(online: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Share of states, 0-d, whose greedy action the two networks' Q, (B, num_actions), disagree on.

    Between syncs of the target, not from update to update as in Schaul et al. 2022.
    """
    return (online.argmax(dim=1) != target.argmax(dim=1)).float().mean()


@torch.no_grad()
def activations(
    network: nn.Module, names: dict[str, str], obs: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The network's output for `obs`, and {name: output} of its submodules at these paths, {path: name}."""
    name_of = {network.get_submodule(path): name for path, name in names.items()}
    layers: dict[str, torch.Tensor] = {}

    def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        layers[name_of[module]] = output

    hooks = [module.register_forward_hook(keep) for module in name_of]
    outputs = network(obs)
    for hook in hooks:
        hook.remove()
    return outputs, layers


def norm_measures(
    network: nn.Module, names: dict[str, str], initial: dict[str, float], loss: torch.Tensor
) -> dict[str, float]:
    """Weight norms of modules {path: name}, their ratios to the initial ones, and norms of their gradients.

    `initial` are the norms by path when they were drawn; the graph of `loss`, 0-d, is used up.
    """
    values = {}
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    gradients = dict(zip(trained, torch.autograd.grad(loss, trained), strict=True))
    for path, name in names.items():
        parameters = list(network.get_submodule(path).parameters())
        norm = joint_norm(parameters).item()
        values[f"weight_norm/{name}"] = norm
        values[f"weight_norm_ratio/{name}"] = norm / initial[path]
        of_module = [gradients[parameter] for parameter in parameters if parameter in gradients]
        if of_module:
            values[f"gradient_norm/{name}"] = joint_norm(of_module).item()
    return values


def unit_measures(layers: dict[str, torch.Tensor], learning: Collection[str]) -> dict[str, torch.Tensor]:
    """Dormant and active fraction of every layer, and of those named in `learning` together.

    `layers` are {name: (B, units) or (B, channels, H, W)}.
    """
    dormant = {name: dormant_units(layer) for name, layer in layers.items()}
    values = {}
    for name, layer in layers.items():
        values[f"dormant_fraction/{name}"] = dormant[name].mean()
        values[f"active_fraction/{name}"] = active_fraction(layer)
    values["dormant_fraction"] = torch.cat([dormant[name] for name in learning]).mean()
    values["active_fraction"] = active_fraction(torch.cat([layers[name].flatten() for name in learning]))
    return values


def rank_measures(features: dict[str, torch.Tensor]) -> dict[str, float]:
    """srank and effective rank of every one of these features, {name: (B, d)}."""
    values = {}
    for name, matrix in features.items():
        sigma = singular_values(matrix)
        values[f"srank/{name}"] = srank(sigma)
        values[f"effective_rank/{name}"] = effective_rank(sigma)
    return values
