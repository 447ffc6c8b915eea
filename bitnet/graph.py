"""Decoding on a GPU as a CUDA graph: one launch a token instead of hundreds.

A graph replays the same kernels on the same addresses, so nothing in it may depend on a Python number that changes.
``StaticCache`` keeps the place of the next token in a tensor. The kernel that attends to up to ``MOST_IN_ONE_KERNEL``
places reads it there, so one graph does for all of them. Beyond, torch's attention sees a fixed number of places, with
those masked that are still empty, and one graph is captured for each power of two, when the sequence first needs it.
"""

import torch
from torch import Tensor

from bitnet.model import MOST_IN_ONE_KERNEL, KVCache, Transformer

SMALLEST = 128
"""Places of the first step where torch attends."""


class StaticCache(KVCache):
    """The buffers of ``cache``, used through tensors only: for one new token at a time and at most ``span`` places."""

    def __init__(self, cache: KVCache, span: int) -> None:
        torch.nn.Module.__init__(self)
        self.keys, self.values, self.first = cache.keys, cache.values, cache.first
        self.span = span
        self.place: Tensor = torch.zeros(1, dtype=torch.int64, device=cache.keys.device)

    @property
    def reach(self) -> int:
        return self.span

    def places(self, T: int) -> Tensor:
        assert T == 1
        return self.place

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[layer].index_copy_(2, self.place, k)
        self.values[layer].index_copy_(2, self.place, v)
        return self.keys[layer, :, :, : self.span], self.values[layer, :, :, : self.span]

    def visible(self, places: Tensor) -> Tensor:
        keys = torch.arange(self.span, device=places.device)
        seen = keys <= places[:, None]
        return seen if self.first is None else seen & (keys >= self.first.view(-1, 1, 1, 1))

    def advance(self, T: int) -> None:
        """Nothing: the place is set before each replay."""


class GraphDecoder:
    """Token ids (B, 1) -> logits (B, V); continues ``cache``.

    Off a GPU, or without ``capture``, the same steps run one by one.
    """

    def __init__(self, model: Transformer, cache: KVCache, capture: bool = True) -> None:
        self.model, self.cache = model, cache
        self.capture = capture and cache.keys.is_cuda
        self.token = torch.zeros(cache.keys.shape[1], 1, dtype=torch.int64, device=cache.keys.device)
        self._steps: dict[int, tuple[StaticCache, torch.cuda.CUDAGraph | None, Tensor | None]] = {}

    def __call__(self, token: Tensor) -> Tensor:
        if self.cache.length >= self.cache.max_len:
            raise ValueError(f"{self.cache.length + 1} tokens exceed the limit of {self.cache.max_len}.")
        smallest = MOST_IN_ONE_KERNEL if self.cache.keys.is_cuda else SMALLEST
        span = min(max(smallest, 1 << self.cache.length.bit_length()), self.cache.max_len)
        self.token.copy_(token)
        if span not in self._steps:
            self._steps[span] = self._capture(span)
        static, graph, logits = self._steps[span]
        static.place.fill_(self.cache.length)
        if graph is None:
            logits = self._step(static)
        else:
            graph.replay()
        self.cache.length += 1
        assert logits is not None
        return logits

    def _step(self, static: StaticCache) -> Tensor:
        logits: Tensor = self.model(self.token, static)
        return logits[:, -1]

    def _capture(self, span: int) -> tuple[StaticCache, torch.cuda.CUDAGraph | None, Tensor | None]:
        static = StaticCache(self.cache, span)
        if not self.capture:
            return static, None, None
        static.place.fill_(self.cache.length)
        # Kernels are compiled and libraries initialized before the capture; what this writes, the replay overwrites.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._step(static)
        return static, graph, logits
