"""Whole runs: what is done when, what is logged, and what leaves training untouched."""

import copy
import io
import itertools
import os
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BRIEF, MEASURED, SHORT_GAMES, TINY_GAMES, WITHOUT_LETTERS, scalars
from interruptions import uninterrupted_runs, until_signal  # noqa: F401 (a fixture)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dqn_injection_atari as script
from dqn_injection_atari import (
    Args,
    FrameReplayBuffer,
    Learner,
    QNetwork,
    Stream,
    Training,
    exploration_epsilon,
    make_envs,
    make_parts,
    stream_seed,
    train,
)
from support import environments, run_log
from support.environments import LearnerView
from support.runs import Run

SCRIPT = Path(script.__file__)
SMALL = replace(
    BRIEF, env_id="PhoenixNoFrameskip-v4", num_envs=1, total_timesteps=200, checkpoint_frequency=0
)
SMALL_FLAGS = """--env-backend ale --total-timesteps 200 --buffer-size 250 --learning-starts 100
--batch-size 4 --head-width 16 --log-frequency 60 --checkpoint-frequency 0""".split()
NORM = {"injection_trigger": "norm"}
PLAYS_ONLY = {"learning_starts": 10_000}


@pytest.fixture
def record():
    """Runs `train`; returns its calls in order, each a kind and what the tests look at, and its folder."""

    def checksum(network):
        sums = [parameter.detach().double().sum() for parameter in network.parameters()]
        return torch.stack(sums).sum().item()

    def checksums(arrays):
        return [zlib.crc32(np.ascontiguousarray(array).tobytes()) for array in arrays]

    def acting(learner, result, given):
        obs, epsilon = given
        return "act", epsilon, checksums((obs, result))

    def sending(envs, result, given):
        return ("send",)

    def updating(network, result, given):
        loss, _ = result
        return "update", (loss.item(), checksum(network), len(given[1].rewards))

    def syncing(learner, result, given):
        return ("sync",)

    def injecting(learner, result, given):
        return "inject", learner

    def adding(buffer, result, given):
        return "add", checksums(given[:5]), given, buffer

    def run(args):
        calls = []

        def spy(owner, name, entry):
            original = getattr(owner, name)

            def wrapper(self, *positional, **named):
                result = original(self, *positional, **named)
                calls.append(entry(self, result, positional))
                return result

            patch.setattr(owner, name, wrapper)

        with pytest.MonkeyPatch.context() as patch:
            spy(Learner, "act", acting)
            spy(LearnerView, "send", sending)
            spy(script, "td_loss", updating)  # one call per gradient step
            spy(Learner, "sync_target", syncing)
            spy(Learner, "inject", injecting)
            spy(FrameReplayBuffer, "add", adding)
            return calls, train(args)

    return run


def kinds(calls, *of):
    return [call[0] for call in calls if not of or call[0] in of]


def course(calls):
    """What equal runs share, in order: transitions, losses and the parameters they were taken at, syncs."""
    return [call[:2] for call in calls if call[0] not in ("inject", "send")]


def replay_of(calls):
    return next(call[3] for call in calls if call[0] == "add")


def runs_at(step, num_envs):
    run = Run.__new__(Run)
    run.step = step
    run.num_envs = num_envs
    return run


# what is done when


@pytest.mark.parametrize("num_envs", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("total", [48, 50, 113])
def test_due_counts_the_multiples_in_a_vector_step_of_any_length(num_envs, total):
    """Against a loop over single steps; the last vector step may be cut short by the end of the run."""
    for period, after in itertools.product((1, 3, 4, 16, 50), (0, 5, 16, 51, 200)):
        counted = 0
        for begin in range(0, total, num_envs):
            run = runs_at(min(begin + num_envs, total), num_envs)
            assert run.previous == begin
            steps = range(begin + 1, run.step + 1)
            assert run.due(period) == sum(step % period == 0 for step in steps)
            assert run.due(period, after) == sum(step % period == 0 and step > after for step in steps)
            counted += run.due(period, after)
        # and all of them together do not depend on num_envs
        assert counted == max(0, total // period - after // period)
    assert runs_at(16, num_envs).due(0) == 0, "0 = never"


def test_nothing_is_due_before_the_first_step():
    for num_envs in (1, 8):
        assert [runs_at(0, num_envs).due(period) for period in (1, 8, 100)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("num_envs", "overlap", "train_frequency"),
    [
        (1, False, 4),
        (3, True, 5),
        pytest.param(1, True, 1, marks=pytest.mark.slow),
        pytest.param(7, False, 1, marks=pytest.mark.slow),
        pytest.param(8, True, 4, marks=pytest.mark.slow),
    ],
)
def test_the_course_of_a_run_is_the_one_written_out(record, num_envs, overlap, train_frequency):
    """Acts, transitions, updates and syncs in order. How many there are does not depend on num_envs.

    With `overlap` the games play while the network learns.
    """
    args = replace(
        SMALL, env_id=TINY_GAMES, num_envs=num_envs, overlap=overlap, train_frequency=train_frequency
    )
    args = replace(
        args,
        total_timesteps=150,
        learning_starts=58,
        target_network_frequency=20,
        log_frequency=50,
        batch_size=1,
    )
    calls, _ = record(args)
    expected = []
    for begin in range(0, 150, num_envs):
        steps = range(begin + 1, min(begin + num_envs, 150) + 1)
        updates = ["update" for step in steps if step > 58 and step % train_frequency == 0]
        syncs = ["sync" for step in steps if step > 58 and step % 20 == 0]
        if overlap:
            expected += ["act", "send", *updates, "add", *syncs]
        else:
            expected += ["act", "send", "add", *updates, *syncs]
    assert kinds(calls) == expected
    acted = [call[2] for call in calls if call[0] == "act"]
    added = [call[1] for call in calls if call[0] == "add"]
    assert acted == [[obs, actions] for obs, _, actions, _, _ in added], "what it acts on, and what it does"
    assert kinds(calls).count("update") == 150 // train_frequency - 58 // train_frequency
    assert kinds(calls).count("sync") == 150 // 20 - 58 // 20


def test_with_overlap_the_first_updates_have_something_to_learn_from(record):
    calls, _ = record(replace(SMALL, num_envs=4, overlap=True, learning_starts=0, total_timesteps=16))
    assert kinds(calls)[:4] == ["act", "send", "add", "update"] and kinds(calls).count("update") == 4


@pytest.mark.parametrize(("overlap", "env_backend"), [(True, "sb3"), (True, "ale"), (False, "sb3")])
def test_a_run_says_where_overlap_saves_no_time(capsys, overlap, env_backend):
    train(replace(SMALL, total_timesteps=10, overlap=overlap, env_backend=env_backend))
    said = "warning: with --env-backend sb3 --overlap saves no time" in capsys.readouterr().out
    assert said == (overlap and env_backend == "sb3")


@pytest.mark.slow
def test_without_learning_overlap_changes_nothing(record):
    args = replace(SMALL, num_envs=3, env_id=TINY_GAMES, **PLAYS_ONLY)
    plain, overlapped = (record(replace(args, overlap=overlap)) for overlap in (False, True))
    assert course(plain[0]) == course(overlapped[0])
    returns = [scalars(folder)["charts/episodic_return"] for _, folder in (plain, overlapped)]
    assert returns[0] == returns[1] and returns[0]


def test_nothing_but_acting_waits_for_the_device_between_two_points_of_the_curves(monkeypatch):
    """Every way to turn a tensor into a Python number or a NumPy array makes a GPU's host wait."""
    reads = []
    per_step = {}
    advance = Training.advance
    for name in "item tolist numpy cpu nonzero __bool__ __int__ __float__ __index__ __array__".split():
        original = getattr(torch.Tensor, name)

        def spy(tensor, *given, name=name, original=original, **named):
            reads.append(name)
            return original(tensor, *given, **named)

        monkeypatch.setattr(torch.Tensor, name, spy)

    def advanced(run):
        reads.clear()
        advance(run)
        per_step[run.run.step] = list(reads)

    monkeypatch.setattr(Training, "advance", advanced)
    train(replace(SMALL, num_envs=4, log_frequency=100, end_e=0.0, exploration_fraction=0.0))
    assert per_step[100] and per_step[200], "logging reads the losses"
    quiet = [reads for step, reads in per_step.items() if step % 100]
    assert all(reads == ["cpu", "numpy"] for reads in quiet), "the actions, once per decision"
    assert len(quiet) == 200 // 4 - 2


@pytest.mark.parametrize("num_envs", [1, 3])
def test_the_run_acts_learns_and_remembers_as_its_arguments_say(record, num_envs):
    args = replace(SMALL, num_envs=num_envs, batch_size=5, exp_name="named", total_timesteps=150)
    calls, folder = record(args)
    epsilons = [call[1] for call in calls if call[0] == "act"]
    assert epsilons == [exploration_epsilon(args, step) for step in range(0, 150, num_envs)]
    assert {call[1][2] for call in calls if call[0] == "update"} == {5}
    replay = replay_of(calls)
    assert replay.buffer_size == 250 // num_envs and replay.n_envs == num_envs
    assert folder.name.startswith("PhoenixNoFrameskip-v4__named__1__")


@pytest.mark.parametrize(
    ("num_envs", "planned", "ends"),
    [(1, (1, 121, 149), (1, 121, 149)), pytest.param(4, (1, 121), (4, 124), marks=pytest.mark.slow)],
)
def test_each_injection_happens_once_at_the_end_of_its_vector_step(record, num_envs, planned, ends):
    args = replace(SMALL, num_envs=num_envs, injection_step=planned, total_timesteps=150)
    calls, folder = record(args)
    at = [i for i, call in enumerate(calls) if call[0] == "inject"]
    assert [kinds(calls[:i]).count("add") * num_envs for i in at] == [*ends] == [*args.planned_interventions]
    assert [kinds(calls[:i]).count("update") for i in at] == [max(step, 100) // 4 - 100 // 4 for step in ends]
    curves = scalars(folder)
    assert curves["injection/step"] == [(step, step) for step in ends]
    assert curves["injection/max_abs_delta_q"] == [(step, 0.0) for step in ends]


@pytest.mark.slow
def test_what_falls_due_within_a_vector_step_happens_at_its_end(monkeypatch):
    seeds = []
    synced = []
    original_reset = LearnerView.reset
    original_advance = Training.advance

    def reset(envs, seed):
        seeds.append(seed)
        return original_reset(envs, seed=seed)

    def advance(run):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Learner, "sync_target", lambda _: synced.append(run.run.step))
            original_advance(run)

    monkeypatch.setattr(LearnerView, "reset", reset)
    monkeypatch.setattr(Training, "advance", advance)
    args = replace(
        SMALL,
        env_id=TINY_GAMES,
        num_envs=4,
        total_timesteps=205,
        checkpoint_frequency=81,
        injection_step=(150,),
    )
    folder = train(replace(args, learning_starts=30, train_frequency=20, log_frequency=62))
    curves = scalars(folder)
    assert [step for step, _ in curves["charts/epsilon"]] == [64, 124, 188, 205], "and at the end of the run"
    assert synced == [52, 100, 152, 200]
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-152", "checkpoint-205"}
    assert seeds == [stream_seed(1, Stream.ENVIRONMENTS, step) for step in (0, 84, 164)], "new games begin"
    assert dict(curves["charts/epsilon"])[124] == pytest.approx(exploration_epsilon(args, 124))


# what is learned from


@pytest.mark.parametrize("backend", [pytest.param("sb3", marks=pytest.mark.slow), "ale"])
def test_replay_is_given_what_happened(record, backend):
    """Lost lives are terminal, truncations bootstrap, and a game's last frame is not the next one's first."""
    args = replace(
        SMALL,
        env_backend=backend,
        env_id=SHORT_GAMES,
        num_envs=2,
        end_e=1.0,
        total_timesteps=440,
        **PLAYS_ONLY,
    )
    transitions = [call[2] for call in record(args)[0] if call[0] == "add"]
    ends = 0
    lives_lost = 0
    for (obs, next_obs, _, rewards, done, infos), (later_obs, *_) in itertools.pairwise(transitions):
        assert np.array_equal(next_obs[:, :-1], obs[:, 1:]) and set(rewards) <= {-1, 0, 1}
        for i in range(2):
            restarted = not later_obs[i, :3].any()
            if infos[i]["TimeLimit.truncated"]:
                assert done[i] and restarted
                assert not np.array_equal(next_obs[i, -1], later_obs[i, -1])
                ends += 1
            else:
                assert restarted <= done[i] and (restarted or np.array_equal(later_obs[i], next_obs[i]))
                lives_lost += done[i]
    assert ends >= 2 and lives_lost > 0

    # the same games once more, by hand
    envs = make_envs(args)
    envs.reset(seed=stream_seed(args.seed, Stream.ENVIRONMENTS, 0))
    rewarded = 0
    for obs, next_obs, actions, rewards, done, infos in transitions:
        assert np.array_equal(obs, envs.obs)
        _, expected, terminations, truncations, seen = envs.step(actions)
        assert np.array_equal(next_obs, seen["final_obs"]) and np.array_equal(rewards, expected)
        assert np.array_equal(done, terminations | truncations)
        assert [info["TimeLimit.truncated"] for info in infos] == truncations.tolist()
        rewarded += np.count_nonzero(rewards)
    assert rewarded > 0


def test_exploration_and_replay_draw_from_streams_of_the_seed():
    for seed in (1, 2):
        _, learner, replay = make_parts(replace(SMALL, seed=seed), torch.device("cpu"))
        for generator, stream in ((learner.rng, Stream.EXPLORATION), (replay.generator, Stream.REPLAY)):
            expected = np.random.default_rng(stream_seed(seed, stream))
            assert generator.bit_generator.state == expected.bit_generator.state


def test_each_measure_of_plasticity_looks_at_transitions_of_its_own(monkeypatch):
    looked_at = []
    monkeypatch.setattr(script, "plasticity_measures", lambda _, batch: looked_at.append(batch) or {})
    drawn = []
    original = Training.replayed

    def replayed(training, stream, key, count=None):
        batch = original(training, stream, key, count)
        drawn.append((stream, key, batch))
        return batch

    monkeypatch.setattr(Training, "replayed", replayed)
    brief = replace(SMALL, injection_step=(), total_timesteps=60, checkpoint_frequency=0)
    train(replace(brief, plasticity_frequency=20))
    assert [(stream, key) for stream, key, _ in drawn] == [(Stream.PLASTICITY, step) for step in (20, 40, 60)]
    assert [id(batch) for _, _, batch in drawn] == [id(batch) for batch in looked_at]


def test_transitions_measured_are_drawn_by_seed_stream_and_key_and_training_does_not_notice(monkeypatch):
    monkeypatch.setattr(Training, "MEASURED", MEASURED)
    space = environments.make_atari_envs(TINY_GAMES, "ale", 1).single_observation_space
    replay = FrameReplayBuffer(40, space, script.environments.gym.spaces.Discrete(6), "cpu", 2)
    zeros = np.zeros((2, 4, 84, 84), np.uint8)
    for i in range(13):
        rewards = np.array([2.0 * i + 1, 2.0 * i + 2])
        replay.add(zeros, zeros, np.zeros(2, int), rewards, np.zeros(2, bool), [{}, {}])
    before = replay.generator.bit_generator.state

    def drawn(seed, stream, key):
        training = Training(Args(seed=seed), run=None, envs=None, learner=None, replay=replay)
        return training.replayed(stream, key).rewards[:, 0].tolist()

    first = drawn(1, Stream.PLASTICITY, 5)
    assert len(first) == 512 and set(first) == set(range(1, 27)), "all that is there and no more"
    assert first == drawn(1, Stream.PLASTICITY, 5)
    assert first != drawn(2, Stream.PLASTICITY, 5)
    assert first != drawn(1, Stream.INJECTION, 5)
    assert first != drawn(1, Stream.PLASTICITY, 6)
    assert replay.generator.bit_generator.state == before


def test_the_logged_change_of_q_is_the_largest(monkeypatch):
    """That of one action's, where the others keep theirs."""
    original = QNetwork.inject

    def broken(self, generator=None):
        original(self, generator)
        with torch.no_grad():
            self.head.theta_prime_2[0].output.bias[2] += 3

    monkeypatch.setattr(QNetwork, "inject", broken)
    folder = train(replace(SMALL, injection_step=(60,), total_timesteps=70))
    assert scalars(folder)["injection/max_abs_delta_q"] == [(60, pytest.approx(3, rel=1e-5))]


# what leaves training untouched


@pytest.mark.slow
def test_a_seed_fixes_a_whole_run_and_only_an_injection_changes_it(record):
    """Two runs with one seed are bitwise equal, one with and one without injection up to it."""
    args = replace(SMALL, injection_step=(150,), num_envs=2, total_timesteps=170)
    injected, _ = record(args)
    again, _ = record(args)
    baseline, _ = record(replace(args, intervention="none"))
    other, _ = record(replace(args, seed=2, total_timesteps=152))
    assert course(injected) == course(again)
    at = kinds(injected).index("inject")
    assert "inject" not in kinds(baseline)
    assert course(injected[:at]) == course(baseline[:at])
    assert kinds(injected[:at]).count("update") == 150 // 4 - 100 // 4
    assert course(injected[at:]) != course(baseline[at:])
    assert course(other[:at]) != course(injected[:at])
    # and the arms go on sharing their random numbers
    assert (
        replay_of(injected).generator.bit_generator.state == replay_of(baseline).generator.bit_generator.state
    )


@pytest.mark.slow
def test_evaluating_filming_and_saving_change_nothing_in_training(record):
    args = replace(SMALL, injection_step=(120,), total_timesteps=160, env_backend="sb3", env_id=TINY_GAMES)
    plain, _ = record(args)
    evaluating = replace(args, eval_frequency=70, eval_episodes=2, eval_epsilon=0.5, capture_video=True)
    evaluated, folder = record(replace(evaluating, save_model=True))
    assert course(plain) == course(evaluated)
    curve = scalars(folder)["eval/episodic_return"]
    assert [step for step, _ in curve] == [70, 140] and all(value >= 0 for _, value in curve)
    assert {path.name for path in (folder / "videos").iterdir()} == {"step-70.mp4", "step-140.mp4"}
    assert (folder / "agent.pt").exists()


def test_what_is_evaluated_and_saved_at_an_intervention_is_the_network_before_it(monkeypatch):
    calls = []
    for owner, name in ((script, "evaluate"), (Training, "intervene"), (Run, "save")):
        original = getattr(owner, name)

        def spy(*given, name=name, original=original, **named):
            calls.append(name)
            return original(*given, **named)

        monkeypatch.setattr(owner, name, spy)
    args = replace(SMALL, env_id=TINY_GAMES, total_timesteps=70, checkpoint_frequency=60, **PLAYS_ONLY)
    args = replace(args, injection_step=(50,), intervention="reset-head", eval_frequency=50, eval_episodes=1)
    train(args)
    assert calls == ["save", "save", "evaluate", "intervene", "save", "save"], "at 0, 50, 60 and 70"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "games"),
    [({"eval_episodes": 5}, 5), ({"eval_episodes": 0, "eval_steps": 160}, 5)],
    ids=["games", "steps"],
)
def test_an_evaluation_logs_the_mean_of_whole_games(monkeypatch, settings, games):
    """Also of more games than the replay holds steps."""
    evaluations = []
    original = script.evaluate

    def evaluate(*given):
        evaluations.append(original(*given))
        return evaluations[-1]

    monkeypatch.setattr(script, "evaluate", evaluate)
    args = replace(SMALL, env_id=TINY_GAMES, buffer_size=4, total_timesteps=60)
    folder = train(replace(args, eval_frequency=40, eval_epsilon=1.0, **settings))
    (scores,) = evaluations
    assert len(scores) == games and len(set(scores)) > 1
    assert not (scores % 20).any(), "Phoenix counts in twenties"
    assert scalars(folder)["eval/episodic_return"] == [(40, pytest.approx(scores.mean()))]


def test_the_recent_speed_leaves_evaluations_out_and_that_over_all_does_not(monkeypatch, tick):
    """On a clock on which a decision takes a second and an evaluation 1,000."""
    advance = Training.advance
    monkeypatch.setattr(Training, "advance", lambda run: (tick(1), advance(run)))
    monkeypatch.setattr(script, "evaluate", lambda *_: tick(1000) or np.zeros(2))
    curves = scalars(train(replace(SMALL, num_envs=4, log_frequency=100, eval_frequency=120, **PLAYS_ONLY)))
    assert dict(curves["charts/SPS_recent"]) == pytest.approx({100: 4, 200: 4})
    assert dict(curves["charts/SPS"]) == {100: 4, 200: 200 // 1050}


# what is logged


def test_tensorboard_holds_every_promised_curve_and_the_hyperparameters():
    args = replace(
        SMALL, env_id=TINY_GAMES, num_envs=2, learning_starts=120, log_frequency=20, injection_step=(170,)
    )
    folder = train(replace(args, exploration_fraction=0.5))
    assert folder.parent == Path("runs") and folder.is_dir()
    curves = scalars(folder)
    expected = """charts/episodic_return charts/episodic_length charts/epsilon charts/SPS charts/SPS_recent
    charts/games_cut losses/td_loss losses/q_values injection/step injection/max_abs_delta_q"""
    assert set(curves) == set(expected.split())
    for tag in ("charts/epsilon", "charts/SPS", "charts/SPS_recent"):
        assert [step for step, _ in curves[tag]] == list(range(20, 201, 20))
    for tag in ("losses/td_loss", "losses/q_values"):
        assert [step for step, _ in curves[tag]] == [140, 160, 180, 200]
    assert curves["charts/epsilon"][-1][1] == pytest.approx(0.01)
    assert curves["charts/epsilon"][0][1] == pytest.approx(1 - 0.99 * 20 / 100)
    texts = EventAccumulator(str(folder)).Reload()
    hyperparameters = texts.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    assert f"|env_id|{TINY_GAMES}|" in hyperparameters and "|injection_step|(170,)|" in hyperparameters


@pytest.mark.slow
def test_where_a_measure_is_undefined_no_point_of_it_is_logged(monkeypatch):
    """The head dies at step 100 and lives again from step 150 on."""
    args = replace(BRIEF, total_timesteps=200, plasticity_frequency=40, learning_starts=200)
    original = script.plasticity_measures

    def measured(learner, batch):
        hidden = learner.q_network.head.theta.hidden
        saved = copy.deepcopy(hidden.state_dict())
        if next(steps) in (120, 160):
            torch.nn.init.zeros_(hidden.weight)
            torch.nn.init.zeros_(hidden.bias)
        measures = original(learner, batch)
        hidden.load_state_dict(saved)
        return measures

    steps = iter((40, 80, 120, 160, 200))

    monkeypatch.setattr(script, "plasticity_measures", measured)
    logged = scalars(train(args))
    assert [step for step, _ in logged["plasticity/srank/head"]] == [40, 80, 200]
    assert [step for step, _ in logged["plasticity/srank/encoder"]] == [40, 80, 120, 160, 200]
    dormant = dict(logged["plasticity/dormant_fraction/head"])
    assert dormant[120] == dormant[160] == 1 and dormant[80] < 1


@pytest.mark.parametrize("boundary", [pytest.param(True, marks=pytest.mark.slow), False])
def test_games_that_end_without_a_return_are_counted_where_they_are_cut_and_at_the_end(boundary):
    """Games of 30 steps in 2 environments, cut after 50 steps in each, and at the end."""
    frequency = 100 if boundary else 0
    folder = train(replace(BRIEF, total_timesteps=250, checkpoint_frequency=frequency, learning_starts=250))
    logged = scalars(folder)
    ended = [step for step, _ in logged["charts/episodic_return"]]
    if boundary:
        assert logged["charts/games_cut"] == [(100, 2), (200, 2), (250, 2)]
        assert len(ended) == 2 * 2 and max(ended) <= 160
    else:
        assert logged["charts/games_cut"] == [(250, 2)] and len(ended) == 2 * (125 // 30)


def test_where_games_end_just_there_none_is_cut():
    folder = train(replace(BRIEF, total_timesteps=120, checkpoint_frequency=60, learning_starts=120))
    logged = scalars(folder)
    assert "charts/games_cut" not in logged and len(logged["charts/episodic_return"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("stop", [100, 150, 240])
def test_games_cut_are_counted_once_whatever_interrupts_the_run(stop):
    args = replace(BRIEF, total_timesteps=240, checkpoint_frequency=100, learning_starts=240)
    folder = until_signal(stop, args)
    train(Args(resume=str(folder)))
    train(Args(resume=str(folder)))  # also a run that is complete
    assert scalars(folder)["charts/games_cut"] == [(100, 2), (200, 2), (240, 2)]
    forked = train(
        replace(args, fork=str(folder / "checkpoint-240"), total_timesteps=320, exploration_fraction=0.075)
    )
    assert scalars(forked)["charts/games_cut"] == [(100, 2), (200, 2), (300, 2), (320, 2)]


class Odd(io.TextIOBase):
    """What a notebook or a launcher may put there for a terminal."""

    def __init__(self, error):
        self.error = error

    def write(self, _):
        raise self.error

    flush = isatty = fileno = lambda self: self.write("")


@pytest.mark.slow
@pytest.mark.parametrize(
    "stream",
    [lambda: None, lambda: Odd(BrokenPipeError()), lambda: Odd(ValueError("I/O operation on closed file"))],
)
def test_a_run_does_not_depend_on_its_output(uninterrupted, monkeypatch, stream):
    args = replace(BRIEF, total_timesteps=130, eval_frequency=60, eval_episodes=1)
    expected = scalars(uninterrupted(args))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream())
        patch.setattr(sys, "stderr", stream())
        folder = train(args)
    found = scalars(folder)
    for tag in expected.keys() | found.keys():
        assert "SPS" in tag or found[tag] == expected[tag]


def test_logged_losses_are_means_over_the_interval(record):
    calls, folder = record(SMALL)
    losses = [call[1][0] for call in calls if call[0] == "update"]
    curve = dict(scalars(folder)["losses/td_loss"])
    # 120 < updates at 124, 128, ... 180 ≤ 180
    assert curve[180] == pytest.approx(np.mean(losses[5:20]), rel=1e-5)


@pytest.mark.parametrize("backend", [pytest.param("sb3", marks=pytest.mark.slow), "ale"])
def test_logged_returns_are_raw_scores_of_whole_games_each_at_its_own_decision(record, backend):
    args = replace(
        SMALL,
        env_id=SHORT_GAMES,
        env_backend=backend,
        total_timesteps=420,
        num_envs=2,
        end_e=1.0,
        **PLAYS_ONLY,
    )
    calls, folder = record(args)
    envs = make_envs(args)
    envs.reset(seed=stream_seed(args.seed, Stream.ENVIRONMENTS))
    expected = []
    step = 0
    scores = np.zeros(2)
    base = envs.env.env  # below the statistics and the learner's view: raw scores
    for _, _, (_, _, actions, *_), _ in (call for call in calls if call[0] == "add"):
        _, rewards, terminations, truncations, _ = base.step(actions)
        scores += rewards
        for i in np.flatnonzero(terminations | truncations):
            expected.append((step + 1 + i, scores[i]))
            scores[i] = 0
        step += 2
    curves = scalars(folder)
    assert curves["charts/episodic_return"] == expected and len({score for _, score in expected}) > 1
    assert [step for step, _ in expected] == [199, 200, 399, 400]
    assert curves["charts/episodic_length"] == [(step, 100) for step, _ in expected]


@pytest.mark.slow
def test_no_point_lies_beyond_the_end():
    """Seven games end in the 30th vector step, of which only two decisions belong to the run."""
    folder = train(replace(SMALL, env_id=TINY_GAMES, num_envs=7, total_timesteps=205, **PLAYS_ONLY))
    curves = scalars(folder)
    assert [step for step, _ in curves["charts/episodic_return"]] == [204, 205]
    for tag, curve in curves.items():
        assert max(step for step, _ in curve) <= 205, tag
    assert curves["charts/epsilon"][-1][0] == 205


# what is said


@pytest.mark.parametrize(
    ("changes", "printed"),
    [
        ({}, "no plasticity injection in this run\n"),
        (
            {"injection_step": (9,), "intervention": "none"},
            "no plasticity injection in this run: baseline arm\n",
        ),
        ({"injection_trigger": "norm"}, None),
    ],
    ids=["none", "baseline", "norm"],
)
def test_a_run_without_injection_or_learning_says_so(changes, printed, capsys):
    train(replace(SMALL, total_timesteps=10, learning_starts=10, **changes))
    out = capsys.readouterr().out
    assert printed in out if printed else "no plasticity injection" not in out
    assert "warning: nothing is learned, the run ends before --learning-starts 10\n" in out
    train(replace(SMALL, total_timesteps=10, learning_starts=9, **changes))
    assert "nothing is learned" not in capsys.readouterr().out


def test_a_run_says_what_happens_before_anything_is_learned(capsys):
    args = replace(SMALL, total_timesteps=20, exploration_fraction=0.4, learning_starts=8)
    train(replace(args, injection_step=(9,)))
    train(replace(args, injection_step=(8,), intervention="none"))
    train(replace(args, start_e=0.1, end_e=0.1, learning_starts=9))
    out = capsys.readouterr().out
    assert "has learned nothing" not in out and "remark" not in out
    train(replace(args, injection_step=(8, 15), learning_starts=9))
    out = capsys.readouterr().out
    fix = "with --learning-starts 9: give a later --injection-step"
    assert f"\nwarning: at step 8 the network has learned nothing, {fix}\n" in out
    fix = "give a lower --learning-starts, or a larger --exploration-fraction"
    assert f"\nremark: ε has fallen at step 8, and learning begins after step 9: {fix}\n" in out
    folder = train(replace(args, injection_step=(8,), learning_starts=9, checkpoint_frequency=20))
    assert "remark" in capsys.readouterr().out
    train(Args(resume=str(folder)))
    assert "remark" not in capsys.readouterr().out, "a run that goes on cannot change it"


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        (
            {"target_network_frequency": 21},
            "no sync of the target network is due, with --target-network-frequency 21: give 12 or less",
        ),
        ({"target_network_frequency": 20}, None),
        (
            NORM | {"injection_norm_ratio": 0.9, "injection_check_frequency": 8},
            "injections come before anything is learned, with --injection-norm-ratio 0.9: give more than 1",
        ),
        (NORM | {"injection_norm_ratio": 1.0, "injection_check_frequency": 8}, None),
        (NORM | {"injection_norm_ratio": 0.9, "injection_check_frequency": 9}, None),
        (
            NORM | {"injection_check_frequency": 20},
            "the norm is never looked at, with --injection-check-frequency 20: give 19 or less",
        ),
        (NORM | {"injection_check_frequency": 19}, None),
        (NORM | {"injection_check_frequency": 16, "num_envs": 4}, None),
        (
            {"exploration_start": 19},
            "ε never falls, with --exploration-start 19: give less than 19",
        ),
        ({"exploration_start": 18}, None),
        (
            {"exploration_start": 16, "num_envs": 4},
            "ε never falls, with --exploration-start 16: give less than 16",
        ),
        ({"exploration_start": 20, "start_e": 0.01, "end_e": 0.01}, None),
        ({"eval_frequency": 21}, "no evaluation is due, with --eval-frequency 21: give 20 or less"),
        ({"eval_frequency": 20, "eval_episodes": 0, "eval_steps": 4}, None),
        (
            NORM | {"injection_check_frequency": 19, "num_envs": 4},
            "the norm is never looked at, with --injection-check-frequency 19: give 16 or less",
        ),
    ],
)
def test_a_run_says_what_it_will_never_do_or_too_early(monkeypatch, capsys, changes, warning):
    synced = []
    monkeypatch.setattr(Learner, "sync_target", lambda learner: synced.append(learner))
    args = replace(SMALL, total_timesteps=20, learning_starts=8, target_network_frequency=10)
    train(replace(args, **changes))
    out = capsys.readouterr().out
    assert out.count("warning: ") == bool(warning)
    assert warning is None or f"\nwarning: {warning}\n" in out
    if "target_network_frequency" in changes:
        assert bool(synced) == (warning is None)


def test_a_loss_that_is_not_finite_ends_the_run_with_step_and_loss_named(monkeypatch):
    updates = []
    original = script.td_loss

    def td_loss(*given):
        loss, q_values = original(*given)
        updates.append(loss)
        if len(updates) > 7:
            loss = loss * float("inf")
        return loss, q_values

    closed = []
    close = run_log.RunLog.close
    monkeypatch.setattr(run_log.RunLog, "close", lambda log: closed.append(close(log)))
    monkeypatch.setattr(script, "td_loss", td_loss)
    with pytest.raises(
        FloatingPointError,
        match=r"^td_loss is not finite from step 132: lower --learning-rate, in a new run$",
    ):
        train(SMALL)  # updates at 104, 108, ... 128 are the seven good ones
    (folder,) = Path("runs").iterdir()
    assert "charts/epsilon" in scalars(folder) and len(closed) == 1, "the curves so far are on disk"


def test_a_diverging_run_ends_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", *SMALL_FLAGS, "--learning-rate", "1e30"])
    with pytest.raises(
        SystemExit,
        match=r"^error: td_loss is not finite from step 1[0-9]{2}: lower --learning-rate, in a new run$",
    ):
        script.main()


@pytest.mark.slow
def test_a_run_in_a_shell_prints_plain_lines_and_ends_with_status_0():
    """Also in a locale without letters, in folders whose names have some."""
    Path("läufe ε").mkdir()
    command = [sys.executable, str(SCRIPT), *SMALL_FLAGS, "--injection-step", "120", "--exp-name", "ε"]
    environment = os.environ | WITHOUT_LETTERS
    plain = subprocess.run(command, cwd="läufe ε", env=environment, capture_output=True, encoding="utf-8")
    assert (plain.returncode, plain.stderr) == (0, "")
    assert "step 200 of 200" in plain.stdout and "SPS" in plain.stdout
    assert "left, ? 0.01, return" in plain.stdout, "a letter that this terminal has not"
    assert "step 120: plasticity injected" in plain.stdout and "\r" not in plain.stdout
    (folder,) = Path("läufe ε/runs").iterdir()
    assert scalars(folder)["injection/step"] == [(120, 120)]


# what the script offers


def test_the_names_that_users_import_are_there():
    from dqn_injection_atari import (
        Args,
        FrameReplayBuffer,
        InjectableHead,
        Learner,
        QNetwork,
        make_envs,
        td_loss,
        train,
    )

    envs = make_envs(Args(env_id=TINY_GAMES, env_backend="ale", num_envs=3))
    assert envs.num_envs == 3 and make_envs(Args(env_id=TINY_GAMES), num_envs=2).num_envs == 2
    assert make_envs(Args(env_id=TINY_GAMES), render_mode="rgb_array").render_mode == "rgb_array"
    q_network = Learner(Args(), 6, "cpu").q_network
    assert isinstance(envs, LearnerView)
    assert isinstance(q_network, QNetwork) and isinstance(q_network.head, InjectableHead)
    assert all(map(callable, (FrameReplayBuffer, td_loss, train)))
