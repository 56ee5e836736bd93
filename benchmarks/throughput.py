"""Steps per second while learning: this project's agent and Stable-Baselines3's DQN, side by side in one run.

    python benchmarks/throughput.py --json throughput.json

Every contender plays at random until its replay holds `--fill` transitions, then learns for a warm-up that
is not counted. After that the contenders take turns, one window each, round after round, so that whatever
else the machine does hits all of them; medians over the rounds are reported. All make one update per 4
steps with a batch of 32.

Ours is Double DQN, with N = 1 on Stable-Baselines3's wrappers and N > 1 on ALE's vectoriser.
Stable-Baselines3's is DQN, which evaluates one network less per update, on the wrappers that its
`make_atari_env` gives (games one after the other), with the settings its users train Atari agents with,
and in a process of its own, waiting while others have their turn.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dqn_injection_atari as script
from orchestration.manifest import commit
from support.acceleration import prepare_process
from support.machine import circumstances, pick_device, slow_bfloat16
from support.process import Signals, ends_in_one_line
from support.runs import Origin, Run
from support.usage import words_given

ROOT = Path(script.__file__).parent


@dataclass(frozen=True)
class Settings:
    env_id: str = "PhoenixNoFrameskip-v4"
    """game"""
    fill: int = 4_000
    """transitions in replay when learning begins"""
    buffer_size: int = 50_000
    """replay capacity in transitions"""
    cuda: bool = True
    """use the GPU when there is one"""
    cuda_graphs: bool = False
    """as in the training script"""
    tf32: bool = script.Args.tf32
    """as in the training script; Stable-Baselines3 has PyTorch's own, TF32 for convolutions alone"""
    overlap: bool = False
    """as in the training script"""
    json: Path | None = None
    """where to write all that was measured, with settings and circumstances"""


@dataclass(frozen=True)
class ThroughputSettings(Settings):
    num_envs: tuple[int, ...] = (1, 8, 16)
    """games in parallel, ours"""
    sb3_num_envs: tuple[int, ...] = (1, 8)
    """games in parallel, Stable-Baselines3's DQN"""
    rounds: int = 9
    """windows per contender"""
    seconds: float = 2.0
    """length of a window"""
    warm_up: float = 2.0
    """seconds of learning before the first window"""


def begin_run(
    args: script.Args, device: torch.device, folder: Path, stack: contextlib.ExitStack
) -> script.Training:
    """A run of the training script that has this folder and no checkpoint yet."""
    envs, learner, replay = script.make_parts(args, device)
    run = Run(
        Origin(folder, "benchmark", asdict(args)),
        name="",
        version=script.__version__,
        args=asdict(args),
        parts={"learner": learner, "replay": replay, "envs": envs},
        circumstances=circumstances(device, script.CODE_VERSION),
        signals=Signals(),
        stack=stack,
    )
    return script.Training(args, run, envs, learner, replay)


def make_run(
    settings: Settings, num_envs: int, stack: contextlib.ExitStack, bf16: bool = False
) -> script.Training:
    """A run of the training script just before its first update, in a folder that goes with `stack`."""
    prepare_process()
    args = script.Args(
        env_id=settings.env_id,
        env_backend="sb3" if num_envs == 1 else "ale",
        num_envs=num_envs,
        buffer_size=settings.buffer_size,
        learning_starts=settings.fill,
        injection_step=(settings.fill + num_envs,),  # room for the one that `ours` makes
        # ε is at its end when learning begins
        exploration_fraction=settings.fill / script.Args.total_timesteps,
        checkpoint_frequency=0,
        bf16=bf16,
        tf32=settings.tf32,
        cuda=settings.cuda,
        torch_deterministic=False,  # a switch of the whole process that Stable-Baselines3's users leave off
        cuda_graphs=settings.cuda_graphs,
        overlap=settings.overlap,
    )
    device = pick_device(args.cuda, args.torch_deterministic, args.tf32)
    slow = slow_bfloat16(device)
    if bf16 and slow:
        raise SystemExit(f"error: {slow}: leave out --bf16")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    training = begin_run(args, device, folder, stack)
    stack.callback(training.envs.close)
    training.run.log.bar.disable = True
    training.run.log.PLAIN_LINE_SECONDS = sys.maxsize
    training.envs.reset(seed=0)
    while training.run.step < settings.fill:
        training.advance()
    return training


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def ours(
    settings: Settings, num_envs: int, bf16: bool, injected: bool, stack: contextlib.ExitStack
) -> Callable[[float], float]:
    """Steps per second of a window of so many seconds."""
    training = make_run(settings, num_envs, stack, bf16)
    run = training.run
    if injected:
        training.intervene()

    def window(seconds: float) -> float:
        first = run.step
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            training.advance()
        wait_for(training.learner.device)
        return (run.step - first) / (time.perf_counter() - start)

    return window


def sb3(settings: Settings, num_envs: int, stack: contextlib.ExitStack) -> Callable[[float], float]:
    """Steps per second of a window of so many seconds."""
    if 4 % num_envs and num_envs % 4:
        cannot = f"Stable-Baselines3 cannot make one update per 4 steps with {num_envs} games"
        raise SystemExit(f"error: {cannot}: try 1 or 8")
    device = "auto" if settings.cuda else "cpu"
    sizes = (str(num_envs), str(settings.buffer_size), str(settings.fill))
    command = [sys.executable, str(ROOT / "benchmarks" / "sb3_dqn.py"), settings.env_id, *sizes, device]
    process = stack.enter_context(
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", bufsize=1)
    )
    assert process.stdin is not None and process.stdout is not None
    questions = process.stdin
    answers = process.stdout
    stack.callback(questions.close)  # which ends it

    def answer() -> str:
        line = answers.readline()
        if not line:
            raise SystemExit("error: Stable-Baselines3's DQN ended, it says why above")
        return line

    answer()

    def window(seconds: float) -> float:
        questions.write(f"{seconds}\n")
        return float(answer())

    return window


def contenders(
    settings: ThroughputSettings, stack: contextlib.ExitStack
) -> dict[str, Callable[[float], float]]:
    """{name: its window}"""
    windows = {f"SB3 DQN, N={n}": sb3(settings, n, stack) for n in settings.sb3_num_envs}
    device = pick_device(settings.cuda, deterministic=False, tf32=settings.tf32)
    plain = "tf32" if settings.tf32 and device.type == "cuda" else "fp32"
    precisions = {plain: False, "bf16": True}
    slow = slow_bfloat16(device)
    if slow:
        del precisions["bf16"]
        print(f"bfloat16 is left out: {slow}")
    for n in settings.num_envs:
        for precision, bf16 in precisions.items():
            for when, injected in (("before", False), ("after", True)):
                name = f"ours, N={n}, {precision}, {when} injection"
                windows[name] = ours(settings, n, bf16, injected, stack)
    return windows


def measure(settings: ThroughputSettings) -> dict[str, list[float]]:
    """{contender: steps per second of each window}"""
    with contextlib.ExitStack() as stack:
        windows = contenders(settings, stack)
        for window in windows.values():
            window(settings.warm_up)
        speeds: dict[str, list[float]] = {name: [] for name in windows}
        for turn in range(settings.rounds):
            for name, window in windows.items():
                speeds[name].append(window(settings.seconds))
            print(f"round {turn + 1} of {settings.rounds}", file=sys.stderr, flush=True)
    return speeds


def table(speeds: dict[str, list[float]]) -> str:
    """A line per contender: median, range, ratios of medians to each of SB3's and to before the injection."""
    medians = {name: statistics.median(windows) for name, windows in speeds.items()}
    peers = [name for name in speeds if name.startswith("SB3")]
    header = f"{'':36}{'steps/s':>9}{'range':>14}"
    for peer in peers:
        header += f"{'÷ ' + peer:>18}"
    lines = [header + f"{'÷ before':>11}"]
    for name, windows in speeds.items():
        spread = f"{min(windows):,.0f}–{max(windows):,.0f}"
        line = f"{name:36}{medians[name]:9,.0f}{spread:>14}"
        for peer in peers:
            line += f"{medians[name] / medians[peer]:18.2f}"
        if "after injection" in name:
            before = name.replace("after injection", "before injection")
            line += f"{medians[name] / medians[before]:11.2f}"
        lines.append(line)
    return "\n".join(lines)


def provenance(settings: Settings, device: torch.device) -> dict[str, Any]:
    """Commit, software and hardware that a measurement belongs to."""
    plain = asdict(settings)
    plain["json"] = None if settings.json is None else str(settings.json)
    return {
        "commit": commit(),
        "settings": plain,
        "circumstances": circumstances(device, script.CODE_VERSION),
    }


def main(settings: ThroughputSettings) -> None:
    device = pick_device(settings.cuda, deterministic=False, tf32=settings.tf32)
    speeds = measure(settings)
    source = provenance(settings, device)
    hardware = source["circumstances"]["device"]
    print(f"{hardware}, commit {source['commit']}, medians of {settings.rounds} windows")
    print(table(speeds))
    if settings.json is not None:
        result = {"steps_per_second": speeds, **source}
        settings.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with ends_in_one_line():
        main(tyro.cli(ThroughputSettings, description=__doc__, args=words_given()))
