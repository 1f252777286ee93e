"""Batch normalisation: kernels/batchnorm.cl appended to a plan. The mathematics is `reference.batchnorm_*`."""

from __future__ import annotations

import numpy as np

from dpresnet.plan import Plan, Tensor

EPS = 1e-5


def pixels(x: Tensor) -> np.int32:
    """Pixels of one image."""
    return np.int32(x.height * x.width)


def statistics(plan: Plan, name: str, x: Tensor, merged: Tensor, control: Tensor) -> None:
    """merged [2, C] = mean and M2 over the valid images of this replica; per image first, then merged in order."""
    partial = Tensor(f"{name}.partial", (x.images, *merged.shape), merged.dtype)
    plan.launch(f"{name}.statistics", "batchnorm_statistics", (x.blocks, x.images), [x, partial, pixels(x)], [partial])
    args = [partial, merged, control, pixels(x)]
    plan.launch(f"{name}.merge", "batchnorm_merge", (x.blocks,), args, [merged])


def apply(plan: Plan, name: str, x: Tensor, y: Tensor, moments: Tensor, weight: Tensor, bias: Tensor) -> None:
    """y = (x - mean) / deviation * weight + bias with moments [2, C] = mean, 1 / deviation."""
    args = [x, y, moments, weight, bias, pixels(x)]
    plan.launch(name, "batchnorm_apply", (x.blocks, x.images), args, [y])


def inference(plan: Plan, name: str, x: Tensor, y: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> None:
    """The same with running statistics [C]."""
    args = [x, y, mean, var, weight, bias, pixels(x), np.float32(EPS)]
    plan.launch(name, "batchnorm_inference", (x.blocks, x.images), args, [y])


def backward_reduce(plan: Plan, name: str, dy: Tensor, x: Tensor, moments: Tensor, sums: Tensor, dbias: Tensor,
                    dweight: Tensor) -> None:  # fmt: skip
    """sums [2, C] = sum(dy), sum(dy * normalised x) over this replica; they are also the gradients of bias and weight."""
    partial = Tensor(f"{name}.partial", (x.images, *sums.shape), sums.dtype)
    args = [dy, x, moments, partial, pixels(x)]
    plan.launch(f"{name}.reduce", "batchnorm_backward_reduce", (x.blocks, x.images), args, [partial])
    args = [partial, sums, dbias, dweight, np.int32(x.images)]
    plan.launch(f"{name}.sum", "batchnorm_sum", (x.blocks,), args, [sums, dbias, dweight])


def backward(plan: Plan, name: str, dy: Tensor, x: Tensor, dx: Tensor, moments: Tensor, means: Tensor, weight: Tensor,
             control: Tensor) -> None:  # fmt: skip
    """dx from the sums divided by the number of values over all replicas."""
    args = [dy, x, dx, moments, means, weight, control, pixels(x)]
    plan.launch(name, "batchnorm_backward", (x.blocks, x.images), args, [dx])
