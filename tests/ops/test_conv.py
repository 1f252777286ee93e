"""Convolution: forward, both gradients and the packed weights, on shapes chosen to hit every remainder."""

from dataclasses import astuple, dataclass, fields, replace

import numpy as np
import pytest
from harness import Bench, Mode, check_joined, each_mode, struct_in, tuned_device

from dpresnet import reference
from dpresnet.device import BLOCK, Device, choose_device
from dpresnet.ops import conv as ops
from dpresnet.plan import Launch, Local, Tensor
from dpresnet.tiles import DirectGather, DirectWeight


@dataclass(frozen=True)
class Shape:
    """One convolution."""

    images: int
    ins: int
    outs: int
    height: int
    width: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1

    def __str__(self) -> str:
        n, c, o, h, w, k, s, p, g = astuple(self)
        return f"{n}x{c}x{h}x{w}-{o}-k{k}s{s}p{p}g{g}"

    @property
    def x(self) -> tuple[int, ...]:
        return (self.images, self.ins, self.height, self.width)

    @property
    def w(self) -> tuple[int, ...]:
        return (self.outs, self.ins // self.groups, self.kernel, self.kernel)

    @property
    def y(self) -> tuple[int, ...]:
        sizes = ((size + 2 * self.padding - self.kernel) // self.stride + 1 for size in (self.height, self.width))
        return (self.images, self.outs, *sizes)

    @property
    def window(self) -> tuple[int, int, int]:
        return (self.stride, self.padding, self.groups)


SHAPES = [
    Shape(1, 1, 1, 1, 1, 1),  # as small as can be
    Shape(1, 3, 16, 8, 11, 3, 1, 1),  # few channels: 4 lanes of a block
    Shape(2, 3, 16, 15, 14, 7, 2, 3),  # the first layer for ImageNet
    Shape(2, 1, 5, 9, 6, 3, 2, 0),  # one lane
    Shape(2, 4, 5, 7, 9, 5, 1, 2),
    Shape(3, 5, 4, 6, 5, 2),  # even kernel
    Shape(1, 5, 17, 9, 7, 2, 2, 1),
    Shape(2, 16, 16, 8, 6, 3, 1, 1),
    Shape(2, 16, 32, 9, 8, 3, 2, 1),  # the stride leaves a remainder across, not down
    Shape(1, 17, 20, 7, 10, 3, 3, 0),  # the stride leaves a remainder both ways
    Shape(2, 20, 17, 10, 11, 3, 3, 2),
    Shape(1, 32, 48, 5, 6, 1),
    Shape(1, 32, 64, 1, 9, 1),  # a single segment, and whole tiles of whole blocks
    Shape(2, 32, 64, 7, 8, 1, 2),  # a projection: three of four phases of the gradient have no tap
    Shape(1, 48, 16, 8, 7, 1, 3, 1),  # windows that see only padding
    Shape(1, 4, 4, 3, 4, 2, 1, 3),  # the same, beyond every edge
    Shape(3, 64, 64, 5, 4, 3, 1, 1),
    Shape(5, 64, 64, 4, 3, 3, 1, 1),  # 4 segments of 5 images
    Shape(1, 16, 20, 5, 5, 5),  # one output pixel
    Shape(2, 20, 16, 3, 4, 7, 1, 3),  # the window is larger than the image
    Shape(2, 5, 32, 7, 6, 7, 3, 2),
    Shape(20, 16, 16, 4, 4, 3, 1, 1),  # several images to a work-group, the last one short; 20 segments
    Shape(33, 5, 3, 2, 3, 2, 1, 1),  # 33 segments
    Shape(70, 1, 1, 2, 2, 1),  # the most segments there are, 64, and more images than that
    Shape(4, 16, 144, 6, 5, 1),  # output channels divided among work-groups, the last one short
    Shape(1, 3, 17, 30, 41, 3, 1, 1),  # many groups of rows
    Shape(1, 16, 16, 3, 200, 3, 1, 1),  # one row to a work-group
    Shape(3, 80, 150, 9, 7, 1),  # panels with a remainder of blocks, lines of several images
    Shape(2, 2, 70, 7, 9, 2, 2),  # two channels
    Shape(2, 6, 10, 7, 6, 3, 1, 1, 2),
    Shape(1, 15, 15, 8, 7, 3, 1, 1, 3),  # groups that end inside a block
    Shape(3, 15, 30, 7, 8, 3, 2, 1, 3),
    Shape(2, 64, 48, 6, 5, 3, 1, 1, 4),
    Shape(2, 48, 64, 5, 6, 3, 1, 1, 2),  # groups that straddle blocks
    Shape(1, 48, 48, 4, 5, 3, 1, 0, 3),
    Shape(1, 32, 32, 9, 7, 3, 2, 1, 8),  # ResNeXt: four channels each
    Shape(1, 8, 8, 3, 4, 2, 1, 0, 2),  # small enough for oclgrind
    Shape(1, 16, 16, 3, 3, 2, 1, 0, 2),
    Shape(3, 72, 72, 6, 7, 3, 1, 1, 9),  # eight channels each, the last block half full
    Shape(2, 24, 24, 8, 5, 3, 2, 1, 12),  # two channels each
    Shape(2, 20, 20, 7, 6, 3, 1, 1, 20),  # depthwise
    Shape(1, 17, 34, 6, 7, 5, 2, 2, 17),
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def conv_of(bench: Bench, shape: Shape) -> ops.Conv:
    x = bench.plan.image("x", *shape.x)
    return ops.conv_for(bench.plan, x, shape.outs, shape.kernel, *shape.window)


def packed_weights(bench: Bench, conv: ops.Conv, w: np.ndarray, transposed: bool) -> Tensor:
    packed = bench.scratch(conv.packed_shape(transposed))
    ops.pack(bench.plan, "pack", conv, bench.array(w), packed, transposed)
    return packed


def forward(bench: Bench, shape: Shape, x: np.ndarray, w: np.ndarray) -> Tensor:
    conv, y = conv_of(bench, shape), bench.out_image(shape.y)
    ops.forward(bench.plan, "conv", conv, bench.image(x), packed_weights(bench, conv, w, False), y)
    bench.run()
    return y


def backward_data(bench: Bench, shape: Shape, dy: np.ndarray, w: np.ndarray, *joined: np.ndarray) -> Tensor:
    """Also with another term of the gradient, and z."""
    conv = conv_of(bench, shape)
    dx, *z = map(bench.image, joined) if joined else [bench.out_image(shape.x)]
    ops.backward_data(bench.plan, "conv", conv, bench.image(dy), packed_weights(bench, conv, w, True), dx, *z)
    bench.run()
    return dx


def backward_weight(bench: Bench, shape: Shape, dy: np.ndarray, x: np.ndarray) -> Tensor:
    conv, dw = conv_of(bench, shape), bench.out_array(*shape.w)
    ops.backward_weight(bench.plan, "conv", conv, bench.image(x), bench.image(dy), dw)
    bench.run()
    return dw


def passes(mode: Mode, shape: Shape, device: Device | None = None) -> list[np.ndarray]:
    """What the three passes leave in memory."""
    x, w, y = shape.x, shape.w, shape.y
    results = []
    for function, a, b in ((forward, x, w), (backward_data, y, w), (backward_weight, y, x)):
        bench = Bench(mode, device)
        results.append(bench.stored(function(bench, shape, bench.draw(*a), bench.draw(*b))))
    return results


@each_mode
@each_shape
def test_forward(mode, shape):
    bench = Bench(mode)
    x, w = bench.draw(*shape.x), bench.draw(*shape.w)
    y = forward(bench, shape, x, w)
    bench.assert_close(y, reference.conv_forward(x, w, *shape.window), w[0].size)


@each_mode
@each_shape
def test_backward_data(mode, shape):
    bench = Bench(mode)
    dy, w = bench.draw(*shape.y), bench.draw(*shape.w)
    dx = backward_data(bench, shape, dy, w)
    bench.assert_close(dx, reference.conv_backward_data(dy, w, shape.x, *shape.window), w[:, 0].size)


@each_mode
@each_shape
def test_backward_data_joins_another_term(mode, shape):
    """Their sum where z is positive, in the place of that term: also at pixels that no window reads."""
    check_joined(Bench(mode), shape, backward_data)


@each_mode
@each_shape
def test_backward_weight(mode, shape):
    bench = Bench(mode)
    dy, x = bench.draw(*shape.y), bench.draw(*shape.x)
    dw = backward_weight(bench, shape, dy, x)
    bench.assert_close(dw, reference.conv_backward_weight(dy, x, shape.w, *shape.window), dy[:, 0].size)


@each_mode
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize(
    "shape",
    [
        *(Shape(1, 15, 30, 4, 4, 2, groups=groups) for groups in (1, 3, 15)),
        Shape(1, 40, 56, 4, 4, 3),  # whole blocks and whole tiles, and a remainder of both
        Shape(1, 64, 32, 4, 4, 3),  # nothing but whole blocks and tiles: nothing lies behind the last one
        Shape(1, 56, 40, 4, 4, 1),
    ],
    ids=str,
)
def test_packed_weights_lie_where_their_layout_says(mode, transposed, shape):
    """Each stored value is the nearest the storage holds; what connects nothing is zero."""
    bench, groups, taps = Bench(mode), shape.groups, shape.kernel**2
    conv, w = conv_of(bench, shape), np.random.default_rng(1).normal(size=shape.w)
    packed = bench.out_array(*conv.packed_shape(transposed))
    ops.pack(bench.plan, "pack", conv, bench.array(w), packed, transposed)
    bench.run()

    dense = np.zeros((shape.outs, shape.ins, taps))
    for o in range(shape.outs):
        first = o // (shape.outs // groups) * w.shape[1]
        dense[o, first : first + w.shape[1]] = w[o].reshape(-1, taps)
    dense = (dense.swapaxes(0, 1) if transposed else dense).astype(np.float32).astype(mode.storage)
    tiles, blocks, _, lanes, channels = packed.shape
    assert blocks * BLOCK >= dense.shape[1], "all input blocks of these shapes belong to every tile"
    expected = np.zeros((tiles * channels, blocks * lanes, taps), np.float32)
    expected[: dense.shape[0], : dense.shape[1]] = dense
    layout = expected.reshape(tiles, channels, blocks, lanes, taps).transpose(0, 2, 4, 3, 1)
    np.testing.assert_array_equal(bench.read(packed), layout)


TILING = [
    Shape(3, 80, 150, 9, 7, 1),  # several slices, panels and lines of several images
    Shape(2, 40, 70, 7, 9, 2, 2),
    Shape(4, 1, 16, 90, 91, 3, 1, 1),
    Shape(3, 16, 144, 11, 13, 3, 2, 1),
    Shape(40, 20, 20, 5, 4, 3, 1, 1, 5),
]


@pytest.mark.parametrize("shape", TILING, ids=str)
@pytest.mark.parametrize("path", ["vector", "narrow"])
@pytest.mark.parametrize(
    ("gather", "weight", "patch_bytes"),
    [
        (DirectGather(3, 48, 4), DirectWeight(4, 1, 32, 32), ops.PATCH_BYTES),
        pytest.param(DirectGather(5, 1000, 1), DirectWeight(12, 1000, 64, 1), ops.PATCH_BYTES, marks=pytest.mark.sweep),
        (DirectGather(7, 10**6, 64), DirectWeight(6, 64, 256, 64), 4000),
        pytest.param(DirectGather(14, 384, 4), DirectWeight(8, 128, 128, 32), 0, marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_work_group_sizes_change_no_bit(monkeypatch, shape, path, gather, weight, patch_bytes):
    """Sizes as a file of tuned ones gives them are those that are launched."""
    mode = Mode("fp16", path)
    usual = passes(mode, shape)
    monkeypatch.setattr(ops, "PATCH_BYTES", patch_bytes)
    others = tuned_device(mode, {"conv_gather": gather, "conv_weight": weight})
    for bits, tuned in zip(usual, passes(mode, shape, others), strict=True):
        np.testing.assert_array_equal(bits, tuned)
    conv = conv_of(Bench(mode, others), shape)
    assert mode.device.vector == 1 or conv.tile_rows("conv_gather") == gather.rows


@pytest.mark.parametrize(
    ("gather", "weight"),
    [(DirectGather(5, 48, 4), DirectWeight(4, 1, 32, 32)),
     pytest.param(DirectGather(14, 1000, 1), DirectWeight(8, 100, 128, 1), marks=pytest.mark.sweep)],
    ids=str,
)
@pytest.mark.parametrize("path", ["vector", "narrow"])
@pytest.mark.parametrize(
    "shape",
    [TILING[0], Shape(33, 16, 16, 3, 5, 1), Shape(2, 96, 48, 8, 8, 1, groups=3), Shape(3, 40, 70, 7, 8, 1, 2)],
    ids=str,
)
def test_sums_over_images_in_place_have_the_same_bits(monkeypatch, shape, path, gather, weight):
    """Where a patch would be a copy of fp32 images, the kernels read these; otherwise, or if made to, a patch."""
    mode, results = Mode("fp32", path), []
    tuned, whole = tuned_device(mode, {"conv_gather": gather, "conv_weight": weight}), shape.stride == 1
    for in_place, patch_bytes, device in ((False, 2**19, None), (True, 2**19, None), (True, 2000, tuned)):
        with monkeypatch.context() as patched:
            if not in_place:
                patched.setattr(ops.Conv, "direct", lambda conv, transposed: False)
            patched.setattr(ops, "PATCH_BYTES", patch_bytes)
            results.append(passes(mode, shape, device))
            recordings = recorded(mode, shape)
        launches = [e for b in recordings for e in b.plan if isinstance(e, Launch) and e.verb in ("gather", "weight")]
        expected = [whole, True, whole] if in_place else [False] * 3  # a gradient has a cell for each pixel of dy
        assert mode.device.vector == 1 or ["DIRECT" in dict(e.defines) for e in launches] == expected
    for copied, direct, divided in zip(*results, strict=True):
        np.testing.assert_array_equal(copied, direct)
        np.testing.assert_array_equal(direct, divided)
    convs = [conv_of(Bench(mode), other) for other in (replace(shape, padding=1), replace(shape, kernel=3))]
    convs.append(conv_of(Bench(Mode("fp16", path)), shape))
    assert not any(conv.direct(transposed) for conv in convs for transposed in (False, True))


@pytest.mark.parametrize("shape", TILING[:-1], ids=str)
@pytest.mark.parametrize("facts", [{"local_bytes": 2**15}, {"compute_units": 1}, {"compute_units": 64}], ids=str)
def test_local_memory_and_compute_units_change_no_bit(shape, facts):
    mode, device = Mode("fp16", "vector"), type("Other", (Device,), facts)(choose_device())
    for bits, others in zip(passes(mode, shape), passes(mode, shape, device), strict=True):
        np.testing.assert_array_equal(bits, others)


def test_without_enough_local_memory_the_scalar_kernels_take_over():
    class Tiny(Device):
        local_bytes = 2**12

    mode, shape, device = Mode("fp16", "vector"), TILING[3], Tiny(choose_device())
    for bits, others in zip(passes(mode, shape), passes(mode, shape, device), strict=True):
        np.testing.assert_array_equal(bits, others)
    assert ops.Conv(*astuple(shape), 8, 2**20).vector == 8
    assert ops.least_local_bytes(ops.Conv(*astuple(shape), 8, 2**12)) > 2**12


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.images > 1], ids=str)
def test_scalar_path_adds_in_the_same_order(shape):
    """Products of fp16 values are exact in fp32, so fusing a multiplication with an addition changes nothing."""
    vector, scalar = (passes(Mode("fp16", path), shape) for path in ("vector", "scalar"))
    for bits, others in zip(vector, scalar, strict=True):
        np.testing.assert_array_equal(bits, others)


@each_shape
def test_order_of_the_weight_gradient_is_the_same_for_every_device(shape):
    many = astuple(replace(shape, images=100))
    devices = [(1, 2**15), (8, 2**20, 2), (16, 2**16, 64, "fp16")]  # lanes, bytes of local memory, compute units
    assert len({ops.Conv(*many, *device).segments for device in devices}) == 1


@each_mode
def test_vectors_use_register_tiles(mode):
    """On a CPU a work-group keeps its patch in local memory; the scalar kernels have no use for any."""
    bench, shape = Bench(mode), Shape(2, 16, 32, 8, 8, 3, 2, 1)
    forward(bench, shape, bench.draw(*shape.x), bench.draw(*shape.w))
    backward_weight(bench, shape, bench.draw(*shape.y), bench.draw(*shape.x))
    launches = [e for e in bench.plan if isinstance(e, Launch) and e.verb in ("gather", "weight")]
    assert len(launches) == 2
    for launch in launches:
        assert any(isinstance(a, Local) for a in launch.args) == (bench.plan.device.vector > 1)
    assert mode.path == "scalar" or (mode.device.vector > 1) == mode.device.host_memory


def launches_of(bench: Bench, verb: str) -> list[Launch]:
    return [e for e in bench.plan if isinstance(e, Launch) and e.verb == verb]


def recorded(mode: Mode, shape: Shape) -> list[Bench]:
    """The plans of the three passes, not run."""
    benches = [Bench(mode) for _ in range(3)]
    tensors = [(conv_of(b, shape), b.plan.image("x", *shape.x), b.plan.image("y", *shape.y)) for b in benches]
    for record, transposed, bench, (conv, x, y) in zip(
        (ops.forward, ops.backward_data), (False, True), benches[:2], tensors[:2], strict=True
    ):
        ends = (y, x) if transposed else (x, y)
        record(bench.plan, "conv", conv, ends[0], bench.scratch(conv.packed_shape(transposed)), ends[1])
    conv, x, y = tensors[2]
    ops.backward_weight(benches[2].plan, "conv", conv, x, y, benches[2].out_array(*shape.w))
    return benches


@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 32, 32, 4, 4, 1),
        Shape(1, 32, 32, 4, 4, 3, groups=2),
        Shape(1, 32, 64, 4, 4, 3, groups=8),
        Shape(1, 30, 30, 4, 4, 3, groups=10),
        Shape(1, 4, 4, 4, 4, 3),
    ],
    ids=str,
)
def test_other_convolutions_multiply_blocks(shape):
    for bench in recorded(Mode("fp16", "vector"), shape):
        assert not [e for e in bench.plan if "GROUP" in dict(e.defines)]


@pytest.mark.parametrize("kernel", [1, 3])
def test_gradient_of_a_strided_input_is_one_launch(kernel):
    bench = recorded(Mode("fp16", "vector"), Shape(2, 32, 48, 9, 8, kernel, 2, kernel // 2))[1]
    (launch,) = launches_of(bench, "gather")
    phases = launch.args[3].data
    assert phases[:, 3].tolist() == ([1, 0, 0, 0] if kernel == 1 else [1, 2, 2, 4])


def test_one_segment_needs_no_partial_sums():
    """Many channels: enough work-groups without dividing the batch, so the gradient is written at once."""
    few, many = (recorded(Mode("fp16", "vector"), Shape(2, c, c, 3, 3, 1))[2] for c in (64, 512))
    assert [len(launches_of(bench, "weight_reduce")) for bench in (few, many)] == [1, 0]
    assert launches_of(many, "weight")[0].size[0] == 1


@pytest.mark.parametrize(
    "shape", [Shape(8, 64, 64, 56, 56, 1), Shape(8, 2048, 512, 7, 7, 1), Shape(64, 512, 512, 4, 4, 3, 1, 1),
              Shape(8, 3, 64, 224, 224, 7, 2, 3), Shape(8, 128, 128, 56, 56, 3, 1, 1, 32)], ids=str
)  # fmt: skip
def test_layers_of_networks_keep_many_cores_busy(shape):
    for bench in recorded(Mode("fp16", "vector"), shape):
        for launch in launches_of(bench, "gather") + launches_of(bench, "weight"):
            assert np.prod(launch.size) >= min(32, 4 * bench.plan.device.compute_units)
            memory = sum(a.nbytes for a in launch.args if isinstance(a, Local))
            assert memory <= bench.plan.device.local_bytes


def test_operations_are_counted_once():
    """The phases of the input's gradient share the operations of the pass."""
    bench, shape = Bench(Mode("fp32", "vector")), Shape(2, 16, 32, 9, 8, 3, 2, 1)
    backward_data(bench, shape, bench.draw(*shape.y), bench.draw(*shape.w))
    images, outs, height, width = shape.y
    assert bench.plan.flops == 2 * images * height * width * outs * shape.ins * shape.kernel**2


def test_geometry_is_the_struct_of_the_kernels():
    struct = struct_in("conv", "Geometry")
    assert [field.name for field in fields(ops.Geometry)] == list(struct.names)
    assert all(struct[name] == np.int32 for name in struct.names)
