"""Plasticity injection in Stable-Baselines3's own DQN: CartPole, in half a minute on a CPU.

    python examples/stable_baselines3_dqn.py

Trains, injects in the middle, saves, loads, goes on, and stops where anything is not as it should be.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import create_mlp
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from analysis.audit import Audited, audit, faults_of_injection
from dqn_injection_atari import InjectableHead


class InjectablePolicy(DQNPolicy):
    """The first hidden layer of `net_arch` is the encoder φ, what comes after it is the head h."""

    def make_q_net(self) -> QNetwork:
        network = super().make_q_net()
        width, *head_widths = network.net_arch
        num_actions = int(network.action_space.n)
        act = network.activation_fn  # ReLU, or what the policy was given
        encoder = torch.nn.Sequential(torch.nn.Linear(network.features_dim, width), act())
        head = InjectableHead(lambda: torch.nn.Sequential(*create_mlp(width, num_actions, head_widths, act)))
        network.q_net = torch.nn.Sequential(encoder, head).to(self.device)
        return network  # the policy makes its optimizer next, over all heads


def head_of(model: DQN) -> InjectableHead:
    return cast(InjectableHead, model.q_net.q_net[1])


def inject(model: DQN) -> None:
    seed = torch.initial_seed() + 1_000_000 * (1 + head_of(model).num_injections)  # each injection's own
    head_of(model).inject(torch.Generator().manual_seed(seed))
    # the library's syncs copy parameters alone, which do not say that more heads are in use now
    model.q_net_target.load_state_dict(model.q_net.state_dict())


class InjectAt(BaseCallback):
    """Injects once, at a step. An agent that was saved and loaded knows that it was injected."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def _on_step(self) -> bool:
        model = cast(DQN, self.model)
        if self.num_timesteps >= self.step and head_of(model).num_injections == 0:
            print(f"step {self.num_timesteps}: return {mean_return(model)}")
            audit_injection(model)  # an agent of your own calls inject(model), no more
        return True


def audit_injection(model: DQN) -> None:
    """Injects, makes two updates, and stops where something is wrong."""
    head = head_of(model)

    def formula(obs: torch.Tensor) -> torch.Tensor:
        features = model.q_net.q_net[0](obs)
        return head.theta(features) + (head.theta_prime_1[0](features) - head.theta_prime_2[0](features))

    agent = Audited(
        network=model.q_net,
        target=model.q_net_target,
        optimizer=model.policy.optimizer,
        parts={
            "φ": "q_net.0",
            "θ": "q_net.1.theta",
            "θ′₁": "q_net.1.theta_prime_1.0",
            "θ′₂": "q_net.1.theta_prime_2.0",
        },
        obs=torch.randn(256, 4, generator=torch.Generator().manual_seed(1)).to(model.device),
        formula=formula,
        update=lambda: model.train(gradient_steps=1, batch_size=model.batch_size),
    )
    findings = audit(lambda: agent, lambda: inject(model))
    if faults := faults_of_injection(findings):
        sys.exit("\n".join(faults))
    print(f"injected: Q changed by {findings.max_abs_delta_q}, the audit found nothing wrong")


def mean_return(model: DQN) -> object:  # of 10 games without exploration, the same for every agent
    return evaluate_policy(model, make_vec_env("CartPole-v1", seed=1000))[0]


def main() -> None:
    torch.set_num_threads(1)  # faster with so small a network
    settings: dict[str, Any] = {"gamma": 0.98, "gradient_steps": 2, "target_update_interval": 100}
    model = DQN(InjectablePolicy, "CartPole-v1", learning_rate=1e-3, seed=1, **settings)
    print(f"step 0: return {mean_return(model)}")
    model.learn(10_000, InjectAt(5_000))
    print(f"step {model.num_timesteps}: return {mean_return(model)}")
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/agent")
        model.save_replay_buffer(f"{folder}/replay")
        loaded = DQN.load(f"{folder}/agent", model.get_env())
        loaded.load_replay_buffer(f"{folder}/replay")
    same_play = mean_return(loaded) == mean_return(model)
    loaded.learn(1_000, InjectAt(5_000), reset_num_timesteps=False)
    saved = head_of(model).state_dict()
    equal = [name for name, value in head_of(loaded).state_dict().items() if torch.equal(value, saved[name])]
    if not same_play or "theta.0.weight" not in equal or "theta_prime_1.0.0.weight" in equal:
        sys.exit("loaded, it plays otherwise, or θ is not frozen, or θ′₁ does not learn")
    print(f"loaded, step {loaded.num_timesteps}: return {mean_return(loaded)}, θ as it was")


if __name__ == "__main__":
    main()
