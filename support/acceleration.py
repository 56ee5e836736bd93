"""What makes learning faster and changes no result but for rounding: bfloat16, oneDNN, graphs, memory."""

import copy
import ctypes
import gc
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn as nn

from support.machine import limit_threads
from support.versions import refuse_wrong_versions

Network = TypeVar("Network", bound=nn.Module)
M_TRIM_THRESHOLD = -1  # as in malloc.h
M_MMAP_THRESHOLD = -3


def prepare_process() -> None:
    """Settings of the whole process, to be made before PyTorch's worker threads start, which take them over.

    Raises UsageError where a package is of a version that is known to give wrong numbers.
    """
    refuse_wrong_versions()
    limit_threads()
    torch.set_flush_denormal(True)  # dead units leave denormal moments, which halve Adam's speed on a CPU
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # glibc gives freed blocks of over 128 kB back, and each update would fault in their pages again
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # smaller blocks, all but replay's frames, come from the heap
        libc.mallopt(M_TRIM_THRESHOLD, 2**29)  # which keeps so many bytes of what was freed


def upload(array: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """`array` on the device.

    Nothing waits for a copy to a GPU: PyTorch keeps the pinned memory until it is done.
    """
    tensor = torch.as_tensor(array)
    if tensor.device.type == device.type:
        return tensor
    if device.type == "cpu":
        return tensor.cpu()
    return tensor.pin_memory().to(device, non_blocking=True)


class OneDNNLinear(torch.autograd.Function):
    """x @ weight.T + bias by oneDNN: PyTorch's MKL does half of what an AMD processor can in fp32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        multiply = torch.ops.mkldnn._linear_pointwise
        return (
            multiply(grad, weight.t(), None, "none", [], "") if of_x else None,
            multiply(grad.t(), x.t(), None, "none", [], "") if of_weight else None,
            grad.sum(dim=0) if of_bias else None,
        )


class HiddenLayer(nn.Linear):
    """A linear layer; on a CPU in float32 it computes with oneDNN, see `OneDNNLinear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            return OneDNNLinear.apply(x, self.weight, self.bias)
        return super().forward(x)


def in_bfloat16(network: Network) -> Network:
    """A copy that computes in bfloat16 but for its output layers, whose sums stay float32."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | HiddenLayer | nn.GroupNorm | nn.LayerNorm):
            module.to(torch.bfloat16)
    return network


def copy_gradients(source: nn.Module, target: nn.Module) -> None:
    """Gives trained parameters of `target` the gradients of those of `source`, a network like it."""
    gradients = []
    copies = []
    for parameter, trained in zip(source.parameters(), target.parameters(), strict=True):
        if trained.requires_grad:
            if trained.grad is None:
                # once, then kept: new memory for every update costs a tenth of its time
                trained.grad = torch.empty_like(trained)
            assert parameter.grad is not None
            gradients.append(parameter.grad)
            copies.append(trained.grad)
    torch._foreach_copy_(copies, gradients)


@torch.no_grad()
def copy_parameters(source: nn.Module, target: nn.Module, only_trained: bool = False) -> None:
    """Gives parameters of `target` the values of those of `source`, all of them or those that are trained."""
    values: list[torch.Tensor] = []
    copies: list[torch.Tensor] = []
    for parameter, copied in zip(source.parameters(), target.parameters(), strict=True):
        if parameter.requires_grad or not only_trained:
            values.append(parameter)
            copies.append(copied)
    torch._foreach_copy_(copies, values)


class CUDAGraphs:
    """Functions of tensors, each captured once as a CUDA graph and replayed from then on.

    A graph uses the memory that its tensors had when it was captured, and does not keep them alive: where one
    of them is replaced, call `clear` before the next call.

    The graphs between two calls of `clear` are a set, which is warmed up and captured on a stream of its own
    (PyTorch has 32, and gives them in turn: the 33rd set gets the first one's).
    Libraries keep a workspace for each stream, in the memory of the first graph that was captured there. It
    goes with that graph (pytorch/pytorch#193402). Autograd goes back to the stream where it met a parameter.

    Graphs must not belong to a reference cycle: one that the garbage collector frees during a capture makes
    that fail. So dead ones are collected before.

    Args:
        state: gives every tensor that the functions change. Before a capture they have to run a few times,
            which trains; that is undone
    """

    WARM_UP = 3  # calls: libraries choose their kernels and take memory, new moments and gradients get theirs

    def __init__(self, state: Callable[[], list[torch.Tensor]]):
        self.state = state
        self.graphs: dict[Any, Callable] = {}
        self.stream: torch.cuda.Stream | None = None

    def clear(self) -> None:
        self.graphs.clear()
        self.stream = None

    def wrap(self, method: Callable) -> Callable:
        """A bound method of a tensor or a named tuple of tensors, captured once for each of their shapes.

        Further arguments are no tensors, and each of their values has a graph of its own. The method's object
        is not kept.
        """
        name = method.__name__
        weak = weakref.WeakMethod(method)

        def call(inputs: Any, *settings: Any) -> Any:
            tensors = [inputs]
            if isinstance(inputs, tuple):
                # a ReplayBufferSamples ends with discounts, which are None
                tensors = [tensor for tensor in inputs if tensor is not None]

            def function(*tensors: torch.Tensor) -> Any:
                bound = weak()
                assert bound is not None
                if isinstance(inputs, tuple):
                    return bound(type(inputs)(*tensors), *settings)
                return bound(*tensors, *settings)

            return self.run((name, *settings), function, *tensors)

        return call

    def run(self, name: Any, function: Callable, *inputs: torch.Tensor) -> Any:
        """function(*inputs), whose output is overwritten by the next call with this name.

        Where the function makes gradients, it sets them to None first: a graph writes to memory of its own.
        """
        key = (name, *(given.shape for given in inputs))
        if key not in self.graphs:
            if self.stream is None:
                self.stream = torch.cuda.Stream()
            self.graphs[key] = self._capture(function, [given.clone() for given in inputs], self.stream)
        return self.graphs[key](*inputs)

    def _capture(self, function: Callable, inputs: list[torch.Tensor], stream: torch.cuda.Stream) -> Callable:
        self._warm_up(function, inputs, stream)
        gc.collect()  # were a dead graph collected during the capture, that would fail
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outputs = function(*inputs)

        def replay(*given: torch.Tensor) -> Any:
            for captured, new in zip(inputs, given, strict=True):
                captured.copy_(new)
            graph.replay()
            return outputs

        return replay

    def _warm_up(self, function: Callable, inputs: list[torch.Tensor], stream: torch.cuda.Stream) -> None:
        before = {tensor: tensor.detach().clone() for tensor in self.state()}
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UP):
                function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            for tensor in self.state():
                if tensor in before:
                    tensor.copy_(before[tensor])
                else:
                    tensor.zero_()  # moments that are new began at zero
