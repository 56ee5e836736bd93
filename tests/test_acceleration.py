"""What is faster computes the same: oneDNN, bfloat16, uploads, CUDA graphs; and the heap keeps its pages."""

import copy
import ctypes
import gc
import os
import resource
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ACTIONS, joined, make_learner, needs_bfloat16_on_the_gpu, random_batch
from recorded_graphs import RecordedGraph, memory
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch._subclasses.fake_tensor import FakeTensorMode

from alternatives import ALTERNATIVES
from benchmarks.kill_test import differences, flat
from dqn_injection_atari import Args, FrameReplayBuffer, Learner
from support.acceleration import (
    CUDAGraphs,
    HiddenLayer,
    copy_gradients,
    copy_parameters,
    in_bfloat16,
    prepare_process,
    upload,
)
from support.machine import pick_device

ROOT = Path(__file__).resolve().parent.parent
DETERMINISTIC = {"cuda": True, "deterministic": True, "tf32": True}


def updates(learner, count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        learner.update(random_batch(rng))


def test_hidden_layers_have_the_value_and_gradients_of_linear_layers():
    torch.manual_seed(0)
    layer = HiddenLayer(3136, 512)
    x = torch.randn(8, 3136, requires_grad=True)
    reference = torch.nn.Linear(3136, 512).double()
    reference.load_state_dict(layer.state_dict())
    x64 = x.detach().double().requires_grad_()
    up = torch.randn(8, 512)
    layer(x).backward(up)
    expected = reference(x64)
    expected.backward(up.double())
    assert torch.allclose(layer(x), expected.float(), atol=1e-5)
    for tensor, exact in ((x, x64), (layer.weight, reference.weight), (layer.bias, reference.bias)):
        assert torch.allclose(tensor.grad, exact.grad.float(), atol=1e-4, rtol=1e-5)
    layer.requires_grad_(False)
    layer.zero_grad()
    layer(x).backward(up)
    assert layer.weight.grad is None and layer.bias.grad is None


def test_hidden_layers_go_by_onednn_in_float32_on_a_cpu_only(monkeypatch):
    layer = HiddenLayer(8, 4)
    calls = []

    def apply(*given):
        calls.append(given)
        return torch.zeros(1)

    monkeypatch.setattr("support.acceleration.OneDNNLinear.apply", apply)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        layer.to(dtype)(torch.ones(2, 8, dtype=dtype))
        assert len(calls) == 1 and calls[0][1] is layer.weight
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    layer.float()(torch.ones(2, 8))
    assert len(calls) == 1


def test_the_working_copy_computes_in_bfloat16_but_for_its_output_layers():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 1), torch.nn.Flatten(), HiddenLayer(2, 3), torch.nn.Linear(3, 4)
    )
    norms = torch.nn.Sequential(torch.nn.GroupNorm(1, 2), torch.nn.LayerNorm(3))
    assert {parameter.dtype for parameter in in_bfloat16(norms).parameters()} == {torch.bfloat16}
    copy = in_bfloat16(network)
    assert [parameter.dtype for parameter in copy.parameters()] == [torch.bfloat16] * 4 + [torch.float32] * 2
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert torch.equal(copy[0].weight, network[0].weight.bfloat16())
    assert torch.equal(copy[3].weight, network[3].weight)
    copy[3].weight.data.zero_()
    assert network[3].weight.any()


def test_gradients_are_copied_in_float32_to_memory_that_stays():
    target = torch.nn.Linear(3, 1)
    target.bias.requires_grad_(False)
    source = copy.deepcopy(target).to(torch.bfloat16)
    addresses = set()
    for value in (0.5, -2.0):
        source.weight.grad = torch.full((1, 3), value, dtype=torch.bfloat16)
        copy_gradients(source, target)
        assert target.weight.grad.dtype == torch.float32 and target.weight.grad.tolist() == [[value] * 3]
        addresses.add(target.weight.grad.data_ptr())
    assert len(addresses) == 1
    assert target.bias.grad is None, "what is frozen has none in either"


def test_parameters_are_copied_in_the_targets_precision_to_where_they_are():
    source = torch.nn.Linear(3, 2)
    target = torch.nn.Linear(3, 2).to(torch.bfloat16)
    weight = target.weight
    copy_parameters(source, target)
    assert target.weight is weight and torch.equal(weight, source.weight.bfloat16())
    assert torch.equal(target.bias, source.bias.bfloat16()) and weight.requires_grad
    with torch.no_grad():
        source.weight.fill_(7)
        source.bias.fill_(7)
    source.bias.requires_grad_(False)
    copy_parameters(source, target, only_trained=True)
    assert (target.weight == 7).all() and not (target.bias == 7).any()


@pytest.mark.parametrize("injections", [0, 1])
def test_bf16_gives_nearly_the_same_values_and_gradients(injections):
    plain, low = (make_learner(bf16=bf16) for bf16 in (False, True))
    obs = random_batch(np.random.default_rng(7), 32)
    for learner in (plain, low):
        for _ in range(injections):
            learner.inject()
        learner.update(obs)
    for expected, got in zip(plain.q_network.parameters(), low.q_network.parameters(), strict=True):
        assert (expected.grad is None) == (got.grad is None)
        if expected.grad is not None:
            assert got.grad.dtype == torch.float32
            error = (got.grad - expected.grad).norm() / expected.grad.norm()
            # rounding alone gives 0.004, units that it moves across ReLU's kink the rest
            assert 0 < error < 0.1
    q_plain = plain.online(obs.observations)
    q_low = low.online(obs.observations)
    assert q_low.dtype == torch.float32 and 0 < (q_plain - q_low).abs().max() < 0.01


def test_bf16_keeps_weights_in_float32_and_its_working_copies_follow_them():
    learner = make_learner(bf16=True, learning_rate=1e-5)
    obs = torch.zeros(3, 4, 84, 84, dtype=torch.uint8)

    def follows():
        pairs = ((learner.q_network, learner.online), (learner.target_network, learner.target))
        for network, working in pairs:
            assert working.num_injections == network.num_injections
            layers = zip(network.named_parameters(), working.named_parameters(), strict=True)
            for (name, exact), (_, rounded) in layers:
                expected = torch.float32 if ".output." in name else torch.bfloat16
                assert exact.dtype == torch.float32 and rounded.dtype == expected
                assert torch.equal(exact.to(rounded.dtype), rounded)
                assert exact.requires_grad == rounded.requires_grad
        return True

    assert follows()
    before = learner.q_network.encoder[2].weight.detach().clone()
    updates(learner, 3)
    step = (learner.q_network.encoder[2].weight - before).abs().max()
    assert 0 < step < before.abs().max() * 2**-9, "an update that bfloat16 itself would lose"
    assert follows()
    learner.sync_target()
    assert follows()
    for _ in range(2):
        q_values = learner.online(obs)
        learner.inject()
        assert follows() and torch.equal(learner.online(obs), q_values)
        updates(learner, 2)
        assert follows()
    other = make_learner(bf16=True, seed=5)
    other.load_state_dict(learner.state_dict())
    learner = other
    assert follows()


@pytest.mark.parametrize("tau", [1.0, 0.25])
def test_a_sync_moves_the_targets_working_copy_as_it_moves_the_target(tau):
    learner = make_learner(bf16=True, tau=tau)
    updates(learner, 3)
    learner.sync_target()
    weight = learner.target_network.encoder[2].weight
    assert torch.equal(learner.target.encoder[2].weight, weight.bfloat16())
    assert torch.equal(weight, learner.q_network.encoder[2].weight) == (tau == 1)


def test_bf16_goes_on_from_a_float32_state_and_back():
    """What is saved are the float32 weights, whichever of the two wrote it."""
    plain = make_learner()
    low = make_learner(bf16=True, seed=3)
    updates(plain, 2)
    low.load_state_dict(plain.state_dict())
    assert differences(flat(plain.state_dict()), flat(low.state_dict())) == []


def test_acting_in_bf16_asks_the_working_copy():
    learner = make_learner(bf16=True)
    with torch.no_grad():
        learner.online.head.theta.output.bias[3] += 100
    assert (learner.act(np.zeros((4, 4, 84, 84), np.uint8), 0.0) == 3).all()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
@pytest.mark.parametrize("bf16", [False, True])
def test_an_update_takes_its_memory_from_what_earlier_ones_freed(bf16):
    """Where the system has to give new pages, an update of 32 faults 700 in: a tenth of its time."""
    prepare_process()
    learner = make_learner(bf16=bf16)
    batch = random_batch(0, 32)
    for _ in range(5):
        learner.update(batch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        learner.update(batch)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10 < 100


@pytest.mark.slow
def test_denormals_are_flushed_in_every_thread():
    code = """
import torch
from support.acceleration import prepare_process
prepare_process()
halves = torch.full((4_000_000,), torch.finfo(torch.float32).tiny) * 0.5
print(torch.get_num_threads(), halves.view(torch.int32).count_nonzero().item())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, encoding="utf-8", check=True, env=environment)
    assert ended.stdout == "2 0\n"


def test_what_is_on_the_gpu_is_not_uploaded_again_and_what_is_not_is():
    """On tensors without memory, which need no GPU. Its devices have numbers, arguments name none."""
    with FakeTensorMode():
        there = torch.zeros(3, device="cuda")
        here = torch.zeros(3)
        assert upload(there, torch.device("cuda")) is there
        assert upload(here, torch.device("cpu")) is here
        assert upload(there, torch.device("cpu")).device.type == "cpu"


@pytest.mark.gpu
def test_an_upload_arrives():
    array = np.arange(1000)
    uploaded = upload(array, torch.device("cuda"))
    assert uploaded.is_cuda and np.array_equal(uploaded.cpu(), array)


# CUDA graphs: on a GPU, and here by what stands in for them


def pair(where="cpu", **settings):
    """Two learners that differ in how they compute alone: as the script says, and by captured graphs."""
    settings = {
        "injection_step": (10, 20),
        "batch_size": 8,
        "learning_rate": 1e-3,
        "head_width": 64,
        **settings,
    }
    return tuple(Learner(Args(**settings, cuda_graphs=graphs), ACTIONS, where) for graphs in (False, True))


def unequal(eager, captured, count=1, rounds=2, rng=0):
    """What is not bitwise equal after some updates of both, `count` in each call, and decisions."""
    found = set()
    rng = np.random.default_rng(rng)
    for _ in range(rounds):
        batch = joined([random_batch(rng) for _ in range(count)])
        batch = ReplayBufferSamples(*(tensor.to(eager.device) for tensor in batch[:5]))
        losses = [learner.update(batch, count) for learner in (eager, captured)]
        found |= {name for name in losses[0] if not torch.equal(losses[0][name], losses[1][name])}
        obs = batch.observations.cpu().numpy()
        if not np.array_equal(eager.act(obs, 0.0), captured.act(obs, 0.0)):
            found.add("actions")
        if not torch.equal(eager.online(batch.observations), captured.online(batch.observations)):
            found.add("Q")
    found |= set(differences(flat(eager.state_dict()), flat(captured.state_dict())))
    trained = zip(eager.q_network.named_parameters(), captured.q_network.named_parameters(), strict=True)
    for (name, parameter), (_, other) in trained:
        if parameter.grad is None and other.grad is None:
            continue
        if parameter.grad is None or other.grad is None or not torch.equal(parameter.grad, other.grad):
            found.add(f"gradient of {name}")
    return found


def check_equality(eager, captured, count):
    """Invariant 9, also across a sync, injections and a load, after each of the latter with new graphs."""
    assert unequal(eager, captured, count) == set()
    for learner in (eager, captured):
        learner.sync_target()
    assert unequal(eager, captured, count) == set()
    for step in (10, 20):
        for learner in (eager, captured):
            learner.inject(step)
        assert unequal(eager, captured, count) == set()
    state = copy.deepcopy(eager.state_dict())
    unequal(eager, captured, count, rounds=1)
    for learner in (eager, captured):
        learner.load_state_dict(state)
    assert unequal(eager, captured, count) == set()


CASES = {  # updates in each call, and settings
    "plain": (1, {}),
    "all heads learn, soft target": (2, {"freeze_heads": False, "tau": 0.5}),
    "bf16": (2, {"bf16": True, "moments": "keep"}),
    "layer norm and weight decay": (2, {"layer_norm": True, "weight_decay": 1e-3}),
    "the same in bf16": (1, {"layer_norm": True, "weight_decay": 1e-3, "bf16": True}),
    "the paper's optimizer": (2, {"optimizer": "rmsprop", "learning_rate": 2.5e-4, "shared_bias": True}),
}
PARAMETERS = []
for name, case in CASES.items():
    marks = () if name in ("plain", "bf16") else pytest.mark.slow
    PARAMETERS.append(pytest.param(*case, id=name, marks=marks))
each_case = pytest.mark.parametrize(("count", "settings"), PARAMETERS)


@each_case
def test_captured_updates_and_actions_equal_eager_ones_where_graphs_are_stood_in_for(
    stand_in, count, settings
):
    check_equality(*pair(**settings), count)
    # act and update, at first, after each injection and after the load
    assert len(stand_in.captures) == 2 * 4


@pytest.mark.gpu
@each_case
def test_captured_updates_and_actions_equal_eager_ones(count, settings):
    if "bf16" in settings:
        needs_bfloat16_on_the_gpu()
    pick_device(**DETERMINISTIC)
    check_equality(*pair("cuda", **settings), count)


def test_interventions_of_another_kind_are_captured_anew_too(stand_in):
    once = [name for name, alternative in ALTERNATIVES.items() if alternative.period is None]
    for intervention in once:
        learners = pair(intervention=intervention)
        assert unequal(*learners) == set()
        for learner in learners:
            learner.intervene(10)
        assert unequal(*learners) == set()


def test_graphs_of_several_sizes_share_what_they_train(stand_in):
    learners = pair()
    for count in (2, 1, 2, 3, 1):
        found = unequal(*learners, count=count, rounds=1)
        # each graph keeps its own gradients
        assert [name for name in found if not name.startswith("gradient")] == []


def test_losses_are_summed_across_captured_updates_and_begin_at_zero_after_they_were_read(stand_in):
    eager, captured = pair()
    for _ in range(2):
        assert unequal(eager, captured) == set()
        assert eager.losses.means(8, 4) == captured.losses.means(8, 4)


def replace_weight(learner):
    weight = learner.q_network.encoder[0].weight
    weight.data = weight.data.clone()


def replace_weight_of_target(learner):
    bias = learner.target_network.head.theta.output.bias
    bias.data = bias.data + 1


def replace_moment(learner):
    moments = learner.optimizer.state[learner.q_network.head.theta.hidden.weight]
    moments["exp_avg"] = moments["exp_avg"].clone()


def replace_sum_of_losses(learner):
    learner.losses.sums = learner.losses.sums.clone()


def replace_count_of_losses(learner):
    learner.losses.counts = learner.losses.counts.clone()


REPLACEMENTS = [
    replace_weight,
    replace_weight_of_target,
    replace_moment,
    replace_sum_of_losses,
    replace_count_of_losses,
]


@pytest.mark.parametrize("replace", REPLACEMENTS)
def test_a_tensor_that_is_replaced_after_the_capture_is_noticed(stand_in, replace):
    learners = pair()
    assert unequal(*learners, rounds=1) == set()
    for learner in learners:
        replace(learner)
    assert unequal(*learners, rounds=1) != set(), "the graph goes on with the tensor that was there"


def test_a_graph_that_stays_after_an_injection_is_noticed(stand_in, monkeypatch):
    eager, captured = pair()
    unequal(eager, captured)
    monkeypatch.setattr(CUDAGraphs, "clear", lambda _: None)
    for learner in (eager, captured):
        learner.inject(10)
    assert any("theta" in name for name in unequal(eager, captured))


def test_a_warm_up_that_is_not_undone_is_noticed(stand_in):
    eager, captured = pair()
    captured.graphs.state = list
    assert any("encoder" in name for name in unequal(eager, captured, rounds=1))


def test_a_capture_that_computes_what_it_records_would_be_noticed(stand_in, monkeypatch):
    monkeypatch.setattr(RecordedGraph, "forget_values", lambda _: None)
    assert unequal(*pair(), rounds=1) != set()


def test_python_runs_in_warm_up_and_capture_only_and_outputs_stay_where_they_are(stand_in):
    calls = []
    total = torch.zeros(2)

    def add(x):
        calls.append(x)
        total.add_(x)
        return total * 2

    graphs = CUDAGraphs(lambda: [total])
    given = torch.ones(2)
    first = graphs.run("add", add, given)
    assert first.tolist() == [2, 2] and len(calls) == CUDAGraphs.WARM_UP + 1 >= 4
    second = graphs.run("add", add, torch.full((2,), 5.0))
    assert second is first and first.tolist() == [12, 12] and total.tolist() == [6, 6]
    assert len(calls) == CUDAGraphs.WARM_UP + 1
    assert given.tolist() == [1, 1], "inputs are copied: what was given first is not overwritten later"
    graphs.run("add", add, torch.ones(1))
    assert len(calls) == 2 * (CUDAGraphs.WARM_UP + 1), "of another shape"


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor | None = None


class Summing:
    """What `wrap` wraps: a method of a named tuple, with a setting."""

    def __init__(self):
        self.calls = 0

    def summed(self, pair, factor=1):
        self.calls += 1
        return (pair.first + pair.second) * factor if pair.second is not None else pair.first * factor


def test_a_wrapped_method_has_a_graph_for_each_shape_and_setting_and_does_not_keep_its_object(stand_in):
    summing = Summing()
    graphs = CUDAGraphs(list)
    summed = graphs.wrap(summing.summed)
    ones = torch.ones(2)
    for _ in range(2):
        assert summed(Pair(ones, ones)).tolist() == [2, 2]
        assert summed(Pair(ones, ones), 3).tolist() == [6, 6]
        assert summed(Pair(torch.ones(3), torch.ones(3))).tolist() == [2, 2, 2]
        assert summed(Pair(ones)).tolist() == [1, 1]
    assert len(stand_in.captures) == 4 and summing.calls == 4 * (CUDAGraphs.WARM_UP + 1)
    gone = weakref.ref(summing)
    del summing
    assert gone() is None


@pytest.mark.parametrize(
    "refused",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x + torch.rand(2),
        lambda x: x + torch.tensor([1.0, 2.0], device=x.device),
    ],
)
def test_what_no_capture_allows_is_refused(stand_in, refused):
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        CUDAGraphs(list).run("name", refused, torch.ones(2))


def test_a_set_of_graphs_has_one_stream_for_warm_up_and_capture_and_the_next_set_another(stand_in):
    _, learner = pair()
    streams = []
    for _ in range(2):
        obs = random_batch().observations.numpy()
        learner.update(random_batch())
        learner.act(obs, 0.0)
        (stream,) = set(stand_in.used)
        assert [captured_on for _, captured_on in stand_in.captures] == [stream, stream]
        assert stand_in.current is not stream
        streams.append(stream)
        learner.inject()
        stand_in.used.clear()
        stand_in.captures.clear()
    assert streams[0] is not streams[1]


@pytest.mark.parametrize("ended", ["clear", "learner"])
def test_graphs_go_at_once_when_they_are_cleared_or_their_learner_goes(stand_in, ended):
    """A garbage collector may come in the middle of another capture, which a graph's end would end."""
    _, learner = pair()
    learner.update(random_batch())
    learner.act(random_batch().observations.numpy(), 0.0)
    graphs = [graph for graph, _ in stand_in.captures]
    assert len(graphs) == 2 and None not in [graph() for graph in graphs]
    gc.disable()
    try:
        if ended == "clear":
            learner.graphs.clear()
        else:
            del learner
        assert [graph() for graph in graphs] == [None, None]
    finally:
        gc.enable()


def test_gradients_are_the_graphs_own(stand_in):
    _, learner = pair()
    learner.update(random_batch())
    graph = stand_in.captures[0][0]()
    assert all(memory(p.grad) in graph.memory for p in learner.q_network.parameters() if p.grad is not None)


def test_pytorch_has_nothing_to_say_against_the_warm_up(stand_in, monkeypatch):
    """Where a capturable optimizer was copied or unpickled, it warns that this one runs uncaptured."""
    warned = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    stream = SimpleNamespace(is_capturing=lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: stream)
    monkeypatch.setattr(warnings, "warn", lambda message, *_, **__: warned.append(message))
    _, learner = pair()
    learner.update(random_batch())
    learner.load_state_dict(learner.state_dict())
    learner.update(random_batch())
    assert warned == []
    copy.deepcopy(learner.optimizer).step()
    assert len(warned) == 1 and "capturable" in warned[0], "as it would"


@pytest.mark.gpu
@pytest.mark.parametrize(("graphs", "storage"), [(False, "cpu"), (True, "cuda"), (True, "cpu")])
def test_learning_makes_the_host_wait_for_nothing(graphs, storage):
    """The default, and graphs where the replay's frames fit on the GPU or do not."""
    learner = Learner(Args(cuda_graphs=graphs, batch_size=8), ACTIONS, pick_device(**DETERMINISTIC))
    space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    replay = FrameReplayBuffer(100, space, gym.spaces.Discrete(ACTIONS), "cuda", n_envs=2, storage=storage)
    obs = np.full((2, 4, 84, 84), 7, np.uint8)

    def once():
        replay.add(obs, obs, np.zeros(2, int), np.zeros(2), np.zeros(2, bool), [{}, {}])
        learner.update(replay.sample(8, batches=2), 2)
        learner.sync_target()

    once()  # captures
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
