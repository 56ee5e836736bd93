"""What makes learning faster and changes no result but for rounding: bfloat16, oneDNN, CUDA graphs, the allocator."""

import copy
import ctypes
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn as nn

from support.machine import limit_threads

Network = TypeVar("Network", bound=nn.Module)


def prepare_cpu() -> None:
    """Settings of the whole process, to be made before PyTorch's worker threads start, which take them over."""
    limit_threads()
    torch.set_flush_denormal(True)  # dead units leave denormal moments, which halve Adam's speed on a CPU
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc gives freed blocks of over 128 kB back to the system, whose pages each update would then fault in again
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: smaller blocks, all but replay's frames, come from the heap
        libc.mallopt(-1, 2**29)  # M_TRIM_THRESHOLD: which keeps so many bytes of what was freed


def upload(array: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """`array` on the device. Nothing waits for the copy: PyTorch keeps the pinned memory from other use until it is done."""
    tensor = torch.as_tensor(array)
    return tensor if tensor.is_cuda or device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class OneDNNLinear(torch.autograd.Function):
    """x @ weight.T + bias by oneDNN. PyTorch gives fp32 to MKL, which leaves half of an AMD processor's arithmetic unused."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        multiply = torch.ops.mkldnn._linear_pointwise
        return (
            multiply(grad, weight.t(), None, "none", [], "") if of_x else None,
            multiply(grad.t(), x.t(), None, "none", [], "") if of_weight else None,
            grad.sum(dim=0) if of_bias else None,
        )


class HiddenLayer(nn.Linear):
    """A linear layer, by the faster of PyTorch's two libraries."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            return OneDNNLinear.apply(x, self.weight, self.bias)
        return super().forward(x)


def in_bfloat16(network: Network) -> Network:
    """A copy that computes in bfloat16 but for its output layers, whose sums stay float32."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | HiddenLayer):
            module.to(torch.bfloat16)
    return network


def copy_gradients(working: Sequence[torch.Tensor], trained: Sequence[torch.Tensor]) -> None:
    """Gives the float32 parameters the gradients of their working copies."""
    for parameter in trained:
        if parameter.grad is None:  # once, then kept: new memory for every update costs a tenth of its time
            parameter.grad = torch.empty_like(parameter)
    torch._foreach_copy_([p.grad for p in trained], [p.grad for p in working])  # type: ignore[misc]


class CUDAGraphs:
    """Functions of tensors, each captured once as a CUDA graph and replayed from then on.

    A captured function holds the memory of what it uses: call `clear` when a tensor that it uses is replaced.

    Args:
        state: gives every tensor that the functions change. Before a capture they have to run a few times, which
            trains; that is undone
        enabled: False calls the functions as they are
    """

    def __init__(self, state: Callable[[], list[torch.Tensor]], enabled: bool):
        self.state, self.enabled = state, enabled
        self.graphs: dict[Any, Callable] = {}

    def clear(self) -> None:
        self.graphs.clear()

    def run(self, name: Any, function: Callable, *inputs: torch.Tensor) -> Any:
        """function(*inputs), whose output is overwritten by the next call with this name."""
        if not self.enabled:
            return function(*inputs)
        key = (name, *(given.shape for given in inputs))
        if key not in self.graphs:
            self.graphs[key] = self._capture(function, [given.clone() for given in inputs])
        return self.graphs[key](*inputs)

    def _capture(self, function: Callable, inputs: list[torch.Tensor]) -> Callable:
        before = {tensor: tensor.detach().clone() for tensor in self.state()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            for tensor in self.state():  # moments that are new began at zero
                tensor.copy_(before[tensor]) if tensor in before else tensor.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = function(*inputs)

        def replay(*given: torch.Tensor) -> Any:
            for own, new in zip(inputs, given, strict=True):
                own.copy_(new)
            graph.replay()
            return outputs

        return replay
