"""Operations against PyTorch: first the project's float64 reference, by which every kernel is tested, then the
operations of a network where they are easily got wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from judge import assert_within, largest, our_outcome, random_walk, torch_outcome
from problems import Case, Problem, draw_images, draw_labels, pose
from torch import Tensor
from torch.nn import functional as F

import dpresnet
from dpresnet import reference, reference_optimizer

CIFAR, IMAGENET = {"stem": "cifar"}, {"stem": "imagenet"}

# The reference. Both sides compute in float64, so they differ by 2^-53 times a small number of operations.


def agree(found: np.ndarray, expected: Tensor) -> None:
    expected = expected.detach().numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max(initial=0.0))


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def torch_gradients(function: Callable[..., Tensor], dy: np.ndarray, *inputs: np.ndarray) -> tuple[Tensor, ...]:
    """The gradient of sum(dy * function(*inputs)) by each input."""
    tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
    return torch.autograd.grad(function(*tensors), tensors, torch.from_numpy(dy))


# n, c, h, w, o, kernel, stride, padding, groups
CONVOLUTIONS = [
    (2, 3, 8, 8, 16, (3, 3), 1, 1, 1),
    (1, 5, 7, 9, 17, (3, 3), 2, 1, 1),
    (2, 3, 15, 17, 8, (7, 7), 2, 3, 1),
    (3, 16, 5, 6, 33, (1, 1), 1, 0, 1),
    (2, 7, 9, 8, 4, (1, 1), 2, 0, 1),
    (2, 12, 6, 5, 8, (3, 3), 1, 1, 4),
    (1, 6, 9, 9, 6, (3, 3), 2, 1, 6),
    (2, 4, 10, 11, 6, (2, 5), 3, 2, 2),
    (1, 1, 3, 3, 1, (3, 3), 1, 0, 1),
]


@pytest.mark.parametrize(("n", "c", "h", "w", "o", "kernel", "stride", "padding", "groups"), CONVOLUTIONS)
def test_reference_convolution(n, c, h, w, o, kernel, stride, padding, groups):
    x, weight = draw(n, c, h, w), draw(o, c // groups, *kernel)
    how = {"stride": stride, "padding": padding, "groups": groups}

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, **how)

    y = reference.conv_forward(x, weight, **how)
    agree(y, convolve(torch.from_numpy(x), torch.from_numpy(weight)))
    dy = draw(*y.shape, seed=1)
    dx, dw = torch_gradients(convolve, dy, x, weight)
    agree(reference.conv_backward_data(dy, weight, x.shape, **how), dx)
    agree(reference.conv_backward_weight(dy, x, weight.shape, **how), dw)


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (2, 17, 1, 1), (1, 2, 3, 7)])
@pytest.mark.parametrize("replicas", [1, 2])
def test_reference_batchnorm_in_training(shape, replicas):
    """Two replicas: statistics of each part, merged. A batch of 1 is divided by rows, which is the same to a norm."""
    c = shape[1]
    x, weight, bias = draw(*shape) * 3 + 5, draw(c, seed=1), draw(c, seed=2)
    running = draw(c, seed=3), draw(c, seed=4) ** 2
    parts = np.array_split(x, replicas, axis=0 if shape[0] >= replicas else 2)
    moments = reference.batchnorm_statistics(parts[0])
    for part in parts[1:]:
        moments = reference.batchnorm_merge(moments, reference.batchnorm_statistics(part))
    count, mean, m2 = moments

    after = [torch.tensor(value) for value in running]
    arguments = (torch.from_numpy(x), *after, torch.from_numpy(weight), torch.from_numpy(bias))
    expected = F.batch_norm(*arguments, training=True)
    agree(reference.batchnorm_apply(x, mean, m2 / count, weight, bias), expected)
    for ours, theirs in zip(reference.batchnorm_running(*running, count, mean, m2), after, strict=True):
        agree(ours, theirs)

    dy, invstd = draw(*shape, seed=5), 1 / np.sqrt(m2 / count + 1e-5)
    dx, dweight, dbias = torch_gradients(
        lambda x, weight, bias: F.batch_norm(x, None, None, weight, bias, training=True), dy, x, weight, bias
    )
    sum_dy, sum_dy_xhat = reference.batchnorm_backward_reduce(dy, x, mean, invstd)
    agree(sum_dy, dbias)
    agree(sum_dy_xhat, dweight)
    agree(reference.batchnorm_backward(dy, x, mean, invstd, weight, sum_dy, sum_dy_xhat, count), dx)


def test_reference_batchnorm_in_inference():
    x, mean, var, weight, bias = draw(2, 5, 3, 4), draw(5), draw(5, seed=1) ** 2, draw(5, seed=2), draw(5, seed=3)
    tensors = map(torch.from_numpy, (x, mean, var, weight, bias))
    agree(reference.batchnorm_apply(x, mean, var, weight, bias), F.batch_norm(*tensors))


def test_reference_relu_passes_nothing_at_zero():
    x, dy = draw(2, 3, 4, 5), draw(2, 3, 4, 5, seed=1)
    x[0], x[1, 0] = 0.0, -0.0
    y = reference.relu_forward(x)
    agree(y, F.relu(torch.from_numpy(x)))
    agree(reference.relu_backward(dy, y), *torch_gradients(F.relu, dy, x))


@pytest.mark.parametrize("stride", [1, 2])
def test_reference_shortcut_a(stride):
    x = draw(2, 3, 5, 6)

    def shortcut(x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, 4))

    y = reference.shortcut_forward(x, 7, stride)
    agree(y, shortcut(torch.from_numpy(x)))
    dy = draw(*y.shape, seed=1)
    agree(reference.shortcut_backward(dy, x.shape, stride), *torch_gradients(shortcut, dy, x))


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1), (3, 3, 0)])
@pytest.mark.parametrize("kind", ["distinct", "negative", "tied"])
def test_reference_max_pool(kernel, stride, padding, kind):
    """Negative values: padding must not win. Ties: the gradient goes where PyTorch sends it."""
    x = draw(2, 3, 7, 10)
    x = {"distinct": x, "negative": -1 - np.abs(x), "tied": np.round(x)}[kind]

    def pool(x: Tensor) -> Tensor:
        return F.max_pool2d(x, kernel, stride, padding)

    y, index = reference.pool_max_forward(x, kernel, stride, padding)
    agree(y, pool(torch.from_numpy(x)))
    dy = draw(*y.shape, seed=1)
    agree(reference.pool_max_backward(dy, index, x.shape, kernel, stride, padding), *torch_gradients(pool, dy, x))


def test_reference_average_pool():
    x, dy = draw(2, 5, 3, 7), draw(2, 5)
    agree(reference.pool_average_forward(x), F.adaptive_avg_pool2d(torch.from_numpy(x), 1).flatten(1))
    (dx,) = torch_gradients(lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), dy, x)
    agree(reference.pool_average_backward(dy, x.shape), dx)


def test_reference_linear():
    x, weight, bias, dy = draw(4, 7), draw(5, 7), draw(5), draw(4, 5)
    agree(reference.linear_forward(x, weight, bias), F.linear(*map(torch.from_numpy, (x, weight, bias))))
    dx, dweight, dbias = torch_gradients(F.linear, dy, x, weight, bias)
    agree(reference.linear_backward_data(dy, weight), dx)
    for ours, theirs in zip(reference.linear_backward_weight(dy, x), (dweight, dbias), strict=True):
        agree(ours, theirs)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_reference_loss(smoothing, size):
    logits, labels = draw(6, 5) * size, np.array([0, 4, 2, 2, 1, 3])

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, torch.from_numpy(labels), reduction="none", label_smoothing=smoothing)

    agree(reference.loss_forward(logits, labels, smoothing), loss(torch.from_numpy(logits)))
    (dlogits,) = torch_gradients(loss, np.full(6, 0.25), logits)
    agree(reference.loss_backward(logits, labels, smoothing, scale=0.25), dlogits)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_reference_sgd(momentum, nesterov, weight_decay):
    """The learning rate changes on the way: it multiplies the step, and does not enter the momentum."""
    ours, buffer = draw(11), np.zeros(11)
    theirs = torch.tensor(ours)
    options = {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
    optimizer = torch.optim.SGD([theirs], lr=1.0, **options)
    for i, lr in enumerate((0.1, 0.5, 0.01)):
        gradient = draw(11, seed=i + 1)
        theirs.grad, optimizer.param_groups[0]["lr"] = torch.tensor(gradient), lr
        optimizer.step()
        ours, buffer = reference_optimizer.optimizer_sgd(ours, gradient, buffer, lr, **options)
        agree(ours, theirs)


# Operations in a network.


def network(case: Case) -> dpresnet.Network:
    options = dict(image=case.image, batch=case.batch, precision="fp32", **case.options)
    return dpresnet.Network(case.arch, num_classes=case.classes, **options)


@pytest.mark.parametrize("classes", [2, 10, 17, 1000])
def test_loss_of_extreme_logits(classes):
    """Without weights the logits are the biases, of which exp() overflows; the bias's gradient is that of the loss."""
    case = Case("resnet20", (3, 16, 16), batch=5, classes=classes, options=CIFAR)
    weights, rng = pose(case, clear=False).weights, np.random.default_rng(0)
    weights["fc.weight"][:] = 0
    weights["fc.bias"] = rng.uniform(-200, 200, classes).astype(np.float32)
    labels = draw_labels(case, rng)
    net = network(case)
    net.load_state_dict(weights)
    loss, gradients = net.loss_and_grads(draw_images(case, rng), labels)
    logits = np.tile(weights["fc.bias"], (case.batch, 1))
    # The loss is a difference of logits of size 200, each rounded once.
    np.testing.assert_allclose(loss, reference.loss_forward(logits, labels).mean(), rtol=0, atol=4 * 200 * 2.0**-24)
    expected = reference.loss_backward(logits, labels, scale=1 / case.batch).sum(axis=0)
    # A rounding of the exponent's argument, of size up to 400, is a relative error of the exponential.
    np.testing.assert_allclose(gradients["fc.bias"], expected, rtol=0, atol=4 * 400 * 2.0**-24)


def assert_agreement(case: Case, problem: Problem, *names: str) -> None:
    """The arrays of these names are as near to float64 as PyTorch's."""
    truth, peer = (torch_outcome(case.torch(dtype), problem) for dtype in (torch.float64, torch.float32))
    outcomes = our_outcome(network(case), problem), peer, truth
    only = [{name: outcome[name] for name in names} for outcome in outcomes]
    assert_within(*only, largest, factor=4, floor=random_walk(case))


def test_variance_beside_a_large_mean():
    """E[x^2] - E[x]^2 in fp32 would lose the variance 1 beside a mean of 1000; (count, mean, M2) keeps it."""
    case = Case("resnet20", options=CIFAR)
    problem = pose(case, clear=False)
    # Only the centre of the stem's filters, so that the zeros around the image do not widen the distribution.
    stem = np.zeros_like(problem.weights["conv1.weight"])
    stem[:, 0, 1, 1] = 1
    problem.weights.update({"conv1.weight": stem, "bn1.running_var": np.zeros(16, np.float32)})
    offset = Problem(problem.weights, problem.images + 1000, problem.labels)
    assert_agreement(case, offset, "statistics bn1.running_var", "loss")


def test_variance_as_small_as_epsilon():
    """Elsewhere variances are near 1, and a wrong epsilon (1e-5) would not be seen."""
    case = Case("resnet20", options=CIFAR)
    problem = pose(case, clear=False)
    problem.weights["bn1.running_var"][:] = 1e-5
    faint = Problem(problem.weights, problem.images / 300, problem.labels)
    assert_agreement(case, faint, "eval logits", "train logits")


@pytest.mark.parametrize("image", [(3, 32, 32), (3, 33, 47)])
def test_max_pool_of_negative_values(image):
    """In v2 the stem's output reaches the pool as it is; here all of it is negative, and padding must not win."""
    case = Case("resnet20", image, batch=2, options=IMAGENET | {"block": "v2"})
    problem = pose(case, clear=False)
    problem.weights["conv1.weight"] = -np.abs(problem.weights["conv1.weight"])
    positive = Problem(problem.weights, 1 + np.abs(problem.images), problem.labels)
    assert_agreement(case, positive, "eval logits", "train logits", "loss")


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_sgd_applies_its_own_gradients(momentum, nesterov, weight_decay):
    """PyTorch's SGD in float64, fed with the gradients that the network reports, with a learning rate that changes.

    Three steps of four roundings (2^-24) each, of numbers not larger than the largest parameter of the array.
    """
    case, rng = Case("resnet20", (3, 16, 16), options=CIFAR), np.random.default_rng(0)
    net, options = network(case), {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
    net.load_state_dict(pose(case, clear=False).weights)
    theirs = {}
    for lr in (0.02, 0.05, 0.001):
        images, labels = draw_images(case, rng), draw_labels(case, rng)
        _, gradients = net.loss_and_grads(images, labels)
        if not theirs:
            before = net.state_dict()
            theirs = {name: torch.tensor(before[name], dtype=torch.float64) for name in gradients}
            optimizer = torch.optim.SGD(theirs.values(), lr=lr, **options)
        optimizer.param_groups[0]["lr"] = lr
        for name, gradient in gradients.items():
            theirs[name].grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        net.train_step(images, labels, lr=lr, **options)
    after = net.state_dict()
    for name, expected in theirs.items():
        tolerance = 3 * 4 * 2.0**-24 * expected.abs().max().item()
        np.testing.assert_allclose(after[name], expected.numpy(), rtol=0, atol=tolerance, err_msg=name)
