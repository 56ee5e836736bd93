"""What a run says: curves in TensorBoard, a progress bar or plain lines on the terminal."""

import contextlib
import logging
import re
import threading
import time
import types
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat import tf
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter, summary
from tqdm import tqdm

from support.machine import HeldFolder, flush_to_disk, way_out
from support.process import on_a_terminal, say
from support.progress import ProgressFile
from support.usage import UsageError, reading

# as SummaryWriter names them: a second, a host, a process and how many files it had begun; nothing after that
EVENT_FILE = re.compile(r"events\.out\.tfevents\.([0-9]{10,})\..*\.[1-9][0-9]*\.[0-9]+")
AROUND_RECORD = 16  # bytes of a length and two checksums
# the length of a record below 16 MB, and the checksum of that
RECORD_BEGINS = re.compile(rb"(?=((?!\0\0\0)...\0{5})(....))", re.DOTALL)
SIDE_BY_SIDE = {  # {title: tag}, in TensorBoard's CUSTOM SCALARS and in comparisons of runs
    "return of training games": "charts/episodic_return",
    "return of evaluation games": "eval/episodic_return",
    "dormant fraction": "plasticity/dormant_fraction",
    "active fraction": "plasticity/active_fraction",
    "srank of the encoder's features": "plasticity/srank/encoder",
    "srank of the learning head's features": "plasticity/srank/head",
    "encoder's weight norm ÷ initial": "plasticity/weight_norm_ratio/encoder",
    "learning head's weight norm ÷ initial": "plasticity/weight_norm_ratio/head",
    "encoder's gradient norm": "plasticity/gradient_norm/encoder",
    "policy churn": "plasticity/policy_churn",
    "new heads' share of Q": "plasticity/new_heads_share_of_q",
}


def event_files(folder: Path) -> list[Path]:
    """A run's event files, but no copies of them, in the order of their names, in which readers take them."""
    named = {path for path in folder.iterdir() if EVENT_FILE.fullmatch(path.name)}
    # NAME.1 could be a name that the writer gives, but beside NAME it is a copy
    return sorted(path for path in named if path.with_suffix("") not in named and path.is_file())


def holds_a_record(content: bytes) -> bool:
    """Whether one begins anywhere in these bytes."""
    for found in RECORD_BEGINS.finditer(content):
        length, checksum = found.groups()
        if masked_crc32c(length) == int.from_bytes(checksum, "little"):
            return True
    return False


def read_events(path: Path) -> Iterator[Event]:
    """The events in a file, and a warning about what of it cannot be read.

    A file that ends in what is no record, as after a power cut or while it is written, is read up to there.
    Where records follow, it is damaged, ValueError: they would be missing in the middle of a curve.
    """
    whole = 0  # bytes of the records so far
    try:
        for record in LegacyEventFileLoader(str(path))._iterator:
            yield Event.FromString(record)
            whole += AROUND_RECORD + len(record)
    except tf.errors.DataLossError as error:
        tail = path.read_bytes()[whole:]
        if "truncated record" not in str(error):
            no_event_file = whole == 0 and any(tail)
            if no_event_file or holds_a_record(tail[1:]):
                raise ValueError(f"{path.name} is damaged, a checksum is another") from error
        unread = f"the last {len(tail):,} bytes of {path} are no whole point"
        say(f"warning: {unread}: all before them is read")


class EventFiles:
    """What `EventAccumulator` takes events from: one event file after the other, once."""

    def __init__(self, folder: Path):
        self.folder = folder

    def Load(self) -> Iterator[Event]:
        for path in event_files(self.folder):
            yield from read_events(path)


def read_scalars(folder: Path, fix: str = "move that file away") -> dict[str, np.ndarray]:
    """The scalars in a folder's event files, {tag: (3, K) float64}: steps, values, wall-clock seconds.

    What is at a file's end and no whole point is passed over, with a warning. Raises UsageError, whose
    message ends with `fix`, where a file is damaged or cannot be read; and where there is no such folder.
    """
    if not folder.is_dir():
        cannot = f"{folder} cannot be read as a run's curves (there is no such folder)"
        raise UsageError(f"{cannot}: give that of a run, one in runs/")
    # that a resumed run replaces what it had logged beyond its checkpoint is no news
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    with reading(folder, "a run's curves", fix):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 1})
        events._generator = EventFiles(folder)
        events.Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        points = [(point.step, point.value, point.wall_time) for point in events.Scalars(tag)]
        curves[tag] = np.array(points).T
    return curves


class Point(NamedTuple):
    """What is logged at a step of a run."""

    step: int
    wall_time: float  # seconds since 1970
    content: Summary


class Curves:
    """A run's TensorBoard curves from `step` on, which no crash, full disk or resume loses or doubles.

    Points wait in memory until `flush`. Those of the newest step stay there even then, since more of that
    step may follow: a new event file, after a resume or a failed write, tells its readers to drop what older
    files hold from its first point on (`purge_step`), and begins with all of these.
    """

    def __init__(self, folder: Path, step: int):
        self.place = HeldFolder(folder)
        self.step = step
        self.points: list[Point] = []  # steps never fall
        self.written = 0  # how many of them are in the event file
        self.writer: Any = None  # a SummaryWriter, once there is something to write

    def add(self, content: Summary, step: int) -> None:
        self.points.append(Point(step, time.time(), content))
        self.step = max(step, self.step)

    def flush(self) -> None:
        """Writes what waits. Raises OSError where it cannot be written; the next call tries again."""
        self.place.write(self._write_to)
        self.points = [point for point in self.points if point.step >= self.step]
        self.written = len(self.points)

    def _write_to(self, folder: Path) -> None:
        if self.writer is not None and Path(self.writer.log_dir) != folder:
            self.close()  # the event file has moved, too, and all of it is there
            self.writer = None
        before = event_files(folder)
        report = threading.excepthook
        threading.excepthook = lambda _: None  # the writer's thread fails as this one does, which reports it
        try:
            if self.writer is None:
                self.writer = self._new_file(before)
                self.written = 0
            for point in self.points[self.written :]:
                self.writer.file_writer.add_summary(point.content, point.step, point.wall_time)
            self.writer.flush()
        except OSError:
            self.writer = None
            for new in set(event_files(folder)) - set(before):
                new.unlink()  # nothing of it counts
            raise
        finally:
            threading.excepthook = report

    def _new_file(self, older: list[Path]) -> SummaryWriter:
        """An event file whose name comes after those of older ones, since readers take them in that order.

        TensorBoard names it by the second, which an older one's may exceed where a clock was ahead.
        """
        newest = max((path.name.split(".")[3] for path in older), default="0")
        number = max(int(time.time()), int(newest) + 1)
        if str(number) < newest:  # names are sorted as text
            number = 10 * int(newest)
        first = min([self.step, *(point.step for point in self.points)])
        clock = event_file_writer.time

        def second_in_the_name() -> int:
            event_file_writer.time = clock  # what is asked after that is the time
            return number

        event_file_writer.time = types.SimpleNamespace(time=second_in_the_name)
        try:
            return SummaryWriter(str(self.place.here()), purge_step=first)
        finally:
            event_file_writer.time = clock

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def state_dict(self) -> list[tuple[int, float, str]]:
        points = self.points
        return [(point.step, point.wall_time, point.content.SerializeToString().hex()) for point in points]

    def load_state_dict(self, state: list[tuple[int, float, str]]) -> None:
        self.points.clear()
        for step, wall_time, content in state:
            self.points.append(Point(step, wall_time, Summary.FromString(bytes.fromhex(content))))


class RunLog:
    """The curves, progress and lines of a run that is at `step` and ends at `total`."""

    PLAIN_LINE_SECONDS = 30
    FLUSH_SECONDS = 10

    def __init__(self, folder: Path, step: int, total: int):
        self.total = total
        self.curves = Curves(folder, step)
        self.progress = ProgressFile(self.curves.place, step, total)
        hidden = not on_a_terminal()
        self.bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True, disable=hidden)
        self.returns: deque[float] = deque(maxlen=100)
        self.start = self.interval_start = self.last_line = self.last_flush = time.perf_counter()
        self.interval_step = 0
        self.way_out = ""  # of what keeps the curves from being written, if anything does

    def state_dict(self) -> dict[str, Any]:
        now = time.perf_counter()
        return {
            "returns": list(self.returns),
            "points": self.curves.state_dict(),
            "interval_step": self.interval_step,
            "interval_seconds": now - self.interval_start,
            "seconds": now - self.start,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.returns.extend(state["returns"])
        self.curves.load_state_dict(state["points"])
        self.interval_step = state["interval_step"]
        now = time.perf_counter()
        self.start = now - state["seconds"]
        self.interval_start = now - state["interval_seconds"]

    def take_over(self, curves: dict[str, np.ndarray], step: int) -> None:
        """Begins with these curves, see `read_scalars`, before `step`, once a checkpoint's state is taken up.

        Of what waits in that state it keeps the scalars: hyperparameters are logged anew.
        """
        waiting = [point for point in self.curves.points if point.content.value[0].HasField("simple_value")]
        first = min([step, *(point.step for point in waiting)])
        earlier = []
        for tag, points in curves.items():
            for at, value, wall_time in points.T:
                if at < first:
                    earlier.append(Point(int(at), wall_time, summary.scalar(tag, value)))
        earlier.sort(key=lambda point: point.step)
        self.curves.points = earlier + waiting

    def hyperparameters(self, args: dict[str, Any], step: int) -> None:
        """Writes the arguments, as a text and for TensorBoard's HPARAMS, and what its CUSTOM SCALARS show."""
        table = "\n".join(f"|{name}|{value}|" for name, value in args.items())
        self.curves.add(summary.text("hyperparameters", f"|param|value|\n|-|-|\n{table}"), step)
        plain = {}
        for name, value in args.items():
            plain[name] = value if type(value) in (int, float) else str(value)
        metrics = {"charts/episodic_return": None, "eval/episodic_return": None}
        for content in summary.hparams(plain, metrics):
            self.curves.add(content, step)
        charts = {}
        for title, tag in SIDE_BY_SIDE.items():
            if args["eval_frequency"] > 0 or not tag.startswith("eval/"):
                charts[title] = ["Multiline", [f"^{tag}$"]]
        self.curves.add(summary.custom_scalars({"return and plasticity": charts}), step)

    def scalar(self, tag: str, value: float, step: int) -> None:
        """A point of a curve; steps never fall."""
        self.curves.add(summary.scalar(tag, value), step)

    def games(self, infos: dict[str, Any], previous: int) -> None:
        """Logs the games that ended in the vector step after `previous`, each at its own decision's step.

        TensorBoard keeps one point per curve and step. What was decided beyond the run's end is left out.
        """
        for i in np.flatnonzero(infos.get("_episode", ())):
            step = previous + 1 + int(i)
            if step <= self.total:
                self.returns.append(float(infos["episode"]["r"][i]))
                self.scalar("charts/episodic_return", self.returns[-1], step)
                self.scalar("charts/episodic_length", int(infos["episode"]["l"][i]), step)

    def unreported(self, games: int, step: int) -> None:
        """Logs how many games end here without a return: cut by new ones, or by the run's end."""
        if games:
            self.scalar("charts/games_cut", games, step)

    def interval(self, step: int, epsilon: float, losses: dict[str, float]) -> None:
        """Logs ε, the speed since the last call, and these mean losses."""
        now = time.perf_counter()
        recent = (step - self.interval_step) / (now - self.interval_start)
        self.scalar("charts/epsilon", epsilon, step)
        self.scalar("charts/SPS", int(step / (now - self.start)), step)
        self.scalar("charts/SPS_recent", recent, step)
        for name, value in losses.items():
            self.scalar(f"losses/{name}", value, step)
        mean_return = float(np.mean(self.returns)) if self.returns else None
        self.progress.note({"step": step, "steps_per_second": recent, "return": mean_return})
        score = "-" if mean_return is None else f"{mean_return:,.0f}"
        state = f"ε {epsilon:.2f}, return {score}"
        self.bar.set_postfix_str(f"{recent:,.0f} SPS, {state}", refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and (now - self.last_line > self.PLAIN_LINE_SECONDS or step == self.total):
            left = tqdm.format_interval((self.total - step) / recent)
            self.say(f"step {step:,} of {self.total:,}, {recent:,.0f} SPS, {left} left, {state}")
            self.last_line = now
        if now - self.last_flush > self.FLUSH_SECONDS:
            self.flush()
        self.interval_start = now
        self.interval_step = step

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves what happens in this block out of the recent speed and the time left."""
        start = time.perf_counter()
        yield
        self.interval_start += time.perf_counter() - start

    def evaluation(self, scores: np.ndarray, step: int) -> None:
        """Logs the mean of one evaluation's scores."""
        self.scalar("eval/episodic_return", scores.mean(), step)
        self.say(f"step {step:,}: mean score of {len(scores)} evaluation games {scores.mean():,.1f}")

    def flush(self, to_disk: bool = False) -> None:
        """Writes the curves, with `to_disk` past the system's own memory. A full disk is reported once."""
        self.last_flush = time.perf_counter()
        try:
            self.curves.flush()
            if to_disk:
                for path in event_files(self.curves.place.here()):
                    flush_to_disk(path)
            self.way_out = ""
        except OSError as error:
            if not self.way_out:
                self.way_out = way_out(error)
                failed = f"the curves cannot be written for now ({error})"
                self.say(f"warning: {failed}: {self.way_out}, training goes on")

    def say(self, line: str) -> None:
        """Prints a line without tearing the progress bar."""
        say(line, self.bar.write)

    def close(self) -> None:
        """Writes out the curves, and how far the run has come."""
        self.bar.close()
        self.progress.write()
        self.flush()
        with contextlib.suppress(OSError):
            self.curves.close()
