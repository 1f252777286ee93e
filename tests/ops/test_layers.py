"""What `bench layers` times is convolutions: they compute the reference, and every one of a network is there."""

from collections import Counter

import numpy as np
import pytest
from harness import blocked, tolerance, unblocked

from dpresnet import reference
from dpresnet.bench.our_layers import OurLayers, Single
from dpresnet.bench.workload import Layer, Workload
from dpresnet.device import Device, choose_device
from dpresnet.model import Model
from dpresnet.resnet import Options

STEM = Layer(2, 3, 16, 9, 8, kernel=3, stride=1, padding=1, groups=1, first=True)
SHAPES = [
    STEM,
    Layer(16, 32, 16, 8, 8, kernel=3, stride=1, padding=1, groups=1, first=False),
    Layer(2, 16, 48, 7, 8, kernel=1, stride=2, padding=0, groups=1, first=False),
    Layer(2, 32, 32, 6, 5, kernel=3, stride=2, padding=1, groups=4, first=False),
]


@pytest.mark.parametrize("lanes", [0, 1], ids=["vector", "scalar"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("layer", SHAPES, ids=str)
def test_what_is_timed_is_the_convolution(layer, precision, lanes):
    single = Single(Device(choose_device(), vector=lanes), precision, layer)
    random, storage = np.random.default_rng(0), np.float16 if precision == "fp16" else np.float32
    x = random.standard_normal((layer.images, layer.in_channels, layer.height, layer.width)).astype(storage)
    w = random.standard_normal(single.weight.shape).astype(storage)
    how = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
    y = reference.conv_forward(x, w, **how)
    dy = random.standard_normal(y.shape).astype(storage)
    single.memory.write(single.x, blocked(x))
    single.memory.write(single.dy, blocked(dy))
    single.memory.view(single.weight.value)[: w.size] = w.ravel()
    single.memory.push(single.weight.value)
    for direction in ("backward", "forward", "backward", "forward"):  # in any order, and as often as one likes
        assert single.run(direction, 2) > 0
    found = [(single.y, y)]
    if single.dx:
        found.append((single.dx, reference.conv_backward_data(dy, w, x.shape, **how)))
    assert (single.dx is None) == layer.first
    for tensor, expected in found:
        actual = unblocked(single.memory.read(tensor))[:, : expected.shape[1]]
        allowed = tolerance(np.dtype(storage), 9 * layer.out_channels) * np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=allowed)
    dw = reference.conv_backward_weight(dy, x, w.shape, **how)
    actual = single.memory.read(single.weight.grad)[: w.size].reshape(w.shape)
    np.testing.assert_allclose(actual, dw, rtol=0, atol=tolerance(np.dtype(np.float32), y[:, 0].size) * np.abs(dw).max())


@pytest.mark.parametrize(("arch", "image", "stem"), [("resnet20", 16, "cifar"), ("resnext50_32x4d", 32, "imagenet")])
def test_every_convolution_of_a_network_is_listed(arch, image, stem):
    """As often as the network has weights of that shape; only the first has no gradient of its input."""
    side = OurLayers(Workload(arch, stem, image=image, batch=2))
    listed = [(Layer(**found["layer"]), found["count"]) for found in side.layers()["layers"]]
    shapes = Counter()
    for layer, count in listed:
        shapes[layer.out_channels, layer.in_channels // layer.groups, layer.kernel, layer.kernel] += count
    model = Model(side.device, arch, Options(10, stem), (3, image, image), 2, "fp32")
    assert shapes == Counter(p.shape for p in model.parameters if len(p.shape) == 4)
    assert [layer.first for layer, _ in listed] == [True] + [False] * (len(listed) - 1)
    assert len({layer for layer, _ in listed}) == len(listed)
    assert listed[0][0].height == image
