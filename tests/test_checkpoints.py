"""Checkpoints of tiny parts: whole or not there, checked byte by byte, whatever breaks them."""

import errno
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zstandard
from interruptions import before_line, full_disk, killed_before_every_line

import support.checkpoints as checkpoints
from support.checkpoints import (
    CHECKSUMS,
    FORMAT,
    create_run_folder,
    list_checkpoints,
    load_checkpoint,
    newest_good_checkpoint,
    read_identity,
    save_checkpoint,
)
from support.usage import UsageError

META = {"run": "this run", "args": {"seed": 1, "injection_step": [5, 9]}}
FILES = ("manifest.json", "state.pt", "frames.zst", CHECKSUMS)
FOLDER = Path("run")


@pytest.fixture(autouse=True)
def disk_that_is_not_waited_for(monkeypatch):
    """What is flushed when is a claim of its own below; what flushing does is one of test_machine.py."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


class Weights:
    """A part with tensors and plain data, all different for every step."""

    def __init__(self, step):
        self.state = {
            "values": torch.randn(40, generator=torch.Generator().manual_seed(step)),
            "generator": {"state": 2**100 + step, "name": "PCG64"},
            "interventions": [step, step + 1],
        }

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        if state["values"].shape != (40,):
            raise RuntimeError("size mismatch for values.\n  a long explanation")
        self.state = state


class Frames:
    """A part whose tensors are streamed. There is room for them only once `load_state_dict` has made it."""

    def __init__(self, step, rows=0):
        generator = torch.Generator().manual_seed(step)
        pixels = torch.randint(256, (rows, 7), dtype=torch.uint8, generator=generator)
        self.content = [pixels, torch.arange(rows) * step, torch.rand(rows, 2, generator=generator)]

    def state_dict(self):
        return {"rows": len(self.content[0])}

    def load_state_dict(self, state):
        self.content = Frames(0, state["rows"]).content

    def tensors(self):
        return self.content


def parts(step, rows=200):
    return {"weights": Weights(step), "frames": Frames(step, rows)}


def save(step, keep=()):
    FOLDER.mkdir(exist_ok=True)
    return save_checkpoint(FOLDER, step, parts(step), META, keep)


def assert_good(path, rows=200):
    """What `path` holds is what was saved at the step in its name."""
    checkpoint = load_checkpoint(path)
    step = int(path.name.removeprefix("checkpoint-"))
    restored, expected = parts(0, rows=0), parts(step, rows)
    checkpoint.restore(restored)
    assert checkpoint.step == step and checkpoint.meta == {"format": FORMAT, "step": step, **META}
    weights, saved = restored["weights"].state, expected["weights"].state
    assert torch.equal(weights.pop("values"), saved.pop("values")) and weights == saved
    for restored_tensor, saved_tensor in zip(
        restored["frames"].content, expected["frames"].content, strict=True
    ):
        assert torch.equal(restored_tensor, saved_tensor)


def there():
    return list(list_checkpoints(FOLDER))


def leftovers():
    return list(FOLDER.glob(".*"))


def seal(path):
    """Makes the checksums right again, as someone would who tampers with a checkpoint."""
    (path / CHECKSUMS).write_text(checkpoints.checksums(path), encoding="utf-8")


# save, load, restore


def test_what_is_saved_is_restored_bit_by_bit():
    path = save(7)
    assert path == FOLDER / "checkpoint-7" and sorted(file.name for file in path.iterdir()) == sorted(FILES)
    assert_good(path)


def test_streamed_tensors_may_be_larger_than_what_is_streamed_at_once_and_empty():
    FOLDER.mkdir()
    rows = 2**24 // 7 + 5
    assert_good(save_checkpoint(FOLDER, 3, parts(3, rows), META), rows)
    assert_good(save_checkpoint(FOLDER, 4, parts(4, rows=0), META), rows=0)


def test_parts_are_restored_in_the_given_order_and_others_left_alone():
    order = []

    class Noted(Weights):
        def load_state_dict(self, state):
            order.append(state["interventions"][0])

    FOLDER.mkdir()
    path = save_checkpoint(FOLDER, 1, {str(k): Weights(k) for k in range(4)}, META)
    load_checkpoint(path).restore({"2": Noted(0), "0": Noted(0), "1": Noted(0)})
    assert order == [2, 0, 1]


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs GNU coreutils")
def test_the_checksums_can_be_checked_without_this_project():
    path = save(7)
    command = ["sha256sum", "--strict", "-c", CHECKSUMS]
    assert (
        subprocess.run(command, cwd=path, capture_output=True, encoding="utf-8", check=True).stdout.count(
            ": OK\n"
        )
        == 3
    )
    (path / "frames.zst").write_bytes(b"")
    assert subprocess.run(command, cwd=path, capture_output=True, check=False).returncode == 1


def test_the_newest_checkpoint_and_those_of_the_steps_to_keep_stay():
    seen = []
    for step in (0, 120, 202, 240, 360):
        save(step, keep=(120, 202, 300))
        seen.append(there())
    assert seen == [[0], [120], [202, 120], [240, 202, 120], [360, 202, 120]] and leftovers() == []


def test_checkpoints_that_lie_ahead_stay_until_the_run_has_come_past_them():
    """After a fallback: a newer one may be unreadable for a moment only."""
    shutil.copytree(save(300), "ahead")
    save(200)
    shutil.copytree("ahead", FOLDER / "checkpoint-300", dirs_exist_ok=True)
    save(250)
    assert there() == [300, 250]
    save(350)
    assert there() == [350]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced():
    path = save(7)
    (path / "state.pt").unlink()
    save(7)
    assert_good(path)
    assert there() == [7] and leftovers() == []


def test_what_cannot_be_removed_now_is_removed_the_next_time(monkeypatch):
    save(1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", lambda path, ignore_errors: None)
        assert_good(save(2))
    assert there() == [2] and leftovers() == [FOLDER / ".checkpoint-1.old"]
    original = Path.rename
    with monkeypatch.context() as patch:

        def rename(path, to):
            if path.name == "checkpoint-2":
                raise PermissionError("another user's")
            return original(path, to)

        patch.setattr(Path, "rename", rename)
        assert_good(save(3))
    assert there() == [3, 2]
    save(4)
    assert there() == [4] and leftovers() == []


# whole or not there


@pytest.mark.slow
def test_killed_before_any_of_its_lines_saving_leaves_a_good_checkpoint_and_nothing_in_the_way():
    save(1)
    newest = set()
    for _ in killed_before_every_line(lambda: save(2), checkpoints):
        found = newest_good_checkpoint(FOLDER, "this run")
        assert_good(found.path)
        newest.add(found.step)
        save(2)
        assert_good(FOLDER / "checkpoint-2")
        assert there() == [2] and leftovers() == []
        shutil.rmtree(FOLDER)
        save(1)
    assert newest == {1, 2}


def test_wherever_saving_fails_the_checkpoint_before_stays_good_and_nothing_is_left_behind():
    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    outcomes = set()
    for number in itertools.count(1):
        shutil.rmtree(FOLDER, ignore_errors=True)
        save(1)
        before_line(number, checkpoints, fail)
        try:
            save(2)
            failed = False
        except OSError:
            failed = True
        ended = sys.gettrace() is not None  # a trace function that raises is taken off
        sys.settrace(None)
        if ended:
            break
        assert_good(FOLDER / f"checkpoint-{there()[0]}")
        assert failed or there()[0] == 2, "what cannot be saved is said"
        assert not list(FOLDER.glob(".*partial")), number
        outcomes.add((failed, tuple(there())))
        assert_good(save(3))
        assert there() == [3] and leftovers() == []
    assert (True, (1,)) in outcomes and number > 40


def test_a_folder_that_cannot_be_listed_is_not_one_without_checkpoints(monkeypatch):
    save(1)

    def stale(_):
        raise OSError(errno.ESTALE, "Stale file handle")

    for listing in ("scandir", "listdir"):  # by which pathlib lists a folder, in one version or another
        monkeypatch.setattr(os, listing, stale)
    with pytest.raises(UsageError, match=r"^run cannot be read as a run's folder .+: see to that, or give"):
        newest_good_checkpoint(FOLDER, "this run")


@pytest.mark.parametrize("fails", ["flush_to_disk", "list_checkpoints", "_remove_leftovers"])
def test_what_fails_once_a_checkpoint_is_in_place_does_not_report_that_there_is_none(
    monkeypatch, capsys, fails
):
    save(1)
    original = getattr(checkpoints, fails)

    def fail(path):
        if path == FOLDER and (FOLDER / "checkpoint-2").exists():
            raise OSError(errno.EIO, "Input/output error")
        return original(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, fails, fail)
        assert save(2) == FOLDER / "checkpoint-2"
    assert_good(FOLDER / "checkpoint-2")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: run/checkpoint-2 is written, older ones stay for now ([Errno 5]")
    if fails != "_remove_leftovers":
        assert_good(FOLDER / "checkpoint-1")
    save(3)
    assert there() == [3] and leftovers() == []


def test_a_rename_that_was_done_although_it_reports_an_error_counts(monkeypatch):
    """As over a network, where the answer to the first request was lost."""
    original = Path.rename

    def rename(path, target):
        original(path, target)
        if path.name.endswith(".partial"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(Path, "rename", rename)
    assert_good(save(1))


def test_a_full_disk_is_an_error_and_the_checkpoint_before_stays(monkeypatch):
    save(1)
    for size in (0, 300, 2_000):
        with full_disk(size), pytest.raises(checkpoints.WRITE_ERRORS, match="File too large"):
            save(2)
        assert there() == [1] and leftovers() == []
    assert_good(FOLDER / "checkpoint-1")


def test_all_is_on_the_disk_before_the_checkpoint_appears_and_older_ones_go_only_then(monkeypatch):
    save(1)
    order = []
    monkeypatch.setattr(checkpoints, "flush_to_disk", lambda path: order.append(f"flush {path.name}"))
    original = Path.rename
    monkeypatch.setattr(
        Path, "rename", lambda path, to: (order.append(f"rename {path.name}"), original(path, to))[1]
    )
    save(2)
    assert set(order[:4]) == {f"flush {name}" for name in FILES}
    assert order[4:] == [
        "flush .checkpoint-2.partial",
        "rename .checkpoint-2.partial",
        "flush run",
        "rename checkpoint-1",
    ]


# damage


def flipped(path, offset, bit):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def damages(path, other, rng):
    """(what is damaged, a function that does it) in many ways, for the checkpoint in `path`."""
    for file in (path / name for name in FILES):
        size = file.stat().st_size
        for offset in (
            0,
            size // 2,
            *(rng.randrange(size) for _ in range(40)),
            *range(max(0, size - 8), size),
        ):
            for bit in rng.sample(range(8), 2):
                yield file, lambda file=file, offset=offset, bit=bit: flipped(file, offset, bit)
        for length in (0, 1, size - 1, *(rng.randrange(size) for _ in range(5))):
            yield file, lambda file=file, length=length: os.truncate(file, length)
        yield file, file.unlink
        yield file, lambda file=file: (file.unlink(), file.mkdir())
        yield file, lambda file=file, size=size: file.write_bytes(rng.randbytes(size))
        yield file, lambda file=file: shutil.copy(other / file.name, file)
        yield file, lambda file=file: file.write_bytes(file.read_bytes() + b"\0")
        yield file, lambda file=file: file.write_bytes(file.read_bytes() + b"\n")
    for one, two in itertools.permutations(FILES, 2):
        yield path / one, lambda one=one, two=two: shutil.copy(path / two, path / one)
    yield path, lambda: shutil.rmtree(path)
    yield path, lambda: (shutil.rmtree(path), path.touch())


def test_a_damaged_checkpoint_is_refused_by_name_and_reason_whatever_the_damage(capsys):
    older = save(1)
    path = save(2, keep=(1,))
    shutil.copytree(path, "intact")
    cases = 0
    for damaged, damage in damages(path, older, random.Random(0)):
        damage()
        with pytest.raises(UsageError) as error:
            load_checkpoint(path)
        message = str(error.value)
        assert (
            message.startswith(f"{path} cannot be read as a checkpoint (")
            and "\n" not in message
            and len(message) < 300
        )
        assert (
            damaged == path
            or damaged.name in message
            or "not permitted" in message
            or CHECKSUMS in damaged.name
        ), message
        if path.is_dir():
            assert newest_good_checkpoint(FOLDER, "this run").path == older
            assert f"warning: {message}; falling back to an older one\n" == capsys.readouterr().out
        cases += 1
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.copytree("intact", path)
    assert cases >= 400
    assert_good(path)


def line_of(name):
    return f"{'0' * 64}  {name}\n"


LISTS = {  # what becomes of the list of checksums
    "empty": lambda text: "",
    "without manifest.json": lambda text: without("manifest.json", text),
    "without state.pt": lambda text: without("state.pt", text),
    "one file twice": lambda text: text + text.splitlines(keepends=True)[0],
    "a file that is not there": lambda text: text + line_of("more.zst"),
    "itself": lambda text: text + line_of(CHECKSUMS),
    "a file elsewhere": lambda text: text + line_of("../checkpoint-1/state.pt"),
    "a way out and in again": lambda text: text.replace("state.pt", "../checkpoint-2/state.pt"),
    "an absolute path": lambda text: text.replace("state.pt", "/etc/hostname"),
    "the folder above": lambda text: text + line_of(".."),
    "the folder": lambda text: text + line_of("."),
    "no name": lambda text: text + line_of(""),
    "another program's file": lambda text: text + line_of("a b.zst"),
    "carriage returns": lambda text: text.replace("\n", "\r\n"),
    "no last newline": lambda text: text[:-1],
    "an empty line": lambda text: "\n" + text,
    "capitals": lambda text: text.upper(),
    "another checksum": lambda text: text.replace(text[:64], "0" * 64),
    "zeros": lambda text: "\0" * len(text),
}


def without(name, text):
    return "".join(line for line in text.splitlines(keepends=True) if name not in line)


@pytest.mark.parametrize("change", LISTS.values(), ids=LISTS)
def test_a_list_that_is_not_that_of_a_checkpoints_files_is_damage(change):
    save(1)
    path = save(2, keep=(1,)) / CHECKSUMS
    path.write_bytes(change(path.read_text(encoding="utf-8")).encode())
    with pytest.raises(
        UsageError, match=r"^run/checkpoint-2 cannot be read as a checkpoint \(.+\): take another$"
    ) as error:
        load_checkpoint(path.parent)
    assert "\n" not in str(error.value)
    assert newest_good_checkpoint(FOLDER, "this run").step == 1


def test_a_stream_that_is_not_in_the_list_is_not_taken():
    path = save(2)
    text = (path / CHECKSUMS).read_text(encoding="utf-8")
    (path / CHECKSUMS).write_text(without("frames.zst", text), encoding="utf-8")
    with pytest.raises(
        UsageError,
        match=r"^run/checkpoint-2 cannot .* \(frames\.zst is not in SHA256SUMS\): move",
    ):
        load_checkpoint(path).restore(parts(0, rows=0))


# files of other programs


BESIDE_FILES = (
    ".DS_Store|._state.pt|._frames.zst|Thumbs.db|desktop.ini|.nfs0000000001|manifest.json.bak|state.pt.gz|"
    "state.pt~|frames.zst.part|frames copy.zst|state (1).pt|SHA256SUMS.asc|notes.txt|säule.zst"
).split("|")
BESIDE_FOLDERS = (".ipynb_checkpoints", "@eaDir", "__MACOSX", "folder.zst")


def litter(folder, files, folders=()):
    """Puts into a folder what other programs leave there."""
    for name in files:
        (folder / name).write_bytes(b"somebody else's")
    for name in folders:
        (folder / name).mkdir()
        (folder / name / "inside").write_bytes(b"somebody else's")


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_files_of_other_programs_in_a_checkpoint_are_passed_over():
    path = save(7)
    litter(path, BESIDE_FILES, BESIDE_FOLDERS)
    before = content(path)
    assert_good(path)
    assert newest_good_checkpoint(FOLDER, "this run").path == path
    assert content(path) == before
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--strict", "--quiet", "-c", CHECKSUMS], cwd=path, check=True)


def test_files_of_other_programs_that_come_and_go_while_a_checkpoint_is_written_are_no_part_of_it(
    monkeypatch,
):
    """As those of a file manager, or of a mounted share."""
    original = checkpoints._files_of

    def while_it_is_listed(folder):
        litter(folder, BESIDE_FILES, BESIDE_FOLDERS)
        files = original(folder)
        for name in BESIDE_FILES:
            (folder / name).unlink()
        for name in BESIDE_FOLDERS:
            shutil.rmtree(folder / name)
        return files

    monkeypatch.setattr(checkpoints, "_files_of", while_it_is_listed)
    path = save(7)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    assert_good(path)


BESIDE_CHECKPOINTS = (
    "checkpoint-100.bak|checkpoint-100 copy|checkpoint-100.old|checkpoint-0100|checkpoint-00|"
    "checkpoint-+100|checkpoint-١٠٠|checkpoint-²|checkpoint-1_000|checkpoint--5|checkpoint-|"
    "checkpoint-9e9|.checkpoint-100|.checkpoint-100.bak|.checkpoint-x.partial|.checkpoint-100.partial.bak|"
    ".checkpoint-01.old"
).split("|")
FILES_BESIDE_CHECKPOINTS = (
    "._checkpoint-100|checkpoint-100.tar.gz|checkpoint-900|checkpoint-901.partial|.checkpoint-notes|"
    ".checkpoint-|.DS_Store|._.checkpoint-100.old|.checkpoint-100.swp|.checkpoint-902.old"
).split("|")


def test_what_is_named_like_a_checkpoint_and_is_none_is_never_gone_on_from_nor_removed_nor_in_the_way(capsys):
    save(100)
    for name in BESIDE_CHECKPOINTS:
        shutil.copytree(FOLDER / "checkpoint-100", FOLDER / name)
    litter(FOLDER, FILES_BESIDE_CHECKPOINTS)
    before = {
        path: read for path, read in content(FOLDER).items() if FOLDER / "checkpoint-100" not in path.parents
    }
    assert there() == [100]
    for step in (200, 300):
        assert_good(save(step))
        assert there() == [step]
    assert newest_good_checkpoint(FOLDER, "this run").step == 300
    shutil.rmtree(FOLDER / "checkpoint-300")
    assert content(FOLDER) == before and newest_good_checkpoint(FOLDER, "this run") is None
    assert capsys.readouterr().out == ""


def test_a_file_that_has_the_name_of_the_next_checkpoint_makes_way_and_is_kept():
    FOLDER.mkdir()
    litter(FOLDER, ("checkpoint-500",))
    assert_good(save(500))
    assert_good(save(600))
    assert there() == [600] and [path.read_bytes() for path in leftovers()] == [b"somebody else's"]


def test_only_a_good_checkpoint_of_this_run_and_this_step_is_gone_on_from(capsys):
    save(1)
    save(2, keep=(1,))
    save_checkpoint(FOLDER, 3, parts(3), META | {"run": "another"}, keep=(1, 2))
    shutil.copytree(FOLDER / "checkpoint-1", FOLDER / "checkpoint-4")
    (FOLDER / "checkpoint-5").mkdir()
    assert newest_good_checkpoint(FOLDER, "this run").step == 2
    out = capsys.readouterr().out.splitlines()
    assert [line.partition("; falling back to an older one")[1] != "" for line in out] == [True] * 3
    assert "run/checkpoint-5 cannot be read as a checkpoint (FileNotFoundError" in out[0]
    assert "run/checkpoint-4 holds step 1, it was renamed" in out[1]
    assert "run/checkpoint-3 belongs to another run" in out[2]
    with pytest.raises(
        UsageError,
        match=r"^run holds no good checkpoint to go on from: start the run again without --resume; ",
    ):
        newest_good_checkpoint(FOLDER, "a third")


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_one_that_the_system_cannot_read_now_is_not_passed_over(monkeypatch, number):
    """It may be readable again when the run has gone on from an older one."""
    save(1)
    save(2, keep=(1,))
    original = checkpoints._checksum

    def checksum(path):
        if path.parent.name == "checkpoint-2":
            raise OSError(number, "cannot")
        return original(path)

    monkeypatch.setattr(checkpoints, "_checksum", checksum)
    with pytest.raises(UsageError, match=r"cannot\): see to that, or take another by moving this one away$"):
        newest_good_checkpoint(FOLDER, "this run")
    (FOLDER / "checkpoint-2").rename("away")
    assert newest_good_checkpoint(FOLDER, "this run").step == 1


def test_a_folder_without_checkpoints_has_no_newest():
    FOLDER.mkdir()
    for name in ("checkpoint-", "checkpoint-x", ".checkpoint-5.partial", "checkpoint-5.old", "videos"):
        (FOLDER / name).mkdir()
    assert there() == [] and newest_good_checkpoint(FOLDER, "this run") is None


def test_checkpoints_are_listed_by_number_newest_first():
    FOLDER.mkdir()
    for step in (9, 100, 20):
        (FOLDER / f"checkpoint-{step}").mkdir()
    assert there() == [100, 20, 9]


def test_another_format_is_refused_by_its_number():
    path = save(1)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 4}), encoding="utf-8")
    seal(path)
    fix = "go on with the version of this project that wrote it"
    with pytest.raises(UsageError, match=f"its format is 4, this version reads {FORMAT}: {fix}$"):
        load_checkpoint(path)


def test_loading_a_checkpoint_runs_no_code():
    class Payload:
        def __reduce__(self):
            return (os.mkdir, ("owned",))

    path = save(1)
    torch.save(Payload(), path / "state.pt")
    seal(path)
    with pytest.raises(UsageError, match="cannot be read as a checkpoint"):
        load_checkpoint(path)
    assert not Path("owned").exists()


def stream_of(content):
    return lambda path: (path / "frames.zst").write_bytes(content)


def state_without(*keys):
    def change(path):
        state = tree = torch.load(path / "state.pt", weights_only=True)
        for key in keys[:-1]:
            tree = tree[key]
        del tree[keys[-1]]
        torch.save(state, path / "state.pt")

    return change


def state_of_another_shape(path):
    state = torch.load(path / "state.pt", weights_only=True)
    state["weights"]["values"] = torch.zeros(3)
    torch.save(state, path / "state.pt")


FOREIGN = {
    "stream cut": lambda path: os.truncate(path / "frames.zst", 2_000),
    "stream too short": stream_of(zstandard.ZstdCompressor().compress(b"too short")),
    "stream of something else": stream_of(b"no frames"),
    "a part missing": state_without("weights"),
    "a number missing": state_without("frames", "rows"),
    "another shape": state_of_another_shape,
}


@pytest.mark.parametrize("change", FOREIGN)
def test_a_checkpoint_that_fits_its_checksums_but_not_its_parts_is_refused_in_one_line(change):
    path = save(1)
    FOREIGN[change](path)
    seal(path)
    checkpoint = load_checkpoint(path)
    fix = "go on with the script, the packages and the processor that its manifest.json names"
    reason = rf"^run/checkpoint-1 cannot be read as this run's checkpoint \(.+\): {fix}$"
    with pytest.raises(UsageError, match=reason) as error:
        checkpoint.restore(parts(0, rows=0))
    assert "\n" not in str(error.value)


# a run's folder


def test_a_run_folder_appears_with_everything_in_it_or_not_at_all():
    identity = {"run": "number", "args": {"seed": 3}}
    target = Path("runs/name")
    appeared = 0
    for _ in killed_before_every_line(lambda: create_run_folder(target, identity), checkpoints):
        if target.exists():
            assert read_identity(target / "run.json") == identity
            shutil.rmtree(target)
            appeared += 1
        assert not list(Path("runs").glob("[!.]*"))
        shutil.rmtree("runs", ignore_errors=True)
    shutil.rmtree("runs")
    assert create_run_folder(target, identity) == target and os.listdir("runs") == ["name"]
    assert read_identity(target / "run.json") == identity


def test_a_runs_arguments_are_on_the_disk_before_its_folder_appears(monkeypatch):
    seen = []
    monkeypatch.setattr(
        checkpoints, "flush_to_disk", lambda path: seen.append((path.name, Path("runs/name").exists()))
    )
    create_run_folder(Path("runs/name"), {"run": "number", "args": {}})
    assert seen == [("run.json", False)]


def test_runs_that_start_in_the_same_second_get_folders_of_their_own():
    folders = [create_run_folder(Path("runs/name"), {"run": str(k), "args": {}}) for k in range(3)]
    assert [folder.name for folder in folders] == ["name", "name-1", "name-2"]
    assert [read_identity(folder / "run.json")["run"] for folder in folders] == ["0", "1", "2"]


def test_a_run_folder_whose_renaming_was_done_and_reported_an_error_is_that_runs(monkeypatch):
    """As over a network, where the answer was lost and the request was made once more."""
    rename = Path.rename

    def rename_twice(path, target):
        rename(path, target)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_twice)
    target = Path("runs/name")
    assert create_run_folder(target, {"run": "number", "args": {}}) == target
    assert os.listdir("runs") == ["name"] and read_identity(target / "run.json")["run"] == "number"


def test_a_run_folder_that_cannot_be_written_is_refused_and_nothing_is_left():
    Path("runs").write_text("a file is in the way", encoding="utf-8")
    with pytest.raises(UsageError, match=r"^cannot write run folder /.*/runs/name \(.+\): start elsewhere$"):
        create_run_folder(Path("runs/name"), {"run": "number", "args": {}})
    assert os.listdir() == ["runs"]
    with full_disk(5), pytest.raises(UsageError, match="File too large"):
        create_run_folder(Path("elsewhere/name"), {"run": "number", "args": {}})
    assert os.listdir("elsewhere") == []


def test_where_it_is_not_the_runs_name_that_is_too_long_no_shorter_one_is_asked_for():
    with pytest.raises(UsageError, match=r"\(File name too long\): start elsewhere$"):
        create_run_folder(Path("x" * 300, "name"), {"run": "number", "args": {}})
    create_run_folder(Path("elsewhere", "name"), {"run": "number", "args": {}})


def test_a_name_that_is_too_long_for_a_folder_is_refused_with_a_fix_that_works():
    name = f"PhoenixNoFrameskip-v4__{'x' * 250}__1__1700000000"
    with pytest.raises(UsageError, match=r"\(File name too long\): give a shorter --exp-name$"):
        create_run_folder(Path("runs", name), {"run": "number", "args": {}})
    assert os.listdir("runs") == []
    assert create_run_folder(Path("runs", name[-200:]), {"run": "number", "args": {}}).is_dir()


@pytest.mark.parametrize("content", [None, b"", b"no JSON", b"[]", b'{"run": "x"}', b'{"args": 5}', b"\xff"])
def test_what_holds_no_arguments_is_refused_by_name(content):
    path = Path("run.json")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        UsageError,
        match=r"^run.json cannot be read as a run's arguments \(.+\): give a run's folder to --resume",
    ):
        read_identity(path)
