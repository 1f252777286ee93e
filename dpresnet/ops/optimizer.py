"""The optimizer over the whole arena of parameters: kernels/optimizer.cl appended to a plan."""

import numpy as np

from dpresnet.plan import Plan, Tensor

HYPER = np.dtype(  # the struct of kernels/optimizer.cl
    [(name, np.float32) for name in ("lr", "momentum", "weight_decay", "nesterov", "grad_factor")]
)


def sgd(plan: Plan, name: str, param: Tensor, grad: Tensor, momentum: Tensor, hyper: Tensor) -> None:
    """PyTorch's SGD rule on flat fp32 arenas of equal layout, in place."""
    plan.elementwise(name, "optimizer_sgd", param.size, [param, grad, momentum, hyper], [param, momentum])


def accumulate(plan: Plan, name: str, grad: Tensor, total: Tensor, fresh: bool) -> None:
    """total = total + grad, or grad if it is ``fresh``: the sum over the micro-batches so far, fp32."""
    plan.elementwise(name, "optimizer_accumulate", grad.size, [grad, total, np.int32(fresh)], [total])


def complete(plan: Plan, name: str, grad: Tensor, total: Tensor) -> None:
    """grad = total + grad: the gradient of the last micro-batch becomes that of all."""
    plan.elementwise(name, "optimizer_complete", grad.size, [grad, total], [grad])


def check(plan: Plan, name: str, grad: Tensor, found: Tensor) -> None:
    """found [work-items] int32: 1 where a range of the gradients holds an infinity or NaN."""
    plan.elementwise(name, "optimizer_check", grad.size, [grad, found], [found])


def check_items(plan: Plan, elements: int) -> int:
    """Work-items of `check`, the length of ``found``."""
    probe = Plan(plan.device, "fp32")
    probe.elementwise("", "optimizer_check", elements, [], [])
    return probe.entries[0].size[0]
