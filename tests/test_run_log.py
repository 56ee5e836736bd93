"""What a run says: every point of its curves once, after kills, forks and full disks; speed and progress."""

import contextlib
import errno
import functools
import io
import os
import pickle
import random
import re
import shutil
import socket
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import scalars
from interruptions import before_line, dies, full_disk, send, signal
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as BrowserView
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.util import tensor_util

import support.run_log as run_log
from support.run_log import SIDE_BY_SIDE, Curves, RunLog, read_scalars, summary
from support.usage import UsageError

FOLDER = Path("run")
NUM_ENVS, TOTAL, CHECKPOINTS, INJECTION = 3, 120, 30, 63
ARGS = {
    "name": "first",
    "learning_rate": 0.5,
    "injection_step": (63,),
    "wandb_entity": None,
    "eval_frequency": 60,
}
WALL_CLOCK = ("charts/SPS", "charts/SPS_recent")


# a run as far as its log sees it


def log_a_vector_step(log, previous):
    """What training logs of one vector step, before the checkpoint at its end."""
    step = previous + NUM_ENVS
    ended = np.array([previous % 5 == 0, step % 4 == 0, step % 7 == 0])  # also several at once
    scores = {"r": np.array([10.0, 20, 30]) + step, "l": np.array([5, 6, 7])}
    log.games({"_episode": ended, "episode": scores} if ended.any() else {}, previous)
    if step % 12 == 0:
        log.interval(step, 1 / step, {"td_loss": 1.5 * step, "q_values": -step})
    if step % 30 == 0:
        log.scalar("plasticity/dormant_fraction", step / 1000, step)


def log_what_follows_the_checkpoint(log, step):
    if step == INJECTION:
        log.scalar("injection/step", step, step)
    if step and step % 60 == 0:
        log.evaluation(np.array([1.0, step]), step)


def newest(states):
    return max(states.glob("[0-9]*"), key=lambda path: int(path.name), default=None)


def live(folder, args=ARGS, origin=None, full=(0, 0, 0)):
    """A run, from its newest checkpoint on, else from the state and folder it was forked from, else anew.

    Its checkpoints are folder/states/{step}. From step full[0] to full[1] there is room for full[2] bytes.
    """
    states = folder / "states"
    states.mkdir(parents=True, exist_ok=True)
    latest = newest(states)
    begin = latest or (origin and origin[0])
    step = int(begin.name) if begin else 0
    log = RunLog(folder, step, TOTAL)
    if begin:
        log.load_state_dict(pickle.loads(begin.read_bytes()))
        if latest is None:
            log.take_over(read_scalars(origin[1]), step)
    if latest is None:
        log.hyperparameters(args, step)
    with contextlib.ExitStack() as disk:
        while True:
            if step % CHECKPOINTS == 0 or step == INJECTION:
                log.flush(to_disk=True)
                if not full[0] <= step < full[1]:
                    (states / "draft").write_bytes(pickle.dumps(log.state_dict()))
                    (states / "draft").rename(states / str(step))
            log_what_follows_the_checkpoint(log, step)
            if step == TOTAL:
                break
            if step == full[0]:
                disk.enter_context(full_disk(full[2]))
            log_a_vector_step(log, step)
            step += NUM_ENVS
            if step >= full[1]:
                disk.close()
            if step % 15 == 0:
                log.flush()
    log.close()


def shown(folder):
    """{tag: [(step, value), ...]} in TensorBoard, wall-clock ones without their values."""
    curves = scalars(folder)
    return curves | {tag: [(step, None) for step, _ in curves[tag]] for tag in WALL_CLOCK if tag in curves}


def hparams(folder):
    """What TensorBoard's HPARAMS shows of a run."""
    metadata = EventAccumulator(str(folder)).Reload().summary_metadata["_hparams_/session_start_info"]
    content = plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content)
    return {
        name: getattr(value, value.WhichOneof("kind"))
        for name, value in content.session_start_info.hparams.items()
    }


def hyperparameter_tables(folder):
    """[(step, text), ...] of TensorBoard's TEXT."""
    texts = BrowserView(str(folder)).Reload().Tensors("hyperparameters/text_summary")
    return [(text.step, text.tensor_proto.string_val[0].decode()) for text in texts]


def in_the_browser(view):
    """As `scalars`, from what TensorBoard itself reads event files with, once more."""
    tags = view.Reload().PluginTagToContent("scalars")
    return {
        tag: [(p.step, tensor_util.make_ndarray(p.tensor_proto).item()) for p in view.Tensors(tag)]
        for tag in tags
    }


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for sleeping: several lives of a run fall into one second, at once."""
    clock = types.SimpleNamespace(now=1_700_000_000.0)
    monkeypatch.setattr(time, "time", lambda: clock.now)
    monkeypatch.setattr(time, "sleep", lambda seconds: setattr(clock, "now", clock.now + seconds))
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return clock


def life(clock, rng, line, *given, **options):
    """Whether `live`, in a process of its own, is killed before that line of support/run_log.py."""

    def process():
        sys.stdout = sys.stderr = io.StringIO()
        number = rng.randrange(2, 40_000)
        os.getpid = lambda: number  # a later process may well have a lower number
        before_line(line, run_log, send(signal.SIGKILL))
        live(*given, **options)

    return dies(process)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody touched."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    live(folder)
    return folder


NEVER = 10**9


def test_the_run_that_nobody_touched_shows_all_that_was_logged(whole):
    curves = shown(whole)
    assert set(curves) == {
        *(
            "charts/episodic_return",
            "charts/episodic_length",
            "charts/epsilon",
            *WALL_CLOCK,
            "losses/td_loss",
        ),
        *("losses/q_values", "plasticity/dormant_fraction", "injection/step", "eval/episodic_return"),
    }
    assert [step for step, _ in curves["charts/SPS"]] == [*range(12, 121, 12)]
    assert curves["eval/episodic_return"] == [(60, 30.5), (120, 60.5)] and curves["injection/step"] == [
        (63, 63)
    ]
    assert [step for step, _ in curves["plasticity/dormant_fraction"]] == [30, 60, 90, 120]
    assert len(list(whole.glob("events*"))) == 1


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=pytest.mark.slow if seed > 2 else ()) for seed in range(12)]
)
def test_killed_at_any_line_and_resumed_every_point_is_shown_once(whole, clock, seed):
    """Also in a TensorBoard that was open all the time, and with a disk that is full for a while."""
    rng = random.Random(seed)
    FOLDER.mkdir()
    view = BrowserView(str(FOLDER), size_guidance={"tensors": 0})
    lives = 0
    for line in (*(int(10 ** rng.uniform(1, 3.2)) for _ in range(6)), NEVER):
        begin = rng.randrange(0, TOTAL, NUM_ENVS)
        full = (begin, begin + rng.choice([0, 0, 9, 40]), rng.choice([0, 200, 3_000, 6_000]))
        lives += life(clock, rng, line, FOLDER, full=full)
        clock.now += rng.choice([0, 0, 0.3, 1, 5])
        if rng.random() < 0.5:
            view.Reload()
    assert lives >= 1
    assert shown(FOLDER) == shown(whole)
    assert in_the_browser(view) == scalars(FOLDER)
    assert [step for step, _ in hyperparameter_tables(FOLDER)] == [0] and hparams(FOLDER)["name"] == "first"


@pytest.mark.parametrize("seed", range(6))
def test_a_fork_shows_every_point_once_however_often_it_is_killed(whole, clock, seed):
    """From where its origin's curves end or go on; also a fork that was killed before it had a checkpoint."""
    rng = random.Random(seed)
    step = (60, 63, 30)[seed % 3]
    origin = (whole / f"states/{step}", whole)
    args = ARGS | {"name": "arm"}
    killed = 0
    for line in (100, 180, *(int(10 ** rng.uniform(2, 3.2)) for _ in range(3)), NEVER):
        killed += life(clock, rng, line, FOLDER, args=args, origin=origin)
    assert killed >= 2
    assert shown(FOLDER) == shown(whole)
    assert hparams(FOLDER)["name"] == "arm"
    assert [at for at, _ in hyperparameter_tables(FOLDER)] == [step], "the origin's are in the origin"


def test_a_fork_of_an_unfinished_run_begins_with_what_that_run_had_logged_when_the_checkpoint_was_made(
    whole, clock
):
    rng = random.Random(0)
    assert life(clock, rng, 900, Path("origin"))
    begin = newest(Path("origin/states"))
    before = scalars(Path("origin"))
    life(clock, rng, NEVER, FOLDER, origin=(begin, Path("origin")))
    assert shown(FOLDER) == shown(whole)
    assert scalars(Path("origin")) == before


@pytest.mark.parametrize("step", [0, 60])
def test_hparams_of_a_fork_are_its_own_also_where_its_origins_are_in_the_checkpoint(whole, clock, step):
    """As in the first checkpoint of a run, and so in that of another fork."""
    rng, first, second = random.Random(0), Path("first"), Path("second")
    if step == 0:
        first = whole
    else:
        life(clock, rng, NEVER, first, args=ARGS | {"name": "an arm"}, origin=(whole / "states/60", whole))
    life(clock, rng, NEVER, second, args=ARGS | {"name": "another"}, origin=(first / f"states/{step}", first))
    assert hparams(second)["name"] == "another"
    ((at, table),) = hyperparameter_tables(second)
    assert at == step and "|name|another|" in table
    assert len(BrowserView(str(second)).Reload().Tensors("custom_scalars__config__")) == 1
    assert shown(second) == shown(whole)


def test_where_the_origins_curves_are_gone_a_fork_begins_with_those_that_its_checkpoint_holds(whole, clock):
    Path("elsewhere").mkdir()
    shutil.copy(whole / "states/60", "elsewhere")
    life(clock, random.Random(0), NEVER, FOLDER, origin=(Path("elsewhere/60"), Path("elsewhere")))
    later = {tag: [point for point in points if point[0] >= 60] for tag, points in shown(whole).items()}
    assert shown(FOLDER) == later and all(later.values())


# curves


def test_points_keep_their_wall_clock_times_through_checkpoint_and_fork(clock):
    FOLDER.mkdir()
    log = RunLog(FOLDER, 0, 100)
    for step in (1, 2, 3):
        clock.now += 10
        log.scalar("a", step, step)
    state = log.state_dict()
    log.close()
    times = read_scalars(FOLDER)["a"]
    assert times.dtype == np.float64 and times.tolist() == [
        [1, 2, 3],
        [1, 2, 3],
        [1_700_000_000 + s for s in (10, 20, 30)],
    ]
    Path("fork").mkdir()
    clock.now += 500
    fork = RunLog(Path("fork"), 3, 100)
    fork.load_state_dict(state)
    fork.take_over(read_scalars(FOLDER), 3)
    fork.close()
    assert np.array_equal(read_scalars(Path("fork"))["a"], times)


def test_a_checkpoint_holds_only_points_that_its_event_files_may_not_settle():
    FOLDER.mkdir()
    curves = Curves(FOLDER, 0)
    for step in range(1, 200):
        curves.add(summary.scalar("a", step), step)
        curves.add(summary.scalar("b", step), step)
        if step % 20 == 0:
            curves.flush()
            assert [point[0] for point in curves.state_dict()] == [step, step]
    curves.close()


@pytest.mark.parametrize("size", [0, 30, 150, 3_000])
def test_what_a_full_disk_kept_out_is_written_when_there_is_room_again(clock, size):
    FOLDER.mkdir()
    curves, expected, failures = Curves(FOLDER, 0), [], 0
    for k in range(1, 400):
        curves.add(summary.scalar("a", k / 2), k)
        expected.append((k, k / 2))
        if 100 < k < 180 or 250 < k < 252:
            try:
                with full_disk(size):
                    curves.flush()
            except OSError as error:
                assert error.errno == errno.EFBIG
                failures += 1
        elif k % 30 == 0:
            curves.flush()
            assert scalars(FOLDER)["a"] == expected
    curves.flush()
    curves.close()
    assert scalars(FOLDER) == {"a": expected}
    assert failures >= (80 if size < 200 else 2)
    assert len(list(FOLDER.glob("events*"))) <= failures + 1 and (
        size or len(list(FOLDER.glob("events*"))) == 3
    )


def log_a_life(first, last, value):
    """A process that goes on from step `first`, and logs this value at every step to `last`."""
    curves = Curves(FOLDER, first)
    for step in range(first, last + 1):
        curves.add(summary.scalar("a", value), step)
    curves.flush()
    curves.close()


def test_curves_longer_than_tensorboard_would_keep_are_read_whole():
    FOLDER.mkdir()
    log_a_life(1, 10_001, 1)
    assert read_scalars(FOLDER)["a"][0].tolist() == [*range(1, 10_002)]


DAY = 86_400
CLOCKS = {  # what a run's processes, one after the other, see on the clock; the first is right
    "stands still": (0, 0, 0, 0),
    "goes on": (0, 5, 60, DAY),
    "was an hour ahead": (3_600, 0, 10, 20),
    "was years ahead": (9_000 * DAY, 0, 0, 5),
    "was ahead again and again": (3_600, 0, 7_200, 3_000),
    "was behind, as without a battery": (-1_700_000_000, -1_699_999_990, 0, 3),
    "was centuries ahead, in one digit more": (150_000 * DAY, 0, 90_000 * DAY, 1),
    "was at the last second of ten digits": (8_299_999_999, 0, 8_299_999_999, 5),
}


@pytest.mark.parametrize("clocks", CLOCKS.values(), ids=CLOCKS)
def test_whatever_the_clock_says_a_process_that_goes_on_is_shown_after_those_before_it_and_waits_for_nothing(
    clock, monkeypatch, clocks
):
    """In our reader, and in TensorBoard, also one that was open all the time. They go by the files' names."""
    FOLDER.mkdir()
    view = BrowserView(str(FOLDER), size_guidance={"tensors": 0})
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    files = []
    for life, ahead in enumerate(clocks):
        clock.now = 1_700_000_000.5 + ahead
        monkeypatch.setattr(
            os, "getpid", lambda life=life: 9_000 - life
        )  # a later process may have a lower number
        log_a_life(5 * life, 5 * life + 9, life)  # the process before had come beyond its checkpoint
        (new,) = set(FOLDER.glob("events*")) - set(files)
        files.append(new)
        expected = {"a": [(step, min(step // 5, life)) for step in range(5 * life + 10)]}
        assert sorted(files) == files == run_log.event_files(FOLDER)
        assert scalars(FOLDER) == in_the_browser(view) == expected
    steps, values, times = read_scalars(FOLDER)["a"]
    assert list(zip(steps, values, strict=True)) == expected["a"]
    assert times[-1] == clock.now, "a point has the time at which it was logged"
    assert time is run_log.event_file_writer.time


def test_the_name_of_an_event_file_has_the_second_in_which_it_was_begun(clock):
    FOLDER.mkdir()
    log_a_life(0, 1, 1)
    clock.now += 100
    log_a_life(1, 2, 2)
    assert [path.name.split(".")[3] for path in run_log.event_files(FOLDER)] == ["1700000000", "1700000100"]


@pytest.mark.parametrize("during", [False, True], ids=["between writes", "during a write"])
def test_a_folder_that_moves_takes_its_curves_along(clock, monkeypatch, during):
    """Nothing of them is written where another folder has its old name."""

    def move(add, *given):
        if not Path("moved").exists():
            FOLDER.rename("moved")
        add(*given)

    FOLDER.mkdir()
    curves, expected = Curves(FOLDER, 0), []
    for step in range(1, 31):
        curves.add(summary.scalar("a", step / 2), step)
        expected.append((step, step / 2))
        if step == 12 and not during:
            FOLDER.rename("moved")
        if step == 12 and during:
            monkeypatch.setattr(
                curves.writer.file_writer,
                "add_summary",
                functools.partial(move, curves.writer.file_writer.add_summary),
            )
        if step == 16:
            FOLDER.mkdir()
        if step % 3 == 0:
            curves.flush()
    curves.close()
    assert list(FOLDER.iterdir()) == [] and scalars(Path("moved")) == {"a": expected}
    assert len(list(Path("moved").glob("events*"))) == 2


def test_curves_whose_folder_is_gone_say_so_once_and_make_none(clock, capsys):
    FOLDER.mkdir()
    log = RunLog(FOLDER, 0, 100)
    for step in range(1, 8):
        log.scalar("a", step, step)
        log.flush(to_disk=True)
        if step == 3:
            shutil.rmtree(FOLDER)
    log.close()
    fix = "if it was moved to another disk, stop this run and --resume it there"
    printed = (
        f"warning: the curves cannot be written for now (run is no longer there): {fix}, training goes on\n"
    )
    assert capsys.readouterr().out == printed and not FOLDER.exists() and log.way_out


@pytest.mark.parametrize("ended", [[0], [1, 2], [0, 1, 2], []])
def test_games_that_end_in_one_vector_step_are_each_shown_at_the_step_of_their_own_decision(ended):
    FOLDER.mkdir()
    log = RunLog(FOLDER, 0, 100)
    mask = np.isin(np.arange(3), ended)
    log.games(
        {"_episode": mask, "episode": {"r": np.array([5.0, 6, 7]) * mask, "l": np.array([50, 60, 70])}},
        previous=30,
    )
    log.scalar("charts/epsilon", 0.5, 33)
    log.close()
    curves = scalars(FOLDER)
    assert curves.get("charts/episodic_return", []) == [(31 + i, 5 + i) for i in ended]
    assert curves.get("charts/episodic_length", []) == [(31 + i, 50 + 10 * i) for i in ended]


def test_no_game_is_logged_beyond_the_end_of_the_run():
    FOLDER.mkdir()
    log = RunLog(FOLDER, 0, 32)
    log.games(
        {"_episode": np.ones(4, bool), "episode": {"r": np.arange(4.0), "l": np.arange(4)}}, previous=30
    )
    log.close()
    assert scalars(FOLDER)["charts/episodic_return"] == [(31, 0), (32, 1)] and list(log.returns) == [0, 1]


def test_hparams_hold_numbers_as_numbers_and_all_else_as_text(whole):
    expected = {
        "name": "first",
        "learning_rate": 0.5,
        "injection_step": "(63,)",
        "wandb_entity": "None",
        "eval_frequency": 60,
    }
    assert hparams(whole) == expected
    ((_, table),) = hyperparameter_tables(whole)
    assert table.splitlines()[2:] == [f"|{name}|{value}|" for name, value in ARGS.items()]


@pytest.mark.parametrize("eval_frequency", [0, 60])
def test_tensorboard_shows_returns_and_plasticity_side_by_side(eval_frequency):
    FOLDER.mkdir()
    log = RunLog(FOLDER, 0, 100)
    log.hyperparameters(ARGS | {"eval_frequency": eval_frequency}, 0)
    log.close()
    tensor = (
        EventAccumulator(str(FOLDER))
        .Reload()
        .Tensors("custom_scalars__config__")[0]
        .tensor_proto.string_val[0]
    )
    (category,) = layout_pb2.Layout.FromString(tensor).category
    charts = {chart.title: tag.strip("^$") for chart in category.chart for tag in chart.multiline.tag}
    assert charts == {
        title: tag for title, tag in SIDE_BY_SIDE.items() if eval_frequency or "eval" not in tag
    }


# reading


def test_a_folder_without_curves_has_none_and_one_that_is_not_there_is_refused():
    FOLDER.mkdir()
    assert read_scalars(FOLDER) == {}
    refusal = r"^nowhere cannot be read as a run's curves \(there is no such folder\): give that of a run"
    with pytest.raises(UsageError, match=refusal):
        read_scalars(Path("nowhere"))


def test_a_last_point_that_is_not_whole_is_left_out_and_all_before_it_read(whole):
    shutil.copytree(whole, FOLDER)
    (path,) = FOLDER.glob("events*")
    os.truncate(path, path.stat().st_size - 3)
    curves, expected = scalars(FOLDER), scalars(whole)
    assert curves.pop("eval/episodic_return") == expected.pop("eval/episodic_return")[:-1]
    assert curves == expected
    assert {
        tag: list(zip(*points[:2].tolist(), strict=True)) for tag, points in read_scalars(FOLDER).items()
    } == scalars(FOLDER)


TAILS = {
    "zeros": bytes(4_096),
    "one zero": bytes(1),
    "zeros in an odd number": bytes(13),
    "a megabyte of zeros": bytes(2**20),
    "what was on the disk before": random.Random(5).randbytes(5_000),
    "a sentence": b"No space left on device\n" * 20,
    "a length that is not there": (10**6).to_bytes(8, "little"),
    "ones": b"\xff" * 512,
}


@pytest.mark.parametrize(
    ("cut", "whole"), [(0, 10), (3, 9), (50, 8)], ids=["after a point", "in the last", "in one before it"]
)
@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_what_is_whole_before_a_torn_tail_is_read_and_what_is_not_is_said(clock, capsys, tail, cut, whole):
    FOLDER.mkdir()
    log_a_life(0, 9, 1)
    (path,) = run_log.event_files(FOLDER)
    os.truncate(path, path.stat().st_size - cut)
    with open(path, "ab") as file:
        file.write(tail)
    assert read_scalars(FOLDER)["a"][0].tolist() == [*range(whole)]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: the last ") and f" bytes of {path} are no whole point" in line
    clock.now += 10
    log_a_life(5, 12, 2)  # from a checkpoint on
    assert read_scalars(FOLDER)["a"].tolist()[:2] == [[*range(13)], [1] * 5 + [2] * 8]
    assert scalars(FOLDER)["a"][5:] == [(step, 2) for step in range(5, 13)], (
        "TensorBoard goes on with the next file, too"
    )


def test_an_event_file_that_is_all_zeros_hides_no_other(clock, capsys):
    FOLDER.mkdir()
    log_a_life(0, 4, 1)
    (FOLDER / "events.out.tfevents.1700000001.host.1.0").write_bytes(bytes(4_096))
    log_a_life(5, 9, 1)
    assert read_scalars(FOLDER)["a"][0].tolist() == [*range(10)]
    out = capsys.readouterr().out
    assert (
        out.startswith("warning: the last 4,096 bytes of run/events.out.tfevents.1700000001.host.1.0 are")
        and out.count("\n") == 1
    )


NOT_OURS = (  # copies, archives, what editors and file managers leave, and names that are only similar
    "{}.bak|{}.gz|{}~|{} copy|{} (1)|{}.tmp|{}.swp|{}.1.orig|{}.profile-empty|{}.v2|{}-conflict|{}\n|"
    "{}.1|{}.2|._{}|.{}.swp|.{}.aB3xYz|#{}#|Copy of {}|{}.sync-conflict-20240101-120000-ABCDEFG.0|"
    "notes on tfevents.md|"
    "events.out.tfevents|events.out.tfevents.1900000000|events.out.tfevents.1900000000.host|"
    "events.out.tfevents.190000000.host.1.0|events.out.tfevents.١٩٠٠٠٠٠٠٠٠.host.1.0|"
    "events.out.tfevents.x.host.1.0|events.out.tfevents.1900000000.host.0.0|"
    "events.out.tfevents.1900000000.host.1.0.csv"
).split("|")


@pytest.mark.parametrize(
    "content", ["a copy", b"\0" * 4_096, b"not an event file"], ids=["copies", "zeros", "something else"]
)
def test_files_of_other_programs_beside_event_files_are_neither_read_nor_counted_nor_touched(
    clock, monkeypatch, capsys, content
):
    """Only what `SummaryWriter` names is an event file."""
    FOLDER.mkdir()
    log_a_life(0, 9, 1)
    (ours,) = FOLDER.iterdir()
    strangers = [FOLDER / name.format(ours.name) for name in NOT_OURS]
    for path in strangers:
        path.write_bytes(ours.read_bytes() if content == "a copy" else content)
    (FOLDER / "events.out.tfevents.1900000000.host.1.0").mkdir()  # nor is a folder
    clock.now += 10
    curves = Curves(FOLDER, 5)
    curves.add(summary.scalar("a", 2), 5)
    with full_disk(10), pytest.raises(OSError):
        curves.flush()
    curves.flush()
    curves.close()
    files = run_log.event_files(FOLDER)
    assert [path.name.split(".")[3] for path in files] == ["1700000000", "1700000010"]
    assert read_scalars(FOLDER)["a"].tolist()[:2] == [[*range(6)], [1] * 5 + [2]]
    assert capsys.readouterr().out == ""
    flushed = []
    monkeypatch.setattr(run_log, "flush_to_disk", flushed.append)
    log = RunLog(FOLDER, 6, 100)
    log.flush(to_disk=True)
    log.close()
    assert flushed == run_log.event_files(FOLDER) and flushed[:2] == files and len(flushed) == 3
    for path in strangers:
        assert path.read_bytes() == (ours.read_bytes() if content == "a copy" else content)


@pytest.mark.parametrize("host", ["host", "node-3.cluster.example.org", "10.0.0.7", "höst", "a b", ""])
def test_a_host_may_have_any_name(clock, monkeypatch, host):
    FOLDER.mkdir()
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    log_a_life(0, 9, 1)
    assert len(run_log.event_files(FOLDER)) == 1 and read_scalars(FOLDER)["a"][0].tolist() == [*range(10)]


def test_a_damaged_event_file_is_refused_by_name_instead_of_leaving_out_what_follows(whole):
    shutil.copytree(whole, FOLDER)
    (path,) = FOLDER.glob("events*")
    content = path.read_bytes()
    rng = random.Random(0)
    for offset in (rng.randrange(len(content) - 200) for _ in range(40)):
        damaged = bytearray(content)
        damaged[offset] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(
            UsageError, match=r"^run cannot be read as a run's curves \(.+\): make room$"
        ) as error:
            read_scalars(FOLDER, "make room")
        assert path.name in str(error.value) and "\n" not in str(error.value)


# full disks, as the run's log tells them


def test_a_full_disk_is_reported_once_until_there_was_room_again(clock, capsys):
    FOLDER.mkdir()
    log = RunLog(FOLDER, 0, 100)
    for step in range(1, 13):
        log.scalar("a", step, step)
        with full_disk(10) if step in (2, 3, 4, 8, 12) else contextlib.nullcontext():
            log.flush(to_disk=True)
            assert bool(log.way_out) == (step in (2, 3, 4, 8, 12))
    out = capsys.readouterr()
    assert (
        out.out.count("warning: the curves cannot be written for now ([Errno 27] File too large") == 3
        and out.err == ""
    )
    with full_disk(10):
        log.close()
    assert [step for step, _ in scalars(FOLDER)["a"]] == [*range(1, 12)]


def test_curves_that_do_not_reach_the_disk_itself_are_reported(monkeypatch, capsys):
    FOLDER.mkdir()
    log = RunLog(FOLDER, 0, 100)
    log.scalar("a", 1, 1)
    flushed = []
    monkeypatch.setattr(run_log, "flush_to_disk", flushed.append)
    log.flush()
    assert flushed == []
    log.flush(to_disk=True)
    assert flushed == list(FOLDER.glob("events*"))

    def fail(_):
        raise OSError("the disk is broken")

    monkeypatch.setattr(run_log, "flush_to_disk", fail)
    log.flush(to_disk=True)
    assert (
        "warning: the curves cannot be written for now (the disk is broken)" in capsys.readouterr().out
        and log.way_out
    )
    log.close()


# speed and progress


@pytest.fixture
def stopwatch(monkeypatch):
    """`stopwatch.now` is what time.perf_counter() says."""
    stopwatch = types.SimpleNamespace(now=5_000.0)
    monkeypatch.setattr(time, "perf_counter", lambda: stopwatch.now)
    FOLDER.mkdir()
    return stopwatch


def test_the_return_that_is_said_is_that_of_the_last_100_games_also_after_a_resume(stopwatch):
    log = RunLog(FOLDER, 0, 1_000)
    for step in range(150):
        log.games({"_episode": [True], "episode": {"r": [float(step)], "l": [1]}}, step)
    state = log.state_dict()
    log.close()
    log = RunLog(FOLDER, 150, 1_000)
    log.load_state_dict(state)
    assert list(log.returns) == [*range(50, 150)]
    log.close()


def test_speed_over_all_counts_all_time_also_before_a_resume_and_recent_speed_leaves_pauses_out(stopwatch):
    log = RunLog(FOLDER, 0, 1000)
    stopwatch.now += 10
    log.interval(100, 0.5, {})  # 10 steps per second
    stopwatch.now += 4
    with log.pause():
        stopwatch.now += 100
    state = log.state_dict()  # at step 120, say
    log.close()
    stopwatch.now += 10_000  # until it is resumed
    log = RunLog(FOLDER, 120, 1000)
    log.load_state_dict(state)
    stopwatch.now += 6
    log.interval(200, 0.5, {})  # 100 steps in 10 seconds, and 200 in 120
    stopwatch.now += 5
    log.interval(300, 0.5, {})
    log.close()
    curves = scalars(FOLDER)
    assert curves["charts/SPS"] == [(100, 10), (200, 200 // 120), (300, 300 // 125)]
    assert curves["charts/SPS_recent"] == [(100, 10), (200, 10), (300, 20)]


def test_curves_are_written_every_ten_seconds(stopwatch):
    log = RunLog(FOLDER, 0, 1000)
    seen = []
    for step in range(1, 41):
        stopwatch.now += 1
        log.interval(step, 0.5, {})
        seen.append(len(scalars(FOLDER).get("charts/epsilon", [])))
    log.close()
    assert seen == [0] * 10 + [11] * 11 + [22] * 11 + [33] * 8


def test_plain_lines_come_every_thirty_seconds_and_in_the_end(stopwatch, capsys):
    log = RunLog(FOLDER, 0, 70)
    log.returns.extend([100, 300])
    for step in range(1, 71):
        stopwatch.now += 1
        log.interval(step, 0.25, {})
    log.close()
    out = capsys.readouterr()
    assert out.out.splitlines() == [
        "step 31 of 70, 1 SPS, 00:39 left, ε 0.25, return 200",
        "step 62 of 70, 1 SPS, 00:08 left, ε 0.25, return 200",
        "step 70 of 70, 1 SPS, 00:00 left, ε 0.25, return 200",
    ]
    assert out.err == ""


def test_on_a_terminal_progress_is_a_bar_that_lines_do_not_tear(monkeypatch, capsys):
    FOLDER.mkdir()
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    log = RunLog(FOLDER, 30, 60)
    log.say("a line")
    for step in (40, 50, 60):
        log.interval(step, 0.25, {})
    log.close()
    text = terminal.getvalue()
    assert (
        "30/60" in text
        and "60/60" in text
        and "SPS, ε 0.25, return -" in text
        and "step 60 of 60" not in text
    )
    assert "\ra line\n" in re.sub(r" +", "", text).replace("aline", "a line"), "the bar is wiped before it"


def test_a_closed_pipe_is_no_reason_to_stop(monkeypatch):
    FOLDER.mkdir()
    log = RunLog(FOLDER, 0, 60)

    class Closed(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    log.say("into the void")
    log.close()
