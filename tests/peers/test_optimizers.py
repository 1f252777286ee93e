"""The float64 reference of the optimizers, and the norms and averages of training, against PyTorch's."""

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import MultiStepLR, PolynomialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dpresnet import reference_optimizer as reference
from dpresnet.config import Config
from dpresnet.schedule import lr_at

LRS = (0.1, 0.5, 0.01, 0.3)  # of four steps


def draw(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(11)


def agree(found: np.ndarray, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("beta1", "beta2", "eps"), [(0.9, 0.999, 1e-8), (0.5, 0.9, 0.1), (0.0, 0.0, 1e-3)])
def test_reference_adamw(beta1, beta2, eps, weight_decay):
    """The learning rate changes on the way: it multiplies step and decay, and enters no moment."""
    ours, first, second = draw(0), np.zeros(11), np.zeros(11)
    theirs = torch.tensor(ours)
    optimizer = torch.optim.AdamW([theirs], betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)
    for i, lr in enumerate(LRS):
        theirs.grad, optimizer.param_groups[0]["lr"] = torch.tensor(draw(i + 1)), lr
        optimizer.step()
        ours, first, second = reference.optimizer_adamw(
            ours, draw(i + 1), first, second, i + 1, lr, beta1, beta2, eps, weight_decay)  # fmt: skip
        agree(ours, theirs)
    agree(first, optimizer.state[theirs]["exp_avg"])
    agree(second, optimizer.state[theirs]["exp_avg_sq"])


def test_reference_lars_is_momentum_with_a_rate():
    """PyTorch has no LARS. With the rate computed here and put into the gradient its SGD at lr 1 is what remains of it."""
    ours, buffer = draw(0), np.zeros(11)
    theirs = torch.tensor(ours)
    optimizer = torch.optim.SGD([theirs], lr=1.0, momentum=0.9)
    for i, lr in enumerate(LRS):
        grad = torch.tensor(draw(i + 1))
        rate = 0.02 * theirs.norm() / (grad.norm() + 0.1 * theirs.norm())
        theirs.grad = lr * rate * (grad + 0.1 * theirs)
        optimizer.step()
        ours, buffer = reference.optimizer_lars(ours, draw(i + 1), buffer, lr, 0.9, 0.1, 0.02)
        agree(ours, theirs)


@pytest.mark.parametrize("largest", [0.5, 4.0, 500.0])
def test_reference_of_clipping(largest):
    """PyTorch adds 1e-6 to the norm that it divides by."""
    grads = [torch.zeros(11, dtype=torch.float64) for _ in range(3)]
    for i, parameter in enumerate(grads):
        parameter.grad = torch.tensor(draw(i))
    norm = torch.nn.utils.clip_grad_norm_(grads, largest)
    ours = reference.clipped([draw(i) for i in range(3)], largest)
    assert (norm > largest) == (largest < 500)
    for found, parameter in zip(ours, grads, strict=True):
        np.testing.assert_allclose(found, parameter.grad.numpy(), rtol=1e-6)


def test_reference_of_averages():
    module = torch.nn.Linear(3, 2).double()
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    averaged.update_parameters(module)  # the first one copies
    ours = module.weight.detach().numpy().copy()
    for _ in range(3):
        torch.nn.init.normal_(module.weight)
        averaged.update_parameters(module)
        ours = reference.optimizer_average(ours, module.weight.detach().numpy(), 0.75)
        agree(ours, averaged.module.weight)


@pytest.mark.parametrize(
    ("flags", "scheduler"),
    [
        ({"schedule": "polynomial", "power": 1.5}, lambda o: PolynomialLR(o, total_iters=80, power=1.5)),
        ({"schedule": "step", "milestones": "3,5", "gamma": 0.25}, lambda o: MultiStepLR(o, [30, 50], 0.25)),
    ],
)
def test_schedules_without_warm_up(flags, scheduler):
    cfg = Config(replicas=1, batch=256, lr=0.5, epochs=8, warmup_epochs=0.0, **flags)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    theirs = scheduler(optimizer)
    for step in range(80):
        assert lr_at(cfg, step, 10, 80) == pytest.approx(theirs.get_last_lr()[0], rel=1e-10, abs=1e-15)
        optimizer.step()
        theirs.step()


def test_one_cycle_between_its_ends():
    """PyTorch's begins, peaks and ends with the same rates, and rises in a line if asked to; its fall is a line then too, and
    its last step the end itself.
    """
    cfg = Config(replicas=1, batch=256, lr=0.5, epochs=8, warmup_epochs=2.0, schedule="onecycle")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.5, total_steps=81, pct_start=21 / 81, anneal_strategy="linear", cycle_momentum=False)  # fmt: skip
    for step in range(81):
        if step <= 20 or step == 80:
            assert lr_at(cfg, step, 10, 80) == pytest.approx(theirs.get_last_lr()[0], rel=1e-10)
        if step < 80:
            optimizer.step()
            theirs.step()
