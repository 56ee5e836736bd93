"""What the machine offers: GPU, memory, processors, disk, locks."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import BRIEF
from interruptions import dies, send

import dqn_injection_atari as script
import support.environments as environments
import support.machine as machine
from support.machine import (
    FolderGone,
    HeldFolder,
    alone_in,
    circumstances,
    code_version,
    flush_to_disk,
    free_memory,
    idle_gpu,
    limit_threads,
    pick_device,
    place_for,
    slow_bfloat16,
    usable_processors,
)
from support.replay import FrameReplayBuffer
from support.usage import UsageError

GB = 10**9
CPU, GPU = torch.device("cpu"), torch.device("cuda")


# device


@pytest.mark.parametrize("cuda", [True, False])
def test_the_gpu_is_used_where_there_is_one_and_it_is_wanted(monkeypatch, cuda):
    tried = []
    monkeypatch.setattr(machine, "try_out", tried.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device(cuda, True, True).type == ("cuda" if cuda else "cpu")
    assert tried == [GPU] * cuda
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(cuda, True, True).type == "cpu" and tried == [GPU] * cuda


def test_the_trial_works_on_a_device_that_works():
    machine.try_out(CPU)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.\nMore"),
        RuntimeError(
            "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might"
        ),
        RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
        AssertionError("Torch not compiled with CUDA enabled"),
    ],
    ids=lambda error: str(error)[:30],
)
def test_a_gpu_that_can_run_nothing_is_refused_in_one_line_with_nothing_written(monkeypatch, error):
    def fails(_):
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "try_out", fails)
    with pytest.raises(UsageError) as refusal:
        script.train(BRIEF)
    message = str(refusal.value)
    assert message.startswith(
        f"a GPU is listed, but cannot be used ({type(error).__name__}: {str(error)[:18]}"
    )
    assert "CUDA_VISIBLE_DEVICES" in message and "\n" not in message and os.listdir() == []


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
        ),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        AttributeError("no such name"),
        AssertionError("of our own"),
    ],
    ids=str,
)
def test_a_mistake_in_the_trial_is_no_fault_of_the_gpu(monkeypatch, error):
    def fails(_):
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "try_out", fails)
    with pytest.raises(type(error)) as raised:
        pick_device(True, True, True)
    assert raised.value is error


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA")
def test_the_trial_fails_where_there_is_no_such_device():
    with pytest.raises(Exception, match="CUDA"):
        machine.try_out(GPU)


def no_nvidia_smi(monkeypatch, tmp_path, output=None, status=0):
    """PATH with nothing but an nvidia-smi that prints this, or with nothing at all."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    if output is not None:
        (tmp_path / "bin/nvidia-smi").write_text(
            f"#!/bin/sh\necho '{output}'\nexit {status}\n", encoding="utf-8"
        )
        (tmp_path / "bin/nvidia-smi").chmod(0o755)


@pytest.mark.parametrize("sign", ["dev/nvidia0", "proc/driver/nvidia/gpus/0000:01:00.0", "dev/kfd"])
def test_a_gpu_that_pytorch_does_not_see_is_noticed_unless_it_was_hidden(monkeypatch, tmp_path, sign):
    no_nvidia_smi(monkeypatch, tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert idle_gpu(tmp_path) is None
    (tmp_path / sign).parent.mkdir(parents=True)
    (tmp_path / sign).touch()
    assert idle_gpu(tmp_path) == f"/{sign}"
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert idle_gpu(tmp_path) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert idle_gpu(tmp_path) == f"/{sign}"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert idle_gpu(tmp_path) is None


def test_a_card_without_a_driver_is_seen_on_its_bus(monkeypatch, tmp_path):
    no_nvidia_smi(monkeypatch, tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    card = tmp_path / "sys/bus/pci/devices/0000:01:00.0"
    card.mkdir(parents=True)
    for vendor, kind, seen in (
        ("0x10de", "0x030200", True),
        ("0x10de", "0x040300", False),
        ("0x1af4", "0x030000", False),
    ):
        (card / "vendor").write_text(f"{vendor}\n", encoding="utf-8")
        (card / "class").write_text(f"{kind}\n", encoding="utf-8")
        assert (idle_gpu(tmp_path) is not None) == seen


def test_nvidia_smi_is_asked_too(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    no_nvidia_smi(monkeypatch, tmp_path, "GPU 0: NVIDIA A100 (UUID: GPU-1)")
    assert idle_gpu(tmp_path) == "GPU 0: NVIDIA A100"
    no_nvidia_smi(
        monkeypatch,
        tmp_path,
        "NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver",
        9,
    )
    assert idle_gpu(tmp_path) is None
    no_nvidia_smi(monkeypatch, tmp_path, "No devices found.")
    assert idle_gpu(tmp_path) is None
    no_nvidia_smi(monkeypatch, tmp_path, "")
    assert idle_gpu(tmp_path) == "nvidia-smi"


@pytest.mark.parametrize("cuda", [True, False])
def test_the_first_lines_of_a_run_warn_of_a_gpu_that_is_not_used(monkeypatch, capsys, cuda):
    monkeypatch.setattr("support.runs.idle_gpu", lambda: "/dev/nvidia0")
    script.train(replace(BRIEF, total_timesteps=4, checkpoint_frequency=0, cuda=cuda))
    lines = capsys.readouterr().out.splitlines()[:3]
    assert (
        any(line.startswith("warning: there is a GPU (/dev/nvidia0), but PyTorch") for line in lines) == cuda
    )


@pytest.mark.parametrize("deterministic", [False, True])  # True, the default, last
def test_determinism_is_a_choice(monkeypatch, deterministic):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    pick_device(False, deterministic, True)
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.backends.cudnn.benchmark != deterministic
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
    assert not torch.utils.deterministic.fill_uninitialized_memory, (
        "it would fill what is written over anyway"
    )


def test_a_workspace_that_the_user_set_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    pick_device(False, True, True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize("tf32", [False, True])  # True, the default, last
def test_tf32_is_a_choice(tf32):
    pick_device(False, True, tf32)
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32


@pytest.mark.parametrize("wanted", ["cuda", "torch_deterministic", "tf32"])
def test_what_is_asked_of_the_device_reaches_it(monkeypatch, wanted):
    asked = []

    def pick(cuda, deterministic, tf32):
        asked.append({"cuda": cuda, "torch_deterministic": deterministic, "tf32": tf32})
        return CPU

    monkeypatch.setattr(script, "pick_device", pick)
    flags = {name: name == wanted for name in ("cuda", "torch_deterministic", "tf32")}
    brief = replace(BRIEF, total_timesteps=4, checkpoint_frequency=0, save_model=True)
    folder = script.train(replace(brief, **flags))
    script.evaluate_saved(script.Args(evaluate=str(folder), eval_episodes=1, **flags))
    assert asked == [flags, flags]


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_replay_lies_where_there_is_a_place_for_it_on_the_gpu_with_graphs_alone(monkeypatch, cuda_graphs):
    asked = []

    class Buffer(FrameReplayBuffer):
        def __init__(self, *_, storage, **__):
            self.storage = storage

    def place(needed, steps, device):
        asked.append((needed, steps, device))
        return "the place"

    monkeypatch.setattr(script, "check_machine", lambda *_: None)
    monkeypatch.setattr(script, "Learner", lambda *_: None)
    monkeypatch.setattr(script, "FrameReplayBuffer", Buffer)
    monkeypatch.setattr(script, "place_for", place)
    envs, _, replay = script.make_parts(replace(BRIEF, cuda_graphs=cuda_graphs), GPU)
    needed = FrameReplayBuffer.bytes_needed(250, envs.single_observation_space, 2)
    assert asked == [(needed, 250, GPU if cuda_graphs else CPU)] and replay.storage == "the place"


# bfloat16


@pytest.mark.parametrize(
    ("onednn", "supported", "avx512", "its_bf16", "fast"),
    [
        (True, True, True, True, True),
        (True, False, True, False, False),  # as with AVX2 alone
        (
            True,
            True,
            True,
            False,
            False,
        ),  # AVX-512 without instructions for bfloat16: 2.3 times slower than float32
        (True, True, False, False, True),  # others that oneDNN knows, as on ARM
        (False, True, True, True, False),
    ],
)
def test_bfloat16_is_slow_where_a_processor_has_no_instructions_for_it(
    monkeypatch, onednn, supported, avx512, its_bf16, fast
):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: its_bf16)
    assert (slow_bfloat16(CPU) is None) == fast


@pytest.mark.parametrize("fast", [True, False])
def test_a_gpu_is_asked_for_its_own_instructions(monkeypatch, fast):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: fast and not including_emulation
    )
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert (slow_bfloat16(GPU) is None) == fast and (fast or "on this GPU" in slow_bfloat16(GPU))


@pytest.fixture
def no_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)


SHORTEST = replace(
    BRIEF,
    total_timesteps=4,
    log_frequency=2,
    checkpoint_frequency=2,
    exploration_fraction=0.0,
    save_model=True,
)


def test_slow_bfloat16_is_refused_in_a_new_run_with_the_fix_and_nothing_is_written(no_bfloat16):
    with pytest.raises(
        UsageError, match=r"^--bf16 is much slower than float32 here: .*: leave out --bf16$"
    ) as refusal:
        script.train(replace(SHORTEST, bf16=True))
    assert "\n" not in str(refusal.value) and os.listdir() == []
    script.train(SHORTEST)


@pytest.mark.slow
def test_slow_bfloat16_is_one_warning_in_what_goes_on_in_it_and_none_where_its_agent_plays(
    monkeypatch, capsys
):
    folder = script.train(replace(SHORTEST, bf16=True))
    assert "bf16" not in capsys.readouterr().out
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    script.train(replace(SHORTEST, bf16=True, resume=str(folder)))
    script.train(replace(SHORTEST, bf16=True, total_timesteps=8, fork=str(folder / "checkpoint-4")))
    warnings = [line for line in capsys.readouterr().out.splitlines() if "bf16" in line]
    assert len(warnings) == 2 and all(line.startswith("warning: --bf16 is much slower") for line in warnings)
    script.evaluate_saved(script.Args(evaluate=str(folder), eval_episodes=1))
    assert "bf16" not in capsys.readouterr().out


# one of several


@pytest.mark.slow
def test_a_run_that_is_one_of_several_equal_ones_says_so_once_and_names_the_variable(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "3")
    folder = script.train(SHORTEST)
    script.train(replace(SHORTEST, resume=str(folder)))
    lines = [line for line in capsys.readouterr().out.splitlines() if "SLURM" in line]
    assert len(lines) == 2 and all(line.startswith("warning: SLURM_STEP_NUM_TASKS is 3: ") for line in lines)
    assert lines[0].endswith("start one (srun -n 1), or give each a --seed of its own")
    assert lines[1].endswith("start one (srun -n 1)"), "a run that is resumed takes no seed"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    script.train(SHORTEST)
    assert "SLURM" not in capsys.readouterr().out


# memory


@pytest.mark.parametrize(
    "line,folder,limit,usage,cache,tmpfs",
    [
        ("0::/job/step", "job/step", "memory.max", "memory.current", "file", "shmem"),
        ("0::/job/step", "job", "memory.max", "memory.current", "file", "shmem"),
        ("0::/../outside", "", "memory.max", "memory.current", "file", "shmem"),
        (
            "4:memory:/job",
            "memory/job",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_cache",
            "total_shmem",
        ),
    ],
)
def test_free_memory_is_the_control_groups_where_that_is_less(
    tmp_path, line, folder, limit, usage, cache, tmpfs
):
    assert free_memory(tmp_path / "no control groups") > 2e8
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"1:cpu:/job\n{line}\n", encoding="utf-8")
    group = tmp_path / "sys/fs/cgroup" / folder
    group.mkdir(parents=True)
    (group / limit).write_text("150000000\n", encoding="utf-8")
    (group / usage).write_text("80000000\n", encoding="utf-8")
    (group / "memory.stat").write_text(f"anon 50000000\n{cache} 30000000\n", encoding="utf-8")
    assert free_memory(tmp_path) == 100_000_000
    with open(group / "memory.stat", "a", encoding="utf-8") as file:
        file.write(
            f"{tmpfs} 20000000\n"
        )  # files in memory, which are counted as cache and are not given back
    assert free_memory(tmp_path) == 80_000_000
    (group / limit).write_text("max\n", encoding="utf-8")
    assert free_memory(tmp_path) > 2e8


def test_of_nested_control_groups_the_tightest_counts(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n", encoding="utf-8")
    for folder, limit in (("job", 90_000_000), ("job/step", 100_000_000)):
        group = tmp_path / "sys/fs/cgroup" / folder
        group.mkdir(parents=True)
        for name, content in {
            "memory.max": limit,
            "memory.current": 20_000_000,
            "memory.stat": "file 0",
        }.items():
            (group / name).write_text(f"{content}\n", encoding="utf-8")
    assert free_memory(tmp_path) == 70_000_000


# processors


def control_group(root, line, files):
    """A process's control group, with these files {path under /sys/fs/cgroup: content}."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"{line}\n", encoding="utf-8")
    for name, content in files.items():
        (root / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / name).write_text(f"{content}\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("line", "files", "processors"),
    [
        ("0::/job", {"job/cpu.max": "200000 100000"}, 2),
        ("0::/job", {"job/cpu.max": "350000 100000"}, 3),
        ("0::/job", {"job/cpu.max": "50000 100000"}, 1),
        ("0::/job", {"job/cpu.max": "max 100000"}, 6),
        ("0::/job", {"job/cpu.max": "900000 100000"}, 6),
        ("0::/job/step", {"job/cpu.max": "200000 100000", "job/step/cpu.max": "max 100000"}, 2),
        ("0::/../outside", {"cpu.max": "200000 100000"}, 2),
        (
            "3:cpu,cpuacct:/job",
            {"cpu,cpuacct/job/cpu.cfs_quota_us": 400_000, "cpu,cpuacct/job/cpu.cfs_period_us": 100_000},
            4,
        ),
        (
            "3:cpuacct,cpu:/job",
            {"cpu/job/cpu.cfs_quota_us": 400_000, "cpu/job/cpu.cfs_period_us": 100_000},
            4,
        ),
        ("3:cpu:/job", {"cpu/job/cpu.cfs_quota_us": -1, "cpu/job/cpu.cfs_period_us": 100_000}, 6),
        (
            "3:memory:/job",
            {"memory/job/cpu.cfs_quota_us": 100_000, "memory/job/cpu.cfs_period_us": 100_000},
            6,
        ),
    ],
)
def test_usable_processors_are_the_quotas_where_that_is_less(monkeypatch, tmp_path, line, files, processors):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert usable_processors(tmp_path) == 6
    control_group(tmp_path, line, files)
    assert usable_processors(tmp_path) == processors


def test_usable_processors_are_those_of_the_affinity(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert usable_processors(tmp_path) == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert usable_processors(tmp_path) == 7


@pytest.mark.parametrize(
    ("usable", "chosen", "expected"), [(3, None, 3), (3, "", 3), (99, None, 5), (3, "4", None)]
)
def test_pytorchs_threads_follow_what_is_usable_unless_the_user_chose(monkeypatch, usable, chosen, expected):
    monkeypatch.setattr(machine, "usable_processors", lambda: usable)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    limit_threads()
    assert given == ([] if expected is None else [expected])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_the_first_line_of_a_run_names_the_threads_which_follow_the_affinity():
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    flags = "--env-backend ale --total-timesteps 4 --buffer-size 100 --checkpoint-frequency 0 --no-cuda"
    flags += " --head-width 16"
    run = subprocess.run(
        [sys.executable, script.__file__, *flags.split()],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        preexec_fn=lambda: os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]),
    )
    assert "on cpu with 1 thread, curves" in run.stdout.splitlines()[0], run.stderr


def test_the_vectorisers_threads_follow_what_is_usable(monkeypatch):
    given = []
    original = environments.EagerAtariVectorEnv
    monkeypatch.setattr(
        environments,
        "EagerAtariVectorEnv",
        lambda **kwargs: (given.append(kwargs["num_threads"]), original(**kwargs))[1],
    )
    monkeypatch.setattr(environments, "usable_processors", lambda: 2)
    for num_envs in (1, 2, 3):
        environments.make_atari_envs("PhoenixNoFrameskip-v4", "ale", num_envs).close()
    assert given == [1, 2, 2]


def test_a_replay_goes_to_the_gpu_where_it_fits_beside_learning_and_else_to_the_cpu(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 50 * GB)
    for free, place in ((12 * GB, GPU), (10 * GB, GPU), (10 * GB - 1, CPU)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 80 * GB))
        assert place_for(8 * GB, 1_000_000, GPU) == place
    assert place_for(8 * GB, 1_000_000, CPU) == CPU


def test_a_replay_that_does_not_fit_names_needed_free_and_what_would_fit(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 2 * GB)
    space = script.make_envs(BRIEF, 1).single_observation_space
    needed = FrameReplayBuffer.bytes_needed(1_000_000, space, 1)
    with pytest.raises(
        UsageError, match=r"^a replay of 1,000,000 steps needs 7\.3 GB and 2\.0 GB of memory are free"
    ) as error:
        place_for(needed, 1_000_000, CPU)
    fits = int(re.search(r"lower --buffer-size to (\d+)$", str(error.value)).group(1))
    assert 1.7e9 < FrameReplayBuffer.bytes_needed(fits, space, 1) <= 2e9
    assert place_for(FrameReplayBuffer.bytes_needed(fits, space, 1), fits, CPU) == CPU


def test_where_hardly_anything_is_free_no_size_is_named_that_would_be_no_use(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 1_000_000)
    with pytest.raises(UsageError, match=r"0\.0 GB of memory are free: free some$"):
        place_for(8 * GB, 1_000_000, CPU)


# what the bits of a run depend on


def test_the_code_version_changes_with_every_file_of_the_code(tmp_path, monkeypatch):
    shutil.copy(script.__file__, tmp_path / "script.py")
    for folder in ("support", "alternatives"):
        source = Path(script.__file__).parent / folder
        shutil.copytree(source, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "support/machine.py"))
    alternatives = tmp_path / "alternatives"
    files = [tmp_path / "script.py", *(tmp_path / "support").glob("*.py"), *alternatives.glob("*.py")]
    version = code_version(files[0], alternatives)
    assert version == script.CODE_VERSION and len(files) > 10
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content + b"\n")
        assert code_version(files[0], alternatives) != version, file.name
        file.write_bytes(content)
    assert code_version(files[0], alternatives) == version


def test_circumstances_name_packages_processor_and_threads(monkeypatch):
    now = circumstances(CPU, "abc")
    assert (
        now["script"] == "abc"
        and now["python"] == sys.version.split()[0]
        and now["torch"] == torch.__version__
    )
    assert {"numpy", "gymnasium", "ale-py", "opencv", "stable-baselines3"} < set(now)
    assert now["device"].endswith(
        f", {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    assert (
        circumstances(CPU, "abc")["device"].endswith(", 99 threads")
        and circumstances(GPU, "abc")["device"] == "H100"
    )
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92100)
    assert circumstances(GPU, "abc")["cudnn"] == "92100" and "cudnn" not in circumstances(CPU, "abc")


# disk


@pytest.mark.parametrize("path", ["file", "folder"])
def test_flushing_to_disk_reaches_the_disk_and_fails_where_that_fails(monkeypatch, path):
    Path("file").write_text("content", encoding="utf-8")
    Path("folder").mkdir()
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    flush_to_disk(Path(path))
    assert flushed == [Path(path).stat().st_ino]
    open_before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    cannot, failed = (
        ("EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EBADF"),
        ("ENOSPC", "EIO", "EDQUOT", "ESTALE"),
    )
    for number, allowed in [(getattr(errno, name), name in cannot) for name in cannot + failed]:

        def fsync(_, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)
        with contextlib.nullcontext() if allowed else pytest.raises(OSError, match=os.strerror(number)):
            flush_to_disk(Path(path))
    assert not open_before or len(os.listdir("/proc/self/fd")) == open_before, "files are closed again"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EISDIR])
def test_a_folder_that_cannot_even_be_opened_is_passed_over_and_a_file_is_not(monkeypatch, number):
    Path("file").touch()

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fail)
    flush_to_disk(Path())
    with pytest.raises(OSError):
        flush_to_disk(Path("file"))


def test_flushing_what_is_not_there_fails():
    with pytest.raises(FileNotFoundError):
        flush_to_disk(Path("nothing"))


# locks


def test_two_processes_never_run_in_one_folder_at_once():
    folder = Path("run")
    folder.mkdir()
    (folder / "run.json").touch()
    ready, go = os.pipe(), os.pipe()

    def elsewhere():
        with alone_in(folder):
            os.write(ready[1], b".")
            os.read(go[0], 1)
            send(signal.SIGKILL)()

    other = threading.Thread(target=lambda: dies(elsewhere))
    other.start()
    os.read(ready[0], 1)
    with (
        pytest.raises(UsageError, match=r"^another process is running run: wait for it, or stop it first$"),
        alone_in(folder),
    ):
        pytest.fail("it came in")
    os.write(go[1], b".")
    other.join()
    with (
        alone_in(folder),
        pytest.raises(UsageError, match="another process is running run"),
        alone_in(folder),
    ):
        pytest.fail("it came in")
    with pytest.raises(ZeroDivisionError), alone_in(folder):
        raise ZeroDivisionError
    with alone_in(folder):
        pass


def test_what_is_locked_is_a_file_that_is_open_for_writing(monkeypatch):
    """NFS locks nothing else: EBADF."""
    original, locked = machine.fcntl.flock, []

    def flock(descriptor, how):
        access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        locked.append((stat.S_ISREG(os.fstat(descriptor).st_mode), access))
        original(descriptor, how)

    monkeypatch.setattr(machine.fcntl, "flock", flock)
    Path("run.json").write_text("content", encoding="utf-8")
    Path("other").touch()
    with alone_in(Path()), alone_in(Path(), "other"):
        pass
    assert locked == [(True, os.O_RDWR)] * 2 and Path("run.json").read_text(encoding="utf-8") == "content"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EBADF, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_one_warning(monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(machine.fcntl, "flock", flock)
    Path("run.json").touch()
    with alone_in(Path()):
        pass
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: . cannot be locked") and os.strerror(number) in line


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES])
def test_a_lock_that_another_holds_is_refused_however_the_file_system_says_so(monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(machine.fcntl, "flock", flock)
    Path("run.json").touch()
    with pytest.raises(UsageError, match="another process is running"), alone_in(Path()):
        pytest.fail("it came in")


def test_a_folder_that_is_not_there_is_refused_by_name():
    with (
        pytest.raises(
            UsageError,
            match=r"^nowhere cannot be read as a run's folder \(FileNotFoundError.*: give one to --resume$",
        ),
        alone_in(Path("nowhere")),
    ):
        pytest.fail("it came in")


# folders that move


@pytest.mark.parametrize("absolute", [False, True])
def test_a_held_folder_is_found_wherever_it_goes_and_no_other_is_taken_for_it(absolute):
    where = Path("runs/x").absolute() if absolute else Path("runs/x")
    where.mkdir(parents=True)
    held = HeldFolder(where)
    assert held.here() == where
    for name in ("runs/y", "elsewhere", "runs/x"):
        held.here().rename(name)
        expected = Path(name).absolute() if absolute else Path(name)
        assert held.here() == expected == held.path
    Path("runs").rename("stopped")
    Path("runs/x").mkdir(parents=True)
    assert held.here() == expected.parent.parent / "stopped/x"
    shutil.rmtree("stopped/x")
    Path("stopped/x").mkdir()
    assert held.find() is None
    with pytest.raises(FolderGone, match=r"stopped/x is no longer there$"):
        held.here()


@pytest.mark.parametrize("obstacle", ["folders cannot be opened", "nobody tells paths"])
def test_where_a_folder_cannot_be_followed_it_is_what_has_its_name(monkeypatch, obstacle):
    Path("x").mkdir()
    with monkeypatch.context() as patch:
        if obstacle == "folders cannot be opened":
            patch.setattr(machine.os, "open", lambda *_: fail_with(errno.EACCES))
        held = HeldFolder(Path("x"))
    monkeypatch.setattr(machine.os, "readlink", lambda _: fail_with(errno.ENOENT))
    assert held.here() == Path("x")
    Path("x").rename("y")
    assert held.find() is None
    Path("y").rename("x")
    assert held.here() == Path("x")


def test_a_mac_tells_a_folders_path_by_a_call_of_its_own(monkeypatch):
    Path("x").mkdir()
    held = HeldFolder(Path("x"))
    answer = os.fsencode(Path("y").absolute()).ljust(1024, b"\0")
    monkeypatch.setattr(machine.fcntl, "F_GETPATH", 50, raising=False)
    monkeypatch.setattr(machine.fcntl, "fcntl", lambda descriptor, *_: {held.descriptor: answer}[descriptor])
    assert held.here() == Path("x")
    Path("x").rename("y")
    assert held.here() == Path("y")


def test_a_held_folders_descriptor_goes_with_it():
    Path("x").mkdir()
    held = HeldFolder(Path("x"))
    descriptor = held.descriptor
    os.fstat(descriptor)
    del held
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def fail_with(number):
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "make room"),
        (OSError(errno.EFBIG, "File too large"), "make room"),
        (OSError(errno.EACCES, "Permission denied"), "see to that"),
        (OSError(errno.EIO, "Input/output error"), "see to that"),
        (MemoryError(), "free some memory"),
        (
            machine.FolderGone(Path("runs/X")),
            "if it was moved to another disk, stop this run and --resume it there",
        ),
    ],
    ids=str,
)
def test_what_to_do_where_nothing_can_be_written_is_what_the_error_tells(error, fix):
    assert machine.way_out(error) == fix
