"""Double DQN with plasticity injection on Atari (Nikishin et al. 2023, arXiv 2305.15555).

    Q(s) = h_θ(φ(s)) + Σ_k [h_θ′₁ₖ(φ(s)) − h_θ′₂ₖ(φ(s))]

φ is the Nature CNN's convolutional encoder, h a head of two linear layers. Before an injection Q = h_θ.
An injection draws one fresh head, installs it twice (θ′₁ = θ′₂), and freezes θ and θ′₂. The output does not
change. Nor does the number of trainable parameters, if all heads have the same width. From then on only θ′₁
and the encoder learn.

    # train, inject, log; and the baseline, which is the same run but for the injection
    python dqn_injection_atari.py --env-id PhoenixNoFrameskip-v4 --injection-step 5000000
    python dqn_injection_atari.py --env-id PhoenixNoFrameskip-v4 --injection-step 5000000 --intervention none
    # go on, bit for bit
    python dqn_injection_atari.py --resume runs/FOLDER
    # read the curves, every point
    tensorboard --logdir runs --samples_per_plugin scalars=100000000

Unit everywhere: 1 step = 1 decision of the agent in 1 environment = 4 emulator frames.

The method is `InjectableHead`, `td_loss`, `Learner` and `Training.advance`, in this order. The code after
`train` validates the arguments, plays with saved agents, and parses the command line.
"""

import contextlib
import copy
import functools
import math
import sys
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from annotated_types import Ge, Interval
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import Tensor

if __name__ == "__main__":
    # before the imports below, which would end in a traceback
    for folder in ("support", "alternatives"):
        if not Path(__file__).parent.joinpath(folder, "__init__.py").exists():
            sys.exit(
                f"error: {folder}/ is not beside this script: "
                "clone or copy the project's whole folder, and run it there"
            )
    from support.versions import exit_with_wrong_versions

    exit_with_wrong_versions()

from alternatives import ALTERNATIVES, SETTINGS, AlternativeSettings
from alternatives.alternative import AgentParts, Alternative, Words, refuse_shared_fields
from support import environments, measures, usage
from support.acceleration import (
    CUDAGraphs,
    HiddenLayer,
    copy_gradients,
    copy_parameters,
    in_bfloat16,
    prepare_process,
)
from support.checkpoints import AS_IT_WAS_MADE, Checkpoint, read_identity
from support.environments import STACK, LearnerView
from support.evaluation import Stop, epsilon_greedy, play_games, player, print_scores, save_agent
from support.flags import Period, PositivePeriod, RunFlags
from support.machine import circumstances, code_version, pick_device, place_for, slow_bfloat16
from support.optimizers import (
    CenteredRMSProp,
    copy_moments,
    empty_moments,
    load_moments,
    moments_by_name,
    num_trainable,
)
from support.process import Signals, begin_in_utf8, deaf_in_the_end, ends_in_one_line
from support.randomness import stream_seed
from support.replay import FrameReplayBuffer
from support.run_log import RunLog, read_scalars
from support.runs import Run, check_machine, find_origin
from support.usage import (
    Count,
    InUTF8,
    OnlyWith,
    Positive,
    Share,
    Steps,
    UsageError,
    check_bounds,
    flag,
    reading,
)

__version__ = "0.9.0"

# a hash, taken before anybody can edit the code that runs
CODE_VERSION = code_version(Path(__file__), Path(__file__).parent / "alternatives")

INJECTION = Words(
    log="plasticity injected",
    noun="injection",
    plural="injections",
    deed="injection",
)
# what may happen at the injection step, by its name for --intervention; "none" is the baseline
INTERVENTIONS = {"injection": INJECTION} | {name: other.words for name, other in ALTERNATIVES.items()}
if TYPE_CHECKING:  # type checkers cannot evaluate a Literal that is built at run time
    Intervention = str
else:
    Intervention = Literal["injection", *ALTERNATIVES, "none"]

# flags of an injection; its baseline may have them, too, so that two commands differ in one flag alone
WITH_INJECTION = OnlyWith("intervention", ("injection", "none"))
WITH_NEW_LAYERS = OnlyWith(
    "intervention",
    ("injection", *(name for name, other in ALTERNATIVES.items() if other.draws_layers), "none"),
)
WITH_NORM = OnlyWith("injection_trigger", ("norm",))


@dataclass(frozen=True)
class Experiment:
    """The settings that affect what is learned. Brackets give the source of a setting or of its value."""

    env_id: str = "PhoenixNoFrameskip-v4"
    """Atari id of Gymnasium; ALE/NAME-v5 has sticky actions, NAMENoFrameskip-v4 none"""
    seed: Annotated[int, Ge(0)] = 1
    """seed of every random stream (cleanRL)"""
    exp_name: Annotated[str, InUTF8()] = Path(__file__).stem
    """part of the run folder's name (cleanRL)"""
    total_timesteps: Count = 15_000_000
    """length of the run in steps (paper: 50_000_000 = 200M frames)"""
    num_envs: Count = 1
    """games played in parallel; updates per step do not depend on it (cleanRL)"""
    env_backend: Literal["sb3", "ale"] = "sb3"
    """who plays: Stable-Baselines3's wrappers, or ALE's C++ vectoriser"""

    injection_step: tuple[int, ...] = ()
    """steps at which to inject plasticity, or to do what --intervention names instead (paper: 12_500_000)"""
    intervention: Intervention = "injection"
    """what to do there; none: nothing, with all else the same, which is the baseline (paper)"""
    freeze_heads: Annotated[bool, WITH_INJECTION] = True
    """freeze θ and θ′₂ at injection, or train all three heads (paper, appendix)"""
    moments: Annotated[Literal["fresh", "keep"], WITH_NEW_LAYERS] = "fresh"
    """optimizer state of newly drawn layers. fresh: none (rmsprop's first steps are then several times too
    large); keep: that of the layers they replace or, at an injection, of the head before (paper, Fig. 9)"""
    injection_trigger: Literal["step", "norm"] = "step"
    """inject at --injection-step, or when the weights have grown (paper, appendix)"""
    injection_norm_ratio: Annotated[Positive, WITH_NORM] = 3.0
    """inject when ‖w‖ of encoder and newest head grew by this factor since step 0 or an injection (paper)"""
    injection_check_frequency: Annotated[PositivePeriod, WITH_NORM] = 1_000
    """steps between checks of that norm"""
    max_injections: Annotated[Count, WITH_NORM] = 1
    """most injections that the norm may trigger, those before a fork included"""

    head_width: Count = 512
    """units of the head's hidden layer (paper; more: naive width scaling)"""
    injected_head_width: Annotated[int | None, Ge(1), WITH_INJECTION] = None
    """hidden units of the heads that injections add; by default --head-width; more: growth (paper)"""
    optimizer: Literal["adam", "rmsprop"] = "adam"
    """adam: eps 1.5e-4 (cleanRL's Rainbow); rmsprop: centered, decay 0.95, 0.01/32² in the root (paper)"""
    learning_rate: Positive = 1e-4
    """step size of the optimizer (cleanRL; paper: 2.5e-4)"""
    weight_decay: Annotated[float, Interval(ge=0, lt=math.inf)] = 0.0
    """c of c·w, added to the gradient of every weight w that is trained, biases too; 0 = none"""
    layer_norm: bool = False
    """normalise each hidden layer before its ReLU (Lyle et al. 2023)"""
    shared_bias: bool = False
    """one bias for all actions in the output layers (paper, DQN Zoo)"""
    gamma: Share = 0.99
    """discount per step (DQN Zoo)"""
    tau: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """target ← τ·online + (1−τ)·target at a sync (cleanRL)"""
    target_network_frequency: PositivePeriod = 8_000
    """steps between target syncs (cleanRL's Rainbow; paper: 30_000)"""
    train_frequency: Count = 4
    """steps per update (DQN Zoo)"""
    batch_size: Count = 32
    """transitions per update (DQN Zoo)"""
    buffer_size: PositivePeriod = 1_000_000
    """replay capacity in steps over all environments, 7.3 kB each (DQN Zoo)"""
    learning_starts: Steps = 80_000
    """steps before the first update (cleanRL; paper: 50_000)"""
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
    """multiply fp32 with 10-bit mantissas on a GPU, which is faster; measures and evaluation, too"""
    overlap: bool = False
    """with ale: let games play on while the network learns; new transitions wait for the updates"""
    checkpoint_frequency: Period = 1_000_000
    """steps between checkpoints; new games begin there; 0 = only on a signal"""


refuse_shared_fields(Experiment, RunFlags, *SETTINGS)


# of a dataclass's bases the last one's fields come first
@dataclass(frozen=True)
class Args(RunFlags, AlternativeSettings, Experiment):
    """Every knob of a run: those of `Experiment`, of the alternatives, then those of `support/flags.py`."""

    def __post_init__(self) -> None:
        for name in ("injection_step", "keep_checkpoints"):
            # one step, or several in whatever holds them
            steps = np.atleast_1d(getattr(self, name)).tolist()
            object.__setattr__(self, name, tuple(map(int, steps)))
        check_bounds(self)
        self.check_flags()
        # these stand below, under "What a run may be"
        check_injection_steps(self)
        check_intervention(self)
        check_kept_checkpoints(self)

    def end_of_vector_step(self, step: int) -> int:
        """The step at which the vector step (of num_envs steps) that contains `step` ends."""
        return math.ceil(step / self.num_envs) * self.num_envs

    @property
    def last_vector_step(self) -> int:
        """Where the last vector step begins: the last step at which the run can still be changed."""
        return (self.total_timesteps - 1) // self.num_envs * self.num_envs

    @property
    def run_name(self) -> str:
        """What the run's folder is called, but for the time."""
        return f"{self.env_id}__{self.exp_name}__{self.seed}".replace("/", "-")

    @property
    def new_head_width(self) -> int:
        """Units of the heads that injections add."""
        return self.injected_head_width or self.head_width

    @property
    def planned_interventions(self) -> tuple[int, ...]:
        """`injection_step`, each at the end of its vector step."""
        return tuple(self.end_of_vector_step(step) for step in self.injection_step)

    @property
    def intervention_period(self) -> int:
        """Steps between two applications of a periodic intervention such as ReDo; 0 for all others."""
        alternative = ALTERNATIVES.get(self.intervention)
        if alternative is None or alternative.period is None:
            return 0
        return getattr(self, alternative.period)

    @property
    def one_time_interventions(self) -> tuple[int, ...]:
        """`planned_interventions`, each preceded by a checkpoint; empty for a periodic one such as ReDo."""
        if self.intervention_period > 0:
            return ()
        return self.planned_interventions

    @property
    def kept_checkpoints(self) -> set[int]:
        """Steps of checkpoints that stay: `keep_checkpoints`, and that before the first planned intervention.

        Each is at the end of its vector step, which may be the run's end.
        """
        steps = {min(self.end_of_vector_step(step), self.total_timesteps) for step in self.keep_checkpoints}
        return steps.union(self.one_time_interventions[:1])

    @property
    def planned_pairs(self) -> int:
        """How many pairs of heads the run's injections will add, those before a fork included."""
        if self.intervention != "injection":
            return 0
        if self.injection_trigger == "norm":
            return self.max_injections
        return len(self.injection_step)


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {  # DQN Zoo's Double DQN (tuned), injected after 50M frames
        "total_timesteps": 50_000_000,
        "injection_step": (12_500_000,),
        "moments": "keep",
        "optimizer": "rmsprop",
        "learning_rate": 2.5e-4,
        "shared_bias": True,
        "target_network_frequency": 30_000,
        "learning_starts": 50_000,
        "exploration_start": 50_000,
        "exploration_fraction": 0.02,
        "eval_frequency": 250_000,
        "eval_episodes": 0,
        "eval_steps": 125_000,
    },
}


class Stream(IntEnum):
    """The independent random streams of a run."""

    NETWORK = 0
    EXPLORATION = 1
    REPLAY = 2
    ENVIRONMENTS = 3
    INJECTION = 4
    EVALUATION = 5
    PLASTICITY = 6
    PERTURBATION = 7


NUM_FEATURES = 64 * 7 * 7  # of the encoder's last convolution


class Head(nn.Module):
    """Features (B, 3136) → Q-values (B, num_actions), by a hidden layer of `width` units.

    Args:
        shared_bias: one bias for all actions in the output layer (DQN Zoo)
        layer_norm: whether the hidden layer is normalised before its ReLU (Lyle et al. 2023)
    """

    def __init__(self, width: int, num_actions: int, shared_bias: bool = False, layer_norm: bool = False):
        super().__init__()
        self.hidden = HiddenLayer(NUM_FEATURES, width)
        self.norm = nn.LayerNorm(width) if layer_norm else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.output = nn.Linear(width, num_actions)
        if shared_bias:
            self.output.bias = nn.Parameter(self.output.bias.detach()[:1].clone())  # (1,), for all actions

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.relu(self.norm(self.hidden(features)))  # (B, width)
        return self.output(hidden.to(self.output.weight.dtype))  # float32, also with --bf16


# To be copied as it is: it needs no import but torch, so Callable stands in quotes. So does `X | None`, which
# Python 3.9 cannot evaluate.
class InjectableHead(torch.nn.Module):
    """A head into which plasticity can be injected (Nikishin et al. 2023): θ and pairs of heads (θ′₁, θ′₂).

        h_θ(φ) + Σ_k [h_θ′₁ₖ(φ) − h_θ′₂ₖ(φ)], over the injections that there were

    All pairs exist from the start, so that an optimizer that is made once holds them all. Those that are not
    in use are zero, are not evaluated and get no gradient.

    It needs nothing but PyTorch and a function that makes a head. To inject plasticity into an agent of your
    own, copy this class, and
    - make the optimizer once, over all parameters
    - after `inject()`, call `target.load_state_dict(online.state_dict())`, too. Copying the parameters is not
      enough, since the state says which heads are in use. If the target was frozen, then call
      `target.requires_grad_(False)`: loading makes the head that learns trainable
    What a head has to be is said in `examples/README.md`.

    Args:
        make_head: makes a head, a module that maps features to outputs, on torch's default device
        max_injections: how many pairs there are
        freeze: if True, only the newest θ′₁ learns after an injection; if False, all heads in use learn
        make_new_head: makes the heads that injections add, e.g. wider ones; `make_head` if not given

    Raises:
        ValueError: two heads share parameters.
    """

    def __init__(
        self,
        make_head: "Callable[[], torch.nn.Module]",
        max_injections: int = 1,
        freeze: bool = True,
        make_new_head: "Callable[[], torch.nn.Module] | None" = None,
    ):
        super().__init__()
        self.make_head = make_head
        self.make_new_head = make_new_head or make_head
        self.freeze = freeze
        self.num_injections = 0
        # θ first: from one seed it is the same, however many pairs follow
        self.theta = self.make_head()
        self.theta_prime_1 = torch.nn.ModuleList(self.make_new_head() for _ in range(max_injections))
        self.theta_prime_2 = torch.nn.ModuleList(self.make_new_head() for _ in range(max_injections))
        seen: set[torch.nn.Parameter] = set()
        for head in (self.theta, *self.theta_prime_1, *self.theta_prime_2):
            if not seen.isdisjoint(head.parameters()):
                raise ValueError(
                    "two heads have parameters in common: make_head has to make a new one each time"
                )
            seen.update(head.parameters())
        # injections draw them; until then they are zero, and loading drops or adds them
        for parameter in (*self.theta_prime_1.parameters(), *self.theta_prime_2.parameters()):
            torch.nn.init.zeros_(parameter)
        self.set_trainable()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The sum of the heads in use. Frozen ones, too, pass gradient to the features."""
        output = self.theta(features)
        for k in range(self.num_injections):
            # the difference first: it is exactly 0 at an injection, where (θ + θ′₁) − θ′₂ is off by rounding
            output = output + (self.theta_prime_1[k](features) - self.theta_prime_2[k](features))
        return output

    @torch.no_grad()
    def inject(self, generator: "torch.Generator | None" = None) -> None:
        """Draws the next pair, θ′₁ = θ′₂, and puts it to use: the output stays as it is, to the bit.

        Args:
            generator: on the CPU; draws the new head's weights, in place of PyTorch's global generator

        Raises:
            ValueError: all pairs are in use; the generator is not on the CPU; or one is given, and make_head
                makes layers on another device.
        """
        k = self.num_injections
        if k == len(self.theta_prime_1):
            raise ValueError(f"all {k} pairs of heads are in use: build it with a larger max_injections")
        new_head = self.draw(self.make_new_head, generator)
        self.theta_prime_1[k].load_state_dict(new_head.state_dict())
        self.theta_prime_2[k].load_state_dict(new_head.state_dict())
        self.num_injections += 1
        self.set_trainable()

    @staticmethod
    def draw(make: "Callable[[], torch.nn.Module]", generator: "torch.Generator | None") -> torch.nn.Module:
        """A new module, with its layers' own initialisation.

        With a generator, the module is made on the CPU with the generator's random numbers, and PyTorch's own
        CPU generator is left as it was. Without one, it is made on torch's default device as usual.
        """
        if generator is None:
            return make()
        if generator.device.type != "cpu":
            raise ValueError(
                f"the generator is of {generator.device}: give one of the CPU, torch.Generator()"
            )
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.set_rng_state(generator.get_state())
            module = make()
            generator.set_state(torch.get_rng_state())
        for parameter in module.parameters():
            if parameter.device.type != "cpu":
                raise ValueError(
                    f"make_head makes layers on {parameter.device}, not on the CPU as its generator: "
                    "leave the device out there, and move the network"
                )
        return module

    def draw_like_newest(self, generator: "torch.Generator | None" = None) -> torch.nn.Module:
        """A new head of the kind that learns now."""
        make = self.make_head
        if self.num_injections > 0:
            make = self.make_new_head
        return self.draw(make, generator)

    def newest(self) -> str:
        """The path of the head that learns: theta, or theta_prime_1.0 and so on."""
        if self.num_injections == 0:
            return "theta"
        return f"theta_prime_1.{self.num_injections - 1}"

    def in_use(self) -> list[str]:
        """Paths of the heads that are evaluated: theta, theta_prime_1.0, theta_prime_2.0 and so on."""
        paths = ["theta"]
        for k in range(self.num_injections):
            paths += [f"theta_prime_1.{k}", f"theta_prime_2.{k}"]
        return paths

    def set_trainable(self) -> None:
        """Sets `requires_grad` of every head. Gradients of frozen ones become None.

        A zero gradient would not do: Adam still moves such a parameter by its momentum.
        """
        learning = [self.newest()] if self.freeze else self.in_use()
        self.requires_grad_(False)
        for path in learning:
            self.get_submodule(path).requires_grad_(True)
        for parameter in self.parameters():
            if not parameter.requires_grad:
                parameter.grad = None

    def get_extra_state(self) -> torch.Tensor:
        """The number of injections. So a state dict says which heads are in use, to a target network, too."""
        return torch.tensor(self.num_injections)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.num_injections = self.whole_number(state)
        self.set_trainable()

    @staticmethod
    def whole_number(state: torch.Tensor) -> int:
        """The number of injections in a state. Raises ValueError if it is not whole, as in averaged states.

        In a moving average of states the number rises towards a new whole number. At most 1e-3 below a whole
        number the average has practically caught up, and 1e-6 above it is rounding. All else is refused: the
        new pair is averaged in only in part, or not yet.
        """
        number = float(state)
        above = number - round(number)
        if above > 1e-6 or above < -1e-3:
            raise ValueError(
                f"this state has {number:.7g} injections, an average of states: "
                "take _extra_state from one of them, which has a whole number"
            )
        return round(number)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *others: list) -> None:
        """PyTorch's hook for loading. The state may have more or fewer pairs that are not in use.

        PyTorch passes a copy of what belongs to this module, whose names begin with `prefix`. Its parts then
        load from that copy.
        """
        num_injections = self.whole_number(state_dict.get(f"{prefix}_extra_state", self.num_injections))
        if num_injections > len(self.theta_prime_1):
            raise RuntimeError(
                f"{prefix}theta_prime_1.{num_injections - 1} is in use, and there are "
                f"{len(self.theta_prime_1)} pairs of heads: build it with a larger max_injections"
            )
        pairs = (f"{prefix}theta_prime_1.", f"{prefix}theta_prime_2.")
        in_use = []
        for k in range(num_injections):
            in_use += [f"{prefix}theta_prime_1.{k}.", f"{prefix}theta_prime_2.{k}."]

        def unused(name: str) -> bool:
            return name.startswith(pairs) and not name.startswith(tuple(in_use))

        # unused pairs of that state make way for zeros in this module's shapes
        for name in list(state_dict):
            if unused(name):
                del state_dict[name]
        for name, value in self.state_dict(prefix=prefix).items():
            if unused(name):
                state_dict[name] = torch.zeros_like(value)
        super()._load_from_state_dict(state_dict, prefix, *others)


class QNetwork(nn.Module):
    """The Nature CNN (Mnih et al. 2015): an encoder φ, and a head that can be injected with plasticity.

    Args:
        max_injections: how many injections there is room for
        freeze_heads: see `InjectableHead`
        shared_bias: see `Head`
        layer_norm: whether each hidden layer is normalised before its ReLU (Lyle et al. 2023)
        head_width: units of the head's hidden layer
        injected_head_width: the same of the heads that injections add; where it is larger, the network grows
    """

    def __init__(
        self,
        num_actions: int,
        max_injections: int = 1,
        freeze_heads: bool = True,
        shared_bias: bool = False,
        head_width: int = 512,
        injected_head_width: int | None = None,
        layer_norm: bool = False,
    ):
        super().__init__()
        self.layer_norm = layer_norm
        new_head_width = injected_head_width or head_width
        self.encoder = self.make_encoder(layer_norm)
        make = functools.partial(
            Head, num_actions=num_actions, shared_bias=shared_bias, layer_norm=layer_norm
        )
        self.head = InjectableHead(
            make_head=functools.partial(make, head_width),
            max_injections=max_injections,
            freeze=freeze_heads,
            make_new_head=functools.partial(make, new_head_width),
        )

    @staticmethod
    def make_encoder(layer_norm: bool = False) -> nn.Sequential:
        """float32 (B, 4, 84, 84) → (B, 3136)."""
        encoder = nn.Sequential(
            nn.Conv2d(STACK, 32, kernel_size=8, stride=4),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 64, kernel_size=4, stride=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 64, kernel_size=3, stride=1),
            nn.ReLU(inplace=True),
            nn.Flatten(),
        )
        if layer_norm:
            # before each ReLU, over all channels and positions; the last first, as each moves what follows
            encoder.insert(5, nn.GroupNorm(1, 64))
            encoder.insert(3, nn.GroupNorm(1, 64))
            encoder.insert(1, nn.GroupNorm(1, 32))
        return encoder

    def make_new_encoder(self) -> nn.Sequential:
        """One like this network's, as it is at the beginning of a run."""
        return self.make_encoder(self.layer_norm)

    def features(self, obs: Tensor) -> Tensor:
        """φ: uint8 (B, 4, 84, 84) → (B, 3136) in the encoder's dtype, bfloat16 in the copies of --bf16."""
        obs = obs.contiguous(memory_format=torch.channels_last)
        dtype = next(self.parameters()).dtype
        return self.encoder(obs.to(dtype, copy=True).div_(255))

    def forward(self, obs: Tensor) -> Tensor:
        """Q-values: uint8 (B, 4, 84, 84) → float32 (B, num_actions)."""
        return self.head(self.features(obs))

    def inject(self, generator: torch.Generator | None = None) -> None:
        """Injects plasticity into the head, see `InjectableHead.inject`."""
        self.head.inject(generator)

    @property
    def num_injections(self) -> int:
        return self.head.num_injections

    def newest_head(self) -> str:
        """The path of the head that learns: head.theta, or head.theta_prime_1.0 and so on."""
        return f"head.{self.head.newest()}"

    @staticmethod
    def num_actions_in(state_dict: dict[str, Tensor]) -> int:
        """The number of actions of the network that this state belongs to."""
        return len(state_dict["head.theta.output.weight"])

    def head_names(self) -> dict[str, str]:
        """{path: name} of the heads in use, as measures call them. The one that learns is called head."""
        names = {f"head.{path}": path.replace(".", "_") for path in self.head.in_use()}
        names[self.newest_head()] = "head"
        return names

    def relus(self) -> dict[str, str]:
        """{path: name} of the ReLUs whose outputs are measured."""
        names: dict[str, str] = {}
        for i, module in enumerate(self.encoder):
            if isinstance(module, nn.ReLU):
                names[f"encoder.{i}"] = f"conv{len(names) + 1}"
        for path, name in self.head_names().items():
            names[f"{path}.relu"] = name
        return names

    def in_use(self) -> dict[str, nn.Module]:
        """The modules that are evaluated, by path: encoder, head.theta, head.theta_prime_1.0 and so on."""
        paths = ["encoder"]
        for path in self.head.in_use():
            paths.append(f"head.{path}")
        return {path: self.get_submodule(path) for path in paths}


def make_q_network(args: Args, num_actions: int, device: torch.device | str) -> QNetwork:
    """The network of a run, with room for its injections and no other."""
    q_network = QNetwork(
        num_actions,
        max_injections=args.planned_pairs,
        freeze_heads=args.freeze_heads,
        shared_bias=args.shared_bias,
        head_width=args.head_width,
        injected_head_width=args.injected_head_width,
        layer_norm=args.layer_norm,
    )
    return q_network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def td_loss(
    q_network: nn.Module, target_network: nn.Module, batch: ReplayBufferSamples, gamma: float
) -> tuple[Tensor, Tensor]:
    """Double DQN's loss (van Hasselt et al. 2016), Huber with δ = 1.

    Rewards are clipped to ±1. `dones` is 1 where a game or a life ended. It is 0 where a game was truncated,
    so that the target bootstraps there (`support/environments.py`).

    Returns:
        the loss and the Q-values of the actions taken (detached), each the mean over the batch, 0-d
    """
    with torch.no_grad():
        next_actions = q_network(batch.next_observations).argmax(dim=1, keepdim=True)  # (B, 1)
        next_values = target_network(batch.next_observations).gather(1, next_actions)  # (B, 1)
        td_target = batch.rewards + gamma * (1 - batch.dones) * next_values
    q_values = q_network(batch.observations)  # (B, num_actions)
    # q_values.gather(1, batch.actions) is the same, but its gradient is summed in no fixed order on a GPU
    taken = torch.arange(q_values.shape[1], device=q_values.device) == batch.actions
    q_taken = q_values.where(taken, 0).sum(dim=1, keepdim=True)  # (B, 1)
    return F.huber_loss(q_taken, td_target), q_taken.detach().mean()


def exploration_epsilon(args: Args, step: int) -> float:
    """ε at `step`: start_e at first, then linear to end_e over exploration_fraction of the run."""
    duration = args.exploration_fraction * args.total_timesteps
    elapsed = step - args.exploration_start
    if elapsed < 0:
        return args.start_e
    if elapsed >= duration:
        return args.end_e
    return args.start_e + elapsed / duration * (args.end_e - args.start_e)


def make_optimizer(args: Args, q_network: QNetwork) -> torch.optim.Optimizer:
    """One optimizer over all parameters: the encoder's and those of every head, injected yet or not.

    If you replace it, the new optimizer must
    - skip parameters without a gradient and leave their state alone: frozen and unused heads have none
    - create a parameter's state, its step count included, at its first gradient: a new head has no state
    - keep all state in `optimizer.state[parameter]`, as tensors that can be copied, emptied and saved
    - change parameters in place
    - with --cuda-graphs, change its state in place and read no number back from the GPU
    """
    if args.optimizer == "rmsprop":
        return CenteredRMSProp(
            q_network.parameters(),
            lr=args.learning_rate,
            weight_decay=args.weight_decay,
        )
    return torch.optim.Adam(
        q_network.parameters(),
        lr=args.learning_rate,
        eps=1.5e-4,
        weight_decay=args.weight_decay,
        fused=True,
        capturable=args.cuda_graphs,
    )


def split(batch: ReplayBufferSamples, count: int) -> list[ReplayBufferSamples]:
    """`count` minibatches of equal size, in the order of their rows."""
    size = len(batch.actions) // count
    minibatches = []
    for i in range(count):
        rows = slice(i * size, (i + 1) * size)
        minibatch = ReplayBufferSamples(
            observations=batch.observations[rows],
            actions=batch.actions[rows],
            next_observations=batch.next_observations[rows],
            dones=batch.dones[rows],
            rewards=batch.rewards[rows],
        )
        minibatches.append(minibatch)
    return minibatches


class Learner:
    """Owns the online and target networks, the optimizer and the exploration stream.

    `online` and `target` are the networks that compute: the float32 networks themselves or, with `args.bf16`,
    bfloat16 copies. The copies act and yield the gradients, and are updated whenever the float32 ones change.
    """

    def __init__(self, args: Args, num_actions: int, device: torch.device | str):
        self.args = args
        self.num_actions = num_actions
        self.device = torch.device(device)
        torch.manual_seed(stream_seed(args.seed, Stream.NETWORK))
        self.q_network = make_q_network(args, num_actions, device)
        self.target_network = copy.deepcopy(self.q_network).requires_grad_(False)
        self.optimizer = make_optimizer(args, self.q_network)
        self.rng = np.random.default_rng(stream_seed(args.seed, Stream.EXPLORATION))
        self.losses = measures.LossMeter(self.device)
        self.norms = measures.NormTracker()
        self.interventions: list[int] = []  # their steps
        self.last_repeat = -1  # step at which a periodic intervention happened last

        # with --cuda-graphs these two are captured when they are first called, and replayed from then on
        learner = weakref.proxy(self)  # so that no reference cycle keeps old graphs
        self.graphs = CUDAGraphs(lambda: learner.captured_tensors())
        if args.cuda_graphs:
            self.q_values = self.graphs.wrap(self.q_values)  # type: ignore[method-assign]
            self.update = self.graphs.wrap(self.update)  # type: ignore[method-assign]
        self._begin()

    def _begin(self) -> None:
        """To be called when the modules in use change: notes norms, makes bf16 copies, drops captured graphs.

        New modules get an initial norm, the others keep theirs. Norm growth is measured from here on.
        """
        self.norms.begin(self.q_network.in_use(), self.growing())
        self.online = self.q_network
        self.target = self.target_network
        if self.args.bf16:
            self.online = in_bfloat16(self.q_network)
            self.target = in_bfloat16(self.target_network)
        self.graphs.clear()

    def learning_head(self) -> nn.Module:
        return self.q_network.get_submodule(self.q_network.newest_head())

    def growing(self) -> list[nn.Module]:
        """What --injection-trigger norm watches: encoder and newest head, also with --no-freeze-heads."""
        return [self.q_network.encoder, self.learning_head()]

    def captured_tensors(self) -> list[Tensor]:
        """All that acting and updating change: what has to be restored after a graph's warm-up."""
        tensors = [*self.q_network.parameters(), *self.online.parameters(), *self.losses.tensors()]
        for moments in self.optimizer.state.values():
            tensors += moments.values()
        return tensors

    def act(self, obs: np.ndarray, epsilon: float) -> np.ndarray:
        """ε-greedy actions (N,) int64 for obs (N, 4, 84, 84) uint8."""
        return epsilon_greedy(self.q_values, obs, self.num_actions, epsilon, self.rng, self.device)

    def q_values(self, obs: Tensor) -> Tensor:
        """Q-values by which to act: uint8 (N, 4, 84, 84) → float32 (N, num_actions)."""
        return self.online(obs)

    def update(self, batch: ReplayBufferSamples, count: int = 1) -> dict[str, Tensor]:
        """`count` gradient steps in sequence, each on its own part of the batch.

        Returns {"td_loss", "q_values"} of the last step, 0-d, left on the device. A run logs `self.losses`
        instead, which sums over all steps.
        """
        for minibatch in split(batch, count):
            loss, q_values = td_loss(self.online, self.target, minibatch, self.args.gamma)
            self.online.zero_grad(set_to_none=True)
            loss.backward()
            if self.args.bf16:
                copy_gradients(self.online, self.q_network)
            self.optimizer.step()
            if self.args.bf16:
                copy_parameters(self.q_network, self.online, only_trained=True)
            self.losses.add(loss, q_values)
        return {"td_loss": loss.detach(), "q_values": q_values}

    @torch.no_grad()
    def sync_target(self) -> None:
        """target ← τ·online + (1 − τ)·target."""
        online = tuple(self.q_network.parameters())
        target = tuple(self.target_network.parameters())
        if self.args.tau == 1:
            torch._foreach_copy_(target, online)
        else:
            torch._foreach_lerp_(target, online, self.args.tau)
        if self.args.bf16:
            copy_parameters(self.target_network, self.target)

    def inject(self, step: int = 0) -> None:
        """Injects plasticity into the online network.

        All optimizer moments stay. The new head, which has had no gradient yet, starts without any. With
        `moments="keep"` it starts with a copy of those of the head that learned before (paper, Fig. 9).
        """
        old_head = self.learning_head()
        self.q_network.inject(self._generator(Stream.INJECTION, key=len(self.interventions)))
        if self.args.moments == "keep":
            copy_moments(self.optimizer, old_head, self.learning_head())
        self._after_intervention(step)

    def intervene(self, step: int = 0) -> None:
        """Does what --intervention names, to the online network and its optimizer."""
        if self.args.intervention == "injection":
            self.inject(step)
        else:
            self.apply(ALTERNATIVES[self.args.intervention], step)

    @torch.no_grad()
    def apply(self, alternative: Alternative, step: int = 0) -> None:
        """Applies a one-time alternative to an injection, such as a head reset, and syncs the target."""
        alternative.apply(self._parts(key=len(self.interventions)), alternative.settings_in(self.args))
        drawn = []
        if alternative.draws_encoder:
            drawn.append("encoder")
        if alternative.draws_head:
            drawn.append(self.q_network.newest_head())
        for path in drawn:
            self.norms.forget(path)
            if self.args.moments == "fresh":
                empty_moments(self.optimizer, self.q_network.get_submodule(path))
        self._after_intervention(step)

    @torch.no_grad()
    def repeat(self, obs: Tensor, step: int) -> dict[str, int]:
        """Applies a periodic intervention such as ReDo, given observations (B, 4, 84, 84) uint8.

        The target network waits for its next sync. Tensors change in place, so captured graphs stay valid.
        Returns counts to be logged.
        """
        alternative = ALTERNATIVES[self.args.intervention]
        activations: dict[str, Tensor] = {}
        if alternative.batch_size > 0:
            _, activations = measures.activations(self.q_network, self.q_network.relus(), obs)
        counts = alternative.apply(self._parts(step, activations), alternative.settings_in(self.args))
        if self.args.bf16:
            copy_parameters(self.q_network, self.online, only_trained=True)
        self.last_repeat = step
        return counts or {}

    def _parts(self, key: int, activations: dict[str, Tensor] | None = None) -> AgentParts:
        """What an alternative works on. Its random numbers depend on the seed and the key."""
        for_heads = self._generator(Stream.INJECTION, key)
        for_others = self._generator(Stream.PERTURBATION, key)
        return AgentParts(
            encoder=self.q_network.encoder,
            head=self.learning_head(),
            optimizer=self.optimizer,
            draw_encoder=lambda: InjectableHead.draw(self.q_network.make_new_encoder, for_others),
            draw_head=lambda: self.q_network.head.draw_like_newest(for_heads),
            generator=for_others,
            activations=activations or {},
        )

    def _generator(self, stream: Stream, key: int) -> torch.Generator:
        return torch.Generator().manual_seed(stream_seed(self.args.seed, stream, key))

    def _after_intervention(self, step: int) -> None:
        """Makes the target network a copy of the online one, whatever `tau` (paper)."""
        self.target_network.load_state_dict(self.q_network.state_dict())
        self.target_network.requires_grad_(False)
        self.interventions.append(step)
        self._begin()

    def state_dict(self) -> dict[str, Any]:
        """All that it owns; the optimizer's moments by the names of their parameters."""
        return {
            "q_network": self.q_network.state_dict(),
            "target_network": self.target_network.state_dict(),
            "losses": self.losses.state_dict(),
            "norms": self.norms.state_dict(),
            "optimizer": moments_by_name(self.optimizer, self.q_network),
            "interventions": self.interventions,
            "last_repeat": self.last_repeat,
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a saved state, also one with more or fewer pairs of heads that were not injected yet."""
        self.q_network.load_state_dict(state["q_network"])
        self.target_network.load_state_dict(state["target_network"])
        self.target_network.requires_grad_(False)
        load_moments(self.optimizer, self.q_network, state["optimizer"])
        self.interventions = list(state["interventions"])
        self.last_repeat = state["last_repeat"]
        self.rng.bit_generator.state = state["rng"]
        self._begin()
        self.losses.load_state_dict(state["losses"])
        self.norms.load_state_dict(state["norms"])


def plasticity_measures(learner: Learner, batch: ReplayBufferSamples) -> dict[str, float]:
    """The state of the online network, in float32, on one batch. docs/metrics.md explains the names."""
    network = learner.q_network
    names = {"encoder": "encoder"} | network.head_names()
    loss, _ = td_loss(network, learner.target_network, batch, learner.args.gamma)
    q_values, layers = measures.activations(network, network.relus(), batch.observations)
    features = {"encoder": layers["conv3"].flatten(start_dim=1), "head": layers["head"]}
    values: dict[str, Any] = {
        **measures.unit_measures(layers, learning=("conv1", "conv2", "conv3", "head")),
        **measures.rank_measures(features),
        **measures.norm_measures(network, names, learner.norms.initial, loss),
    }
    if network.num_injections > 0:
        with torch.no_grad():
            old = network.head.theta(features["encoder"])
        values["new_heads_share_of_q"] = measures.share_of_q(old, q_values - old)
    # one that is undefined is not logged
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def make_envs(args: Args, num_envs: int | None = None, render_mode: str | None = None) -> LearnerView:
    """`num_envs` (default: `args.num_envs`) of the run's games, see `support/environments.py`."""
    if num_envs is None:
        num_envs = args.num_envs
    return environments.make_atari_envs(args.env_id, args.env_backend, num_envs, render_mode)


def evaluate(
    q_network: QNetwork,
    args: Args,
    key: int,
    video: Path | None = None,
    stop: Stop = lambda: False,
) -> np.ndarray:
    """Raw scores of whole games, see `play_games`. Games and random numbers are its own, from (seed, key)."""
    seed = stream_seed(args.seed, Stream.EVALUATION, key)
    render_mode = None if video is None else "rgb_array"
    envs = make_envs(args, max(1, args.eval_episodes), render_mode)
    act = player(q_network, int(envs.single_action_space.n), args.eval_epsilon, seed)
    return play_games(act, envs, seed, args.eval_steps, video, stop)


def make_parts(args: Args, device: torch.device) -> tuple[LearnerView, Learner, FrameReplayBuffer]:
    """Environments, learner and replay of a new run.

    Raises:
        UsageError: this machine cannot do what is asked.
    """
    check_machine(device, args.cuda_graphs, args.track, args.capture_video)
    envs = make_envs(args)
    obs_space = envs.single_observation_space
    action_space = envs.single_action_space
    num_bytes = FrameReplayBuffer.bytes_needed(args.buffer_size, obs_space, args.num_envs)
    # one flag for frames on the GPU and for graphs: neither has run on one yet (docs/speed.md)
    wanted = device if args.cuda_graphs else torch.device("cpu")
    replay = FrameReplayBuffer(
        args.buffer_size,
        obs_space,
        action_space,
        device,
        args.num_envs,
        generator=np.random.default_rng(stream_seed(args.seed, Stream.REPLAY)),
        storage=place_for(num_bytes, args.buffer_size, wanted),
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

    def loop(self) -> bool:
        """Plays and learns to the run's end, or until a signal. Returns whether the run is complete.

        Raises:
            FloatingPointError: a loss is not finite.
            OSError: the last checkpoint before a stop cannot be written.
        """
        args = self.args
        run = self.run
        if self.repeat_due():
            # in a fork: its origin passed this step without the periodic intervention
            self.repeat()
            # its origin has synced the target here already. A full sync can be repeated, now after the
            # intervention; with tau < 1 a second one would move the target twice
            if args.tau == 1 and self.sync_due():
                self.learner.sync_target()
        while True:
            # between two vector steps, when nothing is in flight; a resumed run begins here, too
            step = run.step
            periodic = run.due(args.checkpoint_frequency) > 0
            if step == 0 or periodic:
                self.begin_games()
            intervening = self.intervention_due()
            if run.interrupted or self.checkpoint_due(periodic or intervening):
                self.learner.losses.check_finite(step, args.train_frequency)
                run.save(keep=args.kept_checkpoints.union(self.learner.interventions[:1]))
            if run.signals.stop and run.saved == step:
                return False  # a signal that came after the line above waits for the next vector step
            if step > 0 and run.due(args.eval_frequency):
                play = functools.partial(evaluate, self.learner.q_network, args, step)
                if not run.evaluate(play, film=args.capture_video):
                    # a signal asked for a checkpoint; the evaluation is repeated after it, or after --resume
                    continue
            if intervening:
                self.intervene()
            if step == args.total_timesteps:
                run.log.unreported(self.envs.going, step)
                return True
            self.advance()

    def advance(self) -> None:
        """One vector step, a decision in every environment, with all that is learned and measured in it."""
        args = self.args
        run = self.run
        learner = self.learner
        # act
        obs = self.envs.obs
        actions = learner.act(obs, exploration_epsilon(args, run.step))
        self.envs.send(actions)
        # from here on `step` is where this vector step ends: what is due is due in it
        run.step = min(run.step + args.num_envs, args.total_timesteps)
        # receive and learn; with --overlap the games play on in the meantime
        overlap = args.overlap and self.replay.size() > 0  # in the first there is nothing to sample yet
        if not overlap:
            self.receive(obs, actions)
        updates = run.due(args.train_frequency, after=args.learning_starts)
        if updates > 0:
            learner.update(self.replay.sample(args.batch_size, batches=updates), updates)
        if overlap:
            self.receive(obs, actions)
        # measure how far the online network is from the target network, before a sync brings them together
        if self.sync_due() and self.churn_due():
            self.measure_churn()
        # the periodic part of --intervention, e.g. ReDo
        if self.repeat_due():
            self.repeat()
        # sync
        if self.sync_due():
            learner.sync_target()
        # log
        if run.due(args.log_frequency) or run.step == args.total_timesteps:
            losses = learner.losses.means(run.step, args.train_frequency)
            run.log.interval(run.step, exploration_epsilon(args, run.step), losses)
        # measure
        if run.due(args.plasticity_frequency):
            batch = self.replayed(Stream.PLASTICITY, run.step)
            for name, value in plasticity_measures(learner, batch).items():
                run.log.scalar(f"plasticity/{name}", value, run.step)
        if args.injection_trigger == "norm" and run.due(args.injection_check_frequency):
            run.log.scalar("injection/norm_growth", learner.norms.growth(learner.growing()), run.step)

    def receive(self, obs: np.ndarray, actions: np.ndarray) -> None:
        """Takes the games' answers to actions (N,) at obs (N, 4, 84, 84) into the replay and the log."""
        _, rewards, terminations, truncations, infos = self.envs.receive()
        # what was cut, in Stable-Baselines3's form
        cut = [{"TimeLimit.truncated": bool(truncated)} for truncated in truncations]
        self.replay.add(obs, infos["final_obs"], actions, rewards, terminations | truncations, cut)
        self.run.log.games(infos, self.run.previous)

    def begin_games(self) -> None:
        """Begins new games, as at every checkpoint, whether the run was resumed or not: ALE cannot be saved.

        Those that this cuts bootstrap from their last frames, since no `done` was stored.
        """
        self.run.log.unreported(self.envs.going, self.run.step)
        self.envs.reset(seed=stream_seed(self.args.seed, Stream.ENVIRONMENTS, self.run.step))

    def begin_streams(self) -> None:
        """Has exploration, replay's draws and new games go on from here in this seed's own streams."""
        self.learner.rng = np.random.default_rng(stream_seed(self.args.seed, Stream.EXPLORATION))
        self.replay.generator = np.random.default_rng(stream_seed(self.args.seed, Stream.REPLAY))
        self.begin_games()

    def replayed(self, stream: Stream, key: int, count: int | None = None) -> ReplayBufferSamples:
        """Replayed transitions, drawn by a generator from (seed, stream, key): training's does not move.

        There are `count` of them, or as many as measures take.
        """
        if count is None:
            count = self.MEASURED
        generator = np.random.default_rng(stream_seed(self.args.seed, stream, key))
        return self.replay.sample(count, generator=generator)

    def sync_due(self) -> bool:
        return self.run.due(self.args.target_network_frequency, after=self.args.learning_starts) > 0

    def churn_due(self) -> bool:
        """Whether this sync is the first at or after a multiple of --plasticity-frequency.

        For example, with --plasticity-frequency 50000 and a sync every 8,000 steps, churn is measured at the
        syncs at 56,000 and 104,000. Before the first sync there is none.
        """
        args = self.args
        if args.plasticity_frequency == 0:
            return False
        period = args.target_network_frequency
        sync = self.run.step // period * period
        return sync // args.plasticity_frequency > (sync - period) // args.plasticity_frequency

    def measure_churn(self) -> None:
        """Logs policy churn. Call it just before a sync: after one, with tau = 1, no action differs."""
        learner = self.learner
        obs = self.replayed(Stream.PLASTICITY, self.run.step).observations
        with torch.no_grad():
            churn = measures.policy_churn(learner.q_network(obs), learner.target_network(obs))
        self.run.log.scalar("plasticity/policy_churn", float(churn), self.run.step)

    def checkpoint_due(self, notable: bool) -> bool:
        """Whether to write a checkpoint: something `notable` happens at this step, or one is planned."""
        args = self.args
        if args.checkpoint_frequency == 0:
            return False
        planned = {self.run.first, args.total_timesteps, *args.one_time_interventions, *args.kept_checkpoints}
        return notable or self.run.step in planned

    def intervention_due(self) -> bool:
        """Whether this step is a planned one, or the norm has grown beyond --injection-norm-ratio.

        Periodic interventions are left to `repeat_due`.
        """
        args = self.args
        step = self.run.step
        if args.intervention == "none":
            return False
        if args.injection_trigger == "step":
            return step in args.one_time_interventions
        if not 0 < step < args.total_timesteps or not self.run.due(args.injection_check_frequency):
            return False
        if len(self.learner.interventions) >= args.max_injections:
            return False
        return self.learner.norms.growth(self.learner.growing()) > args.injection_norm_ratio

    def repeat_due(self) -> bool:
        """Whether a periodic intervention is due by now and has not been done yet.

        It is due at --injection-step and every period after that, each time at the end of the vector step
        that contains the due step.
        """
        period = self.args.intervention_period
        if period == 0:
            return False
        begin = self.args.injection_step[0]
        last_due = begin + (self.run.step - begin) // period * period
        return begin <= last_due and self.learner.last_repeat < last_due

    def repeat(self) -> None:
        """Applies the periodic intervention, and logs the counts that it returns."""
        args = self.args
        step = self.run.step
        first = self.learner.last_repeat < args.injection_step[0]
        alternative = ALTERNATIVES[args.intervention]
        batch = self.replayed(Stream.PERTURBATION, step, alternative.batch_size)
        counts = self.learner.repeat(batch.observations, step)
        # comparisons know by such a curve what was done before a fork
        points = counts or {"applied": 1}
        for name, count in points.items():
            self.run.log.scalar(f"injection/{name}", count, step)
        if first:
            words = [alternative.words.log, *(f"{name} {count}" for name, count in counts.items())]
            again = f"again every {args.intervention_period:,} steps"
            self.run.log.say(f"step {step:,}: {', '.join(words)}; {again}")

    def intervene(self) -> None:
        """Does what --intervention names, and logs how far that changed Q: an injection not at all."""
        learner = self.learner
        step = self.run.step
        obs = self.replayed(Stream.INJECTION, len(learner.interventions)).observations
        size_before = num_trainable(learner.q_network)
        with torch.no_grad():
            q_before = learner.online(obs)
            learner.intervene(step)
            delta = (learner.online(obs) - q_before).abs().max().item()
        size = num_trainable(learner.q_network)

        self.run.log.scalar("injection/step", step, step)
        self.run.log.scalar("injection/max_abs_delta_q", delta, step)
        line = f"step {step:,}: {INTERVENTIONS[self.args.intervention].log}"
        line += f", largest change of Q over {len(obs)} observations: {delta:.4}"
        if size != size_before:
            line += f", trainable parameters {size_before:,} → {size:,}"
        self.run.log.say(line)


def train(args: Args, signals: Signals | None = None) -> Path:
    """One run, or what is left of it. Returns its folder.

    Args:
        signals: its `stop` says afterwards which signal ended the run early, if any

    Raises:
        UsageError: `args` cannot work; nothing was written.
        FloatingPointError, OSError: the run cannot go on.
    """
    with contextlib.ExitStack() as stack:
        # what the run goes on from, and its arguments
        prepare_process()
        signals = stack.enter_context(signals or Signals())
        origin = find_origin(args.resume, args.fork, stack)
        if args.resume is not None:
            given = args
            args = usage.settings_of(Args, origin.args, Path(args.resume))
            if given != Args(resume=given.resume):
                usage.refuse_changes(given, args, FORKABLE)
        if origin.checkpoint is not None and origin.forked:
            check_fork(args, origin.checkpoint)
            check_past(origin.checkpoint)

        # its parts, as they begin or as they were
        device = pick_device(args.cuda, args.torch_deterministic, args.tf32)
        slow = slow_bfloat16(device) if args.bf16 else None
        if slow and origin.nothing:
            raise UsageError(f"{slow}: leave out --bf16")
        envs, learner, replay = make_parts(args, device)
        stack.callback(envs.close)
        # the run; where it goes on from a checkpoint, this loads the parts' states
        run = Run(
            origin,
            name=args.run_name,
            version=__version__,
            args=asdict(args),
            parts={"learner": learner, "replay": replay, "envs": envs},
            circumstances=circumstances(device, CODE_VERSION),
            signals=signals,
            stack=stack,
        )
        training = Training(args, run, envs, learner, replay)

        # what there is to say of it
        run.introduce(f"{args.env_id} × {args.num_envs} ({args.env_backend})", device, origin)
        if slow:  # without --bf16 the numbers would be others
            run.log.say(f"warning: {slow}; it goes on as it began")
        if args.intervention == "none":
            run.log.say("no plasticity injection in this run: baseline arm")
        elif args.injection_trigger == "step" and not args.injection_step:
            run.log.say("no plasticity injection in this run")
        if args.overlap and args.env_backend == "sb3":
            run.log.say(
                "warning: with --env-backend sb3 --overlap saves no time, and updates lack the newest "
                "transitions all the same: give --env-backend ale, or leave it out"
            )
        if args.learning_starts >= args.total_timesteps:
            run.log.say(
                f"warning: nothing is learned, the run ends before --learning-starts {args.learning_starts}"
            )
        elif origin.nothing:  # else it is too late to change that
            warn_about_likely_mistakes(args, run.log)

        if origin.forked and args.seed != origin.history[0]["seed"]:
            training.begin_streams()  # one agent that goes on in several ways
        del origin  # and with it a copy of every parameter
        complete = training.loop()
        if complete and args.save_model:
            save_agent(run.folder / "agent.pt", learner.q_network, asdict(args), run.step)
            run.log.say(f"agent saved, play with it: {run.command(__file__, 'evaluate')}")
        run.finish(complete, __file__)
    if complete:
        signals.stop = None  # one that came while files were closed was too late
    return run.folder


def warn_about_likely_mistakes(args: Args, log: RunLog) -> None:
    """Logs a warning or remark where part of the run would have no effect or comes before any learning."""
    starts = args.learning_starts
    period = args.target_network_frequency
    if (starts // period + 1) * period > args.total_timesteps:
        log.say(
            f"warning: no sync of the target network is due, with --target-network-frequency {period}: "
            f"give {args.total_timesteps - starts} or less"
        )
    by_norm = args.intervention != "none" and args.injection_trigger == "norm"
    if by_norm and args.injection_norm_ratio < 1 and args.injection_check_frequency <= starts:
        log.say(
            "warning: injections come before anything is learned, with --injection-norm-ratio "
            f"{args.injection_norm_ratio:g}: give more than 1"
        )
    if by_norm and args.injection_check_frequency > args.last_vector_step:
        log.say(
            "warning: the norm is never looked at, with --injection-check-frequency "
            f"{args.injection_check_frequency}: give {args.last_vector_step} or less"
        )
    if args.eval_frequency > args.total_timesteps:
        log.say(
            f"warning: no evaluation is due, with --eval-frequency {args.eval_frequency}: "
            f"give {args.total_timesteps} or less"
        )
    if args.intervention != "none" and args.planned_interventions and args.planned_interventions[0] <= starts:
        log.say(
            f"warning: at step {args.planned_interventions[0]:,} the network has learned nothing, "
            f"with --learning-starts {starts}: give a later --injection-step"
        )
    if args.start_e > args.end_e and args.exploration_start >= args.last_vector_step:
        log.say(
            f"warning: ε never falls, with --exploration-start {args.exploration_start}: "
            f"give less than {args.last_vector_step}"
        )
    falls_until = args.exploration_start + args.exploration_fraction * args.total_timesteps
    if args.start_e > args.end_e and falls_until < starts:
        log.say(
            f"remark: ε has fallen at step {falls_until:,.0f}, and learning begins after step {starts:,}: "
            "give a lower --learning-starts, or a larger --exploration-fraction"
        )


# What a run may be


def check_injection_steps(args: Args) -> None:
    """Raises UsageError where injections cannot be made at the steps that are planned."""
    steps = args.injection_step
    last = args.last_vector_step
    if last == 0 and (steps or args.injection_trigger == "norm"):
        raise UsageError(
            "the run is over after its first step, before any injection: "
            f"give a --total-timesteps of {args.num_envs + 1} or more"
        )
    earlier = 0
    for planned in args.planned_interventions:
        if not earlier < planned <= last:
            order = ""
            if len(steps) > 1:
                order = "increasing and "
            if len(steps) > 1 and args.num_envs > 1:
                order = f"increasing by num_envs ({args.num_envs}) or more and "
            raise UsageError(
                f"injection_step is {steps}, but must be {order}within 1 ... {last}, "
                "before the run's end at --total-timesteps: change --injection-step"
            )
        earlier = planned


def check_intervention(args: Args) -> None:
    """Raises UsageError for an intervention that would never happen or contradicts its settings."""
    by_norm = args.injection_trigger == "norm"
    if args.intervention_period > 0 and (by_norm or len(args.injection_step) > 1):
        raise UsageError(
            f"intervention {args.intervention} goes on from one step: "
            "give --injection-trigger step, and one --injection-step"
        )
    if by_norm and args.injection_step:
        raise UsageError(
            "injection_trigger norm decides when to inject: give --injection-step without a number"
        )
    if args.intervention in ALTERNATIVES:
        ALTERNATIVES[args.intervention].settings_in(args)
        if not by_norm and not args.injection_step:
            fix = "give --injection-step, or --injection-trigger norm"
            if args.intervention_period > 0:
                fix = "give --injection-step"
            raise UsageError(f"intervention {args.intervention} would never happen: {fix}")
    if args.moments == "keep" and args.new_head_width != args.head_width:
        raise UsageError("a head of another width has no moments to copy: give --moments fresh")


def check_kept_checkpoints(args: Args) -> None:
    """Raises UsageError where checkpoints are to be kept that will not be written."""
    steps = args.keep_checkpoints
    if any(not 0 <= step <= args.total_timesteps for step in steps):
        raise UsageError(
            f"keep_checkpoints is {steps}, but must be within 0 ... {args.total_timesteps}, "
            "the run's steps: change --keep-checkpoints"
        )
    if steps and args.checkpoint_frequency == 0:
        fix = "give --keep-checkpoints without a number"
        if args.fork is None:  # which writes checkpoints as often as its origin
            fix = "give a --checkpoint-frequency, or --keep-checkpoints without a number"
        raise UsageError(f"keep_checkpoints is {steps}, but checkpoint_frequency 0 writes none: {fix}")


# What a fork may be

# what an intervention does: not to be changed in a fork that begins after one
OF_INTERVENTION = (
    "intervention",
    "freeze_heads",
    "moments",
    "injected_head_width",
    *(field.name for field in fields(AlternativeSettings)),
)
# when the norm injects
OF_NORM = ("injection_trigger", "injection_norm_ratio", "injection_check_frequency", "max_injections")
# What a fork may change. Where a change would alter what was learned before the checkpoint, `check_fork`
# refuses it. Three exceptions, which a run from step 0 might not have reached: another seed, another rule for
# the norm, and another intervention after a periodic one
FORKABLE = (
    *OF_INTERVENTION,
    "injection_step",
    *OF_NORM,
    "total_timesteps",
    "exploration_fraction",
    "seed",
    "exp_name",
    "cuda",
    "cuda_graphs",
    "plasticity_frequency",
    "eval_frequency",
    "eval_episodes",
    "eval_steps",
    "eval_epsilon",
    "capture_video",
    "save_model",
    "keep_checkpoints",
    "track",
    "wandb_project_name",
    "wandb_entity",
)


def refuse_unforkable(given: dict[str, Any], saved: Args, where: str) -> None:
    """
    Raises:
        UsageError: a fork's arguments differ from its origin's where a fork may not change them.
    """
    refused = []
    for name, value in asdict(saved).items():
        if name in given and name not in ("resume", "fork", *FORKABLE) and given[name] != value:
            refused.append(name)
    if refused:
        values = ", ".join(f"{name} is {given[name]}, there {getattr(saved, name)}" for name in refused)
        allowed = f"a fork may differ in {', '.join(FORKABLE)} only"
        raise UsageError(f"not as in {where}: {values}; {allowed}: leave out {', '.join(map(flag, refused))}")


def check_fork(args: Args, checkpoint: Checkpoint) -> None:
    """
    Raises:
        UsageError: no single run with these arguments could have reached this checkpoint, and it is none of
            the exceptions at FORKABLE.
    """
    saved = usage.settings_of(Args, checkpoint.meta["args"], checkpoint.path)
    step = checkpoint.step
    where = f"checkpoint {checkpoint.path}"
    refuse_unforkable(asdict(args), saved, where)
    if args.total_timesteps <= step:
        raise UsageError(f"{where} lies at step {step}: give a --total-timesteps of {step + 1} or more")
    check_earlier_interventions(args, saved, checkpoint)
    check_earlier_repeats(args, saved, checkpoint)

    # such a run ended in the middle of a vector step, or logged once more than a longer one would
    if step == saved.total_timesteps and (step % saved.num_envs != 0 or step % saved.log_frequency != 0):
        raise UsageError(
            f"{where} ends a run whose length is no multiple of num_envs and log_frequency: "
            "give an earlier checkpoint"
        )
    asked_for = args.kept_checkpoints.difference(saved.kept_checkpoints, args.planned_interventions)
    missed = sorted(kept for kept in asked_for if kept < step)
    if missed:
        steps = ", ".join(map(str, missed))
        raise UsageError(
            f"{where} lies beyond {steps}, of which no checkpoint can be kept any more: "
            "leave it out of --keep-checkpoints, or give an earlier checkpoint"
        )
    fall = args.exploration_fraction * args.total_timesteps
    fall_before = saved.exploration_fraction * saved.total_timesteps
    if step > 0 and fall_before > args.total_timesteps:
        raise UsageError(
            f"ε falls over {fall_before:,.10g} steps before {where}, more than this run has: "
            f"give a --total-timesteps of {math.ceil(fall_before)} or more"
        )
    if step > 0 and not np.isclose(fall, fall_before, rtol=1e-9):
        raise UsageError(
            f"ε would fall over {fall:,.10g} steps, but before {where} over {fall_before:,.10g}: "
            f"give --exploration-fraction {fall_before / args.total_timesteps} with this --total-timesteps"
        )


def check_earlier_interventions(args: Args, saved: Args, checkpoint: Checkpoint) -> None:
    """
    Raises:
        UsageError: a fork's arguments contradict the interventions that happened before the checkpoint.
    """
    step = checkpoint.step
    where = f"checkpoint {checkpoint.path}"
    with reading(checkpoint.path, "this run's checkpoint", AS_IT_WAS_MADE):
        earlier = tuple(checkpoint.state["learner"]["interventions"])
    expected = tuple(planned for planned in args.one_time_interventions if planned < step)
    if args.intervention == "none":
        expected = ()
    elif args.injection_trigger == "norm":
        expected = earlier  # no step was planned, the norm decided
    if earlier != expected:
        happened = INTERVENTIONS[saved.intervention if earlier else args.intervention].plural
        raise UsageError(
            f"{where} lies after {happened} at {earlier or 'no step'}, but the arguments say "
            f"{expected or 'none'} before step {step}: {interventions_fix(args, earlier, step)}"
        )
    if not earlier:
        return
    changed = usage.changed_fields(args, saved)
    of_intervention = sorted(name for name in changed if name in OF_INTERVENTION)
    if of_intervention:
        flags = " and ".join(map(flag, of_intervention))
        raise UsageError(f"{where} lies after an injection: for another {flags} give an earlier checkpoint")
    if args.injection_trigger == "norm":
        least = len(earlier)
        happened = INTERVENTIONS[saved.intervention].plural
        rule = [name for name in changed if name in OF_NORM]
        if rule:
            least += 1  # or the fork would do nothing of what is asked
        if args.max_injections < least:
            steps = " ".join(map(str, earlier))
            raise UsageError(
                f"{where} lies after {len(earlier)} {happened}, and max_injections is "
                f"{args.max_injections}: give a --max-injections of {least} or more, or an earlier "
                f"checkpoint; for none beyond these give --injection-trigger step --injection-step {steps} "
                f"in the place of {' and '.join(map(flag, rule))}"
            )


def check_earlier_repeats(args: Args, saved: Args, checkpoint: Checkpoint) -> None:
    """
    Raises:
        UsageError: with these arguments a periodic intervention would have begun by the checkpoint, but the
            forked run had none then, or one with other settings.
    """
    if args.intervention_period == 0:
        return
    step = checkpoint.step
    begin = args.injection_step[0]
    # sweep.py asks of checkpoints that are only planned: nothing is repeated before them
    last_repeat = checkpoint.state["learner"].get("last_repeat", -1)
    begins_here = args.end_of_vector_step(begin) >= step and last_repeat < begin
    changed = usage.changed_fields(args, saved)
    if begins_here or not any(name in changed for name in ("injection_step", *OF_INTERVENTION)):
        return
    earliest = step
    if last_repeat == step:
        earliest += 1
    raise UsageError(
        f"checkpoint {checkpoint.path} was not come to with this --intervention {args.intervention} "
        f"from step {begin} on: give an --injection-step of {earliest} or later, or an earlier checkpoint"
    )


def check_past(checkpoint: Checkpoint) -> None:
    """
    Raises:
        UsageError: a periodic intervention lies before a checkpoint, and the curves that tell so are missing.
    """
    if checkpoint.state["learner"].get("last_repeat", -1) < 0:
        return
    curves = read_scalars(checkpoint.path.resolve().parent)
    if not any(tag.startswith("injection/") for tag in curves):
        raise UsageError(
            f"checkpoint {checkpoint.path} lies after an intervention that goes on, and its run's curves, "
            "which tell since when, do not lie beside it: put them there, or give a checkpoint from before it"
        )


def interventions_fix(args: Args, earlier: tuple[int, ...], step: int) -> str:
    """What to give where a checkpoint lies after these injections, and the arguments say otherwise."""
    if not earlier:
        return f"give an --injection-step of {step} or later, or an earlier checkpoint"
    if args.intervention == "none" or args.intervention_period > 0:
        return "give an earlier checkpoint"
    later = [planned for planned in args.planned_interventions if planned >= step]
    steps = " ".join(map(str, (*earlier, *later)))
    return f"give an --injection-step of {steps}, or an earlier checkpoint"


# Playing with a saved agent

# what playing with a saved agent looks at; the rest is as the agent was trained
PLAYING = (
    "seed",
    "cuda",
    "torch_deterministic",
    "tf32",
    "capture_video",
    "eval_episodes",
    "eval_steps",
    "eval_epsilon",
    "evaluate",
)


def load_agent(path: Path, device: torch.device | str) -> tuple[QNetwork, Args, int]:
    """The network, arguments and step of a saved agent. Runs no code from the file.

    Raises:
        UsageError: it is no agent.
    """
    fix = "give an agent.pt from --save-model"
    with reading(path, "an agent", fix):
        saved = torch.load(path, map_location=device, weights_only=True)
        saved_args = dict(saved["args"])
    args = usage.settings_of(Args, saved_args, path)
    with reading(path, "an agent", fix):
        num_actions = QNetwork.num_actions_in(saved["q_network"])
        q_network = make_q_network(args, num_actions, device)
        q_network.load_state_dict(saved["q_network"])
        return q_network, args, int(saved["step"])


def agent_path(given: str) -> Path:
    """The file of a saved agent, for which a run's folder may be given."""
    path = Path(given)
    return path / "agent.pt" if path.is_dir() else path


def refuse_ignored_flags(given: dict[str, Any], trained: Args, path: Path) -> None:
    """
    Raises:
        UsageError: playing would ignore some of these arguments, and they differ from the agent's own.
    """
    ignored = {}
    for name, value in given.items():
        if name not in PLAYING and value != getattr(trained, name):
            ignored[name] = getattr(trained, name)
    if not ignored:
        return
    settings = ", ".join(f"{name} {value}" for name, value in ignored.items())
    how = f"plays as it was trained, with {settings}"
    if "env_id" in ignored:
        how = f"plays {trained.env_id}, not {given['env_id']}"
    raise UsageError(f"the agent in {path} {how}: leave out {', '.join(map(flag, ignored))}")


def evaluate_saved(args: Args) -> np.ndarray:
    """Plays with the agent in `args.evaluate`, prints and returns its scores (eval_episodes,) float64."""
    prepare_process()
    path = agent_path(args.evaluate or "")
    q_network, trained, step = load_agent(path, pick_device(args.cuda, args.torch_deterministic, args.tf32))
    changed = usage.changed_fields(args, Args())
    refuse_ignored_flags({name: getattr(args, name) for name in changed}, trained, path)
    settings = replace(trained, fork=None, **{name: getattr(args, name) for name in PLAYING})
    video = None
    if args.capture_video:
        video = path.parent / "videos" / f"evaluate-seed-{args.seed}.mp4"
    scores = evaluate(q_network, settings, step, video)
    print_scores(f"{trained.env_id}, agent at step {step:,}, ε {settings.eval_epsilon:g}", scores)
    return scores


# The command line


@dataclass(frozen=True)
class CommandLine(Args):
    """The command line, unchecked: `Args` checks it later, since tyro would draw a box around an error."""

    preset: Literal["default", "paper"] = "default"
    """values of the flags that are not given: this script's defaults, or the paper's"""

    def __post_init__(self) -> None:
        pass


def parse_args() -> Args:
    """The command line as `Args`. What is not given is as in the preset, or in the run to resume or fork."""
    line = asdict(tyro.cli(CommandLine, description=__doc__, args=usage.words_given()))
    names_given = usage.flags_given()
    given = {name: value for name, value in line.items() if name in names_given}
    sources = {name: line[name] for name in ("resume", "fork", "evaluate") if line[name] is not None}
    if sources:
        Args(**sources)  # refuses more than one
        if "preset" in given:
            raise UsageError(
                "--preset is for a new run, this one has settings of its own: leave out --preset"
            )
    if "evaluate" in sources:
        return parse_evaluation(given)
    if "resume" in sources:
        path = Path(line["resume"], "run.json")
        saved = usage.settings_of(Args, read_identity(path)["args"], path)
        usage.refuse_changes(CommandLine(**asdict(saved) | given), CommandLine(**asdict(saved)), FORKABLE)
        return Args(resume=line["resume"])

    # what is not given is as in the run that is forked, or as in the preset
    preset = given.pop("preset", "default")
    if "fork" in sources:
        path = Path(line["fork"], "manifest.json")
        saved = usage.settings_of(Args, read_identity(path)["args"], path)
        refuse_unforkable(given, saved, f"checkpoint {line['fork']}")
        args = asdict(saved)
    else:
        args = asdict(Args()) | PRESETS[preset]
    # inherited flags that have no effect together with the given ones go back to their defaults
    if given.get("injection_trigger") == "norm":
        args["injection_step"] = ()
    for name in usage.unused_fields(CommandLine(**args | given)):
        args[name] = getattr(Args, name)
    args |= given
    if preset == "paper" and "exploration_fraction" not in given:
        # ε decays over the preset's number of steps whatever the run's length, but at most over the whole run
        steps = PRESETS[preset]["exploration_fraction"] * PRESETS[preset]["total_timesteps"]
        args["exploration_fraction"] = min(1.0, steps / max(1, args["total_timesteps"]))
    parsed = Args(**args)
    refuse_unused_flags(given, parsed)
    return parsed


def parse_evaluation(given: dict[str, Any]) -> Args:
    """What is given with --evaluate.

    Raises:
        UsageError: a given flag would be ignored and differs from the agent's, even if it is a default here.
    """
    if not set(given).issubset(PLAYING):
        path = agent_path(given["evaluate"])
        _, trained, _ = load_agent(path, "cpu")
        refuse_ignored_flags(given, trained, path)
    return Args(**{name: value for name, value in given.items() if name in PLAYING})


def refuse_unused_flags(given: dict[str, Any], args: Args) -> None:
    """
    Raises:
        UsageError: a given flag has no effect in this run.
    """
    no_evaluations = args.eval_frequency == 0
    no_interventions = args.injection_trigger == "step" and not args.injection_step
    names_by_fix: dict[str, list[str]] = {}
    for name in given:
        fix = None
        if name in ("eval_episodes", "eval_steps", "eval_epsilon") and no_evaluations:
            fix = "--eval-frequency"
        if name in ("wandb_project_name", "wandb_entity") and not args.track:
            fix = "--track"
        is_baseline = name == "intervention" and args.intervention == "none"
        if name in OF_INTERVENTION and no_interventions and not is_baseline:
            fix = "--injection-step, or --injection-trigger norm"
        if fix is not None:
            names_by_fix.setdefault(fix, []).append(name)
    if names_by_fix:
        fix, names = next(iter(names_by_fix.items()))
        it = "it"
        are = "is"
        if len(names) > 1:
            it = "them"
            are = "are"
        raise UsageError(
            f"{' and '.join(names)} {are} given, and nothing in this run looks at {it}: "
            f"give {fix}, or leave {it} out"
        )


def main() -> None:
    with ends_in_one_line(training=True):
        args = parse_args()
        signals = Signals()
        if args.evaluate is not None:
            with ends_in_one_line():  # with no advice on training
                evaluate_saved(args)
        else:
            train(args, signals)
        if signals.stop is not None:
            raise SystemExit(128 + signals.stop)


if __name__ == "__main__":
    begin_in_utf8()
    with deaf_in_the_end():
        main()
