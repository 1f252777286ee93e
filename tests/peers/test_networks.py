"""Whole networks against PyTorch: the same weights, the same images, and float64 as the judge (see judge.py)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from judge import (
    SGD,
    assert_within,
    half_problem,
    largest,
    our_outcome,
    our_training,
    overall,
    random_walk,
    store_in_half,
    torch_outcome,
    torch_training,
)
from problems import Case, Problem, draw_clear_batch, draw_images, draw_labels, load, pose, state

import dpresnet
from dpresnet.bench import torch_resnet
from dpresnet.errors import Refused

CIFAR, IMAGENET, DEEP = {"stem": "cifar"}, {"stem": "imagenet"}, {"stem": "deep"}

PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "wide_resnet50_2": 68_883_240,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    # A plain network has the parameters of its residual twin: shortcut A has none.
    "plain20": 269_722,
    "plain32": 464_154,
    "plain44": 658_586,
    "plain56": 853_018,
}
"""With 1000 classes and the ImageNet stem; from resnet20 on with 10 classes and the CIFAR stem."""

FP32 = [
    Case("resnet18", options=CIFAR),
    Case("resnet18", (3, 64, 64), options=IMAGENET),
    Case("resnet50", batch=4, options=CIFAR),
    Case("resnet50", (3, 64, 64), batch=4, options=IMAGENET),
    Case("resnet18", options=CIFAR | {"block": "v2"}),
    Case("resnet50", (3, 64, 64), batch=4, options=IMAGENET | {"block": "v2"}),
    Case("resnet50", (3, 64, 64), batch=4, options=IMAGENET | {"block": "v1"}),
    Case("resnext50_32x4d", (3, 64, 64), batch=4, options=IMAGENET),
    Case("resnet18", options=CIFAR | {"shortcut": "A"}),
    Case("resnet18", options=CIFAR | {"shortcut": "C"}),
    Case("resnet50", (3, 64, 64), batch=4, options=IMAGENET | {"shortcut": "A"}),
    Case("resnet20", options=CIFAR | {"shortcut": "C", "block": "v2"}),
    Case("resnet18", (3, 64, 64), options=DEEP),
    Case("resnet20", (3, 64, 64), options=DEEP | {"block": "v2"}),
    Case("resnet20", options=CIFAR),
    Case("resnet20", options=CIFAR | {"shortcut": "B"}),
    Case("resnet20", options=CIFAR | {"block": "v2"}),
    Case("resnet20", (3, 64, 64), options=IMAGENET),
    Case("plain20", options=CIFAR),
    Case("plain20", options=CIFAR | {"block": "v2"}),
    # One channel, sizes that halve unevenly, numbers of classes and images that fill no vector.
    Case("resnet18", (1, 28, 28), options=CIFAR),
    Case("resnet20", (5, 33, 27), batch=5, classes=7, options=CIFAR),
    Case("resnet50", (2, 65, 81), batch=3, classes=17, options=IMAGENET),
    # Norms as they are early in a training: every ReLU decides anew at every pixel.
    Case("resnet18", (3, 16, 16), batch=4, options=CIFAR, ordinary=True),
    Case("resnet20", (3, 16, 16), options=CIFAR, ordinary=True),
]

FP16 = [
    Case("resnet18", options=CIFAR, ordinary=True),
    Case("resnet50", (3, 64, 64), options=IMAGENET, ordinary=True),
    Case("resnet20", batch=16, options=CIFAR | {"block": "v2"}, ordinary=True),
]

# Small learning rates: the step of the classifier grows with its inputs, and a loss that explodes compares nothing.
TRAINED = [
    (Case("resnet18", batch=4, options=CIFAR), SGD(lr=0.003, momentum=0.9, weight_decay=5e-4, nesterov=True)),
    (Case("resnet50", (3, 64, 64), batch=4, options=IMAGENET), SGD(0.001, 0.9, weight_decay=1e-2, nesterov=False)),
    (Case("resnet20", options=CIFAR), SGD(lr=0.01, momentum=0.0, weight_decay=0.0, nesterov=False)),
]


def network(case: Case, precision: str = "fp32") -> dpresnet.Network:
    options = dict(image=case.image, batch=case.batch, precision=precision, **case.options)
    return dpresnet.Network(case.arch, num_classes=case.classes, **options)


@pytest.mark.parametrize("case", FP32, ids=str)
def test_fp32_logits_loss_gradients_and_statistics(case):
    problem = pose(case)
    truth, peer = (torch_outcome(case.torch(dtype), problem) for dtype in (torch.float64, torch.float32))
    ours = our_outcome(network(case), problem)
    assert_within(ours, peer, truth, largest, factor=4, floor=random_walk(case))


@pytest.mark.parametrize("case", FP16, ids=str)
def test_fp16_logits_loss_gradients_and_statistics(case):
    """fp16 storage turns about one ReLU in a thousand the other way, in every layer: gradients are off by 5 to 15 %.

    Which ReLUs is chance, how many is not. So arrays are compared as a whole, against PyTorch with the same storage: at
    most twice its error, plus four roundings (2^-11 each). A wrong gradient is off by its own size.
    """
    problem = pose(case, clear=False)
    truth = torch_outcome(case.torch(torch.float64), problem)
    peer = torch_outcome(store_in_half(case.torch(torch.float32)), half_problem(problem))
    ours = our_outcome(network(case, "fp16"), problem)
    assert_within(ours, peer, truth, overall, factor=2, floor=4 * 2.0**-11)


@pytest.mark.parametrize(("case", "sgd"), TRAINED, ids=str)
def test_ten_steps_of_sgd(case, sgd):
    """The floor: every step rounds weight decay, momentum, the Nesterov sum and the update, 2^-24 each."""
    weights, judge, batches = pose(case, clear=False).weights, case.torch(torch.float64), []

    def drawn_while_training():
        rng = np.random.default_rng(1)
        for _ in range(10):
            batches.append(draw_clear_batch(case, judge, rng))
            yield batches[-1]

    truth = torch_training(judge, weights, drawn_while_training(), sgd)
    peer = torch_training(case.torch(torch.float32), weights, batches, sgd)
    ours = our_training(network(case), weights, batches, sgd)
    assert_within(ours, peer, truth, largest, factor=4, floor=10 * 4 * 2.0**-24)


def meta_network(arch: str, **options) -> torch_resnet.ResNet:
    """Names and shapes without memory."""
    with torch.device("meta"):
        return torch_resnet.resnet(arch, **options)


@pytest.mark.parametrize("arch", PARAMETERS)
def test_parameters_are_counted_and_named_as_in_pytorch(arch):
    table = torch_resnet.ARCHS[arch]
    options = IMAGENET | {"num_classes": 1000} if len(table.blocks) == 4 else CIFAR | {"num_classes": 10}
    theirs = meta_network(arch, **options)
    assert sum(p.numel() for p in theirs.parameters()) == PARAMETERS[arch]
    ours = dpresnet.Network(arch, image=(3, 32, 32), batch=1, precision="fp32", **options).state_dict()
    assert shapes(ours) == shapes(state(theirs))


@pytest.mark.parametrize("stem", ["imagenet", "cifar", "deep"])
@pytest.mark.parametrize("block", ["v1.5", "v2"])
@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
def test_every_combination_of_options_has_the_names_of_pytorch(stem, block, shortcut):
    options = {"stem": stem, "block": block, "shortcut": shortcut, "num_classes": 10}
    ours = dpresnet.Network("resnet20", image=(3, 32, 32), batch=1, precision="fp32", **options).state_dict()
    assert shapes(ours) == shapes(state(meta_network("resnet20", **options)))


def shapes(arrays: dict) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in arrays.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("block", ["v1.5", "v2"])
@pytest.mark.parametrize("zero", [False, True])
def test_initial_weights(block, zero):
    """Kaiming normal over the fan out (He 2015, arXiv:1502.01852, eq. 14), norms 1 and 0; zeros as in PyTorch."""
    case = Case("resnext50_32x4d", options=CIFAR | {"block": block, "zero_init_residual": zero}, batch=1)
    theirs, ours = state(case.torch(torch.float32)), network(case).state_dict()
    for name, value in theirs.items():
        if name.startswith("fc."):
            continue  # PyTorch's uniform default is a convention, not part of the method
        if value.ndim == 4 and value.any():
            deviation = math.sqrt(2 / (value.shape[0] * value[0, 0].numel()))
            # Six deviations of the mean and of the standard deviation of n normal numbers.
            assert abs(ours[name].mean()) < 6 * deviation / math.sqrt(value.numel()), name
            assert abs(ours[name].std() / deviation - 1) < 6 / math.sqrt(2 * value.numel()), name
        else:
            assert np.array_equal(ours[name], value.numpy()), name


@pytest.mark.parametrize("block", ["v1.5", "v2"])
def test_network_with_its_own_initial_weights(block):
    """With zero_init_residual a block is its shortcut, to begin with; no gradient is missing because of it."""
    case = Case("resnet20", (3, 16, 16), options=CIFAR | {"block": block, "zero_init_residual": True})
    net, rng, judge = network(case), np.random.default_rng(0), case.torch(torch.float64)
    weights = net.state_dict()
    load(judge, weights)
    problem = Problem(weights, *draw_clear_batch(case, judge, rng))
    truth, peer = torch_outcome(judge, problem), torch_outcome(case.torch(torch.float32), problem)
    assert_within(our_outcome(net, problem), peer, truth, largest, factor=4, floor=random_walk(case))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_state_survives_loading_bit_for_bit(precision):
    """Also in fp16: the masters are fp32. PyTorch's batch counters may be there or not."""
    case = Case("resnet20", options=CIFAR)
    weights, net = pose(case, clear=False).weights, network(case, precision)
    counters = {name: np.array(3) for name in case.torch(torch.float32).state_dict() if name.endswith("tracked")}
    for given in (weights, weights | counters):
        net.load_state_dict({name: np.zeros_like(value) for name, value in weights.items()})
        net.load_state_dict(given)
        after = net.state_dict()
        assert all(np.array_equal(after[name], value) for name, value in weights.items())


def test_foreign_state_is_refused_with_everything_that_is_wrong():
    case = Case("resnet20", options=CIFAR)
    net, weights = network(case), pose(case, clear=False).weights
    before = {name: np.array(value) for name, value in net.state_dict().items()}
    foreign = {"module." + name if name == "bn1.bias" else name: value for name, value in weights.items()}
    foreign["fc.weight"] = np.zeros((100, 64), np.float32)
    with pytest.raises((ValueError, Refused)) as refusal:
        net.load_state_dict(foreign)
    message = str(refusal.value)
    for part in ("missing", "bn1.bias", "unexpected", "module.bn1.bias", "fc.weight", "100", "64", "10"):
        assert part in message
    after = net.state_dict()
    assert all(np.array_equal(after[name], value) for name, value in before.items()), "a refusal changes nothing"


def test_inference_changes_no_state_and_repeats_bit_for_bit():
    case = Case("resnet20", options=CIFAR)
    net, problem = network(case, "fp16"), pose(case, clear=False)
    net.load_state_dict(problem.weights)
    first, second = (np.array(net.forward(problem.images)) for _ in range(2))
    assert np.array_equal(first, second)
    after = net.state_dict()
    assert all(np.array_equal(after[name], value) for name, value in problem.weights.items())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_repeat_bit_for_bit(precision):
    case = Case("resnet18", options=CIFAR, batch=4)
    net, rng = network(case, precision), np.random.default_rng(0)
    images, labels = draw_images(case, rng), draw_labels(case, rng)
    (loss, first), (again, second) = (net.loss_and_grads(images, labels) for _ in range(2))
    assert loss == again
    assert all(np.array_equal(first[name], second[name]) for name in first)
