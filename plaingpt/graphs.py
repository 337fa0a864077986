"""CUDA graphs: all kernels of a function are recorded once, and then launched with one call."""

from collections.abc import Callable

import torch
from torch import Tensor

from plaingpt.console import note, one_line


class Captured:
    """`function` on a CUDA device, with one graph for each combination of its arguments.

    function: takes tensors, of which only the values may differ between calls, and numbers. It returns a tensor, which
    the next call overwrites. Everything else that it reads or changes on the device must keep its address.

    after: its graphs never run at the same time as those of this one, so all share memory.
    """

    def __init__(self, function: Callable[..., Tensor], after: "Captured | None" = None):
        self.function, self.after = function, after
        self.calls = set()  # combinations that were called at least once
        self.graphs, self.pool = {}, None
        self.works = True

    def __call__(self, *arguments: Tensor | float) -> Tensor:
        key = tuple(value.shape if isinstance(value, Tensor) else value for value in arguments)
        if key in self.calls and key not in self.graphs and self.works:
            try:
                self.graphs[key] = self._capture(arguments)
            except RuntimeError as error:  # slower, but the same
                note(f"continuing without CUDA graphs: {one_line(error)}")
                self.works = False
                for generator in torch.cuda.default_generators:  # a failed capture leaves them unusable
                    generator.graphsafe_set_state(generator.clone_state())
        self.calls.add(key)
        if key not in self.graphs:  # the first call compiles and loads kernels, which a capture cannot do
            return self.function(*arguments)
        graph, inputs, result = self.graphs[key]
        for tensor, value in zip(inputs, arguments, strict=True):
            if isinstance(value, Tensor):
                tensor.copy_(value)
        graph.replay()
        return result

    def _capture(self, arguments: tuple) -> tuple[torch.cuda.CUDAGraph, list, Tensor]:
        graph, inputs = torch.cuda.CUDAGraph(), [v.clone() if isinstance(v, Tensor) else v for v in arguments]
        self.pool = self.pool or (self.after and self.after.pool) or torch.cuda.graph_pool_handle()
        # thread_local: a thread that saves a checkpoint may use the device meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            return graph, inputs, self.function(*inputs)
