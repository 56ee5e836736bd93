"""Weights & Biases, which mirrors a run's TensorBoard curves."""

import contextlib
import importlib.util
import os
import shlex
import sys
from typing import Any

from support.process import say
from support.usage import UsageError

WITHOUT = "leave out --track, in a run that has begun by --fork with --no-track"


def require_wandb() -> None:
    """Raises UsageError where Weights & Biases is not installed."""
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder named wandb is found, without an origin
        missing = "--track needs Weights & Biases, which is not installed"
        raise UsageError(f"{missing}: pip install wandb, or {WITHOUT}")


def start_wandb(project: str, entity: str | None, name: str, run_id: str, config: dict[str, Any]) -> Any:
    """Mirrors everything that is written to TensorBoard from now on, in the run there that has this number.

    Returns that run; where its `resumed` is false, it has nothing of what a process before this one wrote.
    Raises UsageError without a login or a network; a folder wandb/, here or in WANDB_DIR, stays even then.
    """
    os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")  # seconds, not 90
    os.environ.setdefault("WANDB_SILENT", "true")  # what it has to say is said here
    stdin = sys.stdin
    try:
        import wandb

        with open(os.devnull, encoding="utf-8") as nothing:
            sys.stdin = nothing  # on a terminal it would ask for a login, and wait
            run = wandb.init(
                project=project,
                entity=entity,
                name=name,
                id=run_id,
                resume="allow",
                config=config,
                sync_tensorboard=True,
                save_code=True,
            )
    except BaseException as error:
        with contextlib.suppress(Exception):
            wandb.teardown()  # it writes on, else
        if not isinstance(error, Exception):
            raise
        reason = str(error).partition("\n")[0].removesuffix(".")
        fix = WITHOUT
        if not isinstance(error, ImportError):
            fix = f"give a login by `wandb login`, keep its curves here by WANDB_MODE=offline, or {fix}"
        raise UsageError(f"--track: Weights & Biases cannot be used ({reason}): {fix}") from error
    finally:
        sys.stdin = stdin
    if run is not None:
        place = f"offline, send it by: {sync_command(run)}" if run.offline else run.url
        if place:
            say(f"Weights & Biases: {place}")
    return run


def sync_command(wandb_run: Any) -> str:
    """What to type to have what a run has left here sent there."""
    return f"wandb sync {shlex.quote(str(wandb_run.settings.sync_dir))}"


def let_go() -> None:
    """Once TensorBoard's first file is there: W&B follows its folder, and writing depends on W&B no more."""
    import wandb

    wandb.tensorboard.unpatch()  # type: ignore[attr-defined]


def finish_wandb(wandb_run: Any, status: Any) -> None:
    """Ends the run there with an exit status, 0 if it is complete."""
    try:
        wandb_run.finish(exit_code=status)
    except Exception as error:
        say(f"warning: Weights & Biases has failed ({error}): send what it has by: {sync_command(wandb_run)}")
