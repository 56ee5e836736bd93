"""A small run's checkpoints and final agent, and what may have become of the agents in them."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from conftest import TINY_GAMES

from dqn_injection_atari import Args, Learner, make_q_network
from support.checkpoints import CHECKSUMS, checksums
from support.evaluation import save_agent

CPU = torch.device("cpu")
ACTIONS = 8  # of Phoenix
STEP = 30  # of a final agent
SMALL = Args(
    env_id=TINY_GAMES,
    env_backend="ale",
    num_envs=2,
    total_timesteps=240,
    buffer_size=200,
    learning_starts=100,
    train_frequency=10,
    batch_size=8,
    head_width=64,  # a quarter of a second less per learner
    learning_rate=1e-3,
    log_frequency=60,
    checkpoint_frequency=240,
    plasticity_frequency=0,
    injection_step=(180,),
    cuda=False,
)


def run_with_agent(folder, **settings):
    """Writes the agent.pt of a run, which has learned nothing; returns the folder."""
    args = Args(**{"env_id": TINY_GAMES, "injection_step": (10,), "head_width": 16, **settings})
    Path(folder).mkdir()
    save_agent(Path(folder, "agent.pt"), Learner(args, ACTIONS, "cpu").q_network, asdict(args), STEP)
    return folder


def change(checkpoint, network=None, learner=None, **args):
    """Rewrites a checkpoint: `network` changes its q_network's state; learner and arguments are replaced."""
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    if network is not None:
        network(state["learner"]["q_network"])
    if learner is not None:
        state["learner"] = learner.state_dict()
    torch.save(state, checkpoint / "state.pt")
    manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    manifest["args"] |= args
    (checkpoint / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (checkpoint / CHECKSUMS).write_text(checksums(checkpoint), encoding="utf-8")


def make_fresh(q_network):
    torch.manual_seed(12345)
    fresh = make_q_network(SMALL, len(q_network["head.theta.output.bias"]), CPU)
    q_network.update(fresh.state_dict())


def kill_head(q_network):
    make_fresh(q_network)
    q_network["head.theta.hidden.bias"][1:] = -1e3  # of 64 units 1 lives on


def kill_encoder(q_network):
    make_fresh(q_network)
    q_network["encoder.4.bias"].fill_(-1e3)
