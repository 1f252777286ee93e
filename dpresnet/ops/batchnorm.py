"""Batch normalisation, with the residual addition and ReLU that follow it: kernels/batchnorm.cl appended to a plan.

The mathematics is `reference.batchnorm_*`, `reference.residual_add` and `reference.relu_*`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpresnet.device import BLOCK, LAST_LEVEL_BYTES
from dpresnet.plan import Plan, Tensor

EPS = 1e-5

LEAST_ITEMS = 32  # work-items of a large tensor: no compute unit of a CPU waits long for the others at the end
LEAST_PIXELS = 64  # of one channel block, for one work-item: less does not pay for starting it


@dataclass(frozen=True, eq=False)
class Affine:
    """What normalises ``x`` [N, C, H, W]: moments [2, C] = mean and 1 / deviation, weight [C] and bias [C]."""

    x: Tensor
    moments: Tensor
    weight: Tensor
    bias: Tensor


def columns(plan: Plan, x: Tensor) -> int:
    """Work-items side by side over the channels: one per block, on GPUs one per lane."""
    return x.blocks * (BLOCK if plan.device.vector == 1 else 1)


def span_of(plan: Plan, x: Tensor) -> int:
    """Pixels of an image that one work-item handles where nothing is summed: all of them, unless images are large and few."""
    pixels = x.height * x.width
    parts = 2**31 if plan.device.vector == 1 else -(-LEAST_ITEMS // (x.blocks * x.images))
    return -(-pixels // max(1, min(parts, pixels // LEAST_PIXELS)))


def launch(plan: Plan, name: str, verb: str, x: Tensor, args: list, writes: list[Tensor], whole: bool = False,
           **defines: int) -> None:  # fmt: skip
    """Appends a launch over an image tensor; with ``whole`` a work-item takes a whole image, because it adds it up."""
    pixels, span = x.height * x.width, span_of(plan, x)
    size = (columns(plan, x), x.images) if whole else (columns(plan, x), x.images, -(-pixels // span))
    sizes = [np.int32(v) for v in ([pixels] if whole else [pixels, span])]
    plan.launch(name, f"batchnorm_{verb}", size, [*args, *sizes], writes, **defines)


def statistics(plan: Plan, name: str, x: Tensor, merged: Tensor, moments: Tensor, control: Tensor) -> None:
    """merged [2, C] = mean and M2 over the valid images of this replica; per image first, then merged in order.

    ``moments`` [2, C] = mean and 1 / deviation of these images, if the device computes in double precision.
    """
    partial = Tensor(f"{name}.partial", (x.images, *merged.shape), merged.dtype)
    launch(plan, f"{name}.statistics", "statistics", x, [x, partial], [partial], whole=True)
    args, writes = [partial, merged, control, np.int32(x.height * x.width)], [merged]
    if plan.device.doubles:
        args, writes = [*args, moments, np.float64(EPS)], [*writes, moments]
    plan.launch(f"{name}.merge", "batchnorm_merge", (columns(plan, x),), args, writes, DOUBLES=int(plan.device.doubles))


def running(plan: Plan, name: str, x: Tensor, mean: Tensor, var: Tensor, moments: Tensor) -> None:
    """moments [2, C] of ``x`` from the running statistics [C]."""
    args = [mean, var, moments, np.float32(EPS)]
    plan.launch(name, "batchnorm_running", (columns(plan, x),), args, [moments])


def apply(plan: Plan, name: str, first: Affine, residual: Affine | Tensor | None, relu: bool, z: Tensor) -> None:
    """z = ``first`` normalised, plus ``residual`` (a tensor, or another one normalised), rectified if ``relu``."""
    added, kind = [], 0
    if isinstance(residual, Affine):
        added, kind = [residual.x, residual.moments, residual.weight, residual.bias], 2
    elif residual is not None:
        added, kind = [residual], 1
    args = [first.x, first.moments, first.weight, first.bias, *added, z]
    launch(plan, name, "apply", z, args, [z], RELU=int(relu), RESIDUAL=kind, LARGE=int(z.nbytes > LAST_LEVEL_BYTES))


def backward_reduce(plan: Plan, name: str, terms: Sequence[Tensor], affines: Sequence[Affine], relu: bool,
                    partials: Sequence[Tensor], z: Tensor | None = None, g: Tensor | None = None) -> None:  # fmt: skip
    """partials [N, 2, C] = sum(g), sum(g * normalised x) per image, for each of one or two branches.

    g is the sum of one or two ``terms`` of the gradient of z, where z is positive if ``relu``. After a residual addition
    ``z`` and ``g`` are given: g is written, and may be one of the terms. Without z, g is the only term, and there already.
    Otherwise the sign of z is computed again.
    """
    first, given = affines[0], g is not None and z is None
    args, writes = [*terms, first.x, first.moments], [*partials]
    if relu:
        args += [first.weight, first.bias] if g is None else [z]
    if g is not None and not given:
        args, writes = [*args, g], [*writes, g]
    for other, partial in zip(affines[1:], partials[1:], strict=True):
        args += [other.x, other.moments, partial]
    kind = 0 if g is None or (given and len(affines) == 1) else len(affines)
    launch(plan, name, "backward_reduce", first.x, [*args, partials[0]], writes, whole=True,
           TERMS=len(terms), RELU=int(relu), RESIDUAL=kind, GIVEN=int(given and kind == 2))  # fmt: skip


def add_images(plan: Plan, name: str, partial: Tensor, sums: Tensor, dbias: Tensor, dweight: Tensor, means: Tensor,
               control: Tensor, pixels: int) -> None:  # fmt: skip
    """sums [2, C] = partial [N, 2, C] added over the images; they are also the gradients of bias and weight.

    ``means`` [2, C] = sums divided by the valid images times ``pixels``, if the device computes in double precision.
    """
    args, writes = [partial, sums, dbias, dweight, np.int32(partial.shape[0])], [sums, dbias, dweight]
    if plan.device.doubles:
        args, writes = [*args, means, control, np.int32(pixels)], [*writes, means]
    items = sums.shape[1] // (1 if plan.device.vector == 1 else BLOCK)
    plan.launch(name, "batchnorm_sum", (items,), args, writes, DOUBLES=int(plan.device.doubles))


def backward(plan: Plan, name: str, terms: Sequence[Tensor], affines: Sequence[Affine], relu: bool, means: Sequence[Tensor],
             control: Tensor, dxs: Sequence[Tensor]) -> None:  # fmt: skip
    """dx of each branch from ``means`` [2, C], the sums divided by the number of values over all replicas.

    After a residual addition the only term is the g of `backward_reduce`, without ReLU; two branches are possible then only.
    The first of ``dxs`` may be one of the terms.
    """
    first = affines[0]
    args = [*terms, first.x, dxs[0], first.moments, means[0], first.weight, *([first.bias] if relu else [])]
    for other, mean, dr in zip(affines[1:], means[1:], dxs[1:], strict=True):
        args += [other.x, dr, other.moments, mean, other.weight]
    launch(plan, name, "backward", first.x, [*args, control], [*dxs],
           TERMS=len(terms), RELU=int(relu), RESIDUAL=2 if len(affines) == 2 else 0,
           LARGE=int(dxs[0].nbytes > LAST_LEVEL_BYTES and dxs[0] not in terms))  # fmt: skip
