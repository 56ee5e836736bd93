"""Weights & Biases, which mirrors a run's TensorBoard curves."""

import contextlib
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

from support.usage import UsageError


def require_wandb() -> None:
    """
    Raises:
        UsageError: Weights & Biases is not installed.
    """
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder named wandb is found, without an origin
        raise UsageError("--track needs Weights & Biases, which is not installed: pip install wandb, or leave out --track")


def start_wandb(project: str, entity: str | None, name: str, run_id: str, config: dict[str, Any]) -> Any:
    """Mirrors everything that is written to TensorBoard from now on, in the run there that has this number.

    Returns that run; where its `resumed` is false, it has nothing of what a process before this one wrote.

    Raises:
        UsageError: no login, or no network. Nothing is left behind.
    """
    import wandb

    folder = Path(os.environ.get("WANDB_DIR", "."), "wandb")
    before = set(folder.iterdir()) if folder.is_dir() else None
    os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")  # seconds, not 90
    try:
        return wandb.init(
            project=project,
            entity=entity,
            name=name,
            id=run_id,
            resume="allow",
            config=config,
            sync_tensorboard=True,
            save_code=True,
        )
    except Exception as error:
        with contextlib.suppress(Exception):
            wandb.teardown()  # it writes on, else
        for new in set(folder.iterdir()) - (before or set()) if folder.is_dir() else ():
            shutil.rmtree(new) if new.is_dir() and not new.is_symlink() else new.unlink()
        if before is None and folder.is_dir():
            folder.rmdir()
        reason = str(error).partition("\n")[0].removesuffix(".")
        fix = "give a login by `wandb login`, keep its curves here by WANDB_MODE=offline, or leave out --track"
        raise UsageError(f"--track: Weights & Biases cannot be used ({reason}): {fix}") from error
