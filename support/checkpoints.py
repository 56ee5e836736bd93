"""Checkpoints: named states in a folder that is whole or not there, checked byte by byte when it is read.

A part is any object with `state_dict` and `load_state_dict`, whose state is plain data and tensors. One whose
state is too large to be held twice also has `tensors()`: contiguous tensors, which go to a compressed file of
their own and, once `load_state_dict` has made room for them, are filled in place.

Other programs' files are passed over: in a run's folder only what is named as a checkpoint is one, and to a
checkpoint belong only the files that its list of checksums names.
"""

import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import zstandard

from support.machine import flush_to_disk
from support.process import say
from support.usage import UsageError, of_the_system, reading

FORMAT = 7
CHECKSUMS = "SHA256SUMS"  # of the other files, to be checked with `sha256sum -c` as well
NEEDED = {"manifest.json", "state.pt"}
FILE = re.compile(r"manifest\.json|state\.pt|\w+\.zst", re.ASCII)
CHECKSUM = re.compile(rf"([0-9a-f]{{64}})  ({FILE.pattern})\n", re.ASCII)  # a line of SHA256SUMS
FOLDER = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
LEFTOVER = re.compile(rf"\.{FOLDER.pattern}\.(partial|damaged|old)")
# what to do with one whose every byte is right, and which does not fit all the same
AS_IT_WAS_MADE = "go on with the script, the packages and the processor that its manifest.json names"
BEGIN_AGAIN = "start the run again without --resume; of a sweep, move it away and repeat the sweep"
WRITE_ERRORS = (OSError, MemoryError, zstandard.ZstdError)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, in memory but for the tensors that are streamed."""

    path: Path
    meta: dict[str, Any]
    state: dict[str, Any]
    files: Collection[str] = ()  # that are verified

    @property
    def step(self) -> int:
        return self.meta["step"]

    def restore(self, parts: dict[str, Any]) -> None:
        """Brings these parts, in their order, into their saved state; UsageError where that does not fit."""
        for name, part in parts.items():
            if hasattr(part, "tensors") and f"{name}.zst" not in self.files:
                reason = f"{name}.zst is not in {CHECKSUMS}"
                cannot = f"{self.path} cannot be read as this run's checkpoint ({reason})"
                raise UsageError(f"{cannot}: move it away, and go on from another")
        with reading(self.path, "this run's checkpoint", AS_IT_WAS_MADE):
            for name, part in parts.items():
                part.load_state_dict(self.state[name])
                if hasattr(part, "tensors"):
                    _fill(part.tensors(), self.path / f"{name}.zst")


def save_checkpoint(
    folder: Path, step: int, parts: dict[str, Any], meta: dict[str, Any], keep: Collection[int] = ()
) -> Path:
    """Writes `checkpoint-{step}` into `folder`, then removes older ones but for those of the steps in `keep`.

    It is written under another name, flushed to disk and renamed, so that a checkpoint is whole or not there.
    `meta` is what JSON can hold. Raises one of WRITE_ERRORS where it fails, and leaves what was there before.
    """
    final = folder / f"checkpoint-{step}"
    partial = folder / f".{final.name}.partial"
    state = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in parts.items()}, state)
    manifest = {"format": FORMAT, "step": step, **meta}
    _remove_leftovers(folder)
    try:
        partial.mkdir()
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        (partial / "state.pt").write_bytes(state.getbuffer())
        for name, part in parts.items():
            if hasattr(part, "tensors"):
                _stream(part.tensors(), partial / f"{name}.zst")
        (partial / CHECKSUMS).write_text(checksums(partial), encoding="utf-8")
        for path in (*_files_of(partial), partial / CHECKSUMS, partial):
            flush_to_disk(path)
        if os.path.lexists(final):  # a damaged one, which the run did not go on from; or somebody else's file
            final.rename(folder / f".{final.name}.damaged")
        _put_in_place(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        flush_to_disk(folder)
        for earlier, old in list_checkpoints(folder).items():
            if earlier < step and earlier not in keep:
                old.rename(old.with_name(f".{old.name}.old"))
        _remove_leftovers(folder)
    except OSError as error:  # the new one is there: what is older goes the next time
        say(f"warning: {final} is written, older ones stay for now ({error})")
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint of which every byte is right; UsageError where one is not. Runs no code from it."""
    fix = "take another"
    with reading(path, "a checkpoint", fix):
        recorded = _read_checksums(path / CHECKSUMS)
        damaged = [name for name, checksum in recorded.items() if _checksum(path / name) != checksum]
        if damaged:
            raise ValueError(f"{' and '.join(damaged)} is damaged, the checksum is another")
        meta = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        written_as = meta["format"]
    if written_as != FORMAT:
        cannot = (
            f"{path} cannot be read as a checkpoint, its format is {written_as}, this version reads {FORMAT}"
        )
        raise UsageError(f"{cannot}: go on with the version of this project that wrote it")
    with reading(path, "a checkpoint", fix):
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        return Checkpoint(path, meta, state, files=tuple(recorded))


def newest_good_checkpoint(folder: Path, run_id: str) -> Checkpoint | None:
    """The newest good checkpoint of this run in its folder, None without any.

    Raises:
        UsageError: all are bad; or the system cannot read one now, which may be good. Were it passed over, a
            later resume could find it readable, and the curves of the steps in between would be missing.
    """
    with reading(folder, "a run's folder", "give another to --resume"):
        paths = list_checkpoints(folder)
    for step, path in paths.items():
        try:
            checkpoint = load_checkpoint(path)
            if checkpoint.meta["run"] != run_id:
                raise UsageError(f"{path} belongs to another run")
            if checkpoint.step != step:
                raise UsageError(f"{path} holds step {checkpoint.step}, it was renamed")
            return checkpoint
        except UsageError as error:
            if of_the_system(error.__cause__):
                raise UsageError(f"{error} by moving this one away") from error.__cause__
            say(f"warning: {error}; falling back to an older one")
    if paths:
        raise UsageError(f"{folder} holds no good checkpoint to go on from: {BEGIN_AGAIN}")
    return None


def read_identity(path: Path) -> dict[str, Any]:
    """The "run" (an id) and "args" in a `run.json` or `manifest.json`; UsageError where there are none."""
    fix = "give a run's folder to --resume, one of its checkpoints to --fork"
    with reading(path, "a run's arguments", fix):
        identity = json.loads(path.read_text(encoding="utf-8"))
        args = dict(identity["args"])  # first of all: a file that holds something else has none
        return {"run": identity.get("run"), "args": args}


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """{step: path} of the checkpoints in a run's folder, good or not, newest first."""
    found = {}
    for path in folder.iterdir():  # glob would find nothing where the system cannot list it
        name = FOLDER.fullmatch(path.name)
        if name is not None and path.is_dir():
            found[int(name[1])] = path
    return dict(sorted(found.items(), reverse=True))


def create_run_folder(folder: Path, identity: dict[str, Any]) -> Path:
    """A new folder of this name, or with a number after it where another run starts in the same second.

    Its `run.json`, there as soon as the folder is, holds `identity`; UsageError where it cannot be written.
    """
    draft = folder.parent / f".{identity['run']}"
    target = folder
    try:
        draft.mkdir(parents=True)
        (draft / "run.json").write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
        flush_to_disk(draft / "run.json")
        attempt = 0
        while True:
            try:
                _put_in_place(draft, target)
                return target
            except OSError:
                if not target.exists():
                    raise
            attempt += 1
            target = folder.with_name(f"{folder.name}-{attempt}")
    except OSError as error:
        fix = "start elsewhere"
        if error.errno == errno.ENAMETOOLONG and os.path.lexists(draft):  # not the path, the name is too long
            fix = "give a shorter --exp-name"
        shutil.rmtree(draft, ignore_errors=True)
        raise UsageError(f"cannot write run folder {target.absolute()} ({error.strerror}): {fix}") from None


def checksums(checkpoint: Path) -> str:
    """One line a file of a checkpoint's own, in the form that `sha256sum` writes and checks."""
    return "".join(f"{_checksum(path)}  {path.name}\n" for path in _files_of(checkpoint))


def _files_of(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint that is being written, but for its list."""
    return sorted(path for path in checkpoint.iterdir() if FILE.fullmatch(path.name) and path.is_file())


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_checksums(path: Path) -> dict[str, str]:
    """{name: checksum} of the files that a checkpoint consists of. Raises ValueError where it is damaged."""
    text = path.read_bytes().decode()
    lines = CHECKSUM.findall(text)
    recorded = {name: checksum for checksum, name in lines}
    others = CHECKSUM.sub("", text)
    twice = len(recorded) < len(lines)
    if others or twice or not recorded.keys() >= NEEDED:
        raise ValueError(f"{path.name} is damaged, it is no list of a checkpoint's files")
    return recorded


def _chunks(tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The memory of contiguous tensors, one after the other, in views of 16 MB."""
    for tensor in tensors:
        yield from tensor.view(-1).view(torch.uint8).split(2**24)


def _stream(tensors: list[torch.Tensor], path: Path) -> None:
    compressor = zstandard.ZstdCompressor(level=1, threads=torch.get_num_threads())
    with open(path, "wb") as file, compressor.stream_writer(file) as stream:
        for chunk in _chunks(tensors):
            stream.write(chunk.cpu().numpy().data)


def _fill(tensors: list[torch.Tensor], path: Path) -> None:
    """Reads what `_stream` has written."""
    with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        for chunk in _chunks(tensors):
            content = torch.empty(len(chunk), dtype=torch.uint8)
            if stream.readinto(content.numpy().data) < len(chunk):
                raise EOFError(f"{path.name} is too short")
            chunk.copy_(content)


def _put_in_place(partial: Path, final: Path) -> None:
    try:
        partial.rename(final)
    except OSError:
        if partial.exists() or not final.exists():  # over a network it may have been done all the same
            raise


def _remove_leftovers(folder: Path) -> None:
    """Removes what an interrupted `save_checkpoint` left behind, as far as possible."""
    for leftover in folder.glob(".checkpoint-*"):
        if LEFTOVER.fullmatch(leftover.name) and leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
