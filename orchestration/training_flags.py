"""Flags of the training script as words of a command line, and what it makes of them."""

import contextlib
import io
import itertools
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dqn_injection_atari as script
from dqn_injection_atari import Args
from support import usage
from support.usage import UsageError, flag


@contextlib.contextmanager
def command_line(flags: list[str] | tuple[str, ...]) -> Iterator[None]:
    """Has the training script find these flags as its own."""
    before, sys.argv = sys.argv, [Path(script.__file__).name, *flags]
    try:
        yield
    finally:
        sys.argv = before


def words_of(text: str) -> list[str]:
    """The words of a part of a command line, as a shell would take them.

    Raises:
        UsageError: a quotation does not end.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{text} is no part of a command line ({error}): change --arm or --grid") from None


def names_in(flags: list[str] | tuple[str, ...]) -> set[str]:
    """Names of the fields that flags of the training script set."""
    with command_line(flags):
        return usage.flags_given()


def parsed(flags: tuple[str, ...]) -> Args:
    """What the training script makes of its flags.

    Raises:
        UsageError: it refuses them.
    """
    said = io.StringIO()
    try:
        with command_line(flags), contextlib.redirect_stderr(said):
            return script.parse_args()
    except SystemExit as end:
        if not end.code:  # --help
            raise
        # tyro says it in a box, below a title and above a rule
        lines = [line.strip(" │╰╯") for line in said.getvalue().splitlines()[1:]]
        below = itertools.dropwhile(lambda line: not line.strip("─-"), lines)
        reason = " ".join(itertools.takewhile(lambda line: line.strip("─-"), below))
        lists = f"python {shlex.quote(os.path.relpath(script.__file__))} --help lists flags"
        raise UsageError(f"{reason}: {lists}") from None


def as_flags(name: str, value: Any) -> tuple[str, ...]:
    """The flags that set a field: to a value, or to the words in which a user gave one."""
    if Args.__dataclass_fields__[name].type is bool or isinstance(getattr(Args, name), bool):
        given = str(value).lower()
        if given not in ("true", "false"):
            raise UsageError(f"{name} is {value}, but must be true or false: change it in --grid")
        return (flag(name) if given == "true" else f"--no-{name.replace('_', '-')}",)
    words = (
        words_of(value)
        if isinstance(value, str)
        else map(str, value if isinstance(value, tuple) else (value,))
    )
    return (flag(name), *words)
