"""This process: what it is asked by signals, what it says, and how it ends."""

import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import IO, Any

from support.usage import UsageError, out_of_resources

# how many processes a launcher has started alike, in a step or a group; an allocation's size is none of these
GROUP_SIZES = (
    "SLURM_STEP_NUM_TASKS",  # srun
    "WORLD_SIZE",  # torchrun, DeepSpeed, Accelerate
    "OMPI_COMM_WORLD_SIZE",  # Open MPI
    "PMI_SIZE",  # MPICH, Intel MPI, Cray
    "MPI_LOCALNRANKS",  # MPICH and Intel MPI, of one machine
    "MV2_COMM_WORLD_SIZE",  # MVAPICH2
    "FLUX_JOB_SIZE",  # Flux
    "JSM_NAMESPACE_SIZE",  # jsrun
)


def begin_in_utf8() -> None:
    """Begins this program once more in Python's UTF-8 mode, where the locale encodes files' names otherwise.

    TensorBoard takes them in UTF-8 in any locale. What is printed stays in the locale's letters. To be called
    by the file that is run, and by nothing that others import: all that went before is done a second time.
    """
    if sys.getfilesystemencoding() == "utf-8":
        return
    os.environ["PYTHONUTF8"] = "1"  # also of the processes that this one starts
    if sys.stdout is not None:
        os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding)
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def group_of_equals() -> tuple[str, int] | None:
    """If several processes were started alike, the variable that says so and their number; else None."""
    for name in GROUP_SIZES:
        with contextlib.suppress(ValueError):  # no number: nobody's count
            size = int(os.environ.get(name, "1"))
            if size > 1:
                return name, size
    return None


def say(line: str, write: Callable[[str], Any] = print) -> None:
    """Prints a line, if anybody listens: a closed pipe, a full disk or a notebook is no reason to stop."""
    with contextlib.suppress(Exception):
        write(line)
        sys.stdout.flush()


class Unfailing:
    """A stream that drops what it cannot write, as where its terminal was closed."""

    def __init__(self, stream: IO[str]):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()


def on_a_terminal() -> bool:
    """Whether a progress bar would be seen."""
    try:
        return sys.stderr.isatty()
    except Exception:  # as of a closed stream, or where there is none
        return False


class Signals:
    """Signals as requests to the training loop, for the time of a `with` block.

    SIGTERM, SIGINT and SIGHUP ask it to stop. Launchers may deliver one request several times, so what comes
    within `SAME_REQUEST` seconds belongs to the first; a later one ends the process with 128 + its number.
    SIGUSR1 and SIGUSR2, which Slurm can send ahead of a time limit, ask for a checkpoint. What was ignored
    before, as by nohup, stays ignored.
    """

    STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    CHECKPOINT = (signal.SIGUSR1, signal.SIGUSR2)
    SAME_REQUEST = 2.0

    def __init__(self) -> None:
        self.stop: signal.Signals | None = None
        self.asked = 0.0  # when it was set, on the monotonic clock
        self.checkpoint = False
        self.at_once = False
        self.ending = False

    def __enter__(self) -> "Signals":
        self.previous: dict[signal.Signals, Any] = {}  # handlers
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (*self.STOP, *self.CHECKPOINT):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self.previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # none that Python knows of

    @contextlib.contextmanager
    def nothing_to_save(self) -> Iterator[None]:
        """While a checkpoint is loaded: the first signal ends the process then."""
        self.at_once = True
        try:
            yield
        finally:
            self.at_once = False

    def _note(self, number: int, _: FrameType | None) -> None:
        if number in self.CHECKPOINT:
            self.checkpoint = True
        elif self.stop is None and not self.at_once:
            self.asked = time.monotonic()  # first, since another signal may come in between
            self.stop = signal.Signals(number)
        elif not self.ending and (self.at_once or time.monotonic() - self.asked >= self.SAME_REQUEST):
            self.ending = True  # what comes now must not disturb the end
            sys.exit(128 + number)


@contextlib.contextmanager
def deaf_in_the_end() -> Iterator[None]:
    """Around the last that a process does: a signal that comes once more must not change its exit status."""
    try:
        yield
    finally:
        for number in (*Signals.STOP, *Signals.CHECKPOINT):
            signal.signal(number, signal.SIG_IGN)


def _nowhere() -> IO[str]:
    return open(os.devnull, "r+", encoding="utf-8")


def _keep_open() -> None:
    """Gives closed standard streams a place to write to: the next file that is opened would be theirs."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
        stream = getattr(sys, name)
        if stream is None or getattr(stream, "closed", False):
            setattr(sys, name, _nowhere())
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # ε and − are question marks where there are no such letters


def _let_go() -> None:
    """Python ends with status 120 where it cannot write what is left: nobody reads it, so it goes nowhere."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except Exception:
            setattr(sys, name, _nowhere())


@contextlib.contextmanager
def ends_in_one_line(training: bool = False) -> Iterator[None]:
    """Around a whole command: what it cannot do ends it with one line and status 1, Ctrl-C with 130."""
    _keep_open()
    try:
        yield
    except (UsageError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
    except (RuntimeError, MemoryError) as error:
        reason = out_of_resources(error, training)
        if reason is None:
            raise
        sys.exit(f"error: {reason}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        _let_go()
