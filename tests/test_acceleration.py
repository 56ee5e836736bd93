"""What is faster computes the same: oneDNN, bfloat16, uploads, CUDA graphs; and the heap keeps its pages."""

import ctypes
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ACTIONS, joined, make_learner, random_batch
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.kill_test import differences, flat
from dqn_injection_atari import Args, FrameReplayBuffer, Learner
from support.acceleration import CUDAGraphs, HiddenLayer, copy_gradients, in_bfloat16, upload
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
    weight, bias = (parameter.detach().double().requires_grad_() for parameter in layer.parameters())
    reference = x.detach().double().requires_grad_()
    up = torch.randn(8, 512)
    layer(x).backward(up)
    expected = torch.nn.functional.linear(reference, weight, bias)
    expected.backward(up.double())
    assert torch.allclose(layer(x), expected.float(), atol=1e-5)
    for got, want in ((x.grad, reference.grad), (layer.weight.grad, weight.grad), (layer.bias.grad, bias.grad)):
        assert torch.allclose(got, want.float(), atol=1e-4, rtol=1e-5)
    layer.requires_grad_(False)
    layer.zero_grad()
    layer(x).backward(up)
    assert layer.weight.grad is None and layer.bias.grad is None


def test_hidden_layers_go_by_onednn_in_float32_on_a_cpu_only(monkeypatch):
    layer, calls = HiddenLayer(8, 4), []
    monkeypatch.setattr("support.acceleration.OneDNNLinear.apply", lambda *given: calls.append(given) or torch.zeros(1))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        layer.to(dtype)(torch.ones(2, 8, dtype=dtype))
        assert len(calls) == 1 and calls[0][1] is layer.weight
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    layer.float()(torch.ones(2, 8))
    assert len(calls) == 1


def test_the_working_copy_computes_in_bfloat16_but_for_its_output_layers():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.Flatten(), HiddenLayer(2, 3), torch.nn.Linear(3, 4))
    copy = in_bfloat16(network)
    assert [parameter.dtype for parameter in copy.parameters()] == [torch.bfloat16] * 4 + [torch.float32] * 2
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert torch.equal(copy[0].weight, network[0].weight.bfloat16()) and torch.equal(copy[3].weight, network[3].weight)
    copy[3].weight.data.zero_()
    assert network[3].weight.any()


def test_gradients_are_copied_in_float32_to_memory_that_stays():
    trained, working = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    addresses = set()
    for value in (0.5, -2.0):
        working.grad = torch.full((3,), value, dtype=torch.bfloat16)
        copy_gradients([working], [trained])
        assert trained.grad.dtype == torch.float32 and trained.grad.tolist() == [value] * 3
        addresses.add(trained.grad.data_ptr())
    assert len(addresses) == 1


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
            assert 0 < error < 0.1, "rounding alone gives 0.004, units that it moves across ReLU's kink the rest"
    q_plain, q_low = plain.online(obs.observations), low.online(obs.observations)
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
                output = re.search(r"theta.*\.2\.(weight|bias)$", name)
                assert exact.dtype == torch.float32 and rounded.dtype == (torch.float32 if output else torch.bfloat16)
                assert torch.equal(exact.to(rounded.dtype), rounded) and exact.requires_grad == rounded.requires_grad
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


def test_bf16_goes_on_from_a_float32_state_and_back():
    """What is saved are the float32 weights, whichever of the two wrote it."""
    plain, low = make_learner(), make_learner(bf16=True, seed=3)
    updates(plain, 2)
    low.load_state_dict(plain.state_dict())
    assert differences(flat(plain.state_dict()), flat(low.state_dict())) == []


def test_acting_in_bf16_asks_the_working_copy():
    learner = make_learner(bf16=True)
    with torch.no_grad():
        learner.online.theta[2].bias[3] += 100
    assert (learner.act(np.zeros((4, 4, 84, 84), np.uint8), 0.0) == 3).all()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
@pytest.mark.parametrize("bf16", [False, True])
def test_an_update_takes_its_memory_from_what_earlier_ones_freed(bf16):
    """Where the system has to give new pages, an update of 32 faults 700 of them in, which takes a tenth of its time."""
    learner, batch = make_learner(bf16=bf16), random_batch(np.random.default_rng(0), 32)
    for _ in range(5):
        learner.update(batch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        learner.update(batch)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10 < 100


@pytest.mark.slow
def test_denormals_are_flushed_in_every_thread():
    code = """
import dqn_injection_atari, torch
halves = torch.full((4_000_000,), torch.finfo(torch.float32).tiny) * 0.5
print(torch.get_num_threads(), halves.view(torch.int32).count_nonzero().item())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True, env=environment
    ).stdout
    assert out == "2 0\n"


def test_without_graphs_functions_are_called_as_they_are():
    graphs = CUDAGraphs(lambda: pytest.fail("nothing is captured"), enabled=False)
    given = torch.ones(3)
    out, also = graphs.run("name", lambda x, y: (x, y), given, given)
    assert out is given and also is given and not graphs.graphs


def test_what_is_on_the_gpu_is_not_uploaded_again_and_what_is_not_is():
    """On tensors without memory, which need no GPU; its devices have numbers, those that arguments name have none."""
    with FakeTensorMode():
        there, here = torch.zeros(3, device="cuda"), torch.zeros(3)
        assert upload(there, torch.device("cuda")) is there
        assert upload(here, torch.device("cpu")) is here


@pytest.mark.gpu
def test_an_upload_arrives():
    array = np.arange(1000)
    assert upload(array, torch.device("cuda")).is_cuda and np.array_equal(upload(array, torch.device("cuda")).cpu(), array)


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("count", [1, 4])
def test_captured_updates_and_actions_equal_eager_ones(count, bf16):
    """Invariant 9, also across an injection, a sync and a load, after each of which there are new graphs."""
    pick_device(**DETERMINISTIC)
    settings = {"injection_step": (10, 20), "batch_size": 8, "learning_rate": 1e-3, "bf16": bf16}
    eager, captured = (Learner(Args(**settings, cuda_graphs=graphs), ACTIONS, "cuda") for graphs in (False, True))
    rng = np.random.default_rng(0)

    def compare():
        for _ in range(3):
            batch = joined([random_batch(rng) for _ in range(count)])
            batch = ReplayBufferSamples(*(tensor.cuda() for tensor in batch[:5]))
            losses = [learner.update(batch, count) for learner in (eager, captured)]
            assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])
            obs = batch.observations.cpu().numpy()
            assert np.array_equal(eager.act(obs, 0.0), captured.act(obs, 0.0))
        trained = zip(eager.q_network.named_parameters(), captured.q_network.named_parameters(), strict=True)
        for (name, expected), (_, got) in trained:
            assert torch.equal(expected, got), name
            assert (expected.grad is None) == (got.grad is None), name
            if expected.grad is not None:
                assert torch.equal(expected.grad, got.grad), name
        assert torch.equal(eager.losses.totals, captured.losses.totals)

    compare()
    for learner in (eager, captured):
        learner.sync_target()
    compare()
    for learner in (eager, captured):
        learner.inject(step=10)
    compare()
    state = eager.state_dict()
    for learner in (eager, captured):
        learner.load_state_dict(state)
    compare()


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_learning_makes_the_host_wait_for_nothing(graphs):
    learner = Learner(Args(cuda_graphs=graphs, batch_size=8), ACTIONS, pick_device(**DETERMINISTIC))
    space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    replay = FrameReplayBuffer(100, space, gym.spaces.Discrete(ACTIONS), "cuda", n_envs=2, storage="cuda")
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
