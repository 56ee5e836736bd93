"""This process: signals, what it says, how it ends."""

import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from interruptions import send

import support.process as process
from support.process import Signals, deaf_in_the_end, ends_in_one_line, say
from support.usage import UsageError

ASKING = (*Signals.STOP, *Signals.CHECKPOINT)


def test_what_a_closed_terminal_does_not_take_is_dropped():
    ours, theirs = os.openpty()
    terminal = open(theirs, "w", encoding="utf-8", buffering=1)  # noqa: SIM115, closing it fails
    stream = process.Unfailing(terminal)
    stream.write("a\n")
    assert os.read(ours, 100) == b"a\r\n" and stream.isatty() and stream.encoding == terminal.encoding
    os.close(ours)
    with pytest.raises(OSError, match="Input/output error"):
        terminal.write("b\n")
    stream.write("c\n")
    stream.write("d")
    stream.flush()
    with pytest.raises(OSError, match="Input/output error"):
        terminal.close()


# signals


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still: [seconds]."""
    now = [100.0]
    monkeypatch.setattr(process.time, "monotonic", lambda: now[0])
    return now


def test_signals_are_requests_while_the_block_lasts_and_handlers_are_put_back():
    before = [signal.getsignal(number) for number in ASKING]
    with pytest.raises(ZeroDivisionError), Signals() as signals:
        assert signals.stop is None and not signals.checkpoint
        send(signal.SIGUSR1)()
        assert signals.checkpoint and signals.stop is None
        send(signal.SIGUSR1)()
        send(signal.SIGTERM)()
        assert signals.stop is signal.SIGTERM
        raise ZeroDivisionError
    assert before == [signal.getsignal(number) for number in ASKING]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_each_signal_that_ends_a_process_is_a_request_to_stop(number):
    with Signals() as signals:
        send(number)()
    assert signals.stop is number and not signals.checkpoint


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_both_user_signals_ask_for_a_checkpoint(number):
    with Signals() as signals:
        send(number)()
    assert signals.checkpoint and signals.stop is None


@pytest.mark.parametrize("first", Signals.STOP)
@pytest.mark.parametrize("second", Signals.STOP)
def test_what_comes_within_two_seconds_is_one_request_and_a_later_one_ends_the_process(clock, first, second):
    with Signals() as signals:
        for later in (0, 0.2, 1.99):
            clock[0] = 100 + later
            send(second if later else first)()
            assert signals.stop is first
        clock[0] = 102
        with pytest.raises(SystemExit) as stop:
            send(second)()
    assert stop.value.code == 128 + second


def test_a_signal_that_comes_while_one_is_noted_is_the_same_request(monkeypatch):
    with Signals() as signals:

        def now():
            monkeypatch.setattr(process.time, "monotonic", lambda: 100.0)
            send(signal.SIGTERM)()  # in the middle of noting the first
            return 100.0

        monkeypatch.setattr(process.time, "monotonic", now)
        send(signal.SIGINT)()
    assert signals.stop is not None


@pytest.mark.parametrize("number", ASKING)
def test_a_signal_that_was_ignored_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Signals() as signals:
            send(number)()
            assert signals.stop is None and not signals.checkpoint
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_once_the_process_ends_no_signal_disturbs_that(clock):
    with Signals() as signals:
        send(signal.SIGTERM)()
        clock[0] += 3
        with pytest.raises(SystemExit) as stop:
            send(signal.SIGINT)()
        send(signal.SIGTERM)()
        clock[0] += 3
        send(signal.SIGTERM)()
    assert stop.value.code == 130 and signals.stop is signal.SIGTERM


def test_in_the_very_end_signals_are_ignored():
    before = {number: signal.getsignal(number) for number in ASKING}
    try:
        with pytest.raises(SystemExit), deaf_in_the_end():
            assert {number: signal.getsignal(number) for number in ASKING} == before
            raise SystemExit(143)
        for number in ASKING:
            send(number)()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number,status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_with_nothing_to_save_the_first_signal_ends_the_process(number, status):
    with Signals() as signals:
        with pytest.raises(SystemExit) as stop, signals.nothing_to_save():
            send(signal.SIGUSR1)()
            send(number)()
        assert stop.value.code == status and signals.checkpoint
    with Signals() as signals:
        with signals.nothing_to_save():
            pass
        send(number)()
        assert signals.stop is number, "afterwards it is a request again"


def test_a_thread_does_without_signals():
    before = [signal.getsignal(number) for number in ASKING]
    stops = []

    def work():
        with Signals() as signals:
            stops.append(signals.stop)
            assert before == [signal.getsignal(number) for number in ASKING]

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert stops == [None] and before == [signal.getsignal(number) for number in ASKING]


# what it says


def test_a_line_is_said_at_once(capsys):
    say("a line")
    assert capsys.readouterr().out == "a line\n"
    written = []
    say("another", written.append)
    assert written == ["another"]


class Failing(io.TextIOBase):
    """A stream of another kind, such as a notebook's whose page was closed."""

    def __init__(self, error):
        self.error = error

    def write(self, _):
        raise self.error

    def isatty(self):
        raise self.error


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS = {
    "none": lambda: None,
    "closed": closed,
    "a pipe without a reader": lambda: Failing(BrokenPipeError("gone")),
    "a terminal that was closed": lambda: Failing(OSError(5, "Input/output error")),
    "another library's": lambda: Failing(RuntimeError("no kernel")),
    "no stream at all": lambda: object(),
}
each_stream = pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)


@each_stream
def test_nobody_has_to_listen(monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream())
    say("a line")


# one of several


@pytest.mark.parametrize(
    ("variables", "group"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "4"}, ("SLURM_STEP_NUM_TASKS", 4)),
        (
            {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"},
            None,
        ),  # an allocation of four tasks, a step of one
        ({"SLURM_NTASKS": "4", "SLURM_NPROCS": "4"}, None),
        ({"SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_SIZE": "2"}, ("OMPI_COMM_WORLD_SIZE", 2)),
        *(({name: "3"}, (name, 3)) for name in process.GROUP_SIZES),
        *(({"WORLD_SIZE": value}, None) for value in ("1", "0", "-2", "", " ", "many", "2.0", "0x4")),
    ],
    ids=str,
)
def test_a_process_of_a_step_or_group_of_several_knows_by_which_variable(monkeypatch, variables, group):
    for name in process.GROUP_SIZES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert process.group_of_equals() == group


# the end


@pytest.mark.parametrize(
    "error",
    [
        UsageError("no"),
        FloatingPointError("no"),
        OSError("no"),
        KeyboardInterrupt(),
        SystemExit(143),
        ValueError("no"),
    ],
)
def test_what_a_command_cannot_do_ends_it_in_one_line_and_what_is_a_bug_does_not(error):
    with pytest.raises(BaseException) as end, ends_in_one_line():
        raise error
    expected = {KeyboardInterrupt: 130, SystemExit: 143}.get(type(error), "error: no")
    if type(error) is ValueError:
        assert end.value is error
    else:
        assert type(end.value) is SystemExit and end.value.code == expected


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"),
            "error: the GPU's memory has run out",
        ),
        (MemoryError(), "error: memory has run out"),
        (RuntimeError("std::bad_alloc"), "error: memory has run out (std::bad_alloc)"),
        (
            RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors"),
            "error: the GPU has failed (CUDA error: unspecified launch failure)",
        ),
    ],
)
def test_what_runs_out_ends_a_command_in_one_line(error, line):
    with pytest.raises(SystemExit) as end, ends_in_one_line():
        raise error
    assert end.value.code.startswith(line) and "\n" not in end.value.code


def test_memory_that_pytorch_cannot_have_ends_a_command_in_one_line():
    with pytest.raises(SystemExit) as end, ends_in_one_line():
        torch.empty(10**15)
    assert end.value.code.startswith("error: memory has run out (") and "\n" not in end.value.code


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
        ),
        RuntimeError("CUDA error: device-side assert triggered"),
        AssertionError("Torch not compiled with CUDA enabled"),
    ],
    ids=str,
)
def test_a_bug_of_ours_keeps_its_traceback(error):
    with pytest.raises(type(error)) as end, ends_in_one_line():
        raise error
    assert end.value is error


def test_letters_that_a_terminal_has_not_are_question_marks(monkeypatch, tmp_path):
    with open(tmp_path / "log", "w", encoding="ascii") as log:
        monkeypatch.setattr(sys, "stdout", log)
        with ends_in_one_line():
            print("ε − x")
    assert (tmp_path / "log").read_text(encoding="utf-8") == "? ? x\n"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "iso8859-1"])
def test_a_program_begins_once_more_in_utf8_where_names_of_files_are_in_another_encoding(
    monkeypatch, encoding
):
    begun = []
    monkeypatch.setattr(os, "execv", lambda *command: begun.append(command))
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: encoding)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "compare.py", "l\udcc3\udca4ufe/a b"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setenv("PYTHONUTF8", "0")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")  # so that it is taken back, whatever becomes of it
    monkeypatch.delenv("PYTHONIOENCODING")
    process.begin_in_utf8()
    again = [sys.executable, "-X", "utf8", "-X", "dev", "compare.py", "l\udcc3\udca4ufe/a b"]
    assert begun == ([] if encoding == "utf-8" else [(sys.executable, again)])
    if begun:  # what is printed stays as a terminal like this can show it
        assert (os.environ["PYTHONUTF8"], os.environ["PYTHONIOENCODING"]) == ("1", "ascii")


ROOT = Path(process.__file__).parent.parent
NO_TORCH = (
    "class OutOfMemoryError(RuntimeError):\n    pass\n"  # what is needed of it, without a second to import it
)
COMMAND = f"""import contextlib, sys; sys.path.insert(1, {str(ROOT)!r})
from support.process import ends_in_one_line, say
with ends_in_one_line():
    file = open("file", "w")
    for _ in range(3): say("a line")
    import os
    for number in (1, 2):
        with contextlib.suppress(OSError): os.write(number, b"from C")
    file.write(str(file.fileno()))
    file.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "redirected", ["| true", ">&-", "2>&-", "<&-", ">&- 2>&- <&-", ">/dev/full", "2>&1 | true"]
)
def test_a_command_ends_well_and_writes_to_no_foreign_file_whatever_its_output_is(redirected):
    Path("command.py").write_text(COMMAND, encoding="utf-8")
    Path("torch.py").write_text(NO_TORCH, encoding="utf-8")
    ended = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {{ sleep 1; {sys.executable} command.py; }} {redirected}"],
        capture_output=True,
        encoding="utf-8",
    )
    assert ended.returncode == 0 and "Error" not in ended.stderr
    assert int(Path("file").read_text(encoding="utf-8")) > 2, (
        "the number of a stream that was closed is not given to another file"
    )


@pytest.mark.parametrize("name", ["dqn_injection_atari", "compare", "sweep"])
def test_a_script_that_was_copied_alone_asks_for_its_folder_and_names_no_package(monkeypatch, name):
    if name == "sweep":
        pytest.importorskip("ray")
    copied = shutil.copy(ROOT / f"{name}.py", "copied.py")
    monkeypatch.setattr(sys, "argv", [copied])
    for module in [name for name in sys.modules if name.startswith(("analysis", "orchestration"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "analysis", None)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(copied, run_name="__main__")
    missing = "support/" if name == "dqn_injection_atari" else r"analysis(\.\w+)?"
    fix = "clone or copy the project's whole folder, and run it there"
    assert re.fullmatch(f"error: {missing} is not beside this script: {fix}", end.value.code)


def test_standard_streams_that_are_there_stay_as_they_are():
    before = sys.stdin, sys.stdout, sys.stderr
    with ends_in_one_line():
        assert before == (sys.stdin, sys.stdout, sys.stderr)
    assert before == (sys.stdin, sys.stdout, sys.stderr) and os.fstat(1)


IMPORTS = """import ast, importlib, json, logging, os, signal, sys, warnings
from pathlib import Path

folder = Path(sys.argv[1])
libraries = set()
for path in folder.glob("*.py"):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            libraries |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            libraries.add(node.module)
for library in sorted(libraries):
    if not library.startswith("support"):
        importlib.import_module(library)

import torch

torch.set_num_threads(7)


def state():
    loggers = [logging.getLogger(name) for name in (None, *logging.root.manager.loggerDict)]
    return {
        "threads": torch.get_num_threads(),
        "keeps denormals": (torch.tensor(1e-310, dtype=torch.float64) * 1).item() != 0,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "switches": [torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32],
        "environment": dict(os.environ),
        "handlers": {number: str(signal.getsignal(number)) for number in signal.valid_signals()},
        "streams": [(stream.encoding, stream.errors) for stream in (sys.stdin, sys.stdout, sys.stderr)],
        "warnings": [str(rule) for rule in warnings.filters],
        "loggers": {logger.name: logger.level for logger in loggers if logger.level},
        "hooks": [str(hook) for hook in (sys.excepthook, sys.unraisablehook)],
    }


before = state()
modules = [path.stem for path in folder.glob("*.py")]
for module in modules:
    importlib.import_module(f"support.{module}")
print(json.dumps({"before": before, "after": state(), "modules": modules}))
import ale_py

ale_py.ALEInterface()  # prints its banner, as in any other process
"""


def test_importing_support_changes_nothing_in_the_process():
    """What its libraries change, when they are imported, is theirs."""
    command = [sys.executable, "-c", IMPORTS, str(ROOT / "support")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)
    assert ended.returncode == 0, ended.stderr
    shown = json.loads(ended.stdout)
    assert shown["after"] == shown["before"]
    assert shown["before"]["threads"] == 7 and shown["before"]["keeps denormals"]
    assert len(shown["modules"]) > 10
    assert "Arcade Learning Environment" in ended.stderr
