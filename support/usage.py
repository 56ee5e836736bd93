"""What a user gives: bounds that stand at their fields, and refusals of one line that name the fix."""

import contextlib
import errno
import math
import os
import re
import sys
import traceback
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import torch
from annotated_types import Ge, Gt, Interval, Le, Lt

PROJECT = Path(__file__).resolve().parent.parent
Kind = TypeVar("Kind")
Count = Annotated[int, Ge(1)]
Steps = Annotated[int, Ge(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
Positive = Annotated[float, Interval(gt=0, lt=math.inf)]


@dataclass(frozen=True)
class OnlyWith:
    """At a field that is looked at only where another one has one of these values; else it is its default."""

    field: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class NotBelow:
    """At a number that is 0 or at least the value of another field."""

    field: str


@dataclass(frozen=True)
class InUTF8:
    """At a text that goes into curves. What a command line holds need not be UTF-8."""


class UsageError(ValueError):
    """Something the user gave cannot work; the message is one line and names the fix."""


def flag(name: str) -> str:
    """The command line's name of a field: --num-envs of num_envs."""
    return f"--{name.replace('_', '-')}"


def check_bounds(settings: Any) -> None:
    """Holds every field of a dataclass against its type: `Annotated` bounds, `Literal` choices, `OnlyWith`.

    Raises UsageError where a value lies outside, as NaN always does, or where nothing would look at it.
    """
    unused = unused_fields(settings)
    for field in fields(settings):
        value = getattr(settings, field.name)
        rule = _broken_rule(value, field.type)
        if rule:
            raise UsageError(f"{field.name} is {value}, but must be {rule}: change {flag(field.name)}")
        for bound in getattr(field.type, "__metadata__", ()):
            if isinstance(bound, NotBelow) and field.name not in unused:
                _refuse_below(settings, field.name, bound)
    for name, condition in unused.items():
        value = getattr(settings, name)
        if value != getattr(type(settings), name):
            *others, last = (choice for choice in condition.values if choice != "none")
            choices = f"{', '.join(others)} or {last}" if others else last
            use = f"{flag(condition.field)} {choices}"
            fix = "give that, or leave the flag out"
            raise UsageError(f"{name} is {value}, which only {use} looks at: {fix}")


def _refuse_below(settings: Any, name: str, bound: NotBelow) -> None:
    value = getattr(settings, name)
    least = getattr(settings, bound.field)
    if 0 < value < least:
        fix = f"raise {flag(name)}"
        if getattr(settings, "fork", None) is None:  # whose other number is its origin's
            fix += f" or lower {flag(bound.field)}"
        raise UsageError(f"{name} is {value}, but must be at least {bound.field} ({least}): {fix}")


def changed_fields(settings: Any, before: Any) -> list[str]:
    """Names of the fields that are not as in `before`; where a run comes from is left out."""
    names = [field.name for field in fields(settings) if field.name not in ("resume", "fork")]
    return [name for name in names if getattr(settings, name) != getattr(before, name)]


def refuse_changes(settings: Any, before: Any, forkable: Collection[str]) -> None:
    """Raises UsageError where a run is to be resumed with other settings than its own.

    `forkable` are the fields that a fork may change.
    """
    changed = changed_fields(settings, before)
    if not changed:
        return
    instead = "use --fork"
    if not set(changed).issubset(forkable):
        instead = "begin a new run"
    names = ", ".join(changed)
    raise UsageError(f"--resume goes on as the run was, {names} cannot change: leave out, or {instead}")


def settings_of(kind: type[Kind], values: dict[str, Any], path: Path) -> Kind:
    """The dataclass `kind` with these values, read at `path`; UsageError where another version wrote them."""
    fix = "take another, or go on with the version of this project that wrote it"
    with reading(path, "a run's arguments", fix):
        return kind(**values)


def conditions(kind: Any) -> dict[str, OnlyWith]:
    """{name: condition} of the fields of a dataclass, or of an instance, that not every setting looks at."""
    found = {}
    for field in fields(kind):
        for part in getattr(field.type, "__metadata__", ()):
            if isinstance(part, OnlyWith):
                found[field.name] = part
    return found


def unused_fields(settings: Any) -> dict[str, OnlyWith]:
    """{name: condition} of the fields that nothing looks at with these settings."""
    unused = {}
    for name, condition in conditions(settings).items():
        if getattr(settings, condition.field) not in condition.values:
            unused[name] = condition
    return unused


def _broken_rule(value: Any, annotation: Any) -> str:
    """What `annotation` asks for in words, where `value` does not keep to it; else nothing."""
    kind = annotation
    bounds: list[Any] = []
    if get_origin(annotation) is Annotated:
        kind, *bounds = get_args(annotation)
    if value is None and type(None) in get_args(kind):
        return ""
    if get_origin(kind) is Literal:
        return "" if value in get_args(kind) else f"one of {', '.join(map(str, get_args(kind)))}"
    single_bounds: list[Any] = []
    for bound in bounds:
        if isinstance(bound, Interval):
            single_bounds.extend(bound)
        else:
            single_bounds.append(bound)
    kept = []
    words = []
    for bound in single_bounds:
        match bound:
            case Ge(limit):
                kept.append(value >= limit)
                words.append("0 or more" if limit == 0 else f"at least {limit}")
            case Gt(limit):
                kept.append(value > limit)
                words.append("positive" if limit == 0 else f"above {limit}")
            case InUTF8():
                kept.append(value.encode(errors="replace").decode() == value)
                words.append("text in UTF-8")
            case Le(limit):
                kept.append(value <= limit)
                words.append(f"at most {limit}")
            case Lt(limit):
                kept.append(value < limit)
                words.append("finite" if limit == math.inf else f"below {limit}")
    return "" if all(kept) else " and ".join(words)


# what a GPU's driver and its maker's libraries report of themselves, in the words that PyTorch passes on
OF_A_GPU = (
    r"\b(cuda|hip)( driver| runtime| unknown)? error\b",
    r"\b(cudnn|cublas|cusolver|cusparse|hipblas|hipsolver|rocblas)( error\b|_status_\w+)",
    r"\bmiopen(status\w+)?\b",
    r"\b(nvrtc|hiprtc): error\b",
    r"\b(cuda|nvidia|hip) driver\b",
    r"\b(cuda|hip)getdevicecount\b",
    r"\bno (cuda|hip) gpus\b",
    r"\bno kernel image\b",
    r"\bunable to find an engine\b",
)
# and what they say there of the program that uses them: a mistake, which its trace leads to
OF_THE_CODE = (
    r"assert triggered",
    r"illegal memory access",
    r"misaligned address",
    r"too many resources",
    r"captur",
    r"invalid (argument|configuration|resource handle|device pointer|device ordinal|pitch|program counter)",
    r"status_(invalid_value|bad_param|not_supported)",
)
# what no file is to blame for, whatever reads it
NO_FILES_FAULT = (
    r"cuda|cudnn|cublas|miopen|\bhip\b",
    r"on the same device",
    r"deterministic",
    r"\bin-?place\b",
)
# what is wrong with a place that is given; all other errors of a system may be mended where they are
OF_A_PLACE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
NO_MEMORY = (r"can't allocate memory", r"not enough memory", r"bad_alloc")
NO_MEMORY_ON_A_GPU = (r"alloc_failed", r"out of memory")


def says(text: str, patterns: tuple[str, ...]) -> bool:
    return re.search("|".join(patterns), text, re.IGNORECASE) is not None


def of_a_gpu(error: BaseException) -> bool:
    """Whether a GPU's driver or library reports this of itself, and it is no mistake in the code."""
    line = str(error).partition("\n")[0]
    return isinstance(error, RuntimeError) and says(line, OF_A_GPU) and not says(line, OF_THE_CODE)


def out_of_resources(error: BaseException, training: bool = True) -> str | None:
    """What ran out or broke down, and the fix, where an error comes from memory or a GPU; else None.

    Where it came in `training`, a smaller run helps.
    """
    line = str(error).partition("\n")[0]
    reason = line.partition(". Tried")[0] or type(error).__name__
    of_the_runtime = isinstance(error, RuntimeError)
    if isinstance(error, torch.OutOfMemoryError) or (of_a_gpu(error) and says(line, NO_MEMORY_ON_A_GPU)):
        fix = "free it of other jobs"
        if training:
            fix += ", or lower --batch-size or --num-envs in a new run"
        return f"the GPU's memory has run out ({reason}): {fix}"
    if isinstance(error, MemoryError) or (of_the_runtime and says(line, NO_MEMORY)):
        fix = "free some"
        if training:
            fix += ", or lower --buffer-size, --batch-size or --num-envs in a new run"
        return f"memory has run out ({reason}): {fix}"
    if of_the_runtime and says(line, (r"can't start new thread",)):
        fix = "end other processes, or raise the limit (ulimit -u)"
        return f"the system starts no more threads ({reason}): {fix}"
    if of_a_gpu(error):
        fix = "try another one by CUDA_VISIBLE_DEVICES, or the CPU by CUDA_VISIBLE_DEVICES="
        return f"the GPU has failed ({reason}): {fix}"
    return None


def of_the_system(error: BaseException | None) -> bool:
    """Whether the system cannot read what is there, as without permission: it may be good."""
    return isinstance(error, OSError) and error.errno not in (None, *OF_A_PLACE)


@contextlib.contextmanager
def reading(path: Path, kind: str, fix: str) -> Iterator[None]:
    """Turns all that a foreign or damaged file makes its reader stumble over into a UsageError of one line.

    A mistake in the code is none of the file's, and keeps its trace.
    """
    try:
        yield
    except Exception as error:
        if out_of_resources(error) or _no_files_fault(error):
            raise
        reason = str(error).partition("\n")[0].partition(". ")[0]
        if of_the_system(error):
            fix = f"see to that, or {fix}"
        cannot = f"{path} cannot be read as {kind} ({type(error).__name__}: {reason})"
        raise UsageError(f"{cannot}: {fix}") from error


def words_given() -> list[str]:
    """This process's command line, ~ as the user's home: also in --out=~/x.png, where no shell puts it in."""
    words = []
    for word in sys.argv[1:]:
        name, equals, value = word.partition("=")
        if equals and name.startswith("-"):
            words.append(f"{name}={os.path.expanduser(value)}")
        else:
            words.append(os.path.expanduser(word))
    return words


def _no_files_fault(error: Exception) -> bool:
    """Whether an error shows a mistake in this project's code, whatever the file that is being read.

    Libraries may stumble over a damaged file in these ways, too; so where the error was raised counts.
    """
    if isinstance(error, AttributeError | NameError | AssertionError | ImportError | NotImplementedError):
        *_, last = traceback.walk_tb(error.__traceback__)
        source = Path(last[0].f_code.co_filename)
        return source.is_relative_to(PROJECT) and "site-packages" not in source.parts
    return isinstance(error, RuntimeError) and says(str(error), NO_FILES_FAULT)


def flags_given(words: Sequence[str] | None = None) -> set[str]:
    """Names of the fields that these words set, by default this process's, also to what they were anyway."""
    words = sys.argv[1:] if words is None else words
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    return {given.removeprefix("--").replace("-", "_").removeprefix("no_") for given in flags}
