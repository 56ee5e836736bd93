"""Has the agent lost plasticity? Compares runs of dqn_injection_atari.py with and without an injection.

    python compare.py runs/A runs/B ... --out img/phoenix.png

Runs with the same arguments but for the seed are an arm. For two arms that differ in nothing but the injection, the verdict
is on the difference in mean return, with − without, over all that is logged in a window after the injection: one mean per
run, and a 95% t interval over seeds. Where the two arms' runs of a seed are one run up to the injection, as forks are, it is
the interval of the differences within seeds, else Welch's. There is one window: from the injection to the last step that all
these runs have reached, or --window steps long. Where the norm decided when to inject, it begins at the latest of the runs'
first injections. A head reset, or shrink and perturb, is compared in the same way. Comparisons that differ in the game alone
are also aggregated, as human-normalised scores.

Written beside --out: the figure of return, one of the plasticity measures (NAME_plasticity), a table (NAME.md) and all numbers
(NAME.json). Runs may still be going. 1 step = 1 decision of the agent in 1 environment = 4 emulator frames.

    python compare.py --probe runs/A/checkpoint-5000000 ...

asks saved agents, in minutes: how well does each fit random targets, as it is and after an injection, next to a fresh
network? That needs no second arm, but says nothing about the return.
"""

import functools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import CRC_TABLE
from tqdm import tqdm

try:
    import matplotlib
    import scipy.stats
    from matplotlib import pyplot as plt
    from matplotlib.artist import Artist
    from matplotlib.figure import SubFigure
except ImportError as error:
    sys.exit(f"error: {error.name} is not installed: pip install -r requirements-dev.txt")

from dqn_injection_atari import (
    FRAME_SIZE,
    STACK,
    Args,
    Checkpoint,
    FrameReplayBuffer,
    Learner,
    RunLog,
    UsageError,
    atari_spec,
    free_memory,
    load_checkpoint,
    pick_device,
    reading,
    record_spans,
)

matplotlib.use("Agg")

# These name a run, choose its hardware, or change what is logged, filmed and evaluated, but not what is learned
BOOKKEEPING = """seed exp_name cuda cuda_graphs compile torch_deterministic track wandb_project_name wandb_entity capture_video
save_model log_frequency plasticity_frequency eval_frequency eval_episodes eval_steps eval_epsilon resume fork
evaluate""".split()
NORM_TRIGGER = ("injection_trigger", "injection_norm_ratio", "injection_check_frequency", "max_injections")
OF_INTERVENTION = ("intervention", "injection", "freeze_heads", "injection_optimizer_state", "shrink_factor", *NORM_TRIGGER)
MIN_SEEDS = 3  # per arm, for a verdict and for an interval
CONFIDENCE = 0.95
RESAMPLES = 2_000  # of a bootstrap
MAX_BINS = 100  # points of a curve
GAMES_PER_BIN = 10  # at least, on average, in the curves of return
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's, safe for the colour-blind
INK = "#222222"
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8}

ARM_NAMES = {  # one and several
    "injection": ("injection", "injections"),
    "reset-head": ("head reset", "head resets"),
    "shrink-perturb": ("shrink and perturb", "shrink and perturb"),
}
DEEDS = {"injection": "injection", "reset-head": "resetting the head", "shrink-perturb": "shrink and perturb"}

# Scores of random play and of a human tester, from no-op starts: github.com/google-deepmind/dqn_zoo, dqn_zoo/atari_data.py
HUMAN_SCORES: dict[str, tuple[float, float]] = {
    "alien": (227.8, 7127.7), "amidar": (5.8, 1719.5), "assault": (222.4, 742), "asterix": (210, 8503.3),
    "asteroids": (719.1, 47388.7), "atlantis": (12850, 29028.1), "bank_heist": (14.2, 753.1), "battle_zone": (2360, 37187.5),
    "beam_rider": (363.9, 16926.5), "berzerk": (123.7, 2630.4), "bowling": (23.1, 160.7), "boxing": (0.1, 12.1),
    "breakout": (1.7, 30.5), "centipede": (2090.9, 12017), "chopper_command": (811, 7387.8),
    "crazy_climber": (10780.5, 35829.4), "defender": (2874.5, 18688.9), "demon_attack": (152.1, 1971),
    "double_dunk": (-18.6, -16.4), "enduro": (0, 860.5), "fishing_derby": (-91.7, -38.7), "freeway": (0, 29.6),
    "frostbite": (65.2, 4334.7), "gopher": (257.6, 2412.5), "gravitar": (173, 3351.4), "hero": (1027, 30826.4),
    "ice_hockey": (-11.2, 0.9), "jamesbond": (29, 302.8), "kangaroo": (52, 3035), "krull": (1598, 2665.5),
    "kung_fu_master": (258.5, 22736.3), "montezuma_revenge": (0, 4753.3), "ms_pacman": (307.3, 6951.6),
    "name_this_game": (2292.3, 8049), "phoenix": (761.4, 7242.6), "pitfall": (-229.4, 6463.7), "pong": (-20.7, 14.6),
    "private_eye": (24.9, 69571.3), "qbert": (163.9, 13455), "riverraid": (1338.5, 17118), "road_runner": (11.5, 7845),
    "robotank": (2.2, 11.9), "seaquest": (68.4, 42054.7), "skiing": (-17098.1, -4336.9), "solaris": (1236.3, 12326.7),
    "space_invaders": (148, 1668.7), "star_gunner": (664, 10250), "surround": (-10, 6.5), "tennis": (-23.8, -8.3),
    "time_pilot": (3568, 5229.2), "tutankham": (11.4, 167.6), "up_n_down": (533.4, 11693.2), "venture": (0, 1187.5),
    "video_pinball": (16256.9, 17667.9), "wizard_of_wor": (563.5, 4756.5), "yars_revenge": (3092.9, 54576.9),
    "zaxxon": (32.5, 9173.3),
}  # fmt: skip

FRESH = "fresh network"
CONTENDERS = ("agent", "agent, injected", FRESH)  # of a probe


@dataclass(frozen=True)
class Settings:
    """What to compare, and how."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """folders of runs, those under runs/"""
    out: str = "comparison.png"
    """where the figure goes (.png, .pdf or .svg); the other files have its name with another ending"""
    metric: Literal["charts/episodic_return", "eval/episodic_return"] = "charts/episodic_return"
    """which return is compared: that of every training game, or the mean of every evaluation"""
    window: int | None = None
    """steps after the injection that count; by default up to the last step that all compared runs have reached"""
    aggregate: Literal["mean", "iqm"] = "mean"
    """what the figures show: mean over seeds and its 95% t interval, or interquartile mean and 95% bootstrap interval, which
    covers less than that with 3 to 5 seeds (Agarwal et al. 2021). The verdict is on means in either case"""
    probe: tuple[str, ...] = ()
    """checkpoints, runs/FOLDER/checkpoint-STEP: how well do these agents still fit random targets? (Lyle et al. 2023)"""
    probe_observations: int = 512
    """replayed observations to fit targets at"""
    probe_updates: int = 1_000
    """gradient steps of each network, with the run's batch size and learning rate"""
    probe_seeds: int = 3
    """repetitions, each with its own targets, batches, fresh weights and injection"""


@dataclass(frozen=True)
class Run:
    """What a run has logged: {tag: (2, K) float64}, K steps and K values in the order of logging."""

    folder: str
    args: Args
    scalars: dict[str, np.ndarray]

    @functools.cached_property
    def last_step(self) -> int:
        return int(max(steps.max() for steps, _ in self.scalars.values()))

    def between(self, tag: str, after: int, upto: float) -> np.ndarray:
        """(2, K) points of `tag` with after < step ≤ upto."""
        points = self.scalars.get(tag, np.empty((2, 0)))
        return points[:, (points[0] > after) & (points[0] <= upto)]


@dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing but the seed; `setting` is what they share."""

    name: str
    setting: dict[str, Any]
    runs: list[Run]

    @property
    def game(self) -> str:
        return self.setting["env_id"]

    @property
    def injection(self) -> tuple[int, ...]:
        return self.setting["injection"]

    def injections(self, run: Run) -> tuple[int, ...]:
        """Steps of a run's injections: those planned or, where the norm decides, those logged so far."""
        return self.injection or tuple(map(int, run.between("injection/step", -1, math.inf)[0]))


@dataclass(frozen=True)
class Judgement:
    """Difference of mean returns, with − without, its 95% interval, NaN where there is none, and the verdict."""

    difference: float
    low: float
    high: float
    verdict: Literal["raised", "no evidence", "lowered", "too few seeds", "no interval"]
    sentence: str


@dataclass(frozen=True)
class Comparison:
    """Two arms that differ in nothing but the intervention, over the steps after < step ≤ upto. Pairs are (without, with)."""

    arms: tuple[Arm, Arm]
    intervention: str
    firsts: dict[int, int]  # seed: step of its run's first injection
    after: int
    upto: int
    ended_by: str | None  # the run whose last step is `upto`, where others have got further
    means: tuple[dict[int, float], dict[int, float]]  # seed: mean return of its run
    counts: tuple[int, int]  # of the returns in those means
    shared: int  # seeds whose runs were one up to the injection
    paired: bool
    judgement: Judgement
    left_out: dict[str, str]  # folder: reason

    @property
    def game(self) -> str:
        return self.arms[0].game


@dataclass(frozen=True)
class Aggregate:
    """Comparisons that differ in nothing but the game. Pairs are (without, with)."""

    names: tuple[str, str]
    games: list[str]
    windows: list[tuple[int, int]]  # of each game: after, upto
    runs: tuple[int, int]
    scores: np.ndarray  # (3, 3), see `aggregate_scores`
    left_out: dict[str, str]  # game: reason


def check(data: bytes, spans: np.ndarray) -> None:
    """Compares the masked CRC-32C of each span of `data`, (S, 2) starts and ends, with the four bytes that follow it.

    Raises:
        ValueError: one is another.
    """
    raw, table, lengths = np.frombuffer(data, np.uint8), np.array(CRC_TABLE, np.uint32), spans[:, 1] - spans[:, 0]
    for length in np.unique(lengths):
        starts = spans[lengths == length, 0]
        block = raw[starts[:, None] + np.arange(length + 4)]  # (spans of this length, bytes)
        crc = np.full(len(block), 0xFFFFFFFF, np.uint32)
        for column in block[:, :length].T:
            crc = table[(crc ^ column) & 0xFF] ^ (crc >> 8)
        crc = (~crc >> 15 | ~crc << 17) + np.uint32(0xA282EAD8)  # TFRecord's mask
        if (wrong := crc != np.ascontiguousarray(block[:, length:]).view("<u4")[:, 0]).any():
            raise ValueError(f"damaged at byte {starts[wrong].min():,}")


def records(data: bytes) -> Iterator[bytes]:
    """Contents of a TFRecord file, but for a last one that is not whole.

    Raises:
        ValueError: a checksum is wrong.
    """
    spans = list(record_spans(data))
    whole = [(start, end) for start, end in spans if end + 4 <= len(data)]
    lengths = [(start - 12, start - 4) for start, _ in spans]
    check(data, np.array(lengths + whole, np.int64).reshape(-1, 2))
    return (data[start:end] for start, end in whole)


def read_scalars(folder: Path) -> dict[str, np.ndarray]:
    """Every scalar in a folder's event files, {tag: (2, K)}. TensorBoard's own reader takes many times as long.

    Raises:
        UsageError: a file is damaged.
    """
    points = defaultdict(list)
    for path in sorted(folder.glob("events.out.tfevents.*")):
        with reading(path, "a TensorBoard event file", "the run is left out"):
            for event in map(Event.FromString, records(path.read_bytes())):
                if event.HasField("session_log"):  # the run begins here, whatever older files say
                    points.clear()
                for value in event.summary.value:
                    if value.HasField("simple_value"):
                        points[value.tag].append((event.step, value.simple_value))
    return {tag: np.array(pairs, np.float64).T for tag, pairs in points.items()}


def read_run(folder: str, metric: str) -> Run:
    """The arguments and scalars of a run.

    Raises:
        UsageError: it is no run's folder, it is damaged, or it has logged no `metric` yet, or one that is not finite.
    """
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise UsageError(f"{folder} is no run's folder, it has no run.json: the run is left out")
    with reading(path, "a run's arguments", "the run is left out"):
        args = Args(**json.loads(path.read_text())["args"])
    scalars = read_scalars(path.parent)
    if metric not in scalars:
        raise UsageError(f"{folder} has logged no {metric} yet: the run is left out")
    if not np.isfinite(scalars[metric]).all():
        raise UsageError(f"{folder} has logged a {metric} that is not finite: the run is left out")
    return Run(folder, args, scalars)


def setting(args: Args) -> dict[str, Any]:
    """The arguments that change what is learned, in a form in which those that come to the same are equal.

    "intervention" is what the run does, "injection" the steps at which, () where it does nothing or the norm decides; what
    the run does not look at is None.
    """
    if args.freeze_heads and args.injection_optimizer_state == "reset":  # which trains as "keep" does
        args = replace(args, injection_optimizer_state="keep")
    by_norm = args.injection_trigger == "norm"
    what = args.applied_intervention if by_norm or args.injection_step else "none"
    looked_at = {
        **dict.fromkeys(NORM_TRIGGER, by_norm and what != "none"),
        **dict.fromkeys(("freeze_heads", "injection_optimizer_state"), what == "injection"),
        "shrink_factor": what == "shrink-perturb",
    }
    rewritten = ("total_timesteps", "exploration_fraction", "injection_step", "apply_injection", *OF_INTERVENTION)
    shared = {name: value for name, value in asdict(args).items() if name not in (*BOOKKEEPING, *rewritten)}
    shared["exploration_steps"] = round(args.exploration_fraction * args.total_timesteps)  # a longer run only goes on
    shared |= {"intervention": what, "injection": () if what == "none" else args.injection_step}
    return shared | {name: getattr(args, name) if matters else None for name, matters in looked_at.items()}


def short(step: float) -> str:
    """A number of steps as figures show it: 0, 802, 400k, 12.5M."""
    unit, letter = (1e6, "M") if step >= 1e6 else (1e3, "k")
    if step >= unit and step % (unit / 1e3) == 0:
        return f"{step / unit:.3f}".rstrip("0").rstrip(".") + letter
    return f"{step:,.10g}"


def describe(setting: dict[str, Any], differing: Iterable[str], baseline: str) -> str:
    """An arm's name: its intervention, `baseline` if there is none, and what else sets it apart."""
    what, steps = setting["intervention"], [short(step) for step in setting["injection"]]
    if what == "none":
        words = [baseline]
    elif steps:
        words = [f"{ARM_NAMES[what][len(steps) > 1]} at {' and '.join(steps)}"]
    else:
        words = [f"{ARM_NAMES[what][0]} where the norm has grown {setting['injection_norm_ratio']:g}×"]
    for name in differing:
        value, plain = setting[name], name.replace("_", " ")
        if isinstance(value, bool):
            words.append(plain if value else f"no {plain}")
        elif value is not None:
            words.append(f"{plain} {value:,}" if isinstance(value, int) else f"{plain} {value}")
    optimizer = {"copy": ["optimizer state copied"], "reset": ["optimizer state reset"]}
    words += optimizer.get(setting["injection_optimizer_state"], [])
    words += ["all heads trained"] if setting["freeze_heads"] is False else []
    return ", ".join(words)


def group(runs: list[Run]) -> tuple[list[Arm], dict[str, str]]:
    """Arms, those of a game together and the one without injection first; and {folder: reason} of runs left out."""
    members, left_out = defaultdict(dict), {}
    for run in runs:
        arm = members[tuple(setting(run.args).items())]
        shorter, longer = sorted((run, arm.get(run.args.seed, run)), key=lambda run: run.last_step)
        arm[run.args.seed] = longer
        if shorter is not longer:
            twin = f"{longer.folder}, which has got to step {longer.last_step:,}"
            left_out[shorter.folder] = f"{shorter.folder} has the arm and the seed of {twin}: the run is left out"
    settings = [dict(key) for key in members]
    said = "intervention injection injection_trigger injection_norm_ratio injection_optimizer_state freeze_heads".split()
    names = [name for name in settings[0] if name not in ("env_id", *said)]
    differing = [name for name in names if len({shared[name] for shared in settings} - {None}) > 1]
    only_injections = {shared["intervention"] for shared in settings} <= {"injection", "none"}
    baseline = "no injection" if only_injections else "no intervention"
    arms = [Arm(describe(dict(key), differing, baseline), dict(key), list(arm.values())) for key, arm in members.items()]
    games = list(dict.fromkeys(arm.game for arm in arms))

    def order(arm: Arm) -> tuple:
        return games.index(arm.game), arm.setting["intervention"] != "none", arm.injection, arm.name

    return sorted(arms, key=order), left_out


def show(value: float, low: float = math.nan, high: float = math.nan) -> str:
    """`value [low, high]`, or the value alone where there is no interval, the largest of them with three digits or more."""
    values = [value, low, high] if low <= high else [value]
    largest = max(map(abs, values))
    decimals = max(0, 2 - math.floor(math.log10(largest))) if largest else 0
    value, *bounds = (f"{round(value, decimals) + 0.0:,.{decimals}f}".replace("-", "−") for value in values)
    return f"{value} [{', '.join(bounds)}]" if bounds else value


def noun(intervention: str) -> str:
    return "injection" if intervention == "injection" else "intervention"


def judge(without: np.ndarray, injected: np.ndarray, paired: bool, intervention: str = "injection") -> Judgement:
    """The verdict, for an injection on plasticity, from one mean return per run.

    Args:
        without, injected: (n,) and (m,); if paired, n = m and the values at one index are of one seed
        intervention: what sets them apart, as in Args
    """
    counts, nothing, deed = (len(without), len(injected)), (math.nan, math.nan), DEEDS[intervention]
    difference = float(injected.mean() - without.mean()) if all(counts) else math.nan
    if min(counts) < MIN_SEEDS:
        few = f"{counts[0]} without and {counts[1]} with {noun(intervention)}, it takes {MIN_SEEDS} of each"
        return Judgement(difference, *nothing, "too few seeds", f"too few seeds to say: {few}")
    spread = np.ptp(injected - without) if paired else np.ptp(without) + np.ptp(injected)
    if spread <= 1e-9 * max(abs(without).max(), abs(injected).max()):
        sentence = f"no interval: the return changed by {show(difference)} with every seed, no spread to judge that by"
        return Judgement(difference, *nothing, "no interval", sentence)
    test = scipy.stats.ttest_rel if paired else functools.partial(scipy.stats.ttest_ind, equal_var=False)
    low, high = map(float, test(injected, without).confidence_interval(CONFIDENCE))
    if low > 0:
        meaning = ": evidence of lost plasticity" if intervention == "injection" else ""
        sentence = f"{deed} raised the return by {show(difference, low, high)}{meaning}"
        return Judgement(difference, low, high, "raised", sentence)
    if high < 0:
        sentence = f"{deed} lowered the return by {show(-difference, -high, -low)}"
        return Judgement(difference, low, high, "lowered", sentence)
    claim, what = (
        ("of lost plasticity", "the return") if intervention == "injection" else (f"that {deed} changed the return", "it")
    )
    sentence = f"no evidence {claim}: {what} changed by {show(difference, low, high)}"
    return Judgement(difference, low, high, "no evidence", sentence)


def share_history(run: Run, other: Run, upto: int) -> bool:
    """Whether two runs were one up to a step, as forks are: the same training games ended at the same steps.

    Where none ended by then: whether one was forked from the other, or both from one checkpoint.
    """
    points, others = (r.between("charts/episodic_return", -1, upto) for r in (run, other))
    if points.size or others.size:
        return np.array_equal(points, others)
    origins = [r.args.fork and Path(r.args.fork).resolve() for r in (run, other)]
    folders = [Path(r.folder).resolve() for r in (other, run)]
    forked = any(origin and origin.parent == folder for origin, folder in zip(origins, folders, strict=True))
    return forked or origins[0] == origins[1] is not None


def in_window(runs: list[Run], metric: str, after: int, upto: int, begin: str) -> tuple[dict[int, Run], dict[str, str]]:
    """{seed: run} of the runs that count in the window after < step ≤ upto, and {folder: reason} of the others."""
    side, left_out = {}, {}
    for run in runs:
        if run.last_step < max(upto, after + 1):
            end = f"beyond {begin}" if run.last_step <= after else f"to the window's end at {upto:,}"
            left_out[run.folder] = f"{run.folder} is at step {run.last_step:,} and has not got {end}"
        elif not run.between(metric, after, upto).size:
            left_out[run.folder] = f"{run.folder} has logged no {metric} in the window"
        else:
            side[run.args.seed] = run
    return side, left_out


def compare(without: Arm, injected: Arm, metric: str, window: int | None) -> Comparison:
    """The verdict on two arms that differ in nothing but the intervention."""
    arms, what = (without, injected), injected.runs[0].args.intervention
    firsts = {run.args.seed: steps[0] for run in injected.runs if (steps := injected.injections(run))}
    yet = "not been injected yet" if what == "injection" else "had no intervention yet"
    left_out = {
        run.folder: f"{run.folder} has {yet}: the verdict is on runs that had"
        for run in injected.runs
        if run.args.seed not in firsts
    }
    used, after = [[run for run in arm.runs if run.folder not in left_out] for arm in arms], max(firsts.values(), default=0)
    reached = {run.folder: run.last_step for runs in used for run in runs if run.last_step > after}
    upto = min(reached.values(), default=after) if window is None else after + window
    cut = window is None and upto < max(reached.values(), default=after)
    ended_by = min(reached, key=reached.get) if cut else None
    begin = f"the {'' if injected.injection else 'latest first '}{noun(what)} at {after:,}"
    sides, reasons = zip(*(in_window(runs, metric, after, upto, begin) for runs in used), strict=True)
    left_out |= reasons[0] | reasons[1]
    both = sides[0].keys() & sides[1].keys()
    shared = {seed for seed in both if share_history(sides[0][seed], sides[1][seed], firsts[seed])}
    paired = len(shared) >= MIN_SEEDS
    for side in sides:
        for seed in [seed for seed in side if paired and seed not in shared]:
            folder = side.pop(seed).folder
            left_out[folder] = f"{folder} shares its history with no run of the other arm"
    returns = [{seed: side[seed].between(metric, after, upto)[1] for seed in sorted(side)} for side in sides]
    means = tuple({seed: float(values.mean()) for seed, values in side.items()} for side in returns)
    counts = tuple(sum(map(len, side.values())) for side in returns)
    judgement = judge(*(np.array(list(side.values())) for side in means), paired, what)
    extent = (firsts, after, upto, ended_by)
    return Comparison(arms, what, *extent, means, counts, len(shared), paired, judgement, left_out)


def comparisons(arms: list[Arm], metric: str, window: int | None) -> list[Comparison]:
    """One for every arm with an intervention that has a counterpart without."""

    def rest(arm: Arm) -> dict[str, Any]:
        return {name: value for name, value in arm.setting.items() if name not in OF_INTERVENTION}

    baselines = [arm for arm in arms if arm.setting["intervention"] == "none"]
    pairs = [(a, b) for b in arms if b not in baselines for a in baselines if rest(a) == rest(b)]
    return [compare(*pair, metric, window) for pair in pairs]


def iqm(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Interquartile mean: of what is left when a quarter of the values, rounded down, is cut off at both ends."""
    return scipy.stats.trim_mean(values, 0.25, axis=axis)


def emulator(env_id: str) -> dict[str, Any]:
    """How an Atari id is registered: {"game": "phoenix", "repeat_action_probability": 0.0, ...}; {} if it is no longer."""
    try:
        return atari_spec(env_id).kwargs
    except UsageError:
        return {}


def human_normalised(env_id: str, score: float) -> float | None:
    """A score on the scale where random play has 0 and a human 1; None for a game that is not in `HUMAN_SCORES`."""
    if (scores := HUMAN_SCORES.get(emulator(env_id).get("game"))) is None:
        return None
    random, human = scores
    return (score - random) / (human - random)


def aggregate_scores(
    without: Sequence[np.ndarray], injected: Sequence[np.ndarray], joint: Sequence[bool], resamples: int = RESAMPLES
) -> np.ndarray:
    """Interquartile means over the runs of all games, and 95% intervals by stratified bootstrap (Agarwal et al. 2021).

    A resample draws from each game as many runs as it has, so that every game keeps its share.

    Args:
        without, injected: per game g, scores (n_g,) and (m_g,), at least one each
        joint: per game, whether n_g = m_g and the scores at one index belong together, so that they are drawn together

    Returns:
        (3, 3) float64: of without, of injected and of the difference of the two, the value and its interval's low and high
    """
    rng, drawn = np.random.default_rng(0), ([], [])
    for ours, theirs, together in zip(without, injected, joint, strict=True):
        rows = rng.integers(len(ours), size=(resamples, len(ours)))
        drawn[0].append(ours[rows])
        drawn[1].append(theirs[rows if together else rng.integers(len(theirs), size=(resamples, len(theirs)))])
    values = np.array([iqm(np.concatenate(side)) for side in (without, injected)])  # (2,)
    samples = np.array([iqm(np.concatenate(side, axis=1), axis=1) for side in drawn])  # (2, resamples)
    values, samples = (np.concatenate((sides, np.diff(sides, axis=0))) for sides in (values, samples))
    tail = (1 - CONFIDENCE) / 2
    return np.column_stack((values, np.quantile(samples, (tail, 1 - tail), axis=1).T))


def aggregates(pairs: list[Comparison]) -> list[Aggregate]:
    """One for every set of comparisons that differ in nothing but the game, if a game of it has scores on both sides."""

    def scores(pair: Comparison, side: int) -> np.ndarray:
        return np.array([human_normalised(pair.game, mean) for mean in pair.means[side].values()])

    kinds, found = defaultdict(list), []
    for pair in pairs:
        rest = {name: value for name, value in pair.arms[1].setting.items() if name != "env_id"}
        rest |= {name: value for name, value in emulator(pair.game).items() if name not in ("game", "frameskip")}
        kinds[tuple(rest.items())].append(pair)
    for of_kind in kinds.values():
        unknown = [pair.game for pair in of_kind if human_normalised(pair.game, 0.0) is None]
        left_out = {pair.game: "no run in the window on one side" for pair in of_kind if not all(pair.means)}
        left_out |= dict.fromkeys(unknown, "no human score is known")
        usable = [pair for pair in of_kind if pair.game not in left_out]
        if usable:
            sides = [[scores(pair, side) for pair in usable] for side in (0, 1)]
            joint = [pair.shared == len(pair.means[0]) == len(pair.means[1]) for pair in usable]
            names, games = tuple(arm.name for arm in usable[0].arms), [pair.game for pair in usable]
            runs = tuple(sum(map(len, side)) for side in sides)
            windows = [(pair.after, pair.upto) for pair in usable]
            found.append(Aggregate(names, games, windows, runs, aggregate_scores(*sides, joint), left_out))
    return found


def t_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Low and high, (...), of the 95% t interval of the mean over the first axis of (n, ...), n of at least 2."""
    half = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * scipy.stats.sem(values, axis=0)
    return values.mean(axis=0) - half, values.mean(axis=0) + half


def interval(values: np.ndarray, aggregate: str = "mean") -> np.ndarray:
    """Mean or interquartile mean over seeds and its 95% interval, (3, ...) of (n, ...); the interval is NaN below 3 seeds."""
    centre = values.mean(axis=0) if aggregate == "mean" else iqm(values, axis=0)
    if len(values) < MIN_SEEDS or not centre.size:
        low = high = np.full_like(centre, np.nan)
    elif aggregate == "mean":
        low, high = t_interval(values)
    else:
        options = {"n_resamples": RESAMPLES, "method": "percentile", "vectorized": True, "rng": np.random.default_rng(0)}
        result = scipy.stats.bootstrap((values,), iqm, axis=0, confidence_level=CONFIDENCE, **options)
        low, high = result.confidence_interval
    return np.array([centre, low, high])


def curve(points: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Mean of the values of (2, K) points in each of B bins edges[i] < step ≤ edges[i + 1], (B,).

    Empty bins are interpolated between full ones, and NaN before the first and after the last. Values that are not finite
    are where a measure is undefined, and count as none.
    """
    steps, values = points[:, np.isfinite(points[1])]
    bins = np.searchsorted(edges, steps).clip(1) - 1
    counts, sums = (np.bincount(bins, weights, len(edges) - 1) for weights in (None, values))
    full, middles = np.flatnonzero(counts), (edges[:-1] + edges[1:]) / 2
    if not len(full):
        return np.full(len(middles), np.nan)
    return np.interp(middles, middles[full], sums[full] / counts[full], left=np.nan, right=np.nan)


def draw(ax: plt.Axes, arms: list[Arm], colours: dict[str, str], tag: str, bins: int, aggregate: str) -> None:
    """One panel: a thin line per run; per arm a thick one and its interval, as far as all its runs have values; injections."""
    edges = np.linspace(0, max(run.last_step for arm in arms for run in arm.runs), bins + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    for arm in arms:
        curves = np.array([curve(run.scalars[tag], edges) for run in arm.runs if tag in run.scalars])
        if len(curves):
            common, colour = ~np.isnan(curves).any(axis=0), colours[arm.name]
            centre, low, high = interval(curves[:, common], aggregate)
            ax.plot(middles, curves.T, color=colour, lw=0.6, alpha=0.45)
            ax.plot(middles[common], centre, color=colour, lw=2, label=f"{arm.name} (n = {len(curves)})")
            ax.fill_between(middles[common], low, high, color=colour, alpha=0.18, lw=0)
    kinds = {arm.setting["intervention"] for arm in arms} - {"none"}
    label = noun(*kinds) if len(kinds) == 1 else "intervention"
    for i, step in enumerate(sorted({step for arm in arms for run in arm.runs for step in arm.injections(run)})):
        ax.axvline(step, color=INK, lw=1, ls=(0, (4, 3)), label="_" * (i > 0) + label)
    ax.set_xlim(0, edges[-1])
    ax.xaxis.set_major_formatter(lambda step, _: short(step))


def legend(target: plt.Axes | SubFigure, lines: dict[str, Artist], inches: float, **where: Any) -> None:
    """A legend of {label: line} in as many columns as fit into a width."""
    columns = int(16 * inches / (max(map(len, lines)) + 8))  # characters of its small type
    target.legend(lines.values(), lines.keys(), ncols=min(max(1, columns), len(lines)), **where)


def draw_returns(games: dict[str, list[Arm]], pairs: list[Comparison], colours: dict[str, str], settings: Settings) -> None:
    """The figure of return against step, a panel per game, with the windows of the verdicts shaded."""
    columns = min(3, len(games))
    rows = math.ceil(len(games) / columns)
    size = (8, 4.6) if len(games) == 1 else (4.6 * columns, 4.4 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    played = "a training game" if settings.metric == "charts/episodic_return" else "an evaluation game"
    for ax, (game, arms) in zip(axes.flat, games.items(), strict=False):
        num_points = np.mean([run.scalars[settings.metric].shape[1] for arm in arms for run in arm.runs])
        bins = int(np.clip(num_points / GAMES_PER_BIN, 20, MAX_BINS))
        draw(ax, arms, colours, settings.metric, bins, settings.aggregate)
        windows = {(pair.after, pair.upto) for pair in pairs if pair.game == game and all(pair.counts)}
        for i, (after, upto) in enumerate(sorted(windows)):
            ax.axvspan(after, upto, color=INK, alpha=0.06, lw=0, label="_" * (i > 0) + "window of the verdict")
        ax.set(xlabel="step (1 step = 4 frames)", ylabel=f"return of {played}")
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:,g}".replace("-", "−"))
        ax.set_title(game, loc="left", fontweight="bold", fontsize=10)
        handles, labels = ax.get_legend_handles_labels()
        legend(
            ax, dict(zip(labels, handles, strict=True)), size[0] / columns - 0.6, loc="upper left", bbox_to_anchor=(0, -0.13)
        )
    for ax in axes.flat[len(games) :]:
        ax.set_axis_off()
    figure.savefig(settings.out, dpi=160)
    plt.close(figure)


def draw_plasticity(games: dict[str, list[Arm]], colours: dict[str, str], path: Path, aggregate: str) -> bool:
    """The figure of the plasticity measures that TensorBoard's custom scalars show too; False, and none, if no run has any."""
    logged = {tag for arms in games.values() for arm in arms for run in arm.runs for tag in run.scalars}
    titles = {tag: title for title, tag in RunLog.SIDE_BY_SIDE.items() if tag.startswith("plasticity/") and tag in logged}
    if not titles:
        return False
    columns = min(4, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure = plt.figure(figsize=(max(6, 3 * columns), (2.3 * rows + 1) * len(games)), layout="constrained")
    for block, (game, arms) in zip(figure.subfigures(len(games), 1, squeeze=False).flat, games.items(), strict=True):
        axes, lines = block.subplots(rows, columns, squeeze=False), {}
        for ax, (tag, title) in zip(axes.flat, titles.items(), strict=False):
            draw(ax, arms, colours, tag, MAX_BINS, aggregate)
            ax.set_title(title, fontsize=9, loc="left")
            ax.locator_params(axis="x", nbins=4)
            lines |= {line.get_label(): line for line in ax.get_legend_handles_labels()[0]}
        for ax in axes.flat[len(titles) :]:
            ax.set_axis_off()
        block.suptitle(game, x=0.01, ha="left", fontweight="bold", fontsize=10)
        for ax in axes.flat[: len(titles)][-columns:]:
            ax.set_xlabel("step (1 step = 4 frames)")
        legend(block, lines, figure.get_figwidth(), loc="outside lower center")
    figure.savefig(path, dpi=160)
    plt.close(figure)
    return True


def in_words(pair: Comparison, metric: str) -> list[str]:
    """A comparison in four lines, what, verdict, window and method; then one per run that was left out of it."""
    word = noun(pair.intervention)
    seeds = [f"{len(means)} seeds ({', '.join(map(str, means)) or 'none'})" for means in pair.means]
    if pair.paired:
        how = f"95% t interval of the differences within {seeds[0]}, whose runs share their history up to the {word}"
    else:
        few = f"of which {pair.shared} share{'s' * (pair.shared == 1)} a history, too few to pair"
        related = few if pair.shared else "which do not share their history"
        how = f"95% Welch interval, {seeds[0]} without and {seeds[1]} with {word}, {related}"
    end = f", where {pair.ended_by} is (a longer --window leaves it out)" if pair.ended_by else ""
    points = f"{pair.counts[0]:,} points of {metric} without and {pair.counts[1]:,} with {word}"
    begins = ", ".join(f"{step:,} with seed {seed}" for seed, step in sorted(pair.firsts.items()))
    points += f"; first {word} at {begins}" if pair.firsts and not pair.arms[1].injection else ""
    return [
        f"{pair.game}: {pair.arms[1].name} against {pair.arms[0].name}",
        pair.judgement.sentence,
        f"window {pair.after:,} < step ≤ {pair.upto:,}{end}, {points}",
        how if pair.judgement.verdict in ("raised", "no evidence", "lowered") else "no interval",
        *(f"not in this comparison: {reason}" for reason in pair.left_out.values()),
    ]


def aggregate_in_words(total: Aggregate) -> list[str]:
    """An aggregate in four lines, what, scores, difference and method; then one per game that was left out of it."""
    without, injected, difference = (show(*row) if row[1] < row[2] else show(row[0]) for row in total.scores)
    few = "brackets are 95% stratified bootstrap intervals, which cover less than that with few runs per game"
    runs = f"{total.runs[0]} runs without and {total.runs[1]} with"
    spans = zip(total.games, total.windows, strict=True)
    games = ", ".join(f"{game} in {after:,} < step ≤ {upto:,}" for game, (after, upto) in spans)
    return [
        f"{len(total.games)} games: {total.names[1]} against {total.names[0]}",
        f"human-normalised return, interquartile mean over runs: {without} without and {injected} with",
        f"difference {difference}, where 0 is random play and 1 a human's",
        f"over {len(total.games)} games ({games}) and {runs}; {few}",
        *(f"not in this aggregate: {game}, {reason}" for game, reason in total.left_out.items()),
    ]


def normalised_mean(pair: Comparison, side: int) -> float | None:
    """Human-normalised mean over the runs of one side."""
    means = list(pair.means[side].values())
    return human_normalised(pair.game, float(np.mean(means))) if means else None


def table(arms: list[Arm], pairs: list[Comparison], totals: list[Aggregate], metric: str) -> str:
    """The comparisons in Markdown: two rows each, one per arm that is in none, and below them each one in words."""
    head = ("game", "arm", "seeds", "n", "mean return in the window", "difference", "verdict", "human-normalised")
    rows = [head, ("---",) * len(head)]
    for pair in pairs:
        judged = pair.judgement
        difference = show(judged.difference, judged.low, judged.high) if all(pair.counts) else "–"
        for side, cells in enumerate((("", ""), (difference, judged.verdict))):
            arm, means, score = pair.arms[side], pair.means[side], normalised_mean(pair, side)
            mean = show(*interval(np.array(list(means.values())))) if means else "–"
            normalised = "–" if score is None else show(score)
            rows.append((arm.game, arm.name, ", ".join(map(str, means)), str(len(means)), mean, *cells, normalised))
    for arm in (arm for arm in arms if not any(arm in pair.arms for pair in pairs)):
        seeds = sorted(str(run.args.seed) for run in arm.runs)
        rows.append((arm.game, arm.name, ", ".join(seeds), str(len(seeds)), "–", "–", "nothing to compare with", "–"))
    words = ["", "Brackets are 95% intervals.", ""] + [f"- {'; '.join(in_words(pair, metric))}." for pair in pairs]
    if totals:
        words += ["", "## Over games", "", *(f"- {'; '.join(aggregate_in_words(total))}." for total in totals)]
    return "\n".join([f"| {' | '.join(row)} |" for row in rows] + words) + "\n"


def aggregate_as_json(total: Aggregate) -> dict[str, Any]:
    values, bounds = total.scores[:, 0].tolist(), total.scores[:, 1:].tolist()
    sides = zip(total.names, total.runs, values, bounds, strict=False)
    without, injected = ({"arm": name, "runs": runs, "iqm": iqm, "interval": bound} for name, runs, iqm, bound in sides)
    difference = {"difference": values[2], "interval": bounds[2]}
    windows = [{"after": after, "upto": upto} for after, upto in total.windows]
    return {
        "games": total.games,
        "windows": windows,
        "without": without,
        "with": injected,
        **difference,
        "left_out": total.left_out,
    }


def as_json(
    arms: list[Arm], pairs: list[Comparison], totals: list[Aggregate], remarks: dict[str, dict[str, str]], metric: str
) -> str:
    """All that was found; null stands for what is not a number."""

    def of_run(run: Run) -> dict[str, Any]:
        return {"run": run.folder, "seed": run.args.seed, "step": run.last_step, "of": run.args.total_timesteps}

    def of_pair(pair: Comparison) -> dict[str, Any]:
        judged = pair.judgement
        difference, *bounds = (x if math.isfinite(x) else None for x in (judged.difference, judged.low, judged.high))
        without, injected = (
            {"arm": arm.name, "means": means, "points": points, "human_normalised": normalised_mean(pair, side)}
            for side, (arm, means, points) in enumerate(zip(pair.arms, pair.means, pair.counts, strict=True))
        )
        return {
            "game": pair.game,
            "without": without,
            "with": injected,
            "first_injections": pair.firsts,
            "window": {"after": pair.after, "upto": pair.upto, "ended_by": pair.ended_by},
            "paired": pair.paired,
            "difference": difference,
            "interval": bounds,
            "verdict": judged.verdict,
            "sentence": judged.sentence,
            "left_out": pair.left_out,
        }

    described = [{"name": arm.name, "setting": arm.setting, "runs": [of_run(run) for run in arm.runs]} for arm in arms]
    found = {"comparisons": [of_pair(pair) for pair in pairs], "aggregates": [aggregate_as_json(total) for total in totals]}
    content = {"metric": metric, "arms": described, **found, **remarks}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def read_arms(folders: Iterable[str], metric: str) -> tuple[list[Arm], dict[str, dict[str, str]]]:
    """The arms, and {"left_out": {folder: reason}, "unfinished": {folder: how far it is}}.

    Raises:
        UsageError: no run is usable.
    """
    runs, left_out = [], {}
    for folder in dict.fromkeys(folders):
        try:
            runs.append(read_run(folder, metric))
        except UsageError as error:
            left_out[folder] = str(error)
    if not runs:
        first = next(iter(left_out.values()))
        raise UsageError(f"none of {len(left_out)} runs can be compared, give folders of runs, those under runs/; {first}")
    arms, duplicates = group(runs)
    going = [run for arm in arms for run in arm.runs if run.last_step < run.args.total_timesteps]
    unfinished = {run.folder: f"{run.folder} is at step {run.last_step:,} of {run.args.total_timesteps:,}" for run in going}
    return arms, {"left_out": left_out | duplicates, "unfinished": unfinished}


def report(settings: Settings) -> None:
    """Compares runs, prints the verdicts and writes figures, table and numbers.

    Raises:
        UsageError: a setting cannot work, or no run is usable.
        OSError: something cannot be written.
    """
    out = Path(settings.out)
    if not settings.runs:
        raise UsageError("nothing to compare: give folders of runs, python compare.py runs/A runs/B ...")
    if settings.window is not None and settings.window < 1:
        raise UsageError(f"window is {settings.window}, but must be at least 1: change --window")
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise UsageError(f"out is {out}, but must end in .png, .pdf or .svg: change --out")
    arms, remarks = read_arms(settings.runs, settings.metric)
    pairs = comparisons(arms, settings.metric, settings.window)
    totals = aggregates(pairs)
    over_games = [total for total in totals if len(total.games) > 1]
    lines = [f"{kind.replace('_', ' ')}: {line}" for kind, of_kind in remarks.items() for line in of_kind.values()]
    words = [in_words(pair, settings.metric) for pair in pairs] + [aggregate_in_words(total) for total in over_games]
    print(*lines, *("\n  ".join(of_one) for of_one in words), sep="\n")
    if not pairs:
        print("no verdict: no two arms differ in the injection alone; --fork makes the counterpart of a run")
    games: dict[str, list[Arm]] = defaultdict(list)
    for arm in arms:
        games[arm.game].append(arm)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(arm.name for arm in arms))}
    out.parent.mkdir(parents=True, exist_ok=True)
    written = [out, plasticity := out.with_stem(f"{out.stem}_plasticity"), out.with_suffix(".md"), out.with_suffix(".json")]
    with matplotlib.rc_context(STYLE):
        draw_returns(games, pairs, colours, settings)
        if not draw_plasticity(games, colours, plasticity, settings.aggregate):
            written.remove(plasticity)
            print("no figure of plasticity: no run has measured it")
    out.with_suffix(".md").write_text(table(arms, pairs, over_games, settings.metric))
    out.with_suffix(".json").write_text(as_json(arms, pairs, totals, remarks, settings.metric))
    print(f"wrote {', '.join(map(str, written))}")


def probe_args(checkpoint: Checkpoint, seed: int = 0) -> Args:
    """The run's arguments for learning in float32, with this seed and room for one injection more than were made."""
    made = int(checkpoint.state["learner"]["q_network"]["_extra_state"])
    room = {"injection_step": tuple(range(1, made + 2)), "total_timesteps": made + 2}
    room |= {name: getattr(Args, name) for name in NORM_TRIGGER}
    plain = {"bf16": False, "cuda_graphs": False, "compile": False, "torch_deterministic": True}
    return replace(checkpoint.args, seed=seed, **plain, **room)


def num_actions(checkpoint: Checkpoint) -> int:
    return len(checkpoint.state["learner"]["q_network"]["theta.2.weight"])


def replayed_observations(checkpoint: Checkpoint, count: int, device: torch.device) -> torch.Tensor:
    """Observations of `count` different transitions in a checkpoint's replay, always the same: (count, 4, 84, 84) uint8.

    Until it returns it takes the memory of the whole replay, 7.3 kB a step: 7.3 GB for 1M.

    Raises:
        UsageError: the replay holds fewer, does not fit in memory, or cannot be read.
    """
    path, args = checkpoint.path, checkpoint.args
    with reading(path, "a checkpoint", "take another"):
        needed, free = checkpoint.state["replay"]["used"] * FRAME_SIZE**2 + 40 * args.buffer_size, free_memory()
    if needed > free:
        sizes = f"needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free"
        raise UsageError(f"{path} cannot be probed, its replay {sizes}: free more, or probe it on another machine")
    with reading(path, "a checkpoint", "take another"):
        obs_space = gym.spaces.Box(0, 255, (STACK, FRAME_SIZE, FRAME_SIZE), np.uint8)
        action_space = gym.spaces.Discrete(num_actions(checkpoint))
        replay = FrameReplayBuffer(args.buffer_size, obs_space, action_space, device, n_envs=args.num_envs)
        checkpoint.restore_replay(replay)
    if (held := replay.size() * args.num_envs) < count:
        fix = f"lower --probe-observations to {held}" if held else "take a later one"
        raise UsageError(f"{path} cannot be probed, its replay holds {held:,} observations and not {count:,}: {fix}")
    chosen = np.random.default_rng(0).choice(held, size=count, replace=False)
    return replay.transitions(*np.divmod(chosen, args.num_envs)).observations


@torch.no_grad()
def random_targets(network: torch.nn.Module, obs: torch.Tensor) -> torch.Tensor:
    """sin(10⁵ f(s)) of a freshly initialised `network` f (Lyle et al. 2023): (B, num_actions) float32, about 0 ± 0.7.

    A function of the observation, so that two that are equal have one target; independent draws would ask of every network
    what none can do. In float64, or the factor would turn rounding errors into other targets. Leaves `network` in float64.
    """
    network = network.double()
    return torch.cat([torch.sin(1e5 * network.theta(network.features(part))) for part in obs.split(64)]).float()


def make_contender(name: str, checkpoint: Checkpoint, seed: int, device: torch.device) -> Learner:
    """One of `CONTENDERS`, each with an optimizer that has no moments yet. `seed` decides the fresh weights, or the injection.

    Raises:
        UsageError: the checkpoint's network is not this script's.
    """
    learner = Learner(probe_args(checkpoint, seed), num_actions(checkpoint), device)
    if name != FRESH:
        with reading(checkpoint.path, "a checkpoint", "take another"):
            learner.load_state_dict(checkpoint.state["learner"])
        learner.optimizer.state.clear()
    if name == "agent, injected":
        learner.inject()
    return learner


@torch.no_grad()
def outputs(network: torch.nn.Module, obs: torch.Tensor) -> torch.Tensor:
    """(B, num_actions) float32, in portions that do not take much memory."""
    return torch.cat([network(part) for part in obs.split(512)])


def fit(learner: Learner, obs: torch.Tensor, targets: torch.Tensor, batches: np.ndarray) -> tuple[float, float]:
    """Regresses the online network on its own mean outputs plus `targets`, with whatever of it the agent itself would train.

    The mean over the observations, one per action, is added because the agent's values have some level and a fresh network's
    have none: to learn a level is easy, and not the question (Lyle et al. 2023). The loss is ½ Σ_a (Q(s, a) − y(s, a))²,
    averaged over a batch, whose gradient is for each output what the run's Huber loss has where |δ| ≤ 1.

    Args:
        obs: (B, 4, 84, 84) uint8
        targets: (B, num_actions) float32
        batches: (updates, batch size) int, rows of obs

    Returns:
        mean squared error over all obs and actions, before and after; NaN or infinite where the network diverged
    """
    network = learner.q_network
    before = outputs(network, obs)
    targets = before.mean(dim=0) + targets
    for batch in torch.from_numpy(batches).to(obs.device):
        loss = 0.5 * (network(obs[batch]) - targets[batch]).square().sum(dim=1).mean()
        learner.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        learner.optimizer.step()
    return F.mse_loss(before, targets).item(), F.mse_loss(outputs(network, obs), targets).item()


def relative_error(errors: Sequence[float], fresh: Sequence[float]) -> dict[str, Any] | None:
    """Errors (seeds,) as multiples of a fresh network's, paired by seed.

    Returns:
        "per_seed" (seeds,), "ratio", their geometric mean, and "interval", the 95% t interval of the mean log-ratio as
        ratios, None for one seed; or None where an error is not finite or 0
    """
    if not all(0 < error < math.inf for error in (*errors, *fresh)):
        return None
    logs = np.log(errors) - np.log(fresh)
    interval = np.exp(t_interval(logs)).tolist() if len(logs) > 1 else None
    return {"per_seed": np.exp(logs).tolist(), "ratio": float(np.exp(logs.mean())), "interval": interval}


def probe_checkpoint(path: Path, settings: Settings) -> dict[str, Any]:
    """Fitting capacity of the agent in a checkpoint, with and without a fresh injection, against a fresh network's.

    With each seed all three get the same observations, targets (but for `fit`'s offset) and batches. The agent's and the
    injected agent's errors before the first update are one number, since an injection does not change Q.

    Returns:
        plain data: "errors" {contender: {"start": (seeds,), "end": (seeds,)}}, mean squared, None where not finite;
        "relative_to_fresh" {contender: see `relative_error`}, of the errors at the end; "sentence"; what it was measured on

    Raises:
        UsageError: the checkpoint is damaged or cannot be probed.
    """
    checkpoint = load_checkpoint(path)
    device = pick_device(probe_args(checkpoint))
    obs = replayed_observations(checkpoint, settings.probe_observations, device)
    errors: dict[str, dict[str, list[float]]] = {name: {"start": [], "end": []} for name in CONTENDERS}
    for seed in tqdm(range(settings.probe_seeds), desc=f"probing {path}", leave=False, disable=None):
        rng = np.random.default_rng(seed)
        for_targets, for_contenders = rng.integers(2**30, size=2).tolist()
        batches = rng.integers(len(obs), size=(settings.probe_updates, checkpoint.args.batch_size))
        targets = random_targets(make_contender(FRESH, checkpoint, for_targets, device).q_network, obs)
        for name, of_one in errors.items():
            start, end = fit(make_contender(name, checkpoint, for_contenders, device), obs, targets, batches)
            of_one["start"].append(start)
            of_one["end"].append(end)
    result = {
        "checkpoint": str(path),
        "env_id": checkpoint.args.env_id,
        "run_seed": checkpoint.args.seed,
        "step": checkpoint.step,
        "injections": len(probe_args(checkpoint).injection_step) - 1,
        **{name: getattr(settings, name) for name in ("probe_observations", "probe_updates", "probe_seeds")},
        "errors": {
            name: {when: [e if math.isfinite(e) else None for e in values] for when, values in of_one.items()}
            for name, of_one in errors.items()
        },
        "relative_to_fresh": {
            name: relative_error(errors[name]["end"], errors[FRESH]["end"]) for name in CONTENDERS if name != FRESH
        },
    }
    return result | {"sentence": probe_in_words(result)}


def times(relative: dict[str, Any]) -> str:
    """`1.23× [1.01, 1.50]`, without brackets where there is no interval."""
    interval = "" if relative["interval"] is None else " [{:.3g}, {:.3g}]".format(*relative["interval"])
    return f"{relative['ratio']:.3g}×{interval}"


def probe_in_words(result: dict[str, Any]) -> str:
    """What a result of `probe_checkpoint` says, and what it cannot say, in one sentence."""

    def against_fresh(name: str) -> str:
        relative, ends = result["relative_to_fresh"][name], result["errors"][name]["end"]
        if relative is None:
            return f"not to be compared (diverged with {ends.count(None)} of {len(ends)} seeds)"
        if (interval := relative["interval"]) is None:
            return f"{times(relative)} a fresh network's (one seed, no interval)"
        verdict = "worse" if interval[0] > 1 else "better" if interval[1] < 1 else "no clear difference"
        return f"{times(relative)} a fresh network's ({verdict})"

    fresh, updates = result["errors"][FRESH], result["probe_updates"]
    if None in fresh["end"]:
        return "no answer: a fresh network diverges with this run's learning rate"
    if (removed := 1 - sum(fresh["end"]) / sum(fresh["start"])) < 0.1:
        return f"no answer: a fresh network loses only {removed:.0%} of its error in {updates:,} updates, raise --probe-updates"
    return (
        f"after {updates:,} updates towards random targets the agent's error is {against_fresh('agent')}, with a fresh "
        f"injection it is {against_fresh('agent, injected')}; the fresh network's own error fell by {removed:.0%}"
    )


def probe_table(result: dict[str, Any]) -> str:
    """One line per contender: error at start and end, averaged over seeds, its multiple of a fresh network's, and per seed."""

    def mean(errors: list[float | None]) -> str:
        return "diverged" if None in errors else f"{np.mean(errors):.3g}"

    rows = [("", "error at start", "at end", "relative to fresh [95%]", "per seed")]
    for name, of_one in result["errors"].items():
        relative = result["relative_to_fresh"].get(name)
        ratios = (times(relative), ", ".join(f"{ratio:.3g}" for ratio in relative["per_seed"])) if relative else ("–", "–")
        rows.append((name, mean(of_one["start"]), mean(of_one["end"]), *ratios))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def probe(settings: Settings) -> list[dict[str, Any]]:
    """Prints and returns `probe_checkpoint` of every checkpoint; those that cannot be probed are named and left out.

    Raises:
        UsageError: a setting cannot work, or no checkpoint can be probed.
    """
    for name in ("probe_observations", "probe_updates", "probe_seeds"):
        if (value := getattr(settings, name)) < 1:
            raise UsageError(f"{name} is {value}, but must be at least 1: change --{name.replace('_', '-')}")
    results, left_out = [], []
    for path in dict.fromkeys(map(Path, settings.probe)):
        try:
            result = probe_checkpoint(path, settings)
        except UsageError as error:
            left_out.append(str(error))
            print(f"left out: {error}", flush=True)
            continue
        results.append(result)
        injections = f"{result['injections']} injection{'s' * (result['injections'] != 1)}"
        print(f"{path}: {result['env_id']}, step {result['step']:,}, {injections} so far")
        print(f"{probe_table(result)}\n{result['sentence']}", flush=True)
    if not results:
        reason = left_out[0] if left_out else "give checkpoints, runs/FOLDER/checkpoint-STEP"
        raise UsageError(f"no checkpoint to probe; {reason}")
    return results


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # − on a terminal or in a log that has none
    try:
        settings = tyro.cli(Settings, description=__doc__)
        if settings.runs and settings.probe:
            raise UsageError("runs and probe exclude each other: give folders of runs, or checkpoints after --probe")
        if settings.probe:
            probe(settings)
        else:
            report(settings)
    except (UsageError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
