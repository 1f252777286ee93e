"""The shape of a convolution and what follows from it: taps, phases, packed weights, the order of the sums, and how a device
divides the work. The kernels are in kernels/conv.cl, their launches in `dpresnet.ops.conv`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property

import numpy as np

from dpresnet.device import BLOCK
from dpresnet.plan import Constant, blocks_of
from dpresnet.shape import ConvShape
from dpresnet.tiles import SHIPPED_ONLY, Sizes, Tuned, shipped

MOST_LOCAL_BYTES = 2**20  # more would leave the second-level cache
MOST_SEGMENTS = 64  # see conv_weight_reduce

# These two decide the number of segments, and so the order of a sum: no size that is chosen for speed may enter there.
SEGMENT_PANELS = 32  # parts of the weight gradient, times segments, at least
SEGMENT_CHANNELS = 64  # of the output, in such a part


@dataclass(frozen=True)
class Struct:
    """What the geometries of the kernels begin with: x [images, in_blocks, in_height, in_width, BLOCK], and y."""

    images: int
    in_blocks: int
    in_height: int
    in_width: int
    out_blocks: int
    out_height: int
    out_width: int

    def constant(self) -> Constant:
        """As the kernel reads it."""
        return Constant(np.array(astuple(self), np.int32))


@dataclass(frozen=True)
class Geometry(Struct):
    """The struct of the same name in kernels/convolution.cl, field by field."""

    grid_height: int
    grid_width: int
    out_step: int
    in_step: int
    phases: int
    taps: int
    row_min: int
    col_min: int
    patch_width: int
    row_step: int
    col_step: int
    patch_span: int
    patch_rows: int
    group_lines: int
    group_blocks: int
    read_blocks: int
    group_tiles: int
    out_group: int
    in_group: int
    tile_blocks: int
    segments: int
    out_channels: int
    in_channels: int
    transposed: int
    tile_channels: int

    @property
    def lines(self) -> int:
        """Rows of cells in the batch."""
        return self.images * self.grid_height

    def first_block(self, tile: int) -> int:
        """The first input block that an output tile is connected to."""
        first = tile * self.tile_channels // self.out_group * self.in_group // BLOCK
        return max(0, min(first, self.in_blocks - self.tile_blocks))

    def spanned_blocks(self, tiles: int) -> int:
        """The most input blocks that the output tiles of one work-group are connected to."""
        last = -(-self.out_blocks * BLOCK // self.tile_channels) - 1
        starts = range(0, last + 1, tiles)
        return max(self.first_block(min(t + tiles - 1, last)) - self.first_block(t) for t in starts) + self.tile_blocks

    def divided(self, lines: int, blocks: int, tiles: int) -> Geometry:
        """The same launch with other sizes of a work-group; ``blocks`` are those of a patch."""
        skip = self.in_step // self.row_step
        images = 1 + -(-(lines - 1) // self.grid_height)  # at most, wherever the lines begin
        rows = lines * skip + max(0, self.patch_span - skip) * images + min(0, self.patch_span - skip)
        read = self.spanned_blocks(tiles)
        return replace(self, group_lines=lines, group_blocks=min(blocks, read), read_blocks=read, group_tiles=tiles,
                       patch_rows=rows)  # fmt: skip


@dataclass(frozen=True)
class Tap:
    """One position of the kernel window: where it reads, relative to in_step times the position of the cell."""

    row: int
    col: int
    index: int


@dataclass(frozen=True)
class Phase:
    """One pixel of the cells and the taps that it gathers over."""

    row: int
    col: int
    taps: list[Tap]


@dataclass(frozen=True)
class Conv(ConvShape):
    """A convolution on a device."""

    vector: int  # lanes of the vectors it is computed with
    local_bytes: int  # local memory of a work-group
    units: int = 1  # that compute at once: the work is divided among them
    precision: str = "fp32"  # of activations
    tuned: Tuned = field(default=SHIPPED_ONLY, compare=False, repr=False)  # sizes measured on the device

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

    def tile_vectors(self, transposed: bool) -> int:
        """TILE_V: vectors of output channels of a register tile, or those of a block of small groups."""
        if self.small_group:
            return BLOCK // self.vector
        outs = self.ends(transposed)[0]
        few = blocks_of(outs) * BLOCK <= self.vector or (self.groups > 1 and outs // self.groups == self.vector)
        return 1 if few else 2  # neither lanes without channels nor, in a tile, a second convolution group

    def tile_channels(self, transposed: bool) -> int:
        """TILE_O: output channels of a register tile; without vectors those of a block."""
        return self.tile_vectors(transposed) * self.vector if self.vector > 1 else BLOCK

    @cached_property
    def small_group(self) -> int:
        """GROUP: channels of a convolution group where blocks hold several whole groups and vectors are used, otherwise 0."""
        channels = self.in_channels // self.groups
        small = self.groups > 1 and channels < BLOCK and BLOCK % channels == 0 and self.vector > 1
        return channels if small and self.in_channels == self.out_channels else 0

    def direct(self, transposed: bool) -> bool:
        """Whether a pass, and with the forward pass the gradient of the weights, reads images where they lie: see DIRECT in
        kernels/conv.cl. A gradient of the input has a cell for each pixel of dy, whatever the stride.
        """
        copies = self.kernel == 1 and self.padding == 0 and (transposed or self.stride == 1) and self.precision == "fp32"
        return copies and self.vector > 1 and self.small_group == 0 and self.lanes(transposed) == BLOCK

    def key(self, kernel: str, transposed: bool) -> str:
        """Names a launch in a file of tuned sizes; begins with the kernel."""
        purpose = "weight" if kernel.endswith("weight") else "data" if transposed else "forward"
        shape = f"{self.images}x{self.in_channels}x{self.height}x{self.width} to {self.out_channels}"
        window = f"{self.kernel}x{self.kernel} stride {self.stride} padding {self.padding} groups {self.groups}"
        return f"{kernel} {purpose} {self.precision} {shape}, {window}"

    def sizes(self, kernel: str, transposed: bool = False) -> Sizes:
        """What a launch of this kernel is divided into: as measured on this device, or as shipped for its kind."""
        found = self.tuned.find(self, kernel, transposed) if self.vector > 1 else None
        return found or shipped(self.vector, kernel, self.tile_vectors(transposed), self.kernel)

    @property
    def shipped(self) -> Conv:
        """The same without measured sizes."""
        return replace(self, tuned=SHIPPED_ONLY)

    def fitting(self, floats: Callable[[Conv], list[int]], reserve: int = 0) -> Conv:
        """Itself if local memory but for ``reserve`` bytes holds what a launch needs, otherwise the same with shipped sizes."""
        fits = self.tuned is SHIPPED_ONLY or 4 * sum(floats(self)) <= self.local_bytes - reserve
        return self if fits else self.shipped

    def tile_rows(self, kernel: str, transposed: bool = False) -> int:
        """Pixels, tiles or entries of a register tile of this kernel (TILE_P, TILE_E); 1 without vectors."""
        rows = self.sizes(kernel, transposed).rows
        if kernel == "conv_weight" and self.small_group % self.vector and rows % self.small_group:
            rows = max(1, rows // self.small_group) * self.small_group  # lanes are permuted, see ENTRY_TERMS in kernels/conv.cl
        return rows

    def defines(self, stem: str, transposed: bool) -> dict[str, int]:
        """What the kernels of a source ("conv" or "winograd") are compiled with for a pass, see kernels/conv.cl and tile.cl.

        Rows are the shipped ones of all its kernels, so that packing, outputs and gradient share a program; a launch
        with other rows names them.
        """
        defines = {"VEC": self.vector, "CU": self.lanes(transposed)}
        if self.small_group:
            defines["GROUP"] = self.small_group
        elif self.terms(transposed) != self.lanes(transposed):
            defines["TERMS"] = self.terms(transposed)
        if self.direct(transposed):
            defines["DIRECT"] = 1
        if self.vector > 1:
            rows = (self.shipped.tile_rows(f"{stem}_{verb}", transposed) for verb in ("gather", "weight"))
            defines |= dict(zip(("TILE_P", "TILE_E"), rows, strict=True), TILE_V=self.tile_vectors(transposed))
        return defines

    def lanes(self, transposed: bool) -> int:
        """CU: channels of an input block that are computed; fewer for images of few channels."""
        if self.small_group:
            return BLOCK
        channels = self.out_channels if transposed else self.in_channels
        return next(lanes for lanes in (1, 4, BLOCK) if channels <= lanes or lanes == BLOCK)

    def terms(self, transposed: bool) -> int:
        """TERMS: channels of an input block that an output lane sums over."""
        lanes, channels = self.lanes(transposed), self.ends(transposed)[1]
        return self.small_group or (channels if lanes < BLOCK else lanes)

    def tile_blocks(self, transposed: bool) -> int:
        """Input blocks that a tile of output channels is connected to (all of them without groups)."""
        return self.connected_blocks(transposed, self.tile_channels(transposed))

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
        return -(-blocks_of(self.ends(transposed)[0]) * BLOCK // self.tile_channels(transposed))

    def packed_shape(self, transposed: bool) -> tuple[int, ...]:
        """[output tile][input block][tap][TERMS][TILE_O]."""
        terms = self.terms(transposed)
        return (self.tiles(transposed), self.tile_blocks(transposed), self.kernel**2, terms, self.tile_channels(transposed))

    @property
    def panel_blocks(self) -> int:
        """Input blocks whose weight gradient is computed together: with few taps more, to use each converted value often."""
        return max(1, 4 // self.kernel**2)

    @property
    def segments(self) -> int:
        """Parts of the batch whose weight gradients are summed apart.

        It follows from the shape alone, never from the device: the order of the sum, and so its bits, must not depend on
        where it is computed.
        """
        outs = SEGMENT_CHANNELS if self.groups == 1 else BLOCK
        panels = -(-self.out_channels // outs) * -(-self.connected_blocks(False, BLOCK) // self.panel_blocks)
        return min(self.images * self.out_height, MOST_SEGMENTS, -(-SEGMENT_PANELS // panels))

    def partial_shape(self) -> tuple[int, ...]:
        """[segment][output tile][input block][tap * TERMS][TILE_O]."""
        tiles, blocks, taps, terms, channels = self.packed_shape(False)
        return (self.segments, tiles, blocks, taps * terms, channels)


def phases_of(conv: Conv, transposed: bool) -> list[Phase]:
    """The phases of a pass, row by row: one for the forward pass, stride * stride for the gradient of the input."""
    k, s, p = conv.kernel, conv.stride, conv.padding
    if not transposed:
        return [Phase(0, 0, [Tap(i - p, j - p, i * k + j) for i in range(k) for j in range(k)])]
    return [
        Phase(row, col, [
            Tap((row + p - i) // s, (col + p - j) // s, i * k + j)
            for i in range(k) for j in range(k)
            if (row + p - i) % s == 0 and (col + p - j) % s == 0
        ])
        for row in range(s) for col in range(s)
    ]  # fmt: skip


def geometry_of(conv: Conv, transposed: bool) -> Geometry:
    """Geometry of one pass; work-groups are as small as can be, see `dpresnet.ops.conv` for others."""
    outs, ins = conv.ends(transposed)
    small = (conv.out_height, conv.out_width)
    large = (conv.height, conv.width)
    (out_height, out_width), (in_height, in_width) = (large, small) if transposed else (small, large)
    out_step, in_step = (conv.stride, 1) if transposed else (1, conv.stride)
    phases = phases_of(conv, transposed)
    rows, cols = ({getattr(t, axis) for phase in phases for t in phase.taps} for axis in ("row", "col"))
    row_step = in_step if len(rows) == 1 else 1
    col_step = in_step if len(cols) == 1 else 1
    grid_width = -(-out_width // out_step)
    geometry = Geometry(
        images=conv.images, in_blocks=blocks_of(ins), in_height=in_height, in_width=in_width,
        out_blocks=blocks_of(outs), out_height=out_height, out_width=out_width,
        grid_height=-(-out_height // out_step), grid_width=grid_width,
        out_step=out_step, in_step=in_step, phases=len(phases), taps=conv.kernel**2, row_min=min(rows), col_min=min(cols),
        patch_width=(grid_width - 1) * (in_step // col_step) + max(cols) - min(cols) + 1,
        row_step=row_step, col_step=col_step, patch_span=max(rows) - min(rows) + 1, patch_rows=0,
        group_lines=1, group_blocks=1, read_blocks=1, group_tiles=1, out_group=outs // conv.groups, in_group=ins // conv.groups,
        tile_blocks=conv.tile_blocks(transposed), segments=conv.segments,
        out_channels=outs, in_channels=ins, transposed=int(transposed), tile_channels=conv.tile_channels(transposed),
    )  # fmt: skip
    return geometry.divided(1, 1 if conv.groups == 1 else geometry.tile_blocks, 1)


def tables(conv: Conv, geometry: Geometry) -> tuple[Constant, Constant]:
    """Phases and taps as the kernels read them."""
    taps, phases = [], []
    for phase in phases_of(conv, bool(geometry.transposed)):
        phases.append((phase.row, phase.col, len(taps), len(phase.taps)))
        taps += phase.taps
    if conv.vector == 1:
        entries = [(t.row, t.index, t.col) for t in taps]
    else:
        lanes = conv.lanes(bool(geometry.transposed))
        entries = [
            (((t.row - geometry.row_min) // geometry.row_step * geometry.patch_width
              + (t.col - geometry.col_min) // geometry.col_step) * lanes, t.index)
            for t in taps
        ]  # fmt: skip
    return Constant(np.array(phases, np.int32)), Constant(np.array(entries, np.int32))


def patch_floats(conv: Conv, geometry: Geometry) -> int:
    """Floats of a patch."""
    return geometry.group_blocks * geometry.patch_rows * geometry.patch_width * conv.lanes(bool(geometry.transposed))


def gather_floats(conv: Conv, geometry: Geometry) -> list[int]:
    """Patch (unless `Conv.direct`), sums and table of conv_gather, in units of 4 bytes."""
    tile = conv.tile_rows("conv_gather", bool(geometry.transposed))
    entries = geometry.phases * -(-geometry.group_lines * geometry.grid_width // tile) * tile
    sliced = geometry.group_blocks < geometry.read_blocks
    sums = geometry.group_tiles * entries * geometry.tile_channels if sliced else 1
    copies = [] if conv.direct(bool(geometry.transposed)) else [patch_floats(conv, geometry)]
    return [*copies, sums, geometry.phases + 2 * entries]


def weight_floats(conv: Conv, geometry: Geometry) -> list[int]:
    """Patch and gradient (neither with `Conv.direct`), sums, tables of pixels and entries of conv_weight, in 4 bytes."""
    edge = conv.tile_rows("conv_weight")
    padded = -(-geometry.group_blocks * geometry.taps * conv.terms(False) // edge) * edge
    pixels = geometry.group_lines * geometry.grid_width
    sums = padded * geometry.group_tiles * geometry.tile_channels
    copies = [] if conv.direct(False) else [patch_floats(conv, geometry), pixels * geometry.tile_channels]
    return [*copies, sums, 2 * 4 * pixels, padded]


def least_local_bytes(conv: Conv) -> int:
    """Local memory of the smallest work-groups of shipped sizes, for the pass that needs most."""
    conv = conv.shipped
    gathers = [gather_floats(conv, geometry_of(conv, transposed)) for transposed in (False, True)]
    return 4 * max(map(sum, [*gathers, weight_floats(conv, geometry_of(conv, False).divided(1, 1, 1))]))
