"""The benchmarks measure what they say."""

import contextlib
import functools
import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from conftest import TINY_GAMES
from saved_agents import run_with_agent
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

from benchmarks import checkpoint_size, kill_test, profile_update, sb3_dqn, sweep_overhead, throughput
from dqn_injection_atari import Learner
from support.run_log import Curves, Point, summary
from support.usage import UsageError


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.slow
def test_throughput_measures_every_contender_in_turns_and_writes_all_windows(capsys, monkeypatch):
    windows = []
    original = throughput.contenders

    def contenders(*given):
        created = original(*given)
        return {
            name: lambda s, name=name, window=window: windows.append(name) or window(s)
            for name, window in created.items()
        }

    monkeypatch.setattr(throughput, "contenders", contenders)
    settings = throughput.ThroughputSettings(
        num_envs=(2,),
        sb3_num_envs=(2,),
        rounds=2,
        seconds=0.02,
        warm_up=0.0,
        fill=64,
        buffer_size=200,
        json=Path("out.json"),
    )
    throughput.main(settings)
    names = [
        "SB3 DQN, N=2",
        "ours, N=2, fp32, before injection",
        "ours, N=2, fp32, after injection",
        "ours, N=2, bf16, before injection",
        "ours, N=2, bf16, after injection",
    ]
    assert windows == names * 3, "a warm-up, then two rounds"
    result = json.loads(Path("out.json").read_text(encoding="utf-8"))
    assert list(result["steps_per_second"]) == names
    assert all(len(speeds) == 2 and min(speeds) > 0 for speeds in result["steps_per_second"].values())
    assert result["settings"]["rounds"] == 2 and "torch" in result["circumstances"] and result["commit"]
    assert all(name in capsys.readouterr().out for name in names[:1])


@pytest.mark.parametrize("fast", [True, False])
def test_contenders_in_slow_bfloat16_are_left_out_and_one_line_says_so(monkeypatch, stack, capsys, fast):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    monkeypatch.setattr(throughput, "ours", lambda *_: None)
    created = throughput.contenders(throughput.ThroughputSettings(num_envs=(1, 8), sb3_num_envs=()), stack)
    printed = capsys.readouterr().out
    assert len(created) == (8 if fast else 4) and any("bf16" in name for name in created) == fast
    assert (
        printed == "" if fast else printed.startswith("bfloat16 is left out: ") and printed.count("\n") == 1
    )
    if not fast:
        with pytest.raises(SystemExit, match=r"^error: --bf16 is much slower .*: leave out --bf16$"):
            profile_update.measure(profile_update.ProfileSettings(bf16=True))


@pytest.mark.parametrize("num_envs", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_sb3_makes_one_update_per_four_steps(monkeypatch, num_envs):
    updates, steps = [], []
    monkeypatch.setattr(
        sb3_dqn.DQN, "train", lambda model, gradient_steps, **_: updates.append(gradient_steps)
    )
    # by count instead of time
    monkeypatch.setattr(
        sb3_dqn.StopAfter,
        "_on_step",
        lambda stop: steps.append(stop.num_timesteps) or len(steps) < 80 // num_envs,
    )
    model = sb3_dqn.make_model("PhoenixNoFrameskip-v4", num_envs, 200, 64, "cpu")
    model.learn(64)
    updates.clear()
    steps.clear()
    sb3_dqn.window(model, 0.3)
    assert steps[-1] - steps[0] + num_envs == 80 and abs(sum(updates) - 80 // 4) <= max(num_envs // 4, 1)


@pytest.mark.parametrize("env_id", ["PhoenixNoFrameskip-v4", "ALE/Phoenix-v5"])
def test_a_step_of_sb3_is_four_frames_whatever_the_id_skips(env_id):
    envs = sb3_dqn.make_model(env_id, 1, 200, 64, "cpu").get_env()
    envs.reset()
    emulator = envs.unwrapped.envs[0].unwrapped.ale
    before = emulator.getEpisodeFrameNumber()
    envs.step([0])
    assert emulator.getEpisodeFrameNumber() - before == 4


@pytest.mark.slow
@pytest.mark.parametrize("num_envs", [1, 4])
def test_ours_makes_one_update_per_four_steps_from_the_first_window_on(monkeypatch, stack, num_envs):
    updates = []
    original = Learner.update
    monkeypatch.setattr(Learner, "update", lambda *given: updates.append(given[2]) or original(*given))
    training = throughput.make_run(throughput.Settings(fill=64, buffer_size=200), num_envs, stack)
    assert training.run.step == 64 and training.replay.size() * num_envs == 64 and not updates
    while training.run.step < 128:
        training.advance()
    assert sum(updates) == 16


@pytest.mark.parametrize(("bf16", "injected"), [(False, True), (True, False)])
def test_a_window_of_ours_learns_in_the_precision_and_after_the_injection_that_its_name_says(
    monkeypatch, stack, bf16, injected
):
    created = []
    original = throughput.make_run
    monkeypatch.setattr(throughput, "make_run", lambda *given: created.append(original(*given)) or created[0])
    settings = throughput.Settings(fill=64, buffer_size=200)
    window = throughput.ours(settings, 4, bf16, injected, stack)  # an update a vector step
    network = created[0].learner.q_network
    before = network.encoder[0].weight.clone()
    assert window(0.01) > 0 and not torch.equal(network.encoder[0].weight, before)
    assert network.num_injections == injected
    assert created[0].learner.online.encoder[0].weight.dtype == (torch.bfloat16 if bf16 else torch.float32)


@pytest.mark.parametrize(("tf32", "name"), [(True, "tf32"), (False, "fp32")])
def test_on_a_gpu_a_contender_is_called_by_what_it_multiplies_with(monkeypatch, stack, tf32, name):
    given = []

    def pick_device(cuda, deterministic, tf32):
        given.append(tf32)
        return torch.device("cuda")

    monkeypatch.setattr(throughput, "pick_device", pick_device)
    monkeypatch.setattr(throughput, "slow_bfloat16", lambda _: None)
    monkeypatch.setattr(throughput, "ours", lambda *_: None)
    settings = throughput.ThroughputSettings(num_envs=(8,), sb3_num_envs=(), tf32=tf32)
    names = list(throughput.contenders(settings, stack))
    assert names[0] == f"ours, N=8, {name}, before injection" and names[2].startswith("ours, N=8, bf16")
    assert given == [tf32]


def test_the_runs_that_are_measured_multiply_as_the_settings_say(monkeypatch, stack):
    training = throughput.make_run(throughput.Settings(fill=8, buffer_size=200, tf32=False), 2, stack)
    assert not training.args.tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_a_measured_run_is_gone_when_all_is_measured():
    with contextlib.ExitStack() as stack:
        training = throughput.make_run(throughput.Settings(fill=8, buffer_size=200), 2, stack)
        training.run.log.flush()
        folder = training.run.folder
        assert any(folder.glob("events*"))
    assert not folder.exists() and not any(Path().iterdir())


def test_the_table_holds_medians_and_their_ratios():
    speeds = {
        "SB3 DQN, N=1": [100.0, 90.0, 500.0],
        "ours, N=8, fp32, before injection": [200.0, 210.0, 190.0],
        "ours, N=8, fp32, after injection": [160.0, 1.0, 170.0],
    }
    lines = [re.split(r"\s{2,}", line.strip()) for line in throughput.table(speeds).splitlines()]
    assert lines[0] == ["steps/s", "range", "÷ SB3 DQN, N=1", "÷ before"]
    assert lines[1] == ["SB3 DQN, N=1", "100", "90–500", "1.00"]
    assert lines[2] == ["ours, N=8, fp32, before injection", "200", "190–210", "2.00"]
    assert lines[3] == ["ours, N=8, fp32, after injection", "160", "1–170", "1.60", "0.80"]


@pytest.mark.slow
def test_an_updates_arithmetic_is_counted_in_full(stack):
    settings = throughput.Settings(env_id=TINY_GAMES, fill=64, buffer_size=200)
    training = throughput.make_run(settings, 2, stack)
    actions = training.learner.num_actions
    layers = [20 * 20 * 32 * 256, 81 * 64 * 512, 49 * 64 * 576]
    head = 3136 * 512 + 512 * actions
    forward = sum(layers) + head
    # two passes of the online network and one of the target's; then the gradients of every layer's weights
    # and input, but the first's input
    before = 2 * 32 * (3 * forward + 2 * forward - layers[0])
    assert profile_update.update_flops(training) == before
    training.learner.inject()
    # two more heads in every pass; of θ and θ′₂, frozen, only the gradient of the input
    assert profile_update.update_flops(training) == before + 2 * 32 * (6 * head + 2 * head)


@pytest.mark.slow
def test_the_profile_counts_every_call_in_its_part_once(monkeypatch, stack):
    training = throughput.make_run(throughput.Settings(env_id=TINY_GAMES, fill=64, buffer_size=200), 4, stack)
    learner, envs, replay = training.learner, training.envs, training.replay
    seconds = 0
    monkeypatch.setattr(profile_update.time, "perf_counter", lambda: seconds)

    def lasts(owner, name, duration):
        original = getattr(type(owner), name)

        def call(*given, **named):
            nonlocal seconds
            seconds += duration
            return original(*given, **named)

        monkeypatch.setattr(type(owner), name, call)

    calls = [
        (learner, "act"),
        (envs, "send"),
        (envs, "receive"),
        (replay, "add"),
        (replay, "sample"),
        (learner, "update"),
    ]
    for k, (owner, name) in enumerate(calls):
        lasts(owner, name, 2**k)
    expected = {"act": 1, "emulate": 2 + 4, "replay": 8 + 16, "update": 32, "all": 63}
    assert profile_update.timed_parts(training, 3) == expected
    assert profile_update.timed_parts(training, 1) == expected, "nothing is timed twice then"


@pytest.mark.slow
def test_the_profile_adds_up(capsys, monkeypatch, tmp_path):
    once = functools.partial(profile_update.seconds_per_call, repeats=1)
    monkeypatch.setattr(profile_update, "seconds_per_call", lambda call, device, **_: once(call, device))
    monkeypatch.setattr(
        profile_update, "emulator_speed", functools.partial(profile_update.emulator_speed, seconds=0.2)
    )
    settings = profile_update.ProfileSettings(
        fill=64,
        num_envs=4,
        buffer_size=1000,
        warm_up=2,
        vector_steps=4,
        inject=True,
        full_replay=True,
        json=tmp_path / "p.json",
    )
    profile_update.main(settings)
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    parts = result["seconds_per_vector_step"]
    assert set(parts) >= {"act", "emulate", "replay", "update", "all"}
    assert all(parts[part] > 0 for part in ("act", "emulate", "replay", "update"))
    assert sum(parts[part] for part in ("act", "emulate", "replay", "update")) <= parts["all"]
    assert result["update_GFLOP_per_second"] == pytest.approx(result["update_GFLOP"] / parts["update"])
    assert re.search(r"^update +[\d.]+ ms +\d+%$", out, re.MULTILINE)
    assert f"{result['emulator_steps_per_second']:,.0f}" in out
    share = result["plasticity_measurement_seconds"] * result["steps_per_second"] / 50_000
    assert 0 < share < 1 and f"{share:.2%} of the time with one every 50,000 steps" in out
    assert result["memory_GB"] > 0.1 and result["frames_on"] == "cpu"
    assert 1000 * 84 * 84 / 1e9 < result["frames_GB"] < 1200 * 84 * 84 / 1e9, "a full replay"


@pytest.mark.parametrize("faster", [0, 1])
def test_the_highest_rate_is_that_of_the_faster_of_two_calls_whose_arithmetic_is_counted(monkeypatch, faster):
    flops = []

    def seconds_per_call(call, _):
        with FlopCounterMode(display=False) as counter:
            call()
        flops.append(counter.get_total_flops())
        return 0.1 if len(flops) - 1 == faster else 10.0

    monkeypatch.setattr(profile_update, "seconds_per_call", seconds_per_call)
    assert profile_update.highest_rate(torch.device("cpu"), torch.float32) == pytest.approx(
        flops[faster] / 0.1
    )


@pytest.mark.slow
def test_the_checkpoint_that_is_measured_is_whole_and_its_figures_are_all_that_is_printed(capsys):
    checkpoint_size.main(checkpoint_size.Settings(env_id=TINY_GAMES, num_envs=2, steps=64, repeats=1))
    result = json.loads(capsys.readouterr().out)
    assert result["bitwise_equal"] and result["write_seconds"] > 0 and result["read_seconds"] > 0
    assert set(result["files_MB"]) == {"manifest.json", "state.pt", "replay.zst", "SHA256SUMS"}
    assert result["checkpoint_GB"] == pytest.approx(sum(result["files_MB"].values()) / 1e3)
    assert result["frames_GB"] > 64 * 84 * 84 / 1e9, "one frame a step, and those before the first"
    assert not any(Path().iterdir())


@pytest.mark.slow
def test_the_agent_that_plays_may_have_another_network(capsys):
    folder = run_with_agent("a", layer_norm=True, shared_bias=True, injected_head_width=24)
    agent = Path(folder, "agent.pt")
    how = {"env_id": TINY_GAMES, "num_envs": 2, "steps": 64, "repeats": 1}
    checkpoint_size.main(checkpoint_size.Settings(**how, agent=agent))
    assert json.loads(capsys.readouterr().out)["bitwise_equal"]


def test_an_agent_of_another_game_is_refused():
    agent = Path(run_with_agent("a"), "agent.pt")
    with pytest.raises(UsageError, match=f"a/agent.pt plays {TINY_GAMES}: give --env-id {TINY_GAMES}"):
        checkpoint_size.main(checkpoint_size.Settings(agent=agent))


def test_nothing_watches_memory_when_a_checkpoint_has_failed():
    before = threading.active_count()
    with pytest.raises(OSError, match="full"), checkpoint_size.peak_memory({}):
        raise OSError("full")
    assert threading.active_count() == before


@pytest.mark.slow
def test_what_a_checkpoint_restores_is_compared_with_what_was_saved(monkeypatch):
    original = checkpoint_size.load_checkpoint

    def load_another(path):
        checkpoint = original(path)
        monkeypatch.setattr(type(checkpoint), "restore", lambda *_: None)  # leaves the replay empty
        return checkpoint

    monkeypatch.setattr(checkpoint_size, "load_checkpoint", load_another)
    monkeypatch.setattr(
        checkpoint_size.torch, "equal", lambda a, b: a.shape == b.shape and bool((a == b).all())
    )
    with pytest.raises(SystemExit, match="bitwise equality"):
        checkpoint_size.main(checkpoint_size.Settings(env_id=TINY_GAMES, num_envs=2, steps=64, repeats=1))


@pytest.mark.parametrize(
    "missed",
    [{"checkpoint_GB": 0.6}, {"write_seconds": 21}, {"extra_memory_GB": 1.1}, {"bitwise_equal": False}, {}],
)
def test_a_checkpoint_that_misses_a_figure_ends_with_its_name(monkeypatch, missed):
    good = {"checkpoint_GB": 0.4, "write_seconds": 19, "extra_memory_GB": 0.9, "bitwise_equal": True}
    monkeypatch.setattr(checkpoint_size, "measure", lambda *_: good | missed)
    if not missed:
        return checkpoint_size.main(checkpoint_size.Settings())
    with pytest.raises(SystemExit, match=next(iter(missed)).replace("_equal", " equality")):
        checkpoint_size.main(checkpoint_size.Settings())


def write_run(
    folder,
    weight=1.0,
    returns=(5.0, 7.0),
    seconds=0.0,
    speed=100.0,
    tag="charts/epsilon",
    step=8,
    replay=b"frames",
):
    """A run's folder with one checkpoint, as far as the kill test looks at it; curves in two event files."""
    checkpoint = folder / "checkpoint-8"
    checkpoint.mkdir(parents=True)
    curves = Curves(folder, 8)
    for name, value in ((tag, 0.5), ("charts/SPS", speed)):
        curves.points.append(Point(step, seconds, summary.scalar(name, value)))
    log = {"points": curves.state_dict(), "returns": [5.0], "seconds": seconds, "interval_seconds": seconds}
    torch.save({"learner": {"weight": torch.tensor([weight])}, "log": log}, checkpoint / "state.pt")
    identity = json.dumps({"step": 8, "circumstances": {}, "run": str(folder)})
    (checkpoint / "manifest.json").write_text(identity, encoding="utf-8")
    (checkpoint / "replay.zst").write_bytes(zstandard.compress(replay))
    for purge_step, suffix in ((None, ".0"), (4, ".1")):
        with SummaryWriter(str(folder), purge_step=purge_step, filename_suffix=suffix) as writer:
            for i, value in enumerate(returns):
                writer.add_scalar("charts/episodic_return", value, 4 + i, walltime=seconds)
            writer.add_scalar("charts/SPS", speed, 8)
        # files are read by their names, in which a writer has a count of all in this process: 10 before 9
        (written,) = folder.glob(f"events*{suffix}")
        written.rename(folder / f"events.out.tfevents{suffix}")
    return kill_test.content(folder, "checkpoint-8")


def test_the_kill_test_compares_all_but_wall_clock_times(tmp_path):
    whole = write_run(tmp_path / "whole", returns=(5.0, float("nan")))
    later = write_run(tmp_path / "later", returns=(5.0, float("nan")), seconds=9.0, speed=300.0)
    assert not kill_test.differences(whole, later), "NaN equals NaN"


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"weight": -0.0}, ["/learner/weight"]),
        ({"returns": (5.0, 7.5)}, ["curves in the run folder"]),
        ({"tag": "losses/td_loss"}, ["/log/points"]),
        ({"step": 9}, ["/log/points"]),
        ({"replay": b"flames"}, ["replay"]),
    ],
)
def test_the_kill_test_names_what_differs(tmp_path, change, names):
    one = write_run(tmp_path / "a", weight=0.0)
    other = write_run(tmp_path / "b", **{"weight": 0.0} | change)
    assert kill_test.differences(one, other) == names


def test_the_kill_test_reads_curves_as_tensorboard_shows_them_and_names_a_point_that_is_shown_twice(tmp_path):
    write_run(tmp_path / "run")
    assert kill_test.read_events(tmp_path / "run") == [
        ("charts/episodic_return", 4, 5.0),
        ("charts/episodic_return", 5, 7.0),
    ]
    assert not kill_test.shown_twice(tmp_path / "run")
    with SummaryWriter(str(tmp_path / "run"), filename_suffix=".2") as writer:  # without a purge
        writer.add_scalar("charts/episodic_return", 7.0, 5)
    assert kill_test.shown_twice(tmp_path / "run") == ["charts/episodic_return at step 5 2 times"]


def test_how_long_runs_take_is_the_time_between_their_first_and_last_points(monkeypatch):
    """And no quotient of steps and speeds, which are logged as whole numbers."""
    times = {"a": [10.0, 12.5, 20.0], "b": [100.0, 107.0, 120.5]}
    for name in times:
        folder = Path("by_hand", "runs", name)
        folder.mkdir(parents=True)
        (folder / "run.json").touch()

    def read_scalars(folder):
        return {sweep_overhead.SPEED: np.array([[10, 20, 30], [1, 1, 1], times[folder.name]])}

    monkeypatch.setattr(sweep_overhead, "read_scalars", read_scalars)
    assert sweep_overhead.seconds_of_runs(Path("by_hand")) == (10 + 20.5) / 2
