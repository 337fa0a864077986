"""CUDA graphs: all kernels of a function are recorded once, and then launched with one call."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from plaingpt.console import note, one_line


class Captured:
    """`function` on a CUDA device, with one graph for each combination of its arguments.

    function: takes tensors and numbers; each new combination of shapes and numbers gets its own graph. It returns a
    tensor, which the next call overwrites. All other memory that it uses on the device must keep its address.

    pool_of: another `Captured`, whose memory pool this one shares. The two must never run at the same time, and a call
    of one may overwrite the last result of the other.

    Destroy no graph while another will be replayed: that frees cuBLAS memory which all share (pytorch issue 193402).
    """

    def __init__(self, function: Callable[..., Tensor], pool_of: "Captured | None" = None):
        self.function, self.pool_of = function, pool_of
        self.graphs, self.pool = {}, None  # the value is None after the first call, which is not captured

    def __call__(self, *arguments: Tensor | float) -> Tensor:
        key = tuple(value.shape if isinstance(value, Tensor) else value for value in arguments)
        if key not in self.graphs:  # the first call compiles and loads kernels, which a capture cannot do
            self.graphs[key] = None
            return self.function(*arguments)
        self.graphs[key] = self.graphs[key] or self._capture(arguments)
        graph, inputs, result = self.graphs[key]
        for tensor, value in zip(inputs, arguments, strict=True):
            if isinstance(value, Tensor):
                tensor.copy_(value)
        graph.replay()
        return result

    def _capture(self, arguments: tuple) -> tuple[torch.cuda.CUDAGraph, list, Tensor]:
        graph, inputs = torch.cuda.CUDAGraph(), [v.clone() if isinstance(v, Tensor) else v for v in arguments]
        stream = torch.cuda.current_stream()
        self.pool = self.pool or (self.pool_of and self.pool_of.pool) or torch.cuda.graph_pool_handle()
        # thread_local: what other threads, such as a library's, do on the device does not end the capture
        try:
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                return graph, inputs, self.function(*inputs)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # if the capture cannot begin or end, torch leaves its own stream current
            for generator in torch.cuda.default_generators:  # in torch 2.11, a failed capture leaves them unusable
                generator.graphsafe_set_state(generator.clone_state())
            raise error.__context__ or error from None  # what failed first, such as a lack of memory


@functools.cache
def graphs_work() -> bool:
    """Whether the current CUDA device can capture graphs; if not, print why."""
    negative, x = Captured(torch.neg), torch.zeros(1, device="cuda")
    try:
        for _ in range(2):  # the second call captures
            negative(x)
    except RuntimeError as error:
        note(f"continuing without CUDA graphs, which makes small models slower: {one_line(error)}")
        return False
    return True
