"""Double DQN with plasticity injection on Atari (Nikishin et al. 2023, arXiv 2305.15555).

    Q(s) = h_θ(φ(s)) + Σ_k [h_θ′₁ₖ(φ(s)) − h_θ′₂ₖ(φ(s))]

φ is the Nature CNN's convolutional encoder, h a head of two linear layers. Before an injection Q = h_θ. An injection
draws one fresh head, installs it twice (θ′₁ = θ′₂), and freezes θ and θ′₂: the output stays as it was, with heads of one
width also the number of trainable parameters, and θ′₁ learns with the plasticity of a new head.

    python dqn_injection_atari.py --env-id PhoenixNoFrameskip-v4 --injection-step 5000000     # train, inject, log
    python dqn_injection_atari.py --env-id PhoenixNoFrameskip-v4 --injection-step 5000000 --intervention none  # baseline
    python dqn_injection_atari.py --resume runs/FOLDER                                         # go on, bit for bit
    tensorboard --logdir runs --samples_per_plugin scalars=100000000                           # read the curves, every point

Unit everywhere: 1 step = 1 decision of the agent in 1 environment = 4 emulator frames.
"""

import contextlib
import copy
import functools
import math
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from annotated_types import Ge, Interval
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import Tensor

if __name__ == "__main__" and not Path(__file__).parent.joinpath("support", "usage.py").exists():
    fix = "clone or copy the project's whole folder, and run it there"
    sys.exit(f"error: support/ is not beside this script: {fix}")

from support import environments, measures, usage
from support.acceleration import CUDAGraphs, HiddenLayer, copy_gradients, in_bfloat16, prepare_cpu, upload
from support.checkpoints import Checkpoint, read_identity
from support.environments import STACK, LearnerView
from support.evaluation import Stop, epsilon_greedy, play_games, player, print_scores, save_agent
from support.flags import Period, PositivePeriod, RunFlags
from support.machine import circumstances, code_version, pick_device, place_for, slow_bfloat16
from support.optimizers import CenteredRMSProp, copy_moments, load_moments, moments_by_name, num_trainable
from support.process import Signals, begin_in_utf8, deaf_in_the_end, ends_in_one_line
from support.randomness import redraw, stream_seed
from support.replay import FrameReplayBuffer
from support.runs import Run, check_machine, find_origin
from support.usage import Count, OnlyWith, Positive, Share, Steps, UsageError, check_bounds, flag, reading

__version__ = "0.9.0"

prepare_cpu()
CODE_VERSION = code_version(Path(__file__))  # of the code that runs, edits come later
OF_INJECTION = OnlyWith(
    "intervention", ("injection", "none")
)  # a baseline may have the flags of the arm it belongs to
OF_REDRAWN = OnlyWith("intervention", ("injection", "reset-head", "shrink-perturb", "none"))
OF_NORM = OnlyWith("injection_trigger", ("norm",))


@dataclass(frozen=True)
class Experiment:
    """What changes a number in a curve. `(DQN Zoo ...)` and `(cleanRL ...)` name where a value or a knob comes from."""

    env_id: str = "PhoenixNoFrameskip-v4"
    """Atari id of Gymnasium; ALE/NAME-v5 has sticky actions, NAMENoFrameskip-v4 none"""
    seed: Steps = 1
    """seed of every random stream (cleanRL)"""
    exp_name: str = Path(__file__).stem
    """part of the run folder's name (cleanRL)"""
    total_timesteps: Count = 15_000_000
    """length of the run in steps (paper: 50_000_000 = 200M frames)"""
    num_envs: Count = 1
    """games played in parallel; updates per step do not depend on it (cleanRL)"""
    env_backend: Literal["sb3", "ale"] = "sb3"
    """who plays: Stable-Baselines3's wrappers, or ALE's C++ vectoriser"""

    injection_step: tuple[int, ...] = ()
    """steps at which plasticity is injected (paper: 12_500_000 = 50M frames)"""
    intervention: Literal["injection", "reset-head", "shrink-perturb", "none"] = "injection"
    """what is done then; none leaves it out and nothing else: the baseline (paper)"""
    freeze_heads: Annotated[bool, OF_INJECTION] = True
    """freeze θ and θ′₂ at injection, or train all three heads (paper, appendix)"""
    moments: Annotated[Literal["fresh", "keep"], OF_REDRAWN] = "fresh"
    """optimizer state of layers drawn anew: none, or that of those before (paper, Fig. 9)"""
    injection_trigger: Literal["step", "norm"] = "step"
    """inject at --injection-step, or when the weights have grown (paper, appendix)"""
    injection_norm_ratio: Annotated[Positive, OF_NORM] = 3.0
    """growth of ‖w‖ of encoder and learning head that triggers (paper)"""
    injection_check_frequency: Annotated[PositivePeriod, OF_NORM] = 1_000
    """steps between checks of that norm"""
    max_injections: Annotated[Count, OF_NORM] = 1
    """most injections that the norm may trigger, those before a fork included"""
    shrink_factor: Annotated[Share, OnlyWith("intervention", ("shrink-perturb", "none"))] = 0.8
    """share of the encoder that shrink-perturb keeps (D'Oro et al. 2023)"""

    head_width: Count = 512
    """units of the head's hidden layer (paper; more: naive width scaling)"""
    injected_head_width: Annotated[int | None, Ge(1), OF_INJECTION] = None
    """the same of the heads that injections add, as the head's if not given: growth (paper)"""
    optimizer: Literal["adam", "rmsprop"] = "adam"
    """adam: eps 1.5e-4; rmsprop: centered, decay 0.95, eps 0.01/32² in the root (paper)"""
    learning_rate: Positive = 1e-4
    """step size of the optimizer (cleanRL; paper: 2.5e-4)"""
    shared_bias: bool = False
    """one bias for all actions in the output layers (paper, DQN Zoo)"""
    gamma: Share = 0.99
    """discount per step (DQN Zoo)"""
    tau: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """target ← τ·online + (1−τ)·target at a sync (cleanRL)"""
    target_network_frequency: PositivePeriod = 8_000
    """steps between target syncs (paper: 30_000)"""
    train_frequency: Count = 4
    """steps per update (DQN Zoo)"""
    batch_size: Count = 32
    """transitions per update (DQN Zoo)"""
    buffer_size: PositivePeriod = 1_000_000
    """replay capacity in steps over all environments, 7.3 kB each (DQN Zoo)"""
    learning_starts: Steps = 80_000
    """steps before the first update (paper: 50_000)"""
    start_e: Share = 1.0
    """ε, the probability of a random action, at first (cleanRL)"""
    end_e: Share = 0.01
    """ε at the end of its linear fall and from then on (DQN Zoo)"""
    exploration_fraction: Share = 0.10
    """share of the run over which ε falls (cleanRL; paper: 1_000_000 steps)"""
    exploration_start: Steps = 0
    """step at which ε begins to fall (paper: 50_000)"""
    bf16: bool = False
    """act and learn in bfloat16; weights, outputs, TD targets, evaluation stay fp32"""
    tf32: bool = True
    """multiply with 10-bit mantissas on a GPU, about twice as fast"""
    overlap: bool = False
    """let games play on while the network learns; new transitions wait for the updates"""
    checkpoint_frequency: Period = 1_000_000
    """steps between checkpoints; new games begin there; 0 = only on a signal"""


@dataclass(frozen=True)
class Args(RunFlags, Experiment):
    """Every knob of a run: those of `Experiment`, then those of `support/flags.py`."""

    def __post_init__(self) -> None:
        for name in ("injection_step", "keep_checkpoints"):  # one step, or several in whatever holds them
            steps = np.atleast_1d(getattr(self, name)).astype(int).tolist()
            object.__setattr__(self, name, tuple(steps))
        check_bounds(self)
        self.check_flags()
        what, when, planned = self.intervention, self.injection_trigger, self.planned_interventions
        last = (self.total_timesteps - 1) // self.num_envs * self.num_envs
        if any(a >= b for a, b in zip((0, *planned), (*planned, last + 1), strict=True)):
            rule = f"increasing{f' by num_envs ({self.num_envs}) or more' * (self.num_envs > 1)} and within 1 ... {last}"
            end = "before the run's end at --total-timesteps: change --injection-step"
            if last == 0:
                fix = f"give a --total-timesteps of {self.num_envs + 1} or more"
                over = "the run is over after its first step"
                raise UsageError(f"injection_step is {self.injection_step}, but {over}: {fix}")
            raise UsageError(f"injection_step is {self.injection_step}, but must be {rule}, {end}")
        if self.moments == "keep" and self.injected_head_width not in (
            None,
            self.head_width,
        ):
            raise UsageError("a head of another width has no moments to copy: give --moments fresh")
        if when == "norm" and planned:
            raise UsageError(
                "injection_trigger norm decides when to inject: give --injection-step without a number"
            )
        if what in ("reset-head", "shrink-perturb") and when == "step" and not planned:
            raise UsageError(
                f"intervention {what} would never happen: give --injection-step, or --injection-trigger norm"
            )
        if any(not 0 <= step <= self.total_timesteps for step in self.keep_checkpoints):
            rule = f"within 0 ... {self.total_timesteps}, the run's steps: change --keep-checkpoints"
            raise UsageError(f"keep_checkpoints is {self.keep_checkpoints}, but must be {rule}")
        if self.keep_checkpoints and self.checkpoint_frequency == 0:
            fix = "give --keep-checkpoints without a number"
            if self.fork is None:  # which writes checkpoints as often as its origin
                fix = "give a --checkpoint-frequency, or --keep-checkpoints without a number"
            raise UsageError(
                f"keep_checkpoints is {self.keep_checkpoints}, but checkpoint_frequency 0 writes none: {fix}"
            )

    @property
    def planned_interventions(self) -> tuple[int, ...]:
        """`injection_step`, each at the end of the vector step of num_envs steps in which it lies."""
        return tuple(-(-step // self.num_envs) * self.num_envs for step in self.injection_step)

    @property
    def kept_checkpoints(self) -> set[int]:
        """Steps of the checkpoints that stay, each at the end of its vector step, which may be the run's end.

        They are the one before the first planned intervention, and `keep_checkpoints`.
        """
        asked_for = {-(-step // self.num_envs) * self.num_envs for step in self.keep_checkpoints}
        return {*self.planned_interventions[:1], *(min(step, self.total_timesteps) for step in asked_for)}

    @property
    def planned_pairs(self) -> int:
        """How many pairs of heads the run's injections will add, those before a fork included."""
        if self.intervention != "injection":
            return 0
        return self.max_injections if self.injection_trigger == "norm" else len(self.injection_step)


# what playing with a saved agent looks at; the rest is as the agent was trained
PLAYING = (
    *("seed", "cuda", "torch_deterministic", "tf32", "capture_video"),
    *("eval_episodes", "eval_steps", "eval_epsilon", "evaluate"),
)
FORKABLE = (  # what a fork may change: nothing of this changes what lies before a checkpoint, or `check_fork` sees to it
    *(
        "seed",
        "exp_name",
        "cuda",
        "cuda_graphs",
        "track",
        "wandb_project_name",
        "wandb_entity",
        "capture_video",
        "save_model",
    ),
    *(
        "total_timesteps",
        "exploration_fraction",
        "injection_step",
        "intervention",
        "freeze_heads",
    ),
    *(
        "moments",
        "injected_head_width",
        "injection_trigger",
        "injection_norm_ratio",
        "shrink_factor",
    ),
    *("injection_check_frequency", "max_injections", "plasticity_frequency"),
    *("eval_frequency", "eval_episodes", "eval_steps", "eval_epsilon", "keep_checkpoints"),
)
OF_KIND = {
    "intervention",
    "freeze_heads",
    "moments",
    "injected_head_width",
    "shrink_factor",
}  # not after one

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {  # DQN Zoo's Double DQN (tuned), injected after 50M frames
        **{
            "total_timesteps": 50_000_000,
            "injection_step": (12_500_000,),
            "moments": "keep",
        },
        **{
            "optimizer": "rmsprop",
            "learning_rate": 2.5e-4,
            "shared_bias": True,
            "target_network_frequency": 30_000,
        },
        **{"learning_starts": 50_000, "exploration_start": 50_000, "exploration_fraction": 0.02},
        **{"eval_frequency": 250_000, "eval_episodes": 0, "eval_steps": 125_000},
    },
}

# the independent random streams of a run
Stream = IntEnum(
    "Stream", "NETWORK EXPLORATION REPLAY ENVIRONMENTS INJECTION EVALUATION PLASTICITY PERTURBATION", start=0
)


def make_envs(args: Args, num_envs: int | None = None, render_mode: str | None = None) -> LearnerView:
    """`num_envs` (default: `args.num_envs`) of the run's games, see `support/environments.py`."""
    return environments.make_atari_envs(
        args.env_id, args.env_backend, args.num_envs if num_envs is None else num_envs, render_mode
    )


class QNetwork(nn.Module):
    """Nature CNN (Mnih et al. 2015) whose head can be injected with plasticity `max_injections` times.

    Q = θ(φ) + Σ_k (θ′₁[k](φ) − θ′₂[k](φ)) over the injections made so far, each difference taken first: at injection
    it is exactly 0, where (θ(φ) + θ′₁(φ)) − θ′₂(φ) would be off by rounding. All heads exist from the start, so that
    an optimizer holds them all; those not injected yet are zero and not evaluated. They may be wider than θ: then the
    network grows at the injection, and so does the number of trainable parameters.
    """

    def __init__(
        self,
        num_actions: int,
        max_injections: int = 1,
        freeze_heads: bool = True,
        shared_bias: bool = False,
        head_width: int = 512,
        injected_head_width: int | None = None,
    ):
        super().__init__()

        def head(width: int) -> nn.Sequential:
            hidden, output = HiddenLayer(3136, width), nn.Linear(width, num_actions)
            if shared_bias:  # one for all actions (DQN Zoo)
                output.bias = nn.Parameter(output.bias.detach()[:1].clone())
            return nn.Sequential(hidden, nn.ReLU(inplace=True), output)

        convolutions = (
            nn.Conv2d(STACK, 32, 8, stride=4),
            nn.Conv2d(32, 64, 4, stride=2),
            nn.Conv2d(64, 64, 3, stride=1),
        )
        activated = (layer for convolution in convolutions for layer in (convolution, nn.ReLU(inplace=True)))
        self.encoder = nn.Sequential(*activated, nn.Flatten())
        self.theta, new_width = head(head_width), injected_head_width or head_width
        self.theta_prime_1 = nn.ModuleList(head(new_width) for _ in range(max_injections))
        self.theta_prime_2 = nn.ModuleList(head(new_width) for _ in range(max_injections))
        for parameter in (*self.theta_prime_1.parameters(), *self.theta_prime_2.parameters()):
            nn.init.zeros_(parameter)
        self.freeze_heads = freeze_heads
        self.num_injections = 0
        self._set_trainable()

    def features(self, obs: Tensor) -> Tensor:
        """φ: uint8 (B, 4, 84, 84) → (B, 3136), float32 or the encoder's dtype."""
        obs = obs.contiguous(memory_format=torch.channels_last)
        return self.encoder(obs.to(next(self.parameters()).dtype, copy=True).div_(255))

    def forward(self, obs: Tensor) -> Tensor:
        """Q-values: uint8 (B, 4, 84, 84) → float32 (B, num_actions)."""
        features = self.features(obs)

        def q(head: nn.Module) -> Tensor:
            hidden, relu, output = head.children()
            return output(relu(hidden(features)).float())

        q_values = q(self.theta)
        for k in range(self.num_injections):
            q_values = q_values + (
                q(self.theta_prime_1[k]) - q(self.theta_prime_2[k])
            )  # frozen heads, too, pass gradient to φ
        return q_values

    @torch.no_grad()
    def inject(self, generator: torch.Generator | None = None) -> None:
        """Draws the next pair θ′₁ = θ′₂, distributed as θ was, makes it live, and freezes every head but that θ′₁."""
        k = self.num_injections
        if k == len(self.theta_prime_1):
            raise ValueError(
                f"all {k} pairs of heads are in use: build QNetwork with a larger max_injections"
            )
        redraw(self.theta_prime_1[k], generator)
        self.theta_prime_2[k].load_state_dict(self.theta_prime_1[k].state_dict())
        self.num_injections += 1
        self._set_trainable()

    def live(self) -> dict[str, nn.Module]:
        """The modules that are evaluated, by name: encoder, theta, theta_prime_1.0, theta_prime_2.0, ..."""
        pairs = (
            f"{pair}.{k}" for k in range(self.num_injections) for pair in ("theta_prime_1", "theta_prime_2")
        )
        return {name: self.get_submodule(name) for name in ("encoder", "theta", *pairs)}

    def newest_head(self) -> str:
        """The name of the head that learns, whatever else does."""
        return f"theta_prime_1.{self.num_injections - 1}" if self.num_injections else "theta"

    def _set_trainable(self) -> None:
        """Sets `requires_grad` of every head from the number of injections; gradients of frozen ones become None.

        A zero gradient would not do: Adam still moves such a parameter by its momentum.
        """
        live, all_train = self.num_injections, not self.freeze_heads
        self.theta.requires_grad_(live == 0 or all_train)
        for k in range(len(self.theta_prime_1)):
            self.theta_prime_1[k].requires_grad_(k == live - 1 or (all_train and k < live))
            self.theta_prime_2[k].requires_grad_(all_train and k < live)
        for parameter in (parameter for parameter in self.parameters() if not parameter.requires_grad):
            parameter.grad = None

    def get_extra_state(self) -> Tensor:
        return torch.tensor(
            self.num_injections
        )  # so that a state dict says which heads are live, also to the target network

    def set_extra_state(self, state: Tensor) -> None:
        self.num_injections = int(state)
        self._set_trainable()

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Takes up a state, also one with more or fewer pairs of heads that are not in use: those are zero."""
        in_use = ["encoder.", "theta.", "_extra_state"]
        for k in range(int(state_dict.get("_extra_state", self.num_injections))):
            in_use += [f"theta_prime_1.{k}.", f"theta_prime_2.{k}."]
        state = {name: value for name, value in state_dict.items() if name.startswith(tuple(in_use))}
        for name, value in self.state_dict().items():
            if not name.startswith(tuple(in_use)):
                state[name] = torch.zeros_like(value)
        return super().load_state_dict(state, strict, assign)


def make_q_network(args: Args, num_actions: int, device: torch.device | str) -> QNetwork:
    """The network of a run, with room for its injections and no other."""
    widths = args.head_width, args.injected_head_width
    q_network = QNetwork(num_actions, args.planned_pairs, args.freeze_heads, args.shared_bias, *widths)
    return q_network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def td_loss(
    q_network: nn.Module, target_network: nn.Module, batch: ReplayBufferSamples, gamma: float
) -> tuple[Tensor, Tensor]:
    """Double DQN's loss (van Hasselt et al. 2016): Huber, δ = 1, mean over the batch; and the mean Q of the batch."""
    with torch.no_grad():
        next_actions = q_network(batch.next_observations).argmax(dim=1, keepdim=True)  # (B, 1)
        next_values = target_network(batch.next_observations).gather(1, next_actions)  # (B, 1)
        td_target = batch.rewards + gamma * (1 - batch.dones) * next_values
    q_values = q_network(batch.observations)  # (B, num_actions)
    taken = torch.arange(q_values.shape[1], device=q_values.device) == batch.actions
    q_values = q_values.where(taken, 0).sum(
        dim=1, keepdim=True
    )  # (B, 1); on a GPU gather's gradient needs atomics
    return F.huber_loss(q_values, td_target), q_values.detach().mean()


def exploration_epsilon(args: Args, step: int) -> float:
    """ε at `step`: start_e until exploration_start, from there linear to end_e over exploration_fraction of the run."""
    duration, since = args.exploration_fraction * args.total_timesteps, step - args.exploration_start
    progress = min(max(since / duration, 0.0), 1.0) if duration else float(since >= 0)
    return args.start_e + progress * (args.end_e - args.start_e)


class Learner:
    """Owns the online and target networks, the optimizer and the exploration stream.

    With `args.bf16` both networks have a working copy in bfloat16, which acts and gives the gradients; it follows every
    change of the float32 one. With `args.cuda_graphs` acting and updating are captured once and replayed from then on.
    """

    def __init__(self, args: Args, num_actions: int, device: torch.device | str):
        self.args, self.num_actions, self.device = args, num_actions, torch.device(device)
        torch.manual_seed(stream_seed(args.seed, Stream.NETWORK))
        self.q_network = make_q_network(args, num_actions, device)
        self.target_network = copy.deepcopy(self.q_network).requires_grad_(False)
        adam = functools.partial(torch.optim.Adam, eps=1.5e-4, fused=True, capturable=args.cuda_graphs)
        make_optimizer: Callable[..., torch.optim.Optimizer] = (
            adam if args.optimizer == "adam" else CenteredRMSProp
        )
        self.optimizer = make_optimizer(
            self.q_network.parameters(), lr=args.learning_rate
        )  # all heads, those to come included
        self.rng = np.random.default_rng(stream_seed(args.seed, Stream.EXPLORATION))
        self.losses, self.norms = measures.LossMeter(self.device), measures.NormTracker()
        self.interventions: list[int] = []  # their steps
        tensors = functools.partial(Learner._tensors, weakref.proxy(self))  # weak: no cycle keeps old graphs
        self.graphs = CUDAGraphs(tensors, enabled=args.cuda_graphs)
        self._renew()

    def _renew(self) -> None:
        """Makes anew what derives from networks and optimizer: initial norms, bf16 copies, captured graphs."""
        self.norms.begin(self.q_network.live(), self.learning())
        self.online, self.target = self.q_network, self.target_network
        if self.args.bf16:
            self.online, self.target = in_bfloat16(self.q_network), in_bfloat16(self.target_network)
        self.graphs.clear()

    def learning(self) -> list[nn.Module]:
        """The encoder and the newest head; with --no-freeze-heads older heads learn, too."""
        return [self.q_network.encoder, self.q_network.get_submodule(self.q_network.newest_head())]

    def _tensors(self) -> list[Tensor]:
        moments = (value for of_one in self.optimizer.state.values() for value in of_one.values())
        return [*self.q_network.parameters(), *self.online.parameters(), self.losses.totals, *moments]

    def act(self, obs: np.ndarray, epsilon: float) -> np.ndarray:
        """ε-greedy actions (N,) int64 for obs (N, 4, 84, 84) uint8."""
        q = functools.partial(self.graphs.run, "act", self.online)
        return epsilon_greedy(
            lambda: q(upload(obs, self.device)), (len(obs), self.num_actions), epsilon, self.rng
        )

    def update(self, batch: ReplayBufferSamples, count: int = 1) -> dict[str, Tensor]:
        """`count` gradient steps, one after the other, each on its part of the batch.

        Returns the last one's loss and mean Q, {"td_loss", "q_values"}, 0-d, left on the device.
        """
        self.losses.num_updates += count
        tensors = (
            tensor for tensor in batch if tensor is not None
        )  # Stable-Baselines3's n-step discounts are
        return self.graphs.run(("update", count), functools.partial(self._update, count), *tensors)

    def _update(self, count: int, *batch: Tensor) -> dict[str, Tensor]:
        trained, working = (
            tuple(p for p in net.parameters() if p.requires_grad) for net in (self.q_network, self.online)
        )
        for minibatch in zip(*(tensor.chunk(count) for tensor in batch), strict=True):
            loss, q_values = td_loss(
                self.online, self.target, ReplayBufferSamples(*minibatch), self.args.gamma
            )
            self.online.zero_grad(set_to_none=True)
            loss.backward()
            if self.args.bf16:
                copy_gradients(working, trained)
            self.optimizer.step()
            with torch.no_grad():
                if self.args.bf16:
                    torch._foreach_copy_(working, trained)
                self.losses.add(loss, q_values)
        return {"td_loss": loss.detach(), "q_values": q_values}

    @torch.no_grad()
    def sync_target(self) -> None:
        """target ← τ·online + (1 − τ)·target."""
        online, target = tuple(self.q_network.parameters()), tuple(self.target_network.parameters())
        if self.args.tau == 1:
            torch._foreach_copy_(target, online)
        else:
            torch._foreach_lerp_(target, online, self.args.tau)
        if self.args.bf16:
            torch._foreach_copy_(tuple(self.target.parameters()), target)

    def intervene(self, step: int) -> None:
        """Does what `args.intervention` names."""
        methods = {
            "injection": self.inject,
            "reset-head": self.reset_head,
            "shrink-perturb": self.shrink_perturb,
        }
        methods[self.args.intervention](step)

    def inject(self, step: int = 0) -> None:
        """Injects plasticity into the online network; the target network becomes its copy, whatever `tau` (paper).

        All optimizer moments stay. The new head, which has had no gradient yet, starts without any, or with a copy of those
        of the head that learned before (paper, Fig. 9).
        """
        _, before = self.learning()
        self.q_network.inject(self._generator(Stream.INJECTION))
        if self.args.moments == "keep":
            copy_moments(self.optimizer, before, self.learning()[1])
        self._intervened(step)

    def reset_head(self, step: int = 0) -> None:
        """Draws the learning head's two layers anew, without moments, and mirrors them (Nikishin et al. 2022)."""
        _, head = self.learning()
        redraw(head, self._generator(Stream.INJECTION))
        for parameter in head.parameters():
            self.optimizer.state.pop(parameter, None)
        self.norms.forget(self.q_network.newest_head())
        self._intervened(step)

    def shrink_perturb(self, step: int = 0) -> None:
        """encoder ← factor·encoder + (1 − factor)·new, moments stay; and `reset_head` (Ash & Adams 2020, D'Oro et al. 2023)."""
        redraw(self.q_network.encoder, self._generator(Stream.PERTURBATION), keep=self.args.shrink_factor)
        self.reset_head(step)

    def _generator(self, stream: Stream) -> torch.Generator:
        """What is drawn depends on the seed and the number of interventions before: no other random stream moves."""
        return torch.Generator().manual_seed(stream_seed(self.args.seed, stream, len(self.interventions)))

    def _intervened(self, step: int) -> None:
        self.target_network.load_state_dict(self.q_network.state_dict())
        self.target_network.requires_grad_(False)
        self.interventions.append(step)
        self._renew()

    def state_dict(self) -> dict[str, Any]:
        """Both networks with their numbers of live heads, the optimizer's moments by parameter name, the stream's state."""
        return {
            **{
                name: getattr(self, name).state_dict()
                for name in ("q_network", "target_network", "losses", "norms")
            },
            "optimizer": moments_by_name(self.optimizer, self.q_network),
            "interventions": self.interventions,
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a saved state, also one with more or fewer pairs of heads that were not injected yet."""
        self.q_network.load_state_dict(state["q_network"])
        self.target_network.load_state_dict(state["target_network"])
        self.target_network.requires_grad_(False)
        load_moments(self.optimizer, self.q_network, state["optimizer"])
        self.interventions = list(state["interventions"])
        self.rng.bit_generator.state = state["rng"]
        self._renew()
        self.losses.load_state_dict(state["losses"])
        self.norms.load_state_dict(state["norms"])


def plasticity_measures(learner: Learner, batch: ReplayBufferSamples) -> dict[str, float]:
    """The state of a learner's online network, in float32, on one batch; docs/metrics.md says what each name means."""
    network = learner.q_network
    names = {name: name.replace(".", "_") for name in network.live()} | {
        network.newest_head(): "head"
    }  # the one that learns
    relus = {"encoder.1": "conv1", "encoder.3": "conv2", "encoder.5": "conv3"}
    relus |= {f"{name}.1": label for name, label in names.items() if name != "encoder"}
    loss, _ = td_loss(network, learner.target_network, batch, learner.args.gamma)
    old = "theta.2" if network.num_injections else None
    return measures.plasticity(network, names, relus, old, learner.norms.initial, loss, batch.observations)


def evaluate(
    q_network: QNetwork, args: Args, key: int, video: Path | None = None, stop: Stop = lambda: False
) -> np.ndarray:
    """Raw scores of whole games, see `play_games`. Games and random numbers are its own, from (seed, key)."""
    seed = stream_seed(args.seed, Stream.EVALUATION, key)
    envs = make_envs(args, max(1, args.eval_episodes), render_mode="rgb_array" if video else None)
    act = player(q_network, int(envs.single_action_space.n), args.eval_epsilon, seed)
    return play_games(act, envs, seed, args.eval_steps, video, stop)


def make_parts(args: Args, device: torch.device) -> tuple[LearnerView, Learner, FrameReplayBuffer]:
    """Environments, learner and replay of a new run. Raises UsageError where this machine cannot do what is asked."""
    check_machine(device, args.cuda_graphs, args.track, args.capture_video)
    envs = make_envs(args)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    needed = FrameReplayBuffer.bytes_needed(args.buffer_size, obs_space, args.num_envs)
    storage = place_for(needed, args.buffer_size, device if args.cuda_graphs else torch.device("cpu"))
    rng = np.random.default_rng(stream_seed(args.seed, Stream.REPLAY))
    replay = FrameReplayBuffer(
        args.buffer_size, obs_space, action_space, device, args.num_envs, generator=rng, storage=storage
    )
    return envs, Learner(args, int(action_space.n), device), replay


@dataclass
class Training:
    """A run in progress, with what it trains."""

    MEASURED = 512  # transitions on which plasticity and the change of Q at an intervention are measured

    args: Args
    run: Run
    envs: LearnerView
    learner: Learner
    replay: FrameReplayBuffer

    def replayed(self, stream: Stream, key: int) -> ReplayBufferSamples:
        """Some of the replayed transitions, drawn by a generator from (seed, stream, key): training's own does not move."""
        rng = np.random.default_rng(stream_seed(self.args.seed, stream, key))
        rows, columns = (
            rng.integers(limit, size=self.MEASURED) for limit in (self.replay.size(), self.replay.n_envs)
        )
        return self.replay.transitions(rows, columns)

    def begin_streams(self) -> None:
        """Has exploration, replay's draws and the games go on from here in this seed's own streams: new games begin."""
        self.learner.rng = np.random.default_rng(stream_seed(self.args.seed, Stream.EXPLORATION))
        self.replay.generator = np.random.default_rng(stream_seed(self.args.seed, Stream.REPLAY))
        self.run.log.unreported(self.envs.going, self.run.step)
        self.envs.reset(seed=stream_seed(self.args.seed, Stream.ENVIRONMENTS, self.run.step))

    def advance(self) -> None:
        """One vector step, a decision in every environment, with all that is learned and measured in it."""
        args, run, envs, learner, replay, log = (
            self.args,
            self.run,
            self.envs,
            self.learner,
            self.replay,
            self.run.log,
        )
        obs, actions = envs.obs, learner.act(envs.obs, exploration_epsilon(args, run.step))
        envs.send(actions)
        run.step = min(run.step + args.num_envs, args.total_timesteps)

        def receive() -> None:
            _, rewards, terminations, truncations, infos = envs.receive()
            cut = [{"TimeLimit.truncated": bool(truncated)} for truncated in truncations]
            replay.add(obs, infos["final_obs"], actions, rewards, terminations | truncations, cut)
            log.games(infos, run.previous)

        play_on = args.overlap and replay.size() > 0  # while the network learns
        if not play_on:
            receive()
        if updates := run.due(args.train_frequency, after=args.learning_starts):
            learner.update(replay.sample(args.batch_size, batches=updates), updates)
        if play_on:
            receive()
        if run.due(args.target_network_frequency, after=args.learning_starts):
            learner.sync_target()
        if run.due(args.log_frequency) or run.step == args.total_timesteps:
            log.interval(
                run.step,
                exploration_epsilon(args, run.step),
                learner.losses.means(run.step, args.train_frequency),
            )
        if run.due(args.plasticity_frequency):
            for name, value in plasticity_measures(
                learner, self.replayed(Stream.PLASTICITY, run.step)
            ).items():
                log.scalar(f"plasticity/{name}", value, run.step)
        if args.injection_trigger == "norm" and run.due(args.injection_check_frequency):
            log.scalar("injection/norm_growth", learner.norms.growth(learner.learning()), run.step)

    def intervention_due(self) -> bool:
        """Whether one of --injection-step has passed, or the norm has grown beyond --injection-norm-ratio."""
        args, step, made = self.args, self.run.step, len(self.learner.interventions)
        if args.injection_trigger == "step":
            return step in args.planned_interventions and args.intervention != "none"
        possible = (
            0 < step < args.total_timesteps and made < args.max_injections and args.intervention != "none"
        )
        due = possible and self.run.due(args.injection_check_frequency)
        return bool(due) and self.learner.norms.growth(self.learner.learning()) > args.injection_norm_ratio

    def intervene(self) -> None:
        """Does what --intervention names, measures how far that changed Q (an injection: not at all), and logs both."""
        args, learner, log, step = self.args, self.learner, self.run.log, self.run.step
        obs, size = (
            self.replayed(Stream.INJECTION, len(learner.interventions)).observations,
            num_trainable(learner.q_network),
        )
        with torch.no_grad():
            before = learner.online(obs)
            learner.intervene(step)
            delta = (learner.online(obs) - before).abs().max().item()
        grown = (
            f", trainable parameters {size:,} → {now:,}"
            if (now := num_trainable(learner.q_network)) != size
            else ""
        )
        log.scalar("injection/step", step, step)
        log.scalar("injection/max_abs_delta_q", delta, step)
        done = {"injection": "plasticity injected", "reset-head": "head drawn anew"}
        done["shrink-perturb"] = "encoder shrunk and perturbed, head drawn anew"
        change = f"largest change of Q over {len(obs)} observations: {delta:.4}"
        log.say(f"step {step:,}: {done[args.intervention]}, {change}{grown}")

    def loop(self) -> bool:
        """Plays and learns from the run's step to its end, or until a signal. Returns whether the run is complete.

        Raises FloatingPointError where a loss is not finite, OSError where the last checkpoint before a stop cannot be written.
        """
        args, run = self.args, self.run
        while True:
            step, boundary = run.step, run.due(args.checkpoint_frequency) > 0
            if step == 0 or boundary:
                # ALE's vectoriser cannot be saved, so games begin anew here, whether the run was resumed or not. Those that
                # this cuts bootstrap from their last frames, since no `done` was stored
                run.log.unreported(self.envs.going, step)
                self.envs.reset(seed=stream_seed(args.seed, Stream.ENVIRONMENTS, step))
            intervening = self.intervention_due()
            special = {run.first, *args.planned_interventions, *args.kept_checkpoints, args.total_timesteps}
            notable = boundary or intervening or step in special
            if run.interrupted or (notable and args.checkpoint_frequency):
                self.learner.losses.check_finite(step, args.train_frequency)
                run.save(keep={*args.kept_checkpoints, *self.learner.interventions[:1]})
            if run.signals.stop:
                return False
            if step and run.due(args.eval_frequency):
                play = functools.partial(evaluate, self.learner.q_network, args, step)
                if not run.evaluate(play, film=args.capture_video):
                    continue  # to the checkpoint that a signal asked for; the evaluation is repeated then, or after --resume
            if intervening:
                self.intervene()
            if step == args.total_timesteps:
                run.log.unreported(self.envs.going, step)
                return True
            self.advance()


def refuse_unforkable(given: dict[str, Any], saved: Args, where: str) -> None:
    """
    Raises:
        UsageError: some of these arguments of a fork are not as in the run that is forked, and must be.
    """
    own = asdict(saved)
    bound = [name for name in own if name not in ("resume", "fork", *FORKABLE)]
    refused = [name for name in bound if name in given and given[name] != own[name]]
    if refused:
        values = ", ".join(f"{name} is {given[name]}, there {own[name]}" for name in refused)
        allowed = f"a fork may differ in {', '.join(FORKABLE)} only"
        raise UsageError(f"not as in {where}: {values}; {allowed}: leave out {', '.join(map(flag, refused))}")


def injections_fix(args: Args, made: tuple[int, ...], step: int) -> str:
    """What to give where a checkpoint lies after injections at `made`, and the arguments say otherwise."""
    earlier = "an earlier checkpoint"
    if not made:
        return f"give an --injection-step of {step} or later, or {earlier}"
    if args.intervention == "none":
        return f"give {earlier}"
    later = [planned for planned in args.planned_interventions if planned >= step]
    return f"give an --injection-step of {' '.join(map(str, (*made, *later)))}, or {earlier}"


def check_fork(args: Args, checkpoint: Checkpoint) -> None:
    """Raises UsageError for a fork that no single run in its arguments could have come to: its curves would mislead."""
    saved = usage.settings_of(Args, checkpoint.meta["args"], checkpoint.path)
    step, where, by_norm = checkpoint.step, f"checkpoint {checkpoint.path}", args.injection_trigger == "norm"
    with reading(checkpoint.path, "this run's checkpoint", "move it away, and go on from another"):
        made = tuple(checkpoint.state["learner"]["interventions"])
    changed = set(usage.changed_fields(args, saved))
    refuse_unforkable(asdict(args), saved, where)
    planned = made if by_norm else tuple(planned for planned in args.planned_interventions if planned < step)
    said = planned if args.intervention != "none" else ()
    kinds = " and ".join(map(flag, sorted(changed & OF_KIND)))
    room = len(made) + bool(changed & {"injection_trigger", "max_injections"})
    ragged = step == saved.total_timesteps and (step % saved.num_envs or step % saved.log_frequency)
    fall, before = (a.exploration_fraction * a.total_timesteps for a in (args, saved))
    asked_for = args.kept_checkpoints.difference(saved.kept_checkpoints, args.planned_interventions)
    past = sorted(kept for kept in asked_for if kept < step)
    for wrong, message in (
        (args.total_timesteps <= step, f"{where} lies at step {step}: give a --total-timesteps of {step + 1} or more"),
        (made != said, f"{where} lies after injections at {made or 'no step'}, but the arguments say {said or 'none'} before "
        f"step {step}: {injections_fix(args, made, step)}"),
        (made and kinds, f"{where} lies after an injection: for another {kinds} give an earlier checkpoint"),
        (by_norm and made and args.max_injections < room, f"{where} lies after {len(made)} injections, and max_injections is "
        f"{args.max_injections}: give a --max-injections of {room} or more, or an earlier checkpoint"),
        (past, f"{where} lies beyond {', '.join(map(str, past))}, of which no checkpoint can be kept any more: "
        "leave it out of --keep-checkpoints, or give an earlier checkpoint"),
        (ragged, f"{where} ends a run whose length is no multiple of num_envs and log_frequency: give an earlier checkpoint"),
        (step and before > args.total_timesteps, f"ε falls over {before:,.10g} steps before {where}, more than this run "
        f"has: give a --total-timesteps of {math.ceil(before)} or more"),
        (step and not np.isclose(fall, before, rtol=1e-9), f"ε would fall over {fall:,.10g} steps, but before {where} over "
        f"{before:,.10g}: give --exploration-fraction {before / args.total_timesteps} with this --total-timesteps"),
    ):  # fmt: skip
        if wrong:
            raise UsageError(message)


def train(args: Args, signals: Signals | None = None) -> Path:
    """One run, or what is left of it. Returns its folder; `signals.stop` then says which signal ended it early, if any.

    Raises UsageError where `args` cannot work, with nothing written; FloatingPointError, OSError where a run cannot go on.
    """
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(signals or Signals())
        origin = find_origin(args.resume, args.fork, stack)
        if args.resume is not None:
            given, args = args, usage.settings_of(Args, origin.args, Path(args.resume))
            if given != Args(resume=given.resume):
                usage.refuse_changes(given, args, FORKABLE)
        if origin.checkpoint is not None and origin.forked:
            check_fork(args, origin.checkpoint)
        device = pick_device(args.cuda, args.torch_deterministic, args.tf32)
        slow = slow_bfloat16(device) if args.bf16 else None
        if slow and origin.nothing:
            raise UsageError(f"{slow}: leave out --bf16")
        envs, learner, replay = make_parts(args, device)
        stack.callback(envs.close)
        name, parts = (
            f"{args.env_id}__{args.exp_name}__{args.seed}",
            {"learner": learner, "replay": replay, "envs": envs},
        )
        surroundings = circumstances(device, CODE_VERSION)
        run = Run(origin, name, __version__, asdict(args), parts, surroundings, signals, stack)
        run.introduce(f"{args.env_id} × {args.num_envs} ({args.env_backend})", device, origin)
        if slow:  # without --bf16 the numbers would be others
            run.log.say(f"warning: {slow}; it goes on as it began")
        baseline = args.intervention == "none"
        if baseline or (args.injection_trigger == "step" and not args.injection_step):
            run.log.say("no plasticity injection in this run" + ": baseline arm" * baseline)
        if args.learning_starts >= args.total_timesteps:
            run.log.say(
                f"warning: nothing is learned, the run ends before --learning-starts {args.learning_starts}"
            )
        training = Training(args, run, envs, learner, replay)
        if origin.forked and args.seed != origin.forked_args["seed"]:
            # one agent that goes on in several ways
            training.begin_streams()
        del origin  # and with it a copy of every parameter
        complete = training.loop()
        if complete and args.save_model:
            save_agent(run.folder / "agent.pt", learner.q_network, asdict(args), run.step)
            run.log.say(f"agent saved, play with it: {run.command(__file__, 'evaluate')}")
        run.finish(complete, __file__)
    return run.folder


def load_agent(path: Path, device: torch.device | str) -> tuple[QNetwork, Args, int]:
    """The network, arguments and step of a saved agent. Runs no code from the file; raises UsageError if it is no agent."""
    with reading(path, "an agent", "give an agent.pt from --save-model"):
        saved = torch.load(path, map_location=device, weights_only=True)
        args = Args(**saved["args"])
        q_network = make_q_network(args, len(saved["q_network"]["theta.2.weight"]), device)
        q_network.load_state_dict(saved["q_network"])
        return q_network, args, int(saved["step"])


def agent_path(given: str) -> Path:
    """The file of a saved agent, for which a run's folder may be given."""
    path = Path(given)
    return path / "agent.pt" if path.is_dir() else path


def refuse_unplayed(given: dict[str, Any], trained: Args, path: Path) -> None:
    """
    Raises:
        UsageError: playing with this agent would pass over some of these arguments, which are not its own.
    """
    ignored = {}
    for name, value in given.items():
        if name not in PLAYING and value != getattr(trained, name):
            ignored[name] = getattr(trained, name)
    if not ignored:
        return
    own = ", ".join(f"{name} {value}" for name, value in ignored.items())
    how = f"plays as it was trained, with {own}"
    if "env_id" in ignored:
        how = f"plays {trained.env_id}, not {given['env_id']}"
    raise UsageError(f"the agent in {path} {how}: leave out {', '.join(map(flag, ignored))}")


def evaluate_saved(args: Args) -> np.ndarray:
    """Plays with the agent in `args.evaluate`, prints and returns its scores (eval_episodes,) float64."""
    path = agent_path(args.evaluate or "")
    q_network, trained, step = load_agent(path, pick_device(args.cuda, args.torch_deterministic, args.tf32))
    changed = usage.changed_fields(args, Args())
    refuse_unplayed({name: getattr(args, name) for name in changed}, trained, path)
    settings = replace(trained, fork=None, **{name: getattr(args, name) for name in PLAYING})
    video = path.parent / "videos" / f"evaluate-seed-{args.seed}.mp4" if args.capture_video else None
    scores = evaluate(q_network, settings, step, video)
    print_scores(f"{trained.env_id}, agent at step {step:,}, ε {settings.eval_epsilon:g}", scores)
    return scores


@dataclass(frozen=True)
class CommandLine(Args):
    """What the command line gives, before `Args` checks it: tyro would draw a box around what is refused."""

    preset: Literal["default", "paper"] = "default"
    """what flags that are not given are: this script's defaults, or the paper's"""

    def __post_init__(self) -> None:
        pass


def parse_evaluation(given: dict[str, Any]) -> Args:
    """What is given with --evaluate.

    Raises:
        UsageError: playing would not look at some of it, also where it is what this script's default is.
    """
    if not set(given).issubset(PLAYING):
        path = agent_path(given["evaluate"])
        _, trained, _ = load_agent(path, "cpu")
        refuse_unplayed(given, trained, path)
    return Args(**{name: value for name, value in given.items() if name in PLAYING})


def refuse_idle(given: dict[str, Any], args: Args) -> None:
    """
    Raises:
        UsageError: a flag is given that nothing looks at in a run like this.
    """
    of_evaluations = ("eval_episodes", "eval_steps", "eval_epsilon")
    of_wandb = ("wandb_project_name", "wandb_entity")
    of_injections = ("freeze_heads", "moments", "injected_head_width", "shrink_factor")
    idle: dict[str, list[str]] = {}  # by what to give
    for name in given:
        fix = None
        if name in of_evaluations and args.eval_frequency == 0:
            fix = "--eval-frequency"
        if name in of_wandb and not args.track:
            fix = "--track"
        if name in of_injections and args.injection_trigger == "step" and not args.injection_step:
            fix = "--injection-step, or --injection-trigger norm"
        if fix is not None:
            idle.setdefault(fix, []).append(name)
    for fix, names in idle.items():
        it, are = "it", "is"
        if len(names) > 1:
            it, are = "them", "are"
        what = " and ".join(names)
        raise UsageError(
            f"{what} {are} given, and nothing in this run looks at {it}: give {fix}, or leave {it} out"
        )


def parse_args() -> Args:
    """The command line as `Args`. Flags that are not given are as in the preset, or as in the run to resume or fork."""
    line = asdict(tyro.cli(CommandLine, description=__doc__, args=usage.words_given()))
    names_given = usage.flags_given()
    given = {name: value for name, value in line.items() if name in names_given}
    preset = PRESETS[line["preset"]]
    base = asdict(Args()) | preset
    sources = {name: line[name] for name in ("resume", "fork", "evaluate")}
    if any(source is not None for source in sources.values()):
        Args(**sources)  # one of them
        if "preset" in given:
            raise UsageError(
                "--preset is for a new run, this one has settings of its own: leave out --preset"
            )
    if line["evaluate"] is not None:
        return parse_evaluation(given)
    if line["resume"] is not None:
        path = Path(line["resume"], "run.json")
        base = asdict(usage.settings_of(Args, read_identity(path)["args"], path))
        usage.refuse_changes(CommandLine(**base | given), CommandLine(**base), FORKABLE)
        return Args(resume=line["resume"])
    if line["fork"] is not None:
        path = Path(line["fork"], "manifest.json")
        base = asdict(usage.settings_of(Args, read_identity(path)["args"], path))
        refuse_unforkable(given, CommandLine(**base), f"checkpoint {line['fork']}")
    # what decides when to inject is given in one way, and what nothing looks at then is not taken over
    if given.get("injection_trigger") == "norm":
        base["injection_step"] = Args.injection_step
    base |= {name: getattr(Args, name) for name in usage.unused_fields(CommandLine(**base | given))}
    args = base | given
    args.pop("preset", None)
    if "exploration_fraction" in preset and "exploration_fraction" not in given:
        # ε falls over so many steps, however long the run is
        steps = preset["exploration_fraction"] * preset["total_timesteps"]
        args["exploration_fraction"] = min(1.0, steps / max(1, args["total_timesteps"]))
    parsed = Args(**args)
    refuse_idle(given, parsed)
    return parsed


def main() -> None:
    with ends_in_one_line(training=True):
        args, signals = parse_args(), Signals()
        evaluate_saved(args) if args.evaluate is not None else train(args, signals)
        if signals.stop is not None:
            raise SystemExit(128 + signals.stop)


if __name__ == "__main__":
    begin_in_utf8()
    with deaf_in_the_end():
        main()
