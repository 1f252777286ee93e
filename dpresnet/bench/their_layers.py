"""PyTorch's side of `bench layers`: a convolution alone, its output and its gradients, in the memory format that is fastest."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch.nn.functional import conv2d

from dpresnet.bench.workload import DIRECTIONS, Facts, Layer, Workload

TRIALS, TRIAL_S = 3, 0.02  # for choosing a variant: rounds, and calls in a row for so long, as they are measured
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Single:
    """One convolution in one memory format, in fp32, with a gradient ``dy`` of its output."""

    def __init__(self, layer: Layer, variant: str):
        self._arguments = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
        x = torch.randn(layer.images, layer.in_channels, layer.height, layer.width)
        weight = torch.randn(layer.out_channels, layer.in_channels // layer.groups, layer.kernel, layer.kernel)
        self.x, self.weight = (array.to(memory_format=FORMATS[variant]) for array in (x, weight))
        self.weight.requires_grad_(True)
        self.x.requires_grad_(not layer.first)
        self.y = conv2d(self.x, self.weight, **self._arguments)
        self.dy = torch.randn_like(self.y)
        self._wanted = (self.weight,) if layer.first else (self.weight, self.x)

    def forward(self) -> torch.Tensor:
        """The output."""
        with torch.no_grad():
            return conv2d(self.x, self.weight, **self._arguments)

    def backward(self) -> Sequence[torch.Tensor]:
        """Gradients of the weights and, but for a first layer, of the input."""
        return torch.autograd.grad(self.y, self._wanted, self.dy, retain_graph=True)

    def run(self, direction: str, calls: int) -> float:
        """Seconds of a call, the mean of some in a row."""
        call = getattr(self, direction)
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - begin) / calls


class TheirLayers:
    """The convolutions of a network, one at a time, each in the variant that is fastest for the direction."""

    def __init__(self, work: Workload, variants: Sequence[str]):
        torch.set_num_threads(work.threads)
        self._variants = list(variants)
        self._best: dict[str, Single] = {}

    @property
    def name(self) -> str:
        """The library and its version."""
        return f"PyTorch {torch.__version__}"

    def prepare(self, layer: Facts) -> Facts:
        """Warms up the variants of a layer; seconds of a call and the variant, by direction."""
        self._best = {}
        ready = {name: Single(Layer(**layer), name) for name in self._variants}
        seconds, chosen = {}, {}
        for direction in DIRECTIONS:
            calls = {name: max(1, round(TRIAL_S / single.run(direction, 1))) for name, single in ready.items()}
            rounds = [{name: single.run(direction, calls[name]) for name, single in ready.items()} for _ in range(TRIALS)]
            times = {name: min(taken[name] for taken in rounds) for name in ready}
            chosen[direction] = min(times, key=times.__getitem__)
            seconds[direction], self._best[direction] = times[chosen[direction]], ready[chosen[direction]]
        return {"seconds": seconds, "variant": chosen}

    def run(self, direction: str, calls: int) -> Facts:
        """Seconds of a call."""
        return {"seconds": self._best[direction].run(direction, calls)}
