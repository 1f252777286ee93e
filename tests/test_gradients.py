"""Whole networks against `dpresnet.reference` alone: logits and loss in float64, and gradients as slopes of that loss.

`Exact` has the layers of a `Recorder`, computes at once, and knows no gradients, no plan and no fusion: what the device
hands back must be what central differences of its loss say.
"""

from dataclasses import dataclass

import numpy as np
import pytest

from dpresnet import reference
from dpresnet.network import Network
from dpresnet.resnet import ARCHITECTURES, Family, Options, cifar, resnet

SMALL = {"resnet8": cifar(8), "plain8": cifar(8, shortcuts=False), "bottleneck": Family((1, 2), bottleneck=True, width=16)}

CASES = [
    ("resnet8", {}),
    ("resnet8", {"shortcut": "B"}),
    ("resnet8", {"shortcut": "C"}),
    ("resnet8", {"block": "v2"}),
    ("resnet8", {"block": "v2", "shortcut": "C"}),
    ("resnet8", {"stem": "imagenet"}),
    ("plain8", {}),
    ("bottleneck", {"block": "v1"}),
    ("bottleneck", {"stem": "deep"}),
    ("bottleneck", {"block": "v2", "stem": "deep"}),
]
STEP = 1e-8  # so small that hardly any ReLU turns on the way; rounding is about 1e-15 / STEP = 1e-7 of a loss near 1
LAYER = 4 * np.sqrt(1000) * 2.0**-24  # rounding of one layer, which adds up at most a thousand terms


@dataclass(frozen=True)
class Image:
    """A float64 activation [N, C, H, W]."""

    data: np.ndarray

    @property
    def channels(self) -> int:
        return self.data.shape[1]


class Exact:
    """The layers of a network on float64 arrays; ``train`` normalises with the statistics of the batch."""

    def __init__(self, state: dict[str, np.ndarray], train: bool = True):
        self.state, self.train = state, train

    def conv(self, name, x, channels, kernel, stride=1, padding=None, groups=1, zero=False):
        padding = kernel // 2 if padding is None else padding
        weight = self.state[f"{name}.weight"]
        assert weight.shape[0] == channels
        return Image(reference.conv_forward(x.data, weight, stride, padding, groups))

    def norm(self, name, x, zero=False):
        weight, bias = (self.state[f"{name}.{part}"] for part in ("weight", "bias"))
        mean, var = (self.state[f"{name}.running_{part}"] for part in ("mean", "var"))
        if self.train:
            count, mean, m2 = reference.batchnorm_statistics(x.data)
            var = m2 / count
        return Image(reference.batchnorm_apply(x.data, mean, var, weight, bias))

    def relu(self, x):
        return Image(reference.relu_forward(x.data))

    def add(self, a, b):
        return Image(reference.residual_add(a.data, b.data))

    def subsample(self, x, channels, stride):
        return Image(reference.shortcut_forward(x.data, channels, stride))

    def max_pool(self, x, kernel, stride, padding):
        return Image(reference.pool_max_forward(x.data, kernel, stride, padding)[0])

    def average_pool(self, x):
        return Image(reference.pool_average_forward(x.data)[:, :, None, None])

    def linear(self, name, x, outputs):
        return reference.linear_forward(x.data[:, :, 0, 0], self.state[f"{name}.weight"], self.state[f"{name}.bias"])


@pytest.fixture(params=CASES, ids=lambda case: "-".join([case[0], *case[1].values()]))
def problem(request, monkeypatch):
    """A small network with weights that leave no norm at 1 and 0, its options, and a batch."""
    for name, family in SMALL.items():
        monkeypatch.setitem(ARCHITECTURES, name, family)
    arch, options = request.param
    options = {"stem": "cifar", "num_classes": 5, **options}
    size = 9 if options["stem"] == "cifar" else 33
    net = Network(arch, image=(3, size, size), batch=3, precision="fp32", **options)
    rng = np.random.default_rng(0)
    state = {}
    for name, value in net.state_dict().items():
        shift = rng.uniform(-0.3, 0.3, value.shape).astype(np.float32)
        state[name] = value + shift if value.ndim == 1 and not name.endswith("running_var") else value
    net.load_state_dict(state)
    images, labels = rng.standard_normal((3, 3, size, size)).astype(np.float32), np.array([0, 3, 4])
    return net, arch, Options(**options), images, labels


def exact_logits(arch, options, state, images, train):
    return resnet(Exact(state, train), Image(images.astype(np.float64)), arch, options)


def test_logits_and_loss(problem):
    """Ten layers in a row."""
    net, arch, options, images, labels = problem
    state = net.state_dict()
    allowed = 10 * LAYER
    for train in (False, True):
        expected = exact_logits(arch, options, state, images, train)
        assert np.abs(net.forward(images, train=train) - expected).max() <= allowed * np.abs(expected).max()
    loss, _ = net.loss_and_grads(images, labels)
    assert loss == pytest.approx(reference.loss_forward(expected, labels).mean(), rel=allowed)


def wrong_slopes(net, logits_of, images, labels):
    """Gradients that are no slope of the exact loss, with their error.

    One direction of random signs per parameter: whatever is wrong with its gradient shows with its own size. Ten layers
    forward and ten backward.
    """
    state = {name: value.astype(np.float64) for name, value in net.state_dict().items()}
    _, gradients = net.loss_and_grads(images, labels)
    rng, wrong = np.random.default_rng(1), {}
    for name, gradient in gradients.items():
        signs = rng.choice([-1.0, 1.0], gradient.shape)
        sides = [logits_of(state | {name: state[name] + step * signs}) for step in (STEP, -STEP)]
        up, down = (reference.loss_forward(logits, labels).mean() for logits in sides)
        error = abs((up - down) / (2 * STEP) - (gradient * signs).sum()) / np.linalg.norm(gradient)
        if not error <= 20 * LAYER:
            wrong[name] = error
    return wrong


def test_gradients_are_slopes_of_the_loss(problem):
    net, arch, options, images, labels = problem
    assert not wrong_slopes(net, lambda state: exact_logits(arch, options, state, images, True), images, labels)


def two_branches(net, x):
    """Both get the same gradient, and one overwrites what it gets."""
    left = net.relu(net.norm("bn1", net.conv("conv1", x, 16, 3)))
    return net.add(left, net.conv("conv2", x, 16, 3))


def around_two_convolutions(net, x):
    """The gradient of the sum is one term of what conv2 reads, and still to be read for that of the weights of conv3."""
    left = net.relu(net.norm("bn1", net.conv("conv1", x, 16, 3)))
    return net.add(left, net.conv("conv3", net.conv("conv2", left, 16, 3), 16, 3))


def without_relu(net, x):
    """What is read twice is negative in places."""
    left = net.norm("bn1", net.conv("conv1", x, 16, 3))
    return net.add(net.norm("bn2", net.conv("conv2", left, 16, 3)), left)


@pytest.mark.parametrize("layers", [two_branches, around_two_convolutions, without_relu])
def test_gradients_of_activations_that_are_read_twice(monkeypatch, layers):
    def whole(net, x, arch, options):
        return net.linear("fc", net.average_pool(net.conv("last", layers(net, x), 16, 3)), options.num_classes)

    monkeypatch.setattr("dpresnet.model.resnet", whole)
    net = Network("resnet20", image=(3, 9, 9), batch=3, precision="fp32", num_classes=5)
    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal((3, 3, 9, 9)).astype(np.float32), np.array([0, 3, 4])

    def exact(state):
        return whole(Exact(state), Image(images.astype(np.float64)), "", Options(num_classes=5))

    assert not wrong_slopes(net, exact, images, labels)
