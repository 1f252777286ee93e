"""How the peers suite decides whether two implementations of a network agree.

Neither fp32 implementation is the truth, so a float64 PyTorch run judges both: dpresnet may be a small factor further
from it than PyTorch is in the same precision. That stays fair in a network of a hundred layers, where a fixed number
would not. Everything compared is an array with a name: "eval logits", "gradient of layer1.0.conv1.weight", ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from problems import Arrays, Batch, Case, Problem, load, state, tensor
from torch import Tensor, nn

import dpresnet
from dpresnet.bench import torch_resnet


class SGD(NamedTuple):
    """Arguments of `torch.optim.SGD` and of `dpresnet.Network.train_step`."""

    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool


STILL = SGD(lr=0.0, momentum=0.0, weight_decay=0.0, nesterov=False)


# What each implementation makes of a problem.


def torch_outcome(net: torch_resnet.ResNet, problem: Problem) -> Arrays:
    """Logits in both modes, loss, every gradient, and the running statistics after one training step."""
    load(net, problem.weights)
    images, labels = tensor(net, problem.images), torch.from_numpy(problem.labels)
    with torch.no_grad():
        found = {"eval logits": net.eval()(images)}
    logits = net.train()(images)
    loss = nn.functional.cross_entropy(logits, labels)
    loss.backward()
    found |= {"train logits": logits.detach(), "loss": loss.detach()}
    found |= {f"gradient of {name}": parameter.grad for name, parameter in net.named_parameters()}
    return as_float64(found | statistics(state(net)))


def our_outcome(net: dpresnet.Network, problem: Problem) -> Arrays:
    """The same by dpresnet. The weights are loaded anew wherever running statistics may have moved."""
    images, labels = problem.images, problem.labels
    net.load_state_dict(problem.weights)
    found = {"eval logits": net.forward(images), "train logits": net.forward(images, train=True)}
    net.load_state_dict(problem.weights)
    found["loss"], gradients = net.loss_and_grads(images, labels)
    net.load_state_dict(problem.weights)
    net.train_step(images, labels, **STILL._asdict())
    found |= {f"gradient of {name}": value for name, value in gradients.items()}
    return as_float64(found | statistics(net.state_dict()))


def torch_training(net: torch_resnet.ResNet, weights: Arrays, batches: Iterable[Batch], sgd: SGD) -> Arrays:
    """The loss of every step, and the parameters and running statistics after the last."""
    load(net, weights)
    optimizer = torch.optim.SGD(net.parameters(), **sgd._asdict())
    losses = []
    for images, labels in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net.train()(tensor(net, images)), torch.from_numpy(labels))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return as_float64({"losses": losses} | state(net))


def our_training(net: dpresnet.Network, weights: Arrays, batches: Iterable[Batch], sgd: SGD) -> Arrays:
    """The same by dpresnet."""
    net.load_state_dict(weights)
    losses = sgd_steps(net, batches, **sgd._asdict())
    return as_float64({"losses": losses} | {name: net.state_dict()[name] for name in weights})


def sgd_steps(
    net: dpresnet.Network, batches: Iterable[Batch], lr: float, momentum: float, weight_decay: float, nesterov: bool
) -> list[float]:
    """One training step per batch; the loss of each, before its update."""
    options = SGD(lr, momentum, weight_decay, nesterov)._asdict()
    return [float(net.train_step(images, labels, **options)) for images, labels in batches]


def statistics(found: dict) -> dict:
    return {f"statistics {name}": value for name, value in found.items() if "running_" in name}


def as_float64(arrays: dict) -> Arrays:
    """Copies: a network may go on using the arrays it handed out."""
    return {name: np.asarray(value).astype(np.float64) for name, value in arrays.items()}


# PyTorch as a network with fp16 storage.


class RoundToHalf(torch.autograd.Function):
    """fp16 storage of an activation and of its gradient, the latter times a loss scale that keeps it from underflow."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.half().float()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return (gradient * 1024).half().float() / 1024


def store_in_half(net: torch_resnet.ResNet) -> torch_resnet.ResNet:
    """The fp32 `net` itself, now rounding every layer's output, and its gradient, to fp16; arithmetic stays fp32."""
    rounded = nn.Conv2d | nn.BatchNorm2d | nn.ReLU | torch_resnet.PostActivation | torch_resnet.PreActivation
    for module in net.modules():
        if isinstance(module, rounded):
            module.register_forward_hook(lambda module, args, output: RoundToHalf.apply(output))
    return net


def half_problem(problem: Problem) -> Problem:
    """Convolutions, classifier and images rounded to fp16; norms keep fp32 weights."""
    weights = {n: w.astype(np.float16).astype(np.float32) if w.ndim > 1 else w for n, w in problem.weights.items()}
    return Problem(weights, problem.images.astype(np.float16).astype(np.float32), problem.labels)


# Distances, and what is allowed.


def largest(found: Arrays, truth: Arrays) -> dict[str, float]:
    """The largest deviation of each array, relative to the largest true value."""
    return {n: float(np.abs(found[n] - truth[n]).max() / scale(n, truth)) for n in same_names(found, truth)}


def overall(found: Arrays, truth: Arrays) -> dict[str, float]:
    """The deviation of each array as a whole: relative, in the Euclidean norm (absolute where the truth is 0)."""
    norm = np.linalg.norm
    return {n: float(norm(found[n] - truth[n]) / (norm(truth[n]) or 1.0)) for n in same_names(found, truth)}


def same_names(found: Arrays, truth: Arrays) -> Iterable[str]:
    assert found.keys() == truth.keys(), f"only in one of the two: {sorted(found.keys() ^ truth.keys())}"
    return truth


def scale(name: str, truth: Arrays) -> float:
    """The largest value of the array, or 1 if all are 0 (as gradients behind a zeroed norm are).

    A norm's weight and bias share theirs: their gradients are sums of the same terms (one set times numbers of
    deviation 1), and the bias's vanishes where the next norm takes any shift out again.
    """
    module, _, kind = name.rpartition(".")
    partner = truth.get(f"{module}.{'bias' if kind == 'weight' else 'weight'}")
    arrays = [truth[name]]
    if kind in ("weight", "bias") and truth[name].ndim == 1 and partner is not None and partner.ndim == 1:
        arrays.append(partner)
    return float(max(np.abs(array).max() for array in arrays)) or 1.0


def random_walk(case: Case) -> float:
    """4 sqrt(K) 2^-24: what fp32 may lose in the network's longest sum (a convolution's terms, or a batch's pixels)."""
    with torch.device("meta"):
        net = case.torch(torch.float32)
    terms = [module.weight[0].numel() for module in net.modules() if isinstance(module, nn.Conv2d)]
    return 4 * np.sqrt(max(*terms, case.batch * case.image[1] * case.image[2])) * 2.0**-24


def assert_within(
    ours: Arrays, peer: Arrays, truth: Arrays, distance: Callable[[Arrays, Arrays], dict], factor: float, floor: float
) -> None:
    """Our distance to the truth is at most factor * the peer's + floor, for every name; the message lists worst first.

    The floor covers what the peer had right by luck.
    """
    allowed = {name: factor * value + floor for name, value in distance(peer, truth).items()}
    found = distance(ours, truth)
    # NaN compares false, so it counts as too far, and infinitely so.
    excess = {name: np.nan_to_num(v / allowed[name], nan=np.inf) for name, v in found.items() if not v <= allowed[name]}
    worst = sorted(excess, key=excess.get, reverse=True)
    lines = [f"{name}: {found[name]:.2e}, allowed {allowed[name]:.2e}" for name in worst]
    assert not lines, "\n".join([f"{len(lines)} of {len(found)} arrays are too far from float64, worst first:", *lines])
