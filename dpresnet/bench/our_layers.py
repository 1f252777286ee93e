"""dpresnet's side of `bench layers`: the convolutions of a network one by one, as a training step launches them.

Import after `dpresnet.environment.prepare`: this loads OpenCL.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from dpresnet.bench.workload import DIRECTIONS, Facts, Layer, Workload
from dpresnet.device import Device, choose_device
from dpresnet.nn import Recorder, Value
from dpresnet.plan import Launch, Memory, Tensor, bind, place_in_order
from dpresnet.resnet import Options, resnet
from dpresnet.state import State
from dpresnet.tuning import filled

WARM_CALLS = 3


class Listing(Recorder):
    """Records a network and notes its convolutions."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.layers: list[Layer] = []

    def conv(self, name: str, x: Value, channels: int, kernel: int, stride: int = 1, padding: int | None = None,
             groups: int = 1, zero: bool = False) -> Tensor:  # fmt: skip
        """Notes the layer, then records it."""
        x, padding = self.memory(x), kernel // 2 if padding is None else padding
        shape = (self.images, x.channels, channels, x.height, x.width, kernel, stride, padding, groups)
        self.layers.append(Layer(*shape, first=x.home == "io"))
        return super().conv(name, x, channels, kernel, stride, padding, groups, zero)


class Single:
    """One convolution with arrays of its own: the launches of its forward pass and of both its gradients.

    Packing the weights is part of either, as it is in a step. Arrays keep their values, so calls may follow in any order.
    """

    def __init__(self, device: Device, precision: str, layer: Layer):
        self.device = device
        record = Recorder(State(), device, precision, layer.images, True)
        self.x = record.plan.image("x", layer.images, layer.in_channels, layer.height, layer.width)
        self.x.home = "io" if layer.first else "work"
        self.y = record.conv("conv", self.x, layer.out_channels, layer.kernel, layer.stride, layer.padding, layer.groups)
        self.weight, self.dy = record.state.parameters["conv.weight"], record.like(self.y, "dy")
        begin = len(record.plan.entries)
        record.add_term(self.y, self.dy)
        record.backward()
        self.dx = None if layer.first else record.gradient(self.x)
        tensors = [*record.plan.tensors(), self.dy]
        arena = filled(device, place_in_order(list(dict.fromkeys(tensors))))
        self.memory = Memory({tensor.home: [arena] for tensor in tensors})
        self._constants: dict = {}
        launches = list(zip(record.plan, bind(record.plan, self.memory, self._constants), strict=True))
        self._launches: dict[str, list[tuple[Launch, Any]]] = {"forward": launches[:begin], "backward": launches[begin:]}

    def run(self, direction: str, calls: int) -> float:
        """Seconds of a call, the mean of some in a row."""
        self.device.finish()
        begin = time.perf_counter()
        for _ in range(calls):
            for launch, kernel in self._launches[direction]:
                self.device.enqueue(kernel, launch.size)
        self.device.finish()
        return (time.perf_counter() - begin) / calls


class OurLayers:
    """The convolutions of a network, one at a time."""

    def __init__(self, work: Workload):
        self.work = work
        self.device = Device(choose_device(work.device), vector=work.vector)
        self._single: Single | None = None

    @property
    def name(self) -> str:
        """Device, platform, driver and how wide its vectors are here."""
        return self.device.name_with_lanes

    def layers(self) -> Facts:
        """The convolutions that differ, in their order, and how often the network has each."""
        work = self.work
        record = Listing(State(), self.device, work.precision, work.batch, True)
        resnet(record, record.input(3, work.image, work.image), work.arch, Options(work.classes, work.stem))
        counts = {layer: record.layers.count(layer) for layer in record.layers}
        return {"layers": [{"layer": asdict(layer), "count": count} for layer, count in counts.items()],
                "tuned": self.device.tuned.facts}  # fmt: skip

    def prepare(self, layer: Facts) -> Facts:
        """Compiles a layer and warms up; the seconds of a call, by direction."""
        self._single = None  # its memory is free before the next takes its own
        self._single = Single(self.device, self.work.precision, Layer(**layer))
        return {"seconds": {name: min(self._single.run(name, 1) for _ in range(WARM_CALLS)) for name in DIRECTIONS}}

    def run(self, direction: str, calls: int) -> Facts:
        """Seconds of a call."""
        return {"seconds": self._single.run(direction, calls)}
