"""Two replicas against PyTorch: with shared statistics they are one batch, without them two passes whose losses are added."""

from __future__ import annotations

import pytest
import torch
from judge import Arrays, as_float64, assert_within, largest, our_outcome, random_walk, torch_outcome
from problems import Case, Problem, load, pose, tensor
from torch import nn

import dpresnet
from dpresnet.bench import torch_resnet

CASES = [
    Case("resnet18", options={"stem": "cifar"}),
    Case("resnet50", (3, 64, 64), options={"stem": "imagenet"}),
    Case("resnet20", options={"stem": "cifar", "block": "v2"}),
]


def replicas_of(case: Case, bn: str) -> dpresnet.Network:
    """Two replicas, each with half of the case's batch."""
    sizes = {"num_classes": case.classes, "image": case.image, "batch": case.batch // 2}
    return dpresnet.Network(case.arch, precision="fp32", replicas=2, bn=bn, **sizes, **case.options)


@pytest.mark.limit(300)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shared_statistics(case):
    """Logits, loss, every gradient and the running statistics of the whole batch."""
    problem = pose(case)
    truth, peer = (torch_outcome(case.torch(dtype), problem) for dtype in (torch.float64, torch.float32))
    assert_within(our_outcome(replicas_of(case, "sync"), problem), peer, truth, largest, 4, random_walk(case))


@pytest.mark.limit(300)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_local_statistics(case):
    """Each half is normalised by itself; the loss is the mean over both. (Running statistics are those of the whole batch.)"""
    problem = pose(case)
    truth, peer = (torch_halves(case.torch(dtype), problem) for dtype in (torch.float64, torch.float32))
    assert_within(our_halves(replicas_of(case, "local"), problem), peer, truth, largest, 4, random_walk(case))


def torch_halves(net: torch_resnet.ResNet, problem: Problem) -> Arrays:
    load(net, problem.weights)
    halves = tensor(net, problem.images).split(len(problem.images) // 2)
    logits = torch.cat([net.train()(half) for half in halves])
    loss = nn.functional.cross_entropy(logits, torch.from_numpy(problem.labels))
    loss.backward()
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in net.named_parameters()}
    return as_float64({"train logits": logits.detach(), "loss": loss.detach(), **gradients})


def our_halves(net: dpresnet.Network, problem: Problem) -> Arrays:
    net.load_state_dict(problem.weights)
    found = {"train logits": net.forward(problem.images, train=True)}
    found["loss"], gradients = net.loss_and_grads(problem.images, problem.labels)
    return as_float64(found | {f"gradient of {name}": value for name, value in gradients.items()})
