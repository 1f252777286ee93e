"""Convolution: kernels/conv.cl appended to a plan. The mathematics is `reference.conv_forward` and its two gradients."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from functools import cached_property

import numpy as np

from dpresnet.device import BLOCK
from dpresnet.plan import Constant, Local, Plan, Tensor, blocks_of

PIXELS = 256  # output pixels that one work-group aims at: its patch stays in the second-level cache
MOST_LOCAL_BYTES = 2**20  # more would leave the second-level cache
LEAST_GROUPS = 32  # work-groups that keep the compute units of a CPU busy to the end
MOST_SEGMENTS = 64  # see conv_weight_reduce


@dataclass(frozen=True)
class Geometry:
    """The struct of the same name in kernels/conv.cl, field by field."""

    images: int
    in_blocks: int
    in_height: int
    in_width: int
    out_blocks: int
    out_height: int
    out_width: int
    grid_height: int
    grid_width: int
    out_step: int
    out_row: int
    out_col: int
    in_step: int
    taps: int
    all_taps: int
    row_min: int
    col_min: int
    patch_width: int
    row_step: int
    col_step: int
    patch_span: int
    group_images: int
    group_rows: int
    out_group: int
    in_group: int
    tile_blocks: int
    tiles_per_group: int
    segments: int
    out_channels: int
    in_channels: int
    transposed: int
    tile_channels: int

    def constant(self) -> Constant:
        """As the kernel reads it."""
        return Constant(np.array(astuple(self), np.int32))

    def patch_floats(self, lanes: int) -> int:
        """Floats of the patch of one image and one input block."""
        rows = (self.group_rows - 1) * (self.in_step // self.row_step) + self.patch_span
        return rows * self.patch_width * lanes


@dataclass(frozen=True)
class Tap:
    """One position of the kernel window: where it reads, relative to in_step times the output position."""

    row: int
    col: int
    index: int


@dataclass(frozen=True)
class Conv:
    """The shape of one convolution; the weights are [out_channels, in_channels / groups, kernel, kernel]."""

    images: int
    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel: int
    stride: int
    padding: int
    groups: int
    vector: int  # lanes of the vectors it is computed with
    local_bytes: int  # local memory of a work-group

    @property
    def out_height(self) -> int:
        """Rows of the output."""
        return (self.height + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def out_width(self) -> int:
        """Columns of the output."""
        return (self.width + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def flops(self) -> int:
        """Multiplications and additions of one pass (forward, or either gradient)."""
        pixels = self.images * self.out_height * self.out_width
        return 2 * pixels * self.out_channels * self.in_channels // self.groups * self.kernel**2

    @cached_property
    def tile_channels(self) -> int:
        """Output channels of a register tile (TILE_O): two vectors."""
        return 2 * self.vector if self.vector > 1 else BLOCK

    @property
    def defines(self) -> dict[str, int]:
        """Tile sizes that fill 16 (AVX2) or 32 (AVX-512) registers."""
        tile = {8: {"TILE_P": 6, "TILE_E": 6}, 16: {"TILE_P": 8, "TILE_E": 8}, 1: {}}[self.vector]
        return {"VEC": self.vector, **tile}

    def lanes(self, transposed: bool) -> int:
        """CU: channels of an input block that are computed; fewer for images of few channels."""
        channels = self.out_channels if transposed else self.in_channels
        return next(lanes for lanes in (1, 4, BLOCK) if channels <= lanes or lanes == BLOCK)

    def tile_blocks(self, transposed: bool) -> int:
        """Input blocks that a tile of output channels is connected to (all of them without groups)."""
        return self.connected_blocks(transposed, self.tile_channels)

    def connected_blocks(self, transposed: bool, channels: int) -> int:
        """The most input blocks that ``channels`` neighbouring output channels are connected to."""
        outs, ins = self.ends(transposed)
        out_group, in_group = outs // self.groups, ins // self.groups
        last = outs - 1
        spans = []
        for start in range(0, outs, channels):
            stop = min(start + channels - 1, last)
            first = start // out_group * in_group // BLOCK
            spans.append((stop // out_group * in_group + in_group - 1) // BLOCK - first + 1)
        return max(spans)

    def ends(self, transposed: bool) -> tuple[int, int]:
        """(channels that are computed, channels that are read)."""
        pair = (self.out_channels, self.in_channels)
        return pair[::-1] if transposed else pair

    def tiles(self, transposed: bool) -> int:
        """Output tiles of a pass."""
        return -(-blocks_of(self.ends(transposed)[0]) * BLOCK // self.tile_channels)

    def packed_shape(self, transposed: bool) -> tuple[int, ...]:
        """[output tile][input block][tap][CU][TILE_O]."""
        lanes = self.lanes(transposed)
        return (self.tiles(transposed), self.tile_blocks(transposed), self.kernel**2, lanes, self.tile_channels)

    @property
    def segments(self) -> int:
        """Parts of the batch whose weight gradients are summed apart.

        It follows from the shape alone, never from the device: the order of the sum, and so its bits, must not depend on
        where it is computed.
        """
        tiles = blocks_of(self.out_channels) * self.connected_blocks(False, BLOCK)
        return min(self.images, MOST_SEGMENTS, -(-64 // tiles))

    def partial_shape(self) -> tuple[int, ...]:
        """[segment][output tile][input block][tap * CU][TILE_O]."""
        tiles, blocks, taps, lanes, channels = self.packed_shape(False)
        return (self.segments, tiles, blocks, taps * lanes, channels)


def packed_shape(conv: Conv, transposed: bool) -> tuple[int, ...]:
    """[output tile][input block][tap][CU][TILE_O]."""
    return conv.packed_shape(transposed)


def conv_for(plan: Plan, x: Tensor, out_channels: int, kernel: int, stride: int, padding: int, groups: int) -> Conv:
    """The shape of a convolution of ``x`` on the plan's device.

    Where even the smallest work-group of the register-tile kernels needs more local memory than there is, the convolution
    is computed by the scalar ones.
    """
    device = plan.device
    conv = Conv(x.images, x.channels, out_channels, x.height, x.width, kernel, stride, padding, groups,
                device.vector, min(device.local_bytes, MOST_LOCAL_BYTES))  # fmt: skip
    return conv if least_local_bytes(conv) <= conv.local_bytes else replace(conv, vector=1)


def least_local_bytes(conv: Conv) -> int:
    """Local memory of work-groups of one row and one image, for the pass that needs most."""
    phases = [(row, col) for row in range(conv.stride) for col in range(conv.stride)]
    forward = geometry_of(conv, window_taps(conv), transposed=False)
    backward = [geometry_of(conv, phase_taps(conv, *phase), True, phase) for phase in phases]
    patches = [g.patch_floats(conv.lanes(bool(g.transposed))) * g.in_blocks + 2 * g.grid_width for g in (forward, *backward)]
    return 4 * max(max(patches) + 2 * BLOCK, sum(weight_local_floats(conv, forward)))


def phase_taps(conv: Conv, row: int, col: int) -> list[Tap]:
    """Taps of the input gradient for the pixels whose position is (row, col) modulo the stride."""
    k, s, p = conv.kernel, conv.stride, conv.padding
    return [
        Tap((row + p - i) // s, (col + p - j) // s, i * k + j)
        for i in range(k) for j in range(k)
        if (row + p - i) % s == 0 and (col + p - j) % s == 0
    ]  # fmt: skip


def tap_table(conv: Conv, taps: list[Tap], geometry: Geometry, lanes: int) -> Constant:
    """The taps as the kernel of this device reads them."""
    if conv.vector == 1:
        return Constant(np.array([(t.row, t.index, t.col) for t in taps] or [(0, 0, 0)], np.int32))
    table = [
        ((t.row - geometry.row_min) // geometry.row_step * geometry.patch_width
         + (t.col - geometry.col_min) // geometry.col_step) * lanes
        for t in taps
    ]  # fmt: skip
    return Constant(np.array([(o, t.index) for o, t in zip(table, taps, strict=True)] or [(0, 0)], np.int32))


def geometry_of(conv: Conv, taps: list[Tap], transposed: bool, phase: tuple[int, int] = (0, 0)) -> Geometry:
    """Geometry of one launch; the sizes of a work-group are filled in by `with_groups`."""
    outs, ins = conv.ends(transposed)
    small = (conv.out_height, conv.out_width)
    large = (conv.height, conv.width)
    (out_height, out_width), (in_height, in_width) = (large, small) if transposed else (small, large)
    grid = [len(range(phase[0], out_height, conv.stride)), len(range(phase[1], out_width, conv.stride))]
    grid_height, grid_width = grid if transposed else (out_height, out_width)
    in_step = 1 if transposed else conv.stride
    rows, cols = {t.row for t in taps} or {0}, {t.col for t in taps} or {0}
    row_step = in_step if len(rows) == 1 else 1
    col_step = in_step if len(cols) == 1 else 1
    return Geometry(
        images=conv.images, in_blocks=blocks_of(ins), in_height=in_height, in_width=in_width,
        out_blocks=blocks_of(outs), out_height=out_height, out_width=out_width,
        grid_height=grid_height, grid_width=grid_width,
        out_step=conv.stride if transposed else 1, out_row=phase[0], out_col=phase[1], in_step=in_step,
        taps=len(taps), all_taps=conv.kernel**2, row_min=min(rows), col_min=min(cols),
        patch_width=(grid_width - 1) * (in_step // col_step) + max(cols) - min(cols) + 1,
        row_step=row_step, col_step=col_step, patch_span=max(rows) - min(rows) + 1,
        group_images=1, group_rows=1, out_group=outs // conv.groups, in_group=ins // conv.groups,
        tile_blocks=conv.tile_blocks(transposed), tiles_per_group=conv.tiles(transposed), segments=conv.segments,
        out_channels=outs, in_channels=ins, transposed=int(transposed), tile_channels=conv.tile_channels,
    )  # fmt: skip


def with_groups(conv: Conv, geometry: Geometry, lanes: int) -> Geometry:
    """Chooses how many rows, images and output tiles one work-group computes.

    Enough pixels to reuse each weight from cache, a patch that fits in local memory, and enough groups for the device.
    None of it changes the order of any sum.
    """
    rows, cols, images = geometry.grid_height, geometry.grid_width, geometry.images
    target = max(48, min(PIXELS, images * rows * cols // LEAST_GROUPS))

    def floats(group_rows: int, group_images: int) -> int:
        sized = replace(geometry, group_rows=group_rows)
        return sized.patch_floats(lanes) * geometry.in_blocks * group_images

    limit = conv.local_bytes // 4 - 4 * PIXELS  # floats, beside the table of pixels
    group_rows = max(1, min(rows, -(-target // cols)))
    while group_rows > 1 and floats(group_rows, 1) > limit:
        group_rows -= 1
    group_images = 1
    if group_rows == rows:
        group_images = max(1, min(images, target // (rows * cols)))
        while group_images > 1 and floats(rows, group_images) > limit:
            group_images -= 1
    groups = -(-images // group_images) * -(-rows // group_rows)
    tiles = conv.tiles(bool(geometry.transposed))
    parts = max(1, min(tiles // 4, -(-LEAST_GROUPS // groups)))
    return replace(geometry, group_rows=group_rows, group_images=group_images, tiles_per_group=-(-tiles // parts))


def gather(plan: Plan, name: str, conv: Conv, x: Tensor, w: Tensor, y: Tensor, taps: list[Tap], transposed: bool,
           phase: tuple[int, int] = (0, 0)) -> None:  # fmt: skip
    """Appends one launch of conv_gather; ``w`` is packed for this direction."""
    lanes = conv.lanes(transposed)
    geometry = geometry_of(conv, taps, transposed, phase)
    if min(geometry.grid_height, geometry.grid_width) <= 0:
        return
    flops = conv.flops * len(taps) // conv.kernel**2 if transposed else conv.flops
    defines = {**conv.defines, "CU": lanes}
    if conv.vector == 1:
        size = (geometry.out_blocks * BLOCK, geometry.grid_height * geometry.grid_width, conv.images)
        args = [x, w, y, tap_table(conv, taps, geometry, lanes), geometry.constant()]
        plan.launch(name, "conv_gather", size, args, [y], flops, **defines)
        return
    geometry = with_groups(conv, geometry, lanes)
    groups = -(-conv.images // geometry.group_images) * -(-geometry.grid_height // geometry.group_rows)
    parts = -(-conv.tiles(transposed) // geometry.tiles_per_group)
    pixels = geometry.group_images * geometry.group_rows * geometry.grid_width + conv.defines["TILE_P"]
    patch = Local(4 * geometry.patch_floats(lanes) * geometry.in_blocks * geometry.group_images)
    args = [x, w, y, tap_table(conv, taps, geometry, lanes), geometry.constant(), patch, Local(8 * pixels)]
    plan.launch(name, "conv_gather", (groups, parts), args, [y], flops, **defines)


def window_taps(conv: Conv) -> list[Tap]:
    """Taps of the forward pass."""
    k, p = conv.kernel, conv.padding
    return [Tap(i - p, j - p, i * k + j) for i in range(k) for j in range(k)]


def forward(plan: Plan, name: str, conv: Conv, x: Tensor, packed: Tensor, y: Tensor) -> None:
    """y [N, O, OH, OW] = x [N, C, H, W] convolved with the packed weights."""
    gather(plan, name, conv, x, packed, y, window_taps(conv), transposed=False)


def backward_data(plan: Plan, name: str, conv: Conv, dy: Tensor, packed: Tensor, dx: Tensor) -> None:
    """dx [N, C, H, W] from dy [N, O, OH, OW]; ``packed`` is the transposed working copy."""
    for row in range(conv.stride):
        for col in range(conv.stride):
            gather(plan, name, conv, dy, packed, dx, phase_taps(conv, row, col), transposed=True, phase=(row, col))


def backward_weight(plan: Plan, name: str, conv: Conv, x: Tensor, dy: Tensor, dw: Tensor) -> None:
    """dw [O, C / groups, K, K] from x and dy, in fp32."""
    lanes, taps = conv.lanes(False), window_taps(conv)
    geometry = geometry_of(conv, taps, transposed=False)
    partial = Tensor(f"{name}.partial", conv.partial_shape(), np.dtype(np.float32))
    defines = {**conv.defines, "CU": lanes}
    segments, tiles, blocks, entries, channels = partial.shape
    args = [x, dy, partial, tap_table(conv, taps, geometry, lanes)]
    if conv.vector == 1:
        size = (entries * channels, tiles * blocks, segments)
        plan.launch(name, "conv_weight", size, [*args, geometry.constant()], [partial], conv.flops, **defines)
    else:
        geometry = with_rows(conv, geometry)
        args += [geometry.constant(), *(Local(4 * n) for n in weight_local_floats(conv, geometry))]
        plan.launch(name, "conv_weight", (segments, tiles, blocks), args, [partial], conv.flops, **defines)
    size = (lanes, blocks, tiles)
    plan.launch(f"{name}.reduce", "conv_weight_reduce", size, [partial, dw, geometry.constant()], [dw], **defines)


def weight_local_floats(conv: Conv, geometry: Geometry) -> list[int]:
    """Patch, gradient, sums, table of pixels and table of entries of conv_weight."""
    lanes, edge = conv.lanes(False), conv.defines.get("TILE_E", 1)
    padded = -(-geometry.taps * lanes // edge) * edge
    pixels = geometry.group_rows * geometry.grid_width
    return [geometry.patch_floats(lanes), pixels * conv.tile_channels, padded * conv.tile_channels, pixels, padded]


def with_rows(conv: Conv, geometry: Geometry) -> Geometry:
    """Rows of the output whose patch and gradient fit in the first-level cache together."""
    rows = max(1, min(geometry.grid_height, PIXELS // 2 // geometry.grid_width))
    while rows > 1 and 4 * sum(weight_local_floats(conv, replace(geometry, group_rows=rows))) > conv.local_bytes:
        rows -= 1
    return replace(geometry, group_rows=rows)


def pack(plan: Plan, name: str, conv: Conv, master: Tensor, packed: Tensor, transposed: bool) -> None:
    """Refreshes a working copy from the fp32 master weights."""
    geometry = geometry_of(conv, window_taps(conv), transposed)
    tiles, blocks, taps, lanes, _ = packed.shape
    args = [master, packed, geometry.constant()]
    plan.launch(name, "conv_pack", (taps * lanes, blocks, tiles), args, [packed], **{**conv.defines, "CU": lanes})
