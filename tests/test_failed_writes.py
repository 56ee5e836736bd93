"""Runs whose files cannot be written, on full disks and others, and runs whose memory gives out."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zstandard
from conftest import scalars
from interruptions import (
    OFTEN,
    PLAYING,
    SMALL,
    assert_same_end,
    at_step,
    flags_of,
    full_disk,
    main,
    names,
    new_folder,
    send,
    uninterrupted_runs,  # noqa: F401 (a fixture)
    until_signal,
)

import dqn_injection_atari as script
import support.checkpoints as checkpoints
import support.runs as runs
from dqn_injection_atari import Args, Learner, Training, train
from support.checkpoints import save_checkpoint
from support.machine import flush_to_disk
from support.run_log import Curves


@pytest.mark.slow
def test_on_a_full_disk_the_run_goes_on_and_tries_again_and_in_the_end_nothing_is_missing(
    uninterrupted, capsys
):
    """First there is room for curves, but for no checkpoint, and later for neither."""
    with contextlib.ExitStack() as disk, pytest.MonkeyPatch.context() as patch:
        at_step(patch, 79, lambda: disk.enter_context(full_disk(1_000_000)))
        at_step(patch, 90, disk.close)
        at_step(patch, 159, lambda: disk.enter_context(full_disk(100)))
        at_step(patch, 170, lambda: present.extend(names(new_folder(set()))))
        at_step(patch, 180, disk.close)
        present = []
        folder = train(OFTEN)
    out = capsys.readouterr().out
    assert (
        "warning: no checkpoint at step 80 ([Errno 27] File too large" in out
        and "checkpoint-0 is still good" in out
    )
    assert (
        "warning: no checkpoint at step 160 ([Errno 27] File too large" in out
        and "checkpoint-142 is still good" in out
    )
    assert out.count("the curves cannot be written for now") == 1 and present == ["checkpoint-142"]
    assert_same_end(folder, uninterrupted(OFTEN))
    assert not list(folder.glob(".*"))


@pytest.mark.slow
def test_whatever_keeps_a_checkpoint_from_being_written_does_not_end_the_run(monkeypatch, capsys):
    errors = iter(
        [OSError(errno.EIO, "Input/output error"), MemoryError(), zstandard.ZstdError("zstd cannot")]
    )
    original, saved = runs.save_checkpoint, []

    def save(folder, step, *given):
        if (error := next(errors, None)) is not None:
            raise error
        saved.append(step)
        return original(folder, step, *given)

    monkeypatch.setattr(runs, "save_checkpoint", save)
    train(replace(PLAYING, total_timesteps=50, checkpoint_frequency=10))
    assert saved == [30, 40, 50]
    out = capsys.readouterr().out
    fix = "see to that, the run will try again; there is none yet"
    assert f"warning: no checkpoint at step 0 ([Errno 5] Input/output error): {fix}" in out
    assert "warning: no checkpoint at step 10 ()" in out
    assert "warning: no checkpoint at step 20 (zstd cannot)" in out


@pytest.mark.parametrize("start", [True, False])
def test_a_disk_that_is_full_at_the_start_or_the_end_is_one_line(monkeypatch, start):
    args = replace(
        PLAYING, total_timesteps=60, learning_starts=60, save_model=True, checkpoint_frequency=1000
    )
    with contextlib.ExitStack() as disk:
        if start:
            disk.enter_context(full_disk(100))
        else:
            original = script.save_agent
            monkeypatch.setattr(script, "save_agent", lambda *given: (original(*given), disk.close()))
            at_step(monkeypatch, 59, lambda: disk.enter_context(full_disk(800_000)))
        message = main(monkeypatch, *flags_of(args))
    if start:
        assert message.startswith("error: cannot write run folder ") and "File too large" in message
        assert os.listdir("runs") == []
    else:
        folder = new_folder(set())
        fix = "make room, and --resume it if you can"
        assert message == f"error: {folder} is complete but for its last checkpoint: {fix}"
        assert names(folder) == ["checkpoint-0"] and (folder / "agent.pt").exists()
        train(Args(resume=str(folder)))
        assert names(folder) == ["checkpoint-60"]


def test_a_last_step_that_fails_once_the_checkpoint_is_in_place_does_not_report_that_there_is_none(
    monkeypatch, capsys
):
    def flush(path):
        if (path / "checkpoint-20").exists():
            raise OSError(errno.EIO, "Input/output error")
        flush_to_disk(path)

    at_step(
        monkeypatch,
        20,
        lambda: (monkeypatch.setattr(checkpoints, "flush_to_disk", flush), send(signal.SIGTERM)()),
    )
    folder = train(PLAYING)
    out = capsys.readouterr().out
    assert "step 20: checkpoint-20" in out and "go on with:" in out and "no checkpoint" not in out
    assert names(folder) == ["checkpoint-0", "checkpoint-20"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"),
            "the GPU's memory has run out",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "the GPU's memory has run out",
        ),
        (RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors"), "the GPU has failed"),
        (MemoryError(), "memory has run out"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you"
            ),
            "memory has run out",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_memory_or_a_gpu_that_gives_out_in_mid_run_is_one_line_that_names_the_last_checkpoint(
    monkeypatch, error, reason
):
    def fail():
        raise error

    at_step(monkeypatch, 30, fail)
    with pytest.raises(OSError) as refusal:
        train(replace(PLAYING, checkpoint_frequency=20))
    folder, message = new_folder(set()), str(refusal.value)
    assert message.startswith(f"stopped at step 30, {reason}") and "\n" not in message
    assert message.endswith(f"; checkpoint-20 is still good: go on with --resume {folder}")


def test_memory_that_runs_out_before_the_first_checkpoint_says_how_to_begin_again(monkeypatch):
    def fail():
        raise MemoryError

    at_step(monkeypatch, 30, fail)
    with pytest.raises(OSError, match="there is no checkpoint yet: start the run again without --resume"):
        train(replace(PLAYING, checkpoint_frequency=0))


def test_memory_that_runs_out_at_the_start_is_one_line_and_nothing_is_written(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has")

    monkeypatch.setattr(script, "Learner", fail)
    message = main(monkeypatch, *flags_of(PLAYING))
    assert message.startswith(
        "error: the GPU's memory has run out (CUDA out of memory): free it of other jobs, or lower"
    )
    assert os.listdir() == []


def test_memory_that_runs_out_while_a_checkpoint_is_taken_up_is_no_fault_of_the_checkpoint(monkeypatch):
    folder = until_signal(20, PLAYING)

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has")

    monkeypatch.setattr(Learner, "load_state_dict", fail)
    message = main(monkeypatch, "--resume", str(folder))
    assert message.startswith("error: the GPU's memory has run out")


def test_a_signal_that_comes_while_a_checkpoint_fails_is_no_clean_stop(monkeypatch):
    def save(folder, step, *given):
        if step == 40:
            send(signal.SIGTERM)()
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_checkpoint(folder, step, *given)

    monkeypatch.setattr(runs, "save_checkpoint", save)
    with pytest.raises(
        OSError, match=r"^stopped at step 40 without a checkpoint .*: checkpoint-20 is still good$"
    ):
        train(replace(PLAYING, checkpoint_frequency=20))


def test_a_checkpoint_whose_size_cannot_be_told_is_still_one(monkeypatch, capsys):
    original = runs.save_checkpoint

    def save(*given):
        path = original(*given)
        path.rename(path.with_name("elsewhere")) if given[1] == 20 else None
        return path

    monkeypatch.setattr(runs, "save_checkpoint", save)
    train(replace(PLAYING, total_timesteps=40, checkpoint_frequency=20))
    assert "step 20: checkpoint-20, nan MB" in capsys.readouterr().out


@pytest.mark.slow
def test_a_signal_delivered_several_times_ends_the_run_with_a_checkpoint_and_the_firsts_status(request):
    slowly = (
        "save = runs.save_checkpoint\nruns.save_checkpoint = lambda *given: (time.sleep(1), save(*given))[1]"
    )
    code = f"import time, support.runs as runs, dqn_injection_atari as s\n{slowly}\ns.main()"
    flags = "--env-backend ale --buffer-size 500 --checkpoint-frequency 0 --head-width 16".split()
    flags += ["--learning-starts", "500"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(Path(script.__file__).parent)},
    )
    request.addfinalizer(process.kill)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    for gap in (0.2, 0.4):
        time.sleep(gap)
        process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and err == "" and "dqn_injection_atari.py --resume runs/" in out
    assert list(new_folder(set()).glob("checkpoint-*"))


def test_a_stop_whose_checkpoint_cannot_be_written_is_an_error(monkeypatch):
    at_step(monkeypatch, 20, lambda: (disk.enter_context(full_disk(900_000)), send(signal.SIGTERM)()))
    with (
        contextlib.ExitStack() as disk,
        pytest.raises(OSError, match=r"^stopped at step 20 without a checkpoint \(.*too large"),
    ):
        train(PLAYING)
    assert names(new_folder(set())) == ["checkpoint-0"]


def test_curves_that_never_reached_the_disk_are_an_error(monkeypatch):
    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    at_step(monkeypatch, 30, lambda: monkeypatch.setattr(Curves, "flush", fail))
    with pytest.raises(OSError, match="is complete but for its curves: make room"):
        train(replace(PLAYING, total_timesteps=60, checkpoint_frequency=0))


def test_a_video_that_cannot_be_written_does_not_end_the_run(monkeypatch, capsys):
    args = replace(
        PLAYING,
        eval_frequency=40,
        eval_episodes=1,
        capture_video=True,
        total_timesteps=50,
        checkpoint_frequency=0,
    )
    at_step(
        monkeypatch, 20, lambda: (new_folder(set()) / "videos").write_text("in the way", encoding="utf-8")
    )
    folder = train(args)
    assert "warning: no video at step 40" in capsys.readouterr().out
    assert [step for step, _ in scalars(folder)["eval/episodic_return"]] == [40]


def test_parameters_that_are_not_finite_never_replace_a_good_checkpoint(monkeypatch):
    original = Learner.update

    def update(self, batch, count=1):
        for parameter in self.q_network.parameters():
            parameter.data.fill_(float("nan"))
        return original(self, batch, count)

    at_step(monkeypatch, 126, lambda: monkeypatch.setattr(Learner, "update", update))
    with pytest.raises(FloatingPointError, match="not finite from step 132"):
        train(replace(SMALL, log_frequency=300))
    assert names(new_folder(set())) == ["checkpoint-130"]


def test_a_stop_that_comes_when_the_loop_has_just_looked_for_one_has_its_checkpoint(monkeypatch):
    original = Training.checkpoint_due

    def checkpoint_due(training, notable):
        if training.run.step == 20:
            training.run.signals.stop = signal.SIGTERM
        return original(training, notable)

    monkeypatch.setattr(Training, "checkpoint_due", checkpoint_due)
    folder = train(SMALL)
    assert names(folder) == ["checkpoint-22"], "one vector step later"
