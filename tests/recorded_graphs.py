"""Stands in for CUDA graphs where there is no GPU, and behaves as they do.

A capture takes note of PyTorch's operations and computes nothing. A replay runs these operations again, on
the same memory: nothing of Python runs, numbers are what they were at the capture, and a tensor that has been
replaced since stays as it is.
"""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# for the device, which no capture allows
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal"}
UPLOADS = {"aten::lift_fresh"}  # Python's numbers, as `torch.tensor` does; no capture allows that either
ALLOCATES = ("aten::empty", "aten::new_empty")  # and computes nothing
RANDOM = torch.Tag.nondeterministic_seeded


def memory(tensor):
    """Identifies the memory that a tensor lies in, for as long as that is in use."""
    return tensor.untyped_storage()._cdata


def aliases(tree):
    """Tensors with the same memory, which keep it where the given ones are made to point elsewhere."""
    return tree_map_only(torch.Tensor, torch.Tensor.detach, tree)


class RecordedGraph(TorchDispatchMode):
    """Stands in for `torch.cuda.CUDAGraph`."""

    def __init__(self):
        super().__init__()
        self.calls = []  # (operation, arguments, outputs that have memory of their own)
        self.found = {}  # memory that was there before: its storage, and what that held
        self.memory = {}  # of the graph

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = (args, kwargs or {})
        if operation._schema.name in WAITS | UPLOADS or RANDOM in operation.tags:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({operation})")
        for tensor in (leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)):
            storage = tensor.untyped_storage()
            if memory(tensor) not in self.memory and memory(tensor) not in self.found:
                self.found[memory(tensor)] = (storage, storage.clone())
        arguments = aliases(given)
        result = operation(*given[0], **given[1])
        inputs = {memory(leaf) for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)}
        outputs = []
        for leaf in tree_leaves(result):
            new = isinstance(leaf, torch.Tensor) and memory(leaf) not in inputs
            outputs.append(leaf.detach() if new else None)
            if new:
                self.memory[memory(leaf)] = leaf.untyped_storage()
        if not operation._schema.name.startswith(ALLOCATES):
            self.calls.append((operation, arguments, outputs))
        return result

    def forget_values(self):
        """Undoes what recording has computed: what was there is as before, the graph's memory is NaN."""
        for storage, content in self.found.values():
            storage.copy_(content)
        self.found.clear()
        for storage in self.memory.values():
            storage.fill_(255)  # of a float, NaN

    @torch.no_grad()
    def replay(self):
        for operation, (args, kwargs), outputs in self.calls:
            results = tree_leaves(operation(*args, **kwargs))
            for output, result in zip(outputs, results, strict=True):
                if output is not None:
                    output.copy_(result)


class Stream:
    """Stands in for `torch.cuda.Stream`: a name, since everything here waits for everything."""

    def wait_stream(self, other):
        assert isinstance(other, Stream)


class Device:
    """Stands in for a GPU's side of `torch.cuda`, and takes note of its streams and graphs."""

    def __init__(self):
        self.current = Stream()
        self.used = []  # streams that something ran on besides the first
        self.captures = []  # (the graph, held weakly, and the stream it was captured on)

    def stream(self, stream):
        """Stands in for `torch.cuda.stream`."""
        return OnStream(self, stream)

    def graph(self, graph, stream=None):
        """Stands in for `torch.cuda.graph`."""
        return Capture(self, graph, Stream() if stream is None else stream)


class OnStream:
    def __init__(self, device, stream):
        self.device, self.stream = device, stream

    def __enter__(self):
        self.before = self.device.current
        self.device.current = self.stream
        self.device.used.append(self.stream)

    def __exit__(self, *_):
        self.device.current = self.before


class Capture(OnStream):
    def __init__(self, device, graph, stream):
        super().__init__(device, stream)
        self.graph = graph

    def __enter__(self):
        super().__enter__()
        self.device.captures.append((weakref.ref(self.graph), self.stream))
        self.graph.__enter__()

    def __exit__(self, *error):
        self.graph.__exit__(*error)
        self.graph.forget_values()
        super().__exit__(*error)


@pytest.fixture
def stand_in(monkeypatch):
    """A `Device` in the place of a GPU, whose graphs run on the CPU."""
    device = Device()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: device.current)
    monkeypatch.setattr(torch.cuda, "stream", device.stream)
    monkeypatch.setattr(torch.cuda, "graph", device.graph)
    return device
