"""Flags of the training script as words of a command line, and what it makes of them."""

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dqn_injection_atari as script
from dqn_injection_atari import Args
from support.usage import UsageError, flag


def words_of(text: str) -> list[str]:
    """The words of a part of a command line, as a shell would take them."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{text} is no part of a command line ({error}): change --arm or --grid") from None


def parsed(flags: Sequence[str]) -> Args:
    """What the training script makes of its flags. Raises UsageError where it refuses them."""
    errors = io.StringIO()
    before = sys.argv
    sys.argv = [Path(script.__file__).name, *flags]
    try:
        with contextlib.redirect_stderr(errors):
            return script.parse_args()
    except SystemExit as end:
        if not end.code:  # --help
            raise
        reason: list[str] = []
        for line in errors.getvalue().splitlines()[1:]:  # it stands in a box, below a title and above a rule
            words = line.strip(" │╰╯")
            if words.strip("─-"):
                reason.append(words)
            elif reason:
                break
        lists = f"python {shlex.quote(os.path.relpath(script.__file__))} --help lists flags"
        raise UsageError(f"{' '.join(reason)}: {lists}") from None
    finally:
        sys.argv = before


def as_flags(name: str, value: Any) -> tuple[str, ...]:
    """The flags that set a field to a value; a tuple is several words."""
    if isinstance(getattr(Args, name), bool):
        given = str(value).lower()
        if given not in ("true", "false"):
            words = " ".join(value) if isinstance(value, tuple) else value
            raise UsageError(f"{name} is {words}, but must be true or false: change it in --grid")
        return (flag(name if given == "true" else f"no_{name}"),)
    values = value if isinstance(value, tuple) else (value,)
    return (flag(name), *map(str, values))
