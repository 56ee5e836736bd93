"""Every arm, done to one Atari agent and looked at (audit.py): python compare.py --audit CHECKPOINT."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from alternatives import ALTERNATIVES
from analysis import fitting
from analysis.audit import (
    ENCODER,
    FROZEN_TWIN,
    NEW_HEAD,
    OLD_HEAD,
    Audited,
    Findings,
    audit,
    faults_of_injection,
    faults_of_recycling,
    table,
)
from analysis.fitting import NO_CHECKPOINT
from dqn_injection_atari import Args, Learner, QNetwork, make_parts
from support.acceleration import prepare_process
from support.checkpoints import Checkpoint, load_checkpoint
from support.machine import pick_device
from support.replay import FrameReplayBuffer
from support.usage import UsageError

LEGEND = """\
Parts: φ encoder, θ head, θ′₁ θ′₂ the injection's heads; * in part; – none. Arms: keep is --moments keep,
all heads is --no-freeze-heads.
changed: at the intervention. updates: what moves in the first and in the second after it, where they differ
with a semicolon. optimizer: what it holds. moments: what became of them at the intervention; empty ones were
so before. ΔQ: its largest change. target: a copy of the online network, or – as before. ∇φ: the encoder's
gradient is that of the formula. trained: how many numbers, before → after.
All in float32, without captured graphs. A layer norm that is drawn anew has the same constants as before."""
OBSERVATIONS = 64  # on which Q and gradients are looked at, and on which ReDo decides
FRESH_STEPS = 200  # of random play in each of 8 games
FRESH_UPDATES = 100
SILENCED = 2  # units of each layer


# The agent


@dataclass(frozen=True)
class Subject:
    """An agent that every arm begins with."""

    checkpoint: Checkpoint
    replay: FrameReplayBuffer

    @property
    def is_fresh(self) -> bool:
        return self.checkpoint.path == Path(NO_CHECKPOINT)


def saved_subject(path: Path) -> Subject:
    """The agent in a checkpoint, with its replay.

    Raises:
        UsageError: it cannot be read, has no replay to learn from, or lies behind an injection.
    """
    if not path.is_dir():
        raise UsageError(f"there is no folder {path}: give runs/FOLDER/checkpoint-STEP")
    checkpoint = load_checkpoint(path)
    args = fitting.saved_args(checkpoint)
    if fitting.num_injections(checkpoint) > 0:
        raise UsageError(
            f"{path} lies behind an injection, which no other arm can follow: "
            "give the checkpoint before it, which its run has kept"
        )
    replay = fitting.read_replay(checkpoint, pick_device(args.cuda, deterministic=True, tf32=False))
    if replay.size() == 0:
        raise UsageError(f"{path} has an empty replay: take a later one")
    return Subject(checkpoint, replay)


def fresh_subject(env_id: str, **settings: Any) -> Subject:
    """An agent that has made 100 updates on random play, without a sync, with two silent units in each layer.

    Args:
        settings: other arguments of the training script
    """
    args = Args(env_id=env_id, env_backend="ale", num_envs=8, buffer_size=8 * FRESH_STEPS, **settings)
    envs, learner, replay = make_parts(args, pick_device(args.cuda, deterministic=True, tf32=False))
    rng = np.random.default_rng(0)
    with contextlib.closing(envs):
        envs.reset(seed=0)
        for _ in range(FRESH_STEPS):
            obs = envs.obs
            actions = rng.integers(envs.single_action_space.n, size=args.num_envs)
            _, rewards, terminations, truncations, infos = envs.step(actions)
            cut = [{"TimeLimit.truncated": bool(truncated)} for truncated in truncations]
            replay.add(obs, infos["final_obs"], actions, rewards, terminations | truncations, cut)
    learner.update(replay.sample(args.batch_size, batches=FRESH_UPDATES), FRESH_UPDATES)
    silence(learner.q_network)
    meta = {"step": FRESH_STEPS * args.num_envs, "args": asdict(args)}
    return Subject(Checkpoint(Path(NO_CHECKPOINT), meta, {"learner": learner.state_dict()}), replay)


@torch.no_grad()
def silence(network: QNetwork) -> None:
    """Has the first units of each hidden layer put out 0 for every observation."""
    for module in (network.encoder, network.get_submodule(f"{network.newest_head()}.hidden")):
        for name, parameter in module.named_parameters():
            parameter[:SILENCED] = -1 if name.endswith("bias") else 0


# The arms


def arms() -> dict[str, dict[str, Any]]:
    """{name: arguments} of every arm in each of its kinds. Numbers that are not here are the run's."""
    injection: dict[str, Any] = {"intervention": "injection", "moments": "fresh", "freeze_heads": True}
    fresh = {"moments": "fresh"}
    keep = {"moments": "keep"}
    rows = {
        "none": {"intervention": "none"},
        "injection": injection,
        "injection, keep": injection | keep,
        "injection, all heads": injection | {"freeze_heads": False},
        "reset-moments, head": {"intervention": "reset-moments", "reset_moments_of": "head"},
        "reset-moments, all": {"intervention": "reset-moments", "reset_moments_of": "all"},
    }
    for name, alternative in ALTERNATIVES.items():
        if name == "reset-moments":  # is there in both its kinds
            continue
        if alternative.draws_layers:
            rows[name] = {"intervention": name} | fresh
            rows[f"{name}, keep"] = {"intervention": name} | keep
        else:
            rows[name] = {"intervention": name}
    return rows


# The equation, with no module's forward


def encode(encoder: nn.Sequential, obs: torch.Tensor) -> torch.Tensor:
    """φ(s): uint8 (B, 4, 84, 84) → (B, 3136).

    Raises:
        UsageError: there is a layer that it does not know.
    """
    x = obs.float() / 255
    for layer in encoder:
        if isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros":
            x = F.conv2d(
                x,
                layer.weight,
                layer.bias,
                stride=layer.stride,
                padding=layer.padding,
                dilation=layer.dilation,
                groups=layer.groups,
            )
        elif isinstance(layer, nn.GroupNorm):
            x = F.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)
        elif isinstance(layer, nn.ReLU):
            x = F.relu(x)
        elif not isinstance(layer, nn.Flatten):
            unknown = f"the audit does not know the encoder's {layer}"
            raise UsageError(f"{unknown}: write it out in encode, analysis/audited_arms.py")
    return x.flatten(start_dim=1)


def evaluate_head(head: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """h(φ): (B, 3136) → (B, num_actions)."""
    of = dict(head.named_parameters())
    hidden = F.linear(features, of["hidden.weight"], of["hidden.bias"])
    if "norm.weight" in of:
        hidden = F.layer_norm(hidden, hidden.shape[1:], of["norm.weight"], of["norm.bias"])
    return F.linear(F.relu(hidden), of["output.weight"], of["output.bias"])


def q_by_the_equation(network: QNetwork, obs: torch.Tensor) -> torch.Tensor:
    """h_θ(φ(s)) + Σ_k [h_θ′₁ₖ(φ(s)) − h_θ′₂ₖ(φ(s))]: (B, num_actions)."""
    features = encode(network.encoder, obs)
    q_values = evaluate_head(network.head.theta, features)
    for k in range(network.num_injections):
        learning = evaluate_head(network.head.theta_prime_1[k], features)
        frozen = evaluate_head(network.head.theta_prime_2[k], features)
        q_values = q_values + (learning - frozen)
    return q_values


# Doing it


def audit_arm(subject: Subject, arguments: dict[str, Any]) -> Findings:
    """What this arm does to the agent, which is built anew. It makes one update first, after which the target
    network is no copy of the online one.

    Raises:
        UsageError: the run's other arguments do not allow this arm.
    """
    saved = fitting.saved_args(subject.checkpoint)
    args = fitting.probe_args(subject.checkpoint, saved.seed, arguments)
    learner = Learner(args, fitting.num_actions(subject.checkpoint), subject.replay.device)
    learner.load_state_dict(subject.checkpoint.state["learner"])
    subject.replay.generator = np.random.default_rng(0)
    obs = subject.replay.sample(OBSERVATIONS).observations
    parts = {ENCODER: "encoder", OLD_HEAD: "head.theta"}
    if args.planned_pairs > 0:
        parts |= {NEW_HEAD: "head.theta_prime_1.0", FROZEN_TWIN: "head.theta_prime_2.0"}

    def update() -> None:
        learner.update(subject.replay.sample(args.batch_size))

    def look() -> Audited:
        return Audited(
            network=learner.q_network,
            target=learner.target_network,
            optimizer=learner.optimizer,
            parts=parts,
            obs=obs,
            formula=lambda obs: q_by_the_equation(learner.q_network, obs),
            update=update,
        )

    def intervene() -> None:
        if args.intervention_period > 0:
            learner.repeat(obs, subject.checkpoint.step)
        elif args.intervention != "none":
            learner.intervene(subject.checkpoint.step)

    update()
    return audit(look, intervene)


def faults(subject: Subject, arguments: dict[str, Any], findings: Findings) -> list[str]:
    """What is wrong with an injection or, where there are units to recycle, with ReDo."""
    if arguments["intervention"] == "injection":
        return faults_of_injection(findings, arguments["freeze_heads"])
    if arguments["intervention"] == "redo" and subject.is_fresh:
        return faults_of_recycling(findings)
    return []


def audit_arms(subject: Subject) -> Iterator[tuple[str, Findings, list[str]]]:
    """Of every arm its name, findings and faults. One that the run's arguments do not allow is left out, and
    says why."""
    for name, arguments in tqdm(arms().items(), desc="auditing", leave=False, disable=None):
        try:
            findings = audit_arm(subject, arguments)
        except UsageError as error:
            print(f"left out: {name}, {error}", flush=True)
            continue
        yield name, findings, faults(subject, arguments, findings)


def print_audit(path: str, env_id: str = "") -> None:
    """Prints the table of all arms, of the agent in a checkpoint or, where `path` is fresh, of one in env_id.

    Raises:
        UsageError: there is no such agent.
        SystemExit: something is wrong with an arm; it is printed below the table.
    """
    prepare_process()
    if path == NO_CHECKPOINT:
        subject = fresh_subject(env_id)
        where = f"{env_id}, {FRESH_UPDATES} updates on random play, {SILENCED} units of each layer silenced"
    else:
        subject = saved_subject(Path(path))
        saved = fitting.saved_args(subject.checkpoint)
        where = f"{path}: {saved.env_id}, step {subject.checkpoint.step:,}"
    rows = {}
    wrong = []
    for name, findings, found in audit_arms(subject):
        rows[name] = findings
        wrong += [f"wrong, {name}: {fault}" for fault in found]
    print(f"{where}\n\n{table(rows)}\n\n{LEGEND}")
    if wrong:
        print("\n".join(wrong), flush=True)
        raise SystemExit(1)
    if subject.is_fresh:
        print("no fault in injections and recycling", flush=True)
    else:
        print("no fault in injections; recycling is judged in a fresh agent only", flush=True)
