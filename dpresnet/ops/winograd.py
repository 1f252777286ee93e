"""3x3 convolution with stride 1 by F(4x4, 3x3): kernels/winograd.cl appended to a plan, with the interface of `ops.conv`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dpresnet.convolution import Conv, Struct
from dpresnet.device import BLOCK, LAST_LEVEL_BYTES
from dpresnet.plan import Local, Plan, Tensor, blocks_of

EDGE, OUT = 6, 4  # rows and columns of a transformed tile, and of its outputs
POINTS = EDGE * EDGE
TAPS = 9
SEGMENT_CHANNELS = 64  # of both sides: parts of the weight gradient, whose number decides that of the segments
MOST_SEGMENTS = 32  # see winograd_reduce
SEGMENT_TILES = 32  # fewer are not worth the transform of their sums
LEAST_TILES = 16  # of a batch, which are worth the transforms of the weights
LEAST_SHARE = 0.35  # of the outputs of all tiles that are needed, for F(4x4, 3x3) to be faster
FRESH_TILES = 2  # output tiles of a work-group that transforms weights itself
FRESH_GROUPS = 2  # groups of tiles at most, whose work-groups transform the same weights
RESERVE = 32 * 1024  # bytes of local memory that drivers take for themselves


@dataclass(frozen=True)
class Geometry(Struct):
    """The struct of the same name in kernels/winograd.cl, field by field."""

    tile_rows: int
    tile_cols: int
    padding: int
    group_tiles: int
    chunk: int
    panel: int
    segments: int
    segment_size: int
    out_channels: int
    in_channels: int
    transposed: int

    @property
    def tiles(self) -> int:
        """Tiles of all images."""
        return self.images * self.tile_rows * self.tile_cols

    @property
    def share(self) -> float:
        """Of the outputs of all tiles, those inside the image."""
        return self.out_height * self.out_width / (self.tile_rows * self.tile_cols * OUT * OUT)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.out_channels * self.in_channels * TAPS


def possible(conv: Conv) -> bool:
    """Whether these kernels can compute it: 3x3 with stride 1, without groups, of whole channel blocks, on vectors."""
    shape = conv.kernel == 3 and conv.stride == 1 and conv.padding <= 2 and conv.groups == 1
    wide = min(conv.in_channels, conv.out_channels) >= BLOCK
    return shape and wide and conv.vector > 1 and least_local_bytes(conv) <= conv.local_bytes


def suits(conv: Conv) -> bool:
    """Whether it is computed here: where that is possible, and tiles are many and well filled, so that it is faster.

    It follows from the shape and the kind of device, never from a timing: which algorithm computes a layer is part of its
    arithmetic.
    """
    if not possible(conv):
        return False
    passes = [geometry_of(conv, transposed) for transposed in (False, True)]
    return all(g.tiles >= LEAST_TILES and g.share >= LEAST_SHARE for g in passes)


def least_local_bytes(conv: Conv) -> int:
    """Local memory of the smallest work-groups of shipped sizes, for the pass that needs most."""
    conv = conv.shipped
    smallest = geometry_of(conv, False, conv.tile_rows("winograd_gather"), 1, 2 * conv.vector)
    return 4 * max(sum(gather_floats(smallest)), sum(weight_floats(smallest, conv.tile_rows("winograd_weight"))))


def packed_shape(conv: Conv, transposed: bool) -> tuple[int, ...]:
    """[output tile][point][input channel][TILE_O]."""
    return (conv.tiles(transposed), POINTS, blocks_of(conv.ends(transposed)[1]) * BLOCK, conv.tile_channels(transposed))


def geometry_of(conv: Conv, transposed: bool, group_tiles: int = 0, chunk: int = 0, panel: int = 0) -> Geometry:
    """Geometry of one launch."""
    outs, ins = conv.ends(transposed)
    sizes = (conv.height, conv.width), (conv.out_height, conv.out_width)
    (in_height, in_width), (out_height, out_width) = sizes[::-1] if transposed else sizes
    weights = outs * ins * TAPS
    return Geometry(
        images=conv.images, in_blocks=blocks_of(ins), in_height=in_height, in_width=in_width,
        out_blocks=blocks_of(outs), out_height=out_height, out_width=out_width,
        tile_rows=-(-out_height // OUT), tile_cols=-(-out_width // OUT),
        padding=2 - conv.padding if transposed else conv.padding,
        group_tiles=group_tiles, chunk=chunk, panel=panel,
        segments=segments(conv), segment_size=blocks_of(weights) * BLOCK,
        out_channels=outs, in_channels=ins, transposed=int(transposed),
    )  # fmt: skip


def segments(conv: Conv) -> int:
    """Parts of the batch whose weight gradients are summed apart; it follows from the shape alone, see `Conv.segments`."""
    panels = -(-conv.in_channels // SEGMENT_CHANNELS) * -(-conv.out_channels // SEGMENT_CHANNELS)
    tiles = conv.images * -(-conv.out_height // OUT) * -(-conv.out_width // OUT)
    return min(conv.images, -(-MOST_SEGMENTS // panels), max(1, tiles // SEGMENT_TILES))


def gather_floats(g: Geometry) -> list[int]:
    """Floats of the transformed input and of the products of a work-group of winograd_gather."""
    return [POINTS * (g.group_tiles * channels + BLOCK) for channels in (g.chunk * BLOCK, g.panel)]


def weight_floats(g: Geometry, edge: int) -> list[int]:
    """Floats of the transformed input, the transformed gradient and their products of a work-group of winograd_weight."""
    padded = -(-g.chunk * BLOCK // edge) * edge
    sizes = (g.group_tiles * blocks_of(padded) * BLOCK, g.group_tiles * g.panel, padded * g.panel)
    return [POINTS * (size + BLOCK) for size in sizes]


def gather_groups(conv: Conv, transposed: bool) -> Geometry:
    """Chooses how many tiles, input blocks and output channels one work-group of winograd_gather handles at once.

    Transformed input and products are to stay in the second-level cache. Weights beyond the last-level cache are read for more
    tiles at a time. None of it changes the order of any sum.
    """
    edge, lanes = conv.tile_rows("winograd_gather", transposed), conv.tile_channels(transposed)
    sizes = conv.sizes("winograd_gather", transposed)
    panel = min(max(1, sizes.panel // lanes), conv.tiles(transposed)) * lanes
    chunk = min(sizes.chunk, blocks_of(conv.ends(transposed)[1]))
    g = geometry_of(conv, transposed, (2 if streamed(conv, transposed) else 1) * sizes.tiles * edge, chunk, panel)
    while 4 * sum(gather_floats(g)) > conv.local_bytes - RESERVE and g != smaller(g, edge, lanes):
        g = smaller(g, edge, lanes)
    return g


def fresh_groups(conv: Conv, transposed: bool) -> Geometry | None:
    """How `gather` divides the work where each work-group transforms the weights that it reads, and they are not packed.

    None if that is not worth it, or does not fit in local memory. It is where packed weights would come from memory, and few
    groups of tiles transform the same ones. Whatever was measured, the sizes are the shipped ones: the kernel for it is
    compiled apart, which may change its rounding, so ranks must not differ in it.
    """
    conv = conv.shipped
    g, lanes = gather_groups(conv, transposed), conv.tile_channels(transposed)
    g = replace(g, panel=min(g.panel, FRESH_TILES * lanes))
    fits = 4 * (sum(gather_floats(g)) + fresh_floats(conv, g, transposed)) <= conv.local_bytes - RESERVE
    return g if streamed(conv, transposed) and fits and g.tiles <= FRESH_GROUPS * g.group_tiles else None


def fresh_floats(conv: Conv, g: Geometry, transposed: bool) -> int:
    """Floats of the transformed weights of an output tile and a chunk of input blocks."""
    return POINTS * (g.chunk * BLOCK * conv.tile_channels(transposed) + BLOCK)


def streamed(conv: Conv, transposed: bool) -> bool:
    """Whether packed weights come from memory."""
    return 4 * int(np.prod(packed_shape(conv, transposed))) > LAST_LEVEL_BYTES


def smaller(g: Geometry, edge: int, lanes: int) -> Geometry:
    """The next smaller work-group: of ``edge`` tiles at least, then of fewer channels."""
    if g.group_tiles > edge:
        return replace(g, group_tiles=max(edge, g.group_tiles // 2 // edge * edge))
    return replace(g, chunk=-(-g.chunk // 2), panel=max(1, g.panel // lanes // 2) * lanes)


def gather(plan: Plan, name: str, conv: Conv, x: Tensor, u: Tensor, y: Tensor, transposed: bool,
           z: Tensor | None = None) -> None:  # fmt: skip
    """Appends a launch of winograd_gather; ``u`` is packed for this direction, or the weights themselves, flat, where there are
    `fresh_groups`; ``z`` as in `ops.conv.backward_data`.
    """
    fresh = len(u.shape) == 1
    conv = conv.shipped if fresh else conv.fitting(lambda c: gather_floats(gather_groups(c, transposed)), RESERVE)
    g = fresh_groups(conv, transposed) if fresh else gather_groups(conv, transposed)
    size = (-(-g.tiles // g.group_tiles), -(-g.out_blocks * BLOCK // g.panel))
    memory = [*gather_floats(g), *([fresh_floats(conv, g, transposed)] if fresh else [])]
    args = [x, u, y, *([z] if z else []), g.constant(), *(Local(4 * n) for n in memory)]
    defines = conv.defines("winograd", transposed) | {"TILE_P": conv.tile_rows("winograd_gather", transposed)}
    defines |= ({"JOIN": 1} if z else {}) | ({"FRESH": 1} if fresh else {})
    plan.launch(name, "winograd_gather", size, args, [y], conv.flops, **defines)


def forward(plan: Plan, name: str, conv: Conv, x: Tensor, packed: Tensor, y: Tensor) -> None:
    """y [N, O, OH, OW] = x [N, C, H, W] convolved with the packed weights."""
    gather(plan, name, conv, x, packed, y, transposed=False)


def backward_data(plan: Plan, name: str, conv: Conv, dy: Tensor, packed: Tensor, dx: Tensor, z: Tensor | None = None) -> None:
    """dx [N, C, H, W] from dy [N, O, OH, OW] and the transposed working copy; ``z`` as in `ops.conv.backward_data`."""
    gather(plan, name, conv, dy, packed, dx, transposed=True, z=z)


def weight_groups(conv: Conv) -> Geometry:
    """Chooses the tiles and the panel of channels that one work-group of winograd_weight handles at once."""
    edge, lanes, sizes = conv.tile_rows("winograd_weight"), conv.tile_channels(False), conv.sizes("winograd_weight")
    chunk = min(max(1, sizes.panel // BLOCK), blocks_of(conv.in_channels))
    g = geometry_of(conv, False, 1, chunk, min(max(1, sizes.panel // lanes), conv.tiles(False)) * lanes)
    most = -(-g.images // g.segments) * g.tile_rows * g.tile_cols
    g = replace(g, group_tiles=-(-most // max(1, round(most / sizes.tiles))))  # no small rest
    while 4 * sum(weight_floats(g, edge)) > conv.local_bytes - RESERVE and g != smaller(g, 4, lanes):
        g = smaller(g, 4, lanes)
    return g


def backward_weight(plan: Plan, name: str, conv: Conv, x: Tensor, dy: Tensor, dw: Tensor) -> None:
    """dw [O, C, 3, 3] from x and dy, in fp32."""
    conv = conv.fitting(lambda c: weight_floats(weight_groups(c), c.tile_rows("winograd_weight")), RESERVE)
    g = weight_groups(conv)
    parts = -(-g.in_blocks // g.chunk), -(-g.out_blocks * BLOCK // g.panel)
    single = g.segments == 1
    partial = dw if single else Tensor(f"{name}.partial", (g.segments, g.segment_size), np.dtype(np.float32))
    edge = conv.tile_rows("winograd_weight")
    args = [x, dy, partial, g.constant(), *(Local(4 * n) for n in weight_floats(g, edge))]
    defines = conv.defines("winograd", False) | {"TILE_E": edge}
    plan.launch(name, "winograd_weight", (g.segments, *parts), args, [partial], conv.flops, **defines)
    if not single:
        sizes = np.int32(g.segments), np.int32(g.segment_size)
        plan.elementwise(f"{name}.reduce", "winograd_reduce", g.weights, [partial, dw, *sizes], [dw])


def pack(plan: Plan, name: str, conv: Conv, master: Tensor, packed: Tensor, transposed: bool) -> None:
    """Refreshes a working copy from the fp32 master weights."""
    tiles, _, channels, _ = packed.shape
    args = [master, packed, geometry_of(conv, transposed).constant()]
    plan.launch(name, "winograd_pack", (channels // BLOCK, tiles), args, [packed], **conv.defines("winograd", transposed))
