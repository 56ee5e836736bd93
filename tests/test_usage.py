"""Bounds that stand at their fields, flags that nothing would look at, and refusals of one line."""

import errno
import json
import math
import os
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch
from annotated_types import Ge, Gt, Interval, Le, Lt

from dqn_injection_atari import Args, parse_args
from support import usage
from support.checkpoints import read_identity
from support.flags import Period, PositivePeriod
from support.usage import Count, InUTF8, NotBelow, OnlyWith, Positive, Share, Steps, UsageError, check_bounds


@dataclass
class Settings:
    """One field of every kind."""

    count: Count = 3
    steps: Steps = 0
    share: Share = 0.5
    positive: Positive = 1.0
    tau: Annotated[float, Interval(gt=0, le=1)] = 1.0
    below: Annotated[int, Lt(10), Gt(2)] = 5
    most: Annotated[int, Le(10)] = 5
    kind: Literal["plain", "fancy", "none"] = "plain"
    period: Annotated[Steps, NotBelow("count")] = 0
    least: Annotated[Annotated[Steps, NotBelow("count")], Ge(1)] = 3
    plume: Annotated[float, Interval(ge=0, le=1), OnlyWith("kind", ("fancy", "none"))] = 0.25
    often: Annotated[int, NotBelow("count"), OnlyWith("kind", ("fancy",))] = 4
    hat: Annotated[Literal["red", "blue"], OnlyWith("kind", ("fancy",))] = "red"
    name: Annotated[str | None, InUTF8()] = None
    path: str | None = None


def refusal(settings):
    with pytest.raises(UsageError) as error:
        check_bounds(settings)
    assert "\n" not in str(error.value)
    return str(error.value)


BOUNDS = {  # field: (kept at, broken at, what is asked for)
    "count": ([1, 2], [0, -1], "at least 1"),
    "steps": ([0, 1], [-1], "0 or more"),
    "share": ([0, 0.3, 1], [-0.1, 1.1, math.nan, math.inf], "0 or more and at most 1"),
    "positive": ([1e-9, 1e30], [0.0, -1.0, math.nan, math.inf], "positive and finite"),
    "tau": ([0.01, 1], [0.0, 1.01, math.nan], "positive and at most 1"),
    "below": ([3, 9], [2, 10], "below 10 and above 2"),
    "most": ([10], [11], "at most 10"),
    "kind": (["plain", "fancy"], ["", "Plain"], "one of plain, fancy, none"),
    "period": ([0, 3, 4], [-1], "0 or more"),
    "least": ([3, 4], [0], "0 or more and at least 1"),
    "path": ([None, "caf\udce9"], [], ""),
    "name": ([None, "", "anything", "Ä"], ["caf\udce9"], "text in UTF-8"),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_value_keeps_to_the_bounds_at_its_field(name):
    kept, broken, asked = BOUNDS[name]
    for value in kept:
        check_bounds(Settings(**{name: value}))
    for value in broken:
        expected = f"{name} is {value}, but must be {asked}: change --{name}"
        assert refusal(Settings(**{name: value})) == expected


def test_the_bounds_of_a_field_are_held_whatever_else_stands_at_it():
    assert "plume is 2" in refusal(Settings(kind="fancy", plume=2.0))
    green = refusal(Settings(kind="fancy", hat="green"))
    assert green == "hat is green, but must be one of red, blue: change --hat"


@pytest.mark.parametrize("name", ["period", "least"])
def test_a_number_is_not_below_another_field(name):
    for value in (5, 7):
        check_bounds(Settings(**{"count": 5, "least": 9} | {name: value}))
    got = refusal(Settings(**{"count": 5, "least": 9} | {name: 4}))
    assert got == f"{name} is 4, but must be at least count (5): raise --{name} or lower --count"


def test_what_nothing_looks_at_may_stay_below_another_field():
    check_bounds(Settings(count=5, least=9))  # often is 4
    assert "often is 4, but must be at least count (5)" in refusal(Settings(count=5, least=9, kind="fancy"))


@pytest.mark.parametrize(("name", "value"), [("plume", 0.5), ("often", 9), ("hat", "blue")])
def test_what_nothing_would_look_at_is_refused_and_named_with_what_would(name, value):
    for kind in ("fancy", "plain", "none"):
        check_bounds(Settings(kind=kind))
        settings = Settings(kind=kind, **{name: value})
        if kind == "fancy" or (kind == "none" and name == "plume"):
            check_bounds(settings)
        else:
            fix = "give that, or leave the flag out"
            assert refusal(settings) == f"{name} is {value}, which only --kind fancy looks at: {fix}"


def test_only_where_it_cannot_help_the_advice_of_a_smaller_run_is_left_out():
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        assert "in a new run" in usage.out_of_resources(error)
        assert re.search(r": free (some|it of other jobs)$", usage.out_of_resources(error, training=False))


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOENT, "give another"),
        (errno.ENOTDIR, "give another"),
        (errno.EACCES, "see to that, or give another"),
        (errno.EIO, "see to that, or give another"),
    ],
)
def test_a_file_that_is_there_and_cannot_be_read_need_not_be_another(number, fix):
    with pytest.raises(UsageError) as refused, usage.reading(Path("a"), "a list", "give another"):
        raise OSError(number, os.strerror(number), "a")
    assert str(refused.value).endswith(f"): {fix}") and os.strerror(number) in str(refused.value)


def test_unused_fields_are_those_that_nothing_looks_at():
    assert usage.unused_fields(Settings()).keys() == {"plume", "often", "hat"}
    assert usage.unused_fields(Settings(kind="none")).keys() == {"often", "hat"}
    assert usage.unused_fields(Settings(kind="fancy")) == {}


def test_changed_fields_leave_out_where_a_run_comes_from():
    before = Args()
    assert usage.changed_fields(Args(resume="a"), before) == []
    assert usage.changed_fields(Args(fork="a"), before) == []
    assert usage.changed_fields(Args(gamma=0.5, seed=2, fork="a"), before) == ["seed", "gamma"]


def test_a_run_is_resumed_with_its_own_settings_only():
    usage.refuse_changes(Args(seed=2, resume="a"), Args(seed=2), ("seed", "gamma"))
    message = r"^--resume goes on as the run was, seed, gamma cannot change: leave out, or use --fork$"
    with pytest.raises(UsageError, match=message):
        usage.refuse_changes(Args(gamma=0.5, resume="a"), Args(seed=2), ("seed", "gamma"))


@pytest.mark.parametrize("values", [{"count": 0}, {"size": 3}, {"kind": ["plain"]}], ids=str)
def test_settings_of_another_version_are_refused_by_the_file_they_are_in(values):
    @dataclass
    class Checked(Settings):
        def __post_init__(self):
            check_bounds(self)

    assert usage.settings_of(Checked, {"count": 5, "least": 7}, Path("run.json")) == Checked(count=5, least=7)
    fix = "take another, or go on with the version of this project that wrote it"
    message = rf"^run.json cannot be read as a run's arguments \(.*\): {fix}$"
    with pytest.raises(UsageError, match=message):
        usage.settings_of(Checked, values, Path("run.json"))


# of a run


PERIODS = """log_frequency target_network_frequency plasticity_frequency eval_frequency checkpoint_frequency
injection_check_frequency redo_frequency buffer_size""".split()
NEEDED = {  # by some of them, to be looked at
    "injection_check_frequency": {"injection_trigger": "norm"},
    "redo_frequency": {"intervention": "none"},
}


@pytest.mark.parametrize("name", PERIODS)
def test_a_period_below_a_vector_step_is_refused_with_the_fix(name):
    needed = NEEDED.get(name, {})
    Args(**needed, num_envs=8, **{name: 8})
    with pytest.raises(UsageError) as error:
        Args(**needed, num_envs=8, **{name: 7})
    flag = f"--{name.replace('_', '-')}"
    fix = f"raise {flag} or lower --num-envs"
    assert str(error.value) == f"{name} is 7, but must be at least num_envs (8): {fix}"


@pytest.mark.parametrize("name", PERIODS)
def test_only_what_may_be_left_out_may_be_zero(name):
    needed = NEEDED.get(name, {})
    optional = name in ("plasticity_frequency", "eval_frequency", "checkpoint_frequency")
    if optional:
        Args(**needed, num_envs=8, **{name: 0})
    else:
        with pytest.raises(UsageError, match=f"{name} is 0, but must be 0 or more and at least 1"):
            Args(**needed, **{name: 0})


def test_every_period_of_a_run_has_its_bound():
    bounded = set()
    frequencies = set()
    for field in fields(Args):
        if NotBelow("num_envs") in getattr(field.type, "__metadata__", ()):
            bounded.add(field.name)
        if field.name.endswith("_frequency"):
            frequencies.add(field.name)
    assert bounded == set(PERIODS)
    assert NotBelow("num_envs") in Period.__metadata__ and Ge(1) in PositivePeriod.__metadata__
    # one vector step may hold several updates
    assert frequencies == bounded - {"buffer_size"} | {"train_frequency"}


NUMBERS = [f.name for f in fields(Args) if type(f.default) in (int, float)]


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_of_a_run_is_without_a_bound(name):
    norm = {"injection_trigger": "norm"} if name.startswith("injection_") or name == "max_injections" else {}
    shrink = {"intervention": "none"} if name == "shrink_factor" else {}
    bad = -1 if type(getattr(Args, name)) is int else math.nan
    with pytest.raises(UsageError, match=f"^{name} is {bad}, but must be "):
        Args(**norm, **shrink, **{name: bad})


# one line


def test_a_file_that_cannot_be_read_is_named_with_the_reason_and_the_fix():
    with pytest.raises(UsageError) as error, usage.reading(Path("a/b.json"), "a list", "give another"):
        raise KeyError("x\nsecond line. More")
    assert str(error.value) == r"a/b.json cannot be read as a list (KeyError: 'x\nsecond line): give another"
    assert type(error.value.__cause__) is KeyError
    with usage.reading(Path("a"), "b", "c"):
        pass


OURS = [
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
    "put_ does not have a deterministic implementation, but you set "
    "'torch.use_deterministic_algorithms(True)'. CUDA",
    "Deterministic behavior was enabled, but this operation is not deterministic as it uses CuBLAS and "
    "you have CUDA >= 10.2",
    "CUDA error: device-side assert triggered",
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: misaligned address",
    "CUDA error: too many resources requested for launch",
    "CUDA error: invalid argument",
    "CUDA error: operation not permitted when stream is capturing",
    "CUDA error: operation failed due to a previous error during capture",
    "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is pinned",
    "Attempting CUDA graph capture of step() for an instance of Adam but param_groups' capturable is False.",
    "CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm`",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
    "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing",
    "Function CudnnConvolutionBackward0 returned an invalid gradient at index 0 - expected device cuda:0 but "
    "got cpu",
    "Function MiopenConvolutionBackward0 returned an invalid gradient at index 0",
    "Input type (torch.cuda.FloatTensor) and weight type (torch.FloatTensor) should be the same",
    "mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)",
]
A_GPUS = [
    "CUDA error: unspecified launch failure\n"
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
    "CUDA error: no kernel image is available for execution on the device",
    "CUDA error: uncorrectable ECC error encountered",
    "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
    "CUDA driver error: unknown error",
    "CUDA driver version is insufficient for CUDA runtime version",
    "CUDA unknown error - this may be due to an incorrectly set up environment",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`",
    "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`",
    "nvrtc: error: invalid value for --gpu-architecture (-arch)",
    "HIP error: the operation cannot be performed in the present state",
    "MIOpen Error: no kernel",
    "miopenStatusUnknownError",
    "GET was unable to find an engine to execute this computation",
    "Found no NVIDIA driver on your system",
    "No CUDA GPUs are available",
    "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before",
]


@pytest.mark.parametrize("message", A_GPUS, ids=str)
def test_what_a_gpus_driver_and_libraries_report_of_themselves_is_its_failure(message):
    first = message.partition("\n")[0]
    printed = usage.out_of_resources(RuntimeError(message))
    fix = "try another one by CUDA_VISIBLE_DEVICES, or the CPU by CUDA_VISIBLE_DEVICES="
    assert printed == f"the GPU has failed ({first}): {fix}"
    assert usage.out_of_resources(ValueError(message)) is None


@pytest.mark.parametrize("message", OURS, ids=str)
def test_what_they_report_of_the_program_is_not_nor_what_only_names_a_gpu(message):
    assert usage.out_of_resources(RuntimeError(message)) is None


@pytest.mark.parametrize(
    ("error", "printed"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"),
            "the GPU's memory has run out (CUDA out of memory)",
        ),
        (RuntimeError("CUDA error: out of memory"), "the GPU's memory has run out ("),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "the GPU's memory has run out ("),
        (
            MemoryError(),
            "memory has run out (MemoryError): free some, or lower --buffer-size, --batch-size or --num-envs",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory has run out ("),
        (
            RuntimeError("can't start new thread"),
            "the system starts no more threads (can't start new thread): end other",
        ),
        (KeyError("alloc_failed"), None),
        (ValueError("not enough memory"), None),
        (RuntimeError("Tried to run out of memory words"), None),
    ],
    ids=str,
)
def test_what_has_run_out_is_what_the_error_names(error, printed):
    got = usage.out_of_resources(error)
    assert got is None if printed is None else got.startswith(printed)


def through_torch():
    return torch.nn.Linear(1, 1).no_such_name


@pytest.mark.parametrize(
    "error",
    [
        AttributeError("x"),
        NameError("x"),
        AssertionError("x"),
        NotImplementedError("x"),
        *map(RuntimeError, OURS[:-1]),
    ],
    ids=str,
)
def test_a_mistake_in_the_code_is_no_fault_of_the_file_that_is_read(error):
    with pytest.raises(type(error)) as raised, usage.reading(Path("a"), "a list", "give another"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    "read",
    [
        through_torch,  # an AttributeError
        lambda: torch.nn.Linear(1, 1).load_state_dict({"weight": torch.zeros(3)}),
        lambda: torch.zeros(3).copy_(torch.zeros(2)),
        lambda: json.loads("{}")["x"],
        lambda: int("five"),
        lambda: Path("nowhere").read_bytes(),
    ],
)
def test_what_a_reader_stumbles_over_is_the_files_fault_wherever_a_library_says_so(read):
    with (
        pytest.raises(UsageError, match=r"^a cannot be read as a list \("),
        usage.reading(Path("a"), "a list", "give another"),
    ):
        read()


@pytest.mark.parametrize(
    "content",
    ["[]", "5", "null", '"x"', "{}", '{"args": 5}', '{"args": null}', "[1, 2", '{"args": {"seed": []}}'],
)
def test_no_content_of_a_file_of_arguments_ends_in_a_trace(content):
    Path("run.json").write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=r"^run\.json cannot be read as a run's arguments \("):
        usage.settings_of(Args, read_identity(Path("run.json"))["args"], Path("run.json"))


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("", set()),
        ("--seed 1 --no-cuda --gamma=0.5", {"seed", "cuda", "gamma"}),
        ("--env-id --injection-step 5 -7", {"env_id", "injection_step"}),
        ("--no-freeze-heads --num_envs 3", {"freeze_heads", "num_envs"}),
        ("runs/no-such-flag", set()),
    ],
)
def test_flags_given_are_those_that_the_command_line_names(monkeypatch, words, names):
    monkeypatch.setattr(sys, "argv", ["script.py", *words.split()])
    assert usage.flags_given() == names


def test_a_flag_is_its_fields_name_in_the_shells_spelling():
    assert usage.flag("num_envs") == "--num-envs" and usage.flag("seed") == "--seed"


def test_the_users_home_is_put_in_where_a_shell_leaves_it_out(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = [
        "x.py",
        "~/runs/a",
        "--out=~/x.png",
        "--export",
        "~",
        "a~b",
        "--name=a=~/b",
        "~nobody-of-this-name/x",
        "--",
        "-o=~",
    ]
    monkeypatch.setattr(sys, "argv", given)
    expected = [
        "/home/me/runs/a",
        "--out=/home/me/x.png",
        "--export",
        "/home/me",
        *given[5:-1],
        "-o=/home/me",
    ]
    assert usage.words_given() == expected
    monkeypatch.setattr(sys, "argv", ["dqn_injection_atari.py", "--evaluate=~/runs/a"])
    assert parse_args().evaluate == "/home/me/runs/a"
