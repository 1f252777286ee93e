"""Convolution: kernels/conv.cl appended to a plan. The mathematics is `reference.conv_forward` and its two gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dpresnet.convolution import (
    MOST_LOCAL_BYTES,
    Conv,
    Geometry,
    gather_floats,
    geometry_of,
    least_local_bytes,
    patch_floats,
    tables,
    weight_floats,
)
from dpresnet.device import BLOCK
from dpresnet.plan import Local, Plan, Tensor

PACK_GROUPS = 16  # work-groups of conv_pack, at least, where there are as many parts
PATCH_BYTES = 2**19  # of the patch of conv_gather: half of the second-level cache
CONVERT, READ = 4, 4  # cost of converting one value for the patch, of reading one weight, in multiplications


def packed_shape(conv: Conv, transposed: bool) -> tuple[int, ...]:
    """[output tile][input block][tap][TERMS][TILE_O]."""
    return conv.packed_shape(transposed)


def conv_for(plan: Plan, x: Tensor, out_channels: int, kernel: int, stride: int, padding: int, groups: int) -> Conv:
    """The shape of a convolution of ``x`` on the plan's device.

    Where even the smallest work-group of the register-tile kernels needs more local memory than there is, the convolution
    is computed by the scalar ones.
    """
    device, precision = plan.device, "fp16" if plan.half else "fp32"
    eights = groups > 1 and x.channels == 8 * groups  # a group is a vector of 8: one value for all lanes
    vector = min(device.vector, 8) if eights else device.vector
    conv = Conv(x.images, x.channels, out_channels, x.height, x.width, kernel, stride, padding, groups,
                vector, min(device.local_bytes, MOST_LOCAL_BYTES), device.compute_units, precision,
                device.tuned)  # fmt: skip
    return conv if least_local_bytes(conv) <= conv.local_bytes else replace(conv, vector=1)


def gather_groups(conv: Conv, transposed: bool) -> Geometry:
    """Chooses how many lines, input blocks and output tiles one work-group computes: the cheapest that fits in local memory
    and gives enough groups for the device. None of it changes the order of any sum.
    """
    geometry, tiles, sizes = geometry_of(conv, transposed), conv.tiles(transposed), conv.sizes("conv_gather", transposed)
    most = min(geometry.lines, max(1, sizes.pixels // (geometry.grid_width * geometry.phases)))
    choices = []
    for lines in range(1, most + 1):
        parts = min(tiles, -(-sizes.groups * conv.units // -(-geometry.lines // lines)))
        choices.append(fitting(conv, geometry.divided(lines, geometry.in_blocks, tiles // parts)))
    return min(filter(None, choices), key=lambda choice: gather_cost(conv, choice), default=geometry)


def fitting(conv: Conv, geometry: Geometry) -> Geometry | None:
    """With so few input blocks at a time that patch and sums fit in local memory, if there is such a number.

    With convolution groups, where a tile reads few blocks anyway, with fewer output tiles instead.
    """
    lines, tiles = geometry.group_lines, geometry.group_tiles
    slices = 1
    while 4 * sum(gather_floats(conv, geometry)) > conv.local_bytes or 4 * patch_floats(conv, geometry) > PATCH_BYTES:
        if conv.groups > 1 and tiles > 1:
            tiles = -(-tiles // 2)
        elif conv.groups == 1 and slices < geometry.in_blocks:
            slices += 1
        else:
            return geometry if 4 * sum(gather_floats(conv, geometry)) <= conv.local_bytes else None
        geometry = geometry.divided(lines, -(-geometry.in_blocks // slices), tiles)
    return geometry


def gather_cost(conv: Conv, geometry: Geometry) -> float:
    """Vector operations of the busiest compute unit, roughly: multiplications with those of unused pixels, conversions,
    weights read.
    """
    transposed = bool(geometry.transposed)
    lanes, terms, tiles = conv.lanes(transposed), conv.terms(transposed), conv.tiles(transposed)
    whole, rest = divmod(geometry.lines, geometry.group_lines)
    parts, edge = -(-tiles // geometry.group_tiles), conv.tile_rows("conv_gather", transposed)
    weights = geometry.tile_blocks * geometry.taps * terms * geometry.group_tiles * geometry.tile_channels
    copied = 0 if conv.direct(transposed) else geometry.read_blocks
    patch = copied * geometry.patch_rows * geometry.patch_width * lanes

    def group(lines: int) -> int:
        return (-(-lines * geometry.grid_width // edge) * edge + READ) * weights + CONVERT * patch

    total = parts * (whole * group(geometry.group_lines) + (group(rest) if rest else 0))
    share = -(-parts * (whole + (rest > 0)) // conv.units)  # of the work-groups: PoCL hands out as many at once
    return max(total / conv.units, share * group(geometry.group_lines)) / conv.vector


def gather(plan: Plan, name: str, conv: Conv, x: Tensor, w: Tensor, y: Tensor, transposed: bool,
           z: Tensor | None = None) -> None:  # fmt: skip
    """Appends one launch of conv_gather; ``w`` is packed for this direction, ``z`` as in `backward_data`."""
    geometry = geometry_of(conv, transposed)
    if conv.vector == 1:
        size = (geometry.out_blocks * BLOCK, geometry.out_height * geometry.out_width, conv.images)
        memory = []
    else:
        conv = conv.fitting(lambda c: gather_floats(c, gather_groups(c, transposed)))
        geometry = gather_groups(conv, transposed)
        size = (-(-geometry.lines // geometry.group_lines), -(-conv.tiles(transposed) // geometry.group_tiles))
        memory = [Local(4 * n) for n in gather_floats(conv, geometry)]
    args = [x, w, y, *([z] if z else []), *tables(conv, geometry), geometry.constant(), *memory]
    defines = conv.defines("conv", transposed) | {"TILE_P": conv.tile_rows("conv_gather", transposed)}
    defines |= {"JOIN": 1} if z else {}
    plan.launch(name, "conv_gather", size, args, [y], conv.flops, **defines)


def forward(plan: Plan, name: str, conv: Conv, x: Tensor, packed: Tensor, y: Tensor) -> None:
    """y [N, O, OH, OW] = x [N, C, H, W] convolved with the packed weights."""
    gather(plan, name, conv, x, packed, y, transposed=False)


def backward_data(plan: Plan, name: str, conv: Conv, dy: Tensor, packed: Tensor, dx: Tensor, z: Tensor | None = None) -> None:
    """dx [N, C, H, W] from dy [N, O, OH, OW]; ``packed`` is the transposed working copy.

    With ``z`` [N, C, H, W], the convolution's input and the output of ReLU, dx holds another term of the gradient of z before,
    and afterwards the sum of both where z is positive, 0 elsewhere: the gradient of what was rectified.
    """
    gather(plan, name, conv, dy, packed, dx, transposed=True, z=z)


def weight_groups(conv: Conv) -> Geometry:
    """Chooses the panel of output tiles and input blocks that one work-group computes, and how many lines at a time.

    None of it changes the order of any sum.
    """
    geometry, sizes = geometry_of(conv, transposed=False), conv.sizes("conv_weight")
    tiles, blocks = conv.tiles(False), geometry.tile_blocks
    panel = [max(1, sizes.panel // geometry.tile_channels) if conv.groups == 1 else 1, min(conv.panel_blocks, blocks)]
    for axis in (0, 0, 1) if conv.kernel == 1 else (0, 0):  # twice as large where that leaves enough work-groups
        larger = [size * 2 if i == axis else size for i, size in enumerate(panel)]
        if conv.groups == 1 and conv.segments * -(-tiles // larger[0]) * -(-blocks // larger[1]) >= sizes.groups * conv.units:
            panel = larger
    most = -(-geometry.lines // conv.segments)
    lines = max(1, min(most, sizes.pixels // geometry.grid_width))
    lines = -(-most // -(-most // lines))  # no small rest
    chosen = geometry.divided(lines, min(panel[1], blocks), min(panel[0], tiles))
    while 4 * sum(weight_floats(conv, chosen)) > conv.local_bytes:
        lines, blocks, tiles = chosen.group_lines, chosen.group_blocks, chosen.group_tiles
        if lines > 1:
            lines -= 1
        else:
            blocks, tiles = -(-blocks // 2), -(-tiles // 2)
        smaller = chosen.divided(lines, blocks, tiles)
        if smaller == chosen:
            break
        chosen = smaller
    return chosen


def backward_weight(plan: Plan, name: str, conv: Conv, x: Tensor, dy: Tensor, dw: Tensor) -> None:
    """dw [O, C / groups, K, K] from x and dy, in fp32."""
    conv = replace(conv, vector=min(conv.vector, 8)) if conv.small_group else conv  # permutations of lanes cost less
    if conv.vector > 1:
        conv = conv.fitting(lambda c: weight_floats(c, weight_groups(c)))
    geometry = geometry_of(conv, transposed=False)
    partial = Tensor(f"{name}.partial", conv.partial_shape(), np.dtype(np.float32))
    segments, tiles, blocks, entries, channels = partial.shape
    defines = conv.defines("conv", False) | {"TILE_E": conv.tile_rows("conv_weight")}
    if conv.vector == 1:
        _, taps = tables(conv, geometry)
        args = [x, dy, partial, taps, geometry.constant()]
        plan.launch(name, "conv_weight", (entries * channels, tiles * blocks, segments), args, [partial], conv.flops, **defines)
        size = (channels * conv.terms(False), blocks, tiles)
        plan.launch(f"{name}.reduce", "conv_weight_reduce", size, [partial, dw, geometry.constant()], [dw], **defines)
        return
    geometry = weight_groups(conv)
    out = partial if segments > 1 else dw
    _, taps = tables(conv, geometry)
    args = [x, dy, out, taps, geometry.constant(), *(Local(4 * n) for n in weight_floats(conv, geometry))]
    size = (segments, -(-tiles // geometry.group_tiles), -(-blocks // geometry.group_blocks))
    plan.launch(name, "conv_weight", size, args, [out], conv.flops, **defines)
    if segments > 1:
        args = [partial, dw, geometry.constant(), Local(4 * entries * channels)]
        plan.launch(f"{name}.reduce", "conv_weight_reduce", (blocks, tiles), args, [dw], **defines)


def pack(plan: Plan, name: str, conv: Conv, master: Tensor, packed: Tensor, transposed: bool) -> None:
    """Refreshes a working copy from the fp32 master weights."""
    tiles, blocks, taps, terms, _ = packed.shape
    args = [master, packed, geometry_of(conv, transposed).constant()]
    if conv.vector == 1:
        size = (taps * terms, blocks, tiles)
    else:  # the master lies in rows of input blocks or, where it is read transposed, of output tiles: few parts of these
        size = (blocks, min(tiles, -(-PACK_GROUPS // blocks))) if transposed else (min(blocks, -(-PACK_GROUPS // tiles)), tiles)
    plan.launch(name, "conv_pack", size, args, [packed], **conv.defines("conv", transposed))
