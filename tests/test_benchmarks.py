"""The benchmarks measure what they say."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import TINY_GAMES
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import profile_update, sb3_dqn, throughput
from dqn_injection_atari import Learner


def test_throughput_measures_every_contender_in_turns_and_writes_all_windows(capsys, monkeypatch):
    windows = []
    original = throughput.contenders

    def contenders(*given):
        made = original(*given)
        return {name: lambda s, name=name, window=window: windows.append(name) or window(s) for name, window in made.items()}

    monkeypatch.setattr(throughput, "contenders", contenders)
    settings = throughput.ThroughputSettings(
        num_envs=(8,), sb3_num_envs=(1, 8), rounds=2, seconds=0.1, warm_up=0.0, fill=64, buffer_size=200, json=Path("out.json")
    )
    throughput.main(settings)
    names = [
        *("SB3 DQN, N=1", "SB3 DQN, N=8"),
        *(f"ours, N=8, {dtype}, {when} injection" for dtype in ("fp32", "bf16") for when in ("before", "after")),
    ]
    assert windows == names * 3, "a warm-up, then two rounds"
    result = json.loads(Path("out.json").read_text())
    assert list(result["steps_per_second"]) == names
    assert all(len(speeds) == 2 and min(speeds) > 0 for speeds in result["steps_per_second"].values())
    assert result["settings"]["rounds"] == 2 and "torch" in result["circumstances"] and result["commit"]
    assert all(name in capsys.readouterr().out for name in names[:1])


@pytest.mark.parametrize("num_envs", [1, 8])
def test_sb3_makes_one_update_per_four_steps(monkeypatch, num_envs):
    updates, steps = [], []
    monkeypatch.setattr(sb3_dqn.DQN, "train", lambda model, gradient_steps, **_: updates.append(gradient_steps))
    # by count instead of time
    monkeypatch.setattr(
        sb3_dqn.StopAfter, "_on_step", lambda stop: steps.append(stop.num_timesteps) or len(steps) < 80 // num_envs
    )
    model = sb3_dqn.make_model("PhoenixNoFrameskip-v4", num_envs, 200, 64, "cpu")
    model.learn(64)
    updates.clear()
    steps.clear()
    sb3_dqn.window(model, 0.3)
    assert steps[-1] - steps[0] + num_envs == 80 and abs(sum(updates) - 80 // 4) <= max(num_envs // 4, 1)


@pytest.mark.parametrize("num_envs", [1, 8])
def test_ours_makes_one_update_per_four_steps_from_the_first_window_on(monkeypatch, tmp_path, num_envs):
    updates = []
    original = Learner.update
    monkeypatch.setattr(Learner, "update", lambda *given: updates.append(given[2]) or original(*given))
    run = throughput.make_run(throughput.Settings(fill=64, buffer_size=200), num_envs, str(tmp_path))
    assert run.step == 64 and run.replay.size() * num_envs == 64 and not updates
    while run.step < 128:
        throughput.script.advance(run)
    assert sum(updates) == 16


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


def test_an_updates_arithmetic_is_counted_in_full(tmp_path):
    settings = throughput.Settings(env_id=TINY_GAMES, fill=64, buffer_size=200)
    run = throughput.make_run(settings, 8, str(tmp_path))
    actions = run.learner.num_actions
    layers = [20 * 20 * 32 * 256, 81 * 64 * 512, 49 * 64 * 576]
    head = 3136 * 512 + 512 * actions
    forward = sum(layers) + head
    # two passes of the online network and one of the target's; then both gradients of every layer but the first's input's
    before = 2 * 32 * (3 * forward + 2 * forward - layers[0])
    assert profile_update.update_flops(run) == before
    run.learner.inject()
    # two more heads in every pass; of θ and θ′₂, frozen, only the gradient of the input
    assert profile_update.update_flops(run) == before + 2 * 32 * (6 * head + 2 * head)


def test_the_profile_adds_up(capsys, tmp_path):
    settings = profile_update.ProfileSettings(
        fill=64, buffer_size=1000, vector_steps=4, inject=True, full_replay=True, json=tmp_path / "p.json"
    )
    profile_update.main(settings)
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "p.json").read_text())
    parts = result["seconds_per_vector_step"]
    assert set(parts) >= {"act", "emulate", "replay", "update", "all"}
    assert all(parts[part] > 0 for part in ("act", "emulate", "replay", "update"))
    assert sum(parts[part] for part in ("act", "emulate", "replay", "update")) <= parts["all"]
    assert result["update_GFLOP_per_second"] == pytest.approx(2 * result["update_GFLOP"] / parts["update"])
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
    assert profile_update.highest_rate(torch.device("cpu"), torch.float32) == pytest.approx(flops[faster] / 0.1)
