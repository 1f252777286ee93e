"""F(4x4, 3x3): three passes against float64 sums, within the tolerance of direct sums, on shapes that hit every remainder."""

from dataclasses import fields, replace

import numpy as np
import pytest
from harness import Bench, Mode, check_joined, device_for, each_vector, struct_in, tuned_device
from test_conv import Shape

from dpresnet import reference
from dpresnet.device import Device, choose_device
from dpresnet.ops import conv, winograd
from dpresnet.plan import Launch
from dpresnet.tiles import WinogradGather, WinogradWeight

SHAPES = [
    Shape(1, 16, 16, 1, 1, 3, 1, 1),  # a tile of which one output is used
    Shape(1, 16, 16, 4, 4, 3, 1, 1),  # exactly one tile
    Shape(2, 16, 16, 3, 2, 3, 1, 1),  # two segments, small enough for an interpreter
    Shape(2, 17, 20, 5, 7, 3, 1, 1),  # tiles that reach beyond two edges; lanes without channels
    Shape(2, 32, 16, 8, 6, 3, 1, 0),
    Shape(1, 16, 40, 3, 9, 3, 1, 2),
    Shape(3, 20, 17, 13, 10, 3, 1, 1),  # a short last group of tiles, groups that span images
    Shape(1, 144, 80, 6, 5, 3, 1, 1),  # several panels of channels, the last one short
    Shape(2, 64, 272, 4, 5, 3, 1, 1),  # output channels divided among work-groups
    Shape(5, 48, 64, 7, 7, 3, 1, 1),  # one segment per image
    Shape(37, 16, 16, 4, 3, 3, 1, 1),  # the most segments there are, 32, and more images than that
    Shape(1, 512, 32, 4, 4, 3, 1, 1),  # several chunks of input channels
    Shape(1, 128, 512, 5, 2, 3, 1, 1),  # one segment: no partial sums
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
VECTORS = Mode("fp32", "vector")


def conv_of(bench, shape):
    found = conv.conv_for(bench.plan, bench.plan.image("x", *shape.x), shape.outs, shape.kernel, *shape.window)
    assert winograd.possible(found)
    return found


@pytest.fixture(autouse=True)
def several_segments(monkeypatch):
    """Of few tiles each, so that small shapes have what large ones have."""
    monkeypatch.setattr(winograd, "SEGMENT_TILES", 1)


def gathered(bench, shape, source, w, transposed, *joined, fresh=False):
    """Backward also with another term of the gradient, and z."""
    found = conv_of(bench, shape)
    out, *z = map(bench.image, joined) if joined else [bench.out_image(shape.x if transposed else shape.y)]
    master = u = bench.array(w.ravel())
    if not fresh:
        u = bench.scratch(winograd.packed_shape(found, transposed))
        winograd.pack(bench.plan, "pack", found, master, u, transposed)
    launch = winograd.backward_data if transposed else winograd.forward
    launch(bench.plan, "conv", found, bench.image(source), u, out, *z)
    bench.run()
    return out


def weight_gradient(bench, shape, dy, x):
    dw = bench.out_array(*shape.w)
    winograd.backward_weight(bench.plan, "conv", conv_of(bench, shape), bench.image(x), bench.image(dy), dw)
    bench.run()
    return dw


def passes(shape, device=None, mode=VECTORS):
    """What the three passes leave in memory."""
    results = []
    for transposed in (False, True):
        bench = Bench(mode, device)
        source, w = bench.draw(*(shape.y if transposed else shape.x)), bench.draw(*shape.w)
        results.append(bench.stored(gathered(bench, shape, source, w, transposed)))
    bench = Bench(mode, device)
    results.append(bench.stored(weight_gradient(bench, shape, bench.draw(*shape.y), bench.draw(*shape.x))))
    return results


@each_vector
@each_shape
def test_forward(mode, shape):
    bench = Bench(mode)
    x, w = bench.draw(*shape.x), bench.draw(*shape.w)
    y = gathered(bench, shape, x, w, transposed=False)
    bench.assert_close(y, reference.conv_forward(x, w, *shape.window), w[0].size)


@each_vector
@each_shape
def test_backward_data(mode, shape):
    bench = Bench(mode)
    dy, w = bench.draw(*shape.y), bench.draw(*shape.w)
    dx = gathered(bench, shape, dy, w, transposed=True)
    bench.assert_close(dx, reference.conv_backward_data(dy, w, shape.x, *shape.window), w[:, 0].size)


@each_vector
@each_shape
def test_backward_data_joins_another_term(mode, shape):
    """Their sum where z is positive, in the place of that term."""
    check_joined(Bench(mode), shape, lambda bench, shape, dy, w, *joined: gathered(bench, shape, dy, w, True, *joined))


@each_vector
@each_shape
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_weights_that_are_not_packed(monkeypatch, mode, shape, transposed):
    monkeypatch.setattr(winograd, "LAST_LEVEL_BYTES", 0)
    monkeypatch.setattr(winograd, "FRESH_GROUPS", 1000)
    bench = Bench(mode)
    if mode.device.local_bytes < 2**19:
        pytest.skip("transformed weights do not fit in the local memory of this device, so they are always packed")
    assert winograd.fresh_groups(conv_of(bench, shape), transposed)
    source, w = bench.draw(*(shape.y if transposed else shape.x)), bench.draw(*shape.w)
    out = gathered(bench, shape, source, w, transposed, fresh=True)
    if transposed:
        bench.assert_close(out, reference.conv_backward_data(source, w, shape.x, *shape.window), w[:, 0].size)
    else:
        bench.assert_close(out, reference.conv_forward(source, w, *shape.window), w[0].size)


def test_whether_weights_are_packed_follows_from_the_shape(monkeypatch):
    """Measured sizes decide how a launch is divided, not which program computes it: programs may round differently."""
    monkeypatch.setattr(winograd, "LAST_LEVEL_BYTES", 0)
    shape, found = SHAPES[0], []
    for sizes in ({}, {"winograd_gather": WinogradGather(4, 1, 1, 32)}, {"winograd_gather": WinogradGather(8, 64, 8, 512)}):
        conv_shape = conv_of(Bench(VECTORS, tuned_device(VECTORS, sizes)), shape)
        found.append(winograd.fresh_groups(conv_shape, False))
    assert found[0] and found[0] == found[1] == found[2]


@each_vector
@each_shape
def test_backward_weight(mode, shape):
    bench = Bench(mode)
    dy, x = bench.draw(*shape.y), bench.draw(*shape.x)
    dw = weight_gradient(bench, shape, dy, x)
    bench.assert_close(dw, reference.conv_backward_weight(dy, x, shape.w, *shape.window), max(dy[:, 0].size, POINTS_OF_A_TILE))


POINTS_OF_A_TILE = 36  # a sum over fewer pixels still passes through the sums of the transforms


@each_vector
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_a_pixel_that_is_no_number_stays_in_the_tiles_that_read_it(mode, padding, transposed):
    """In place of those outside the image, tiles at its border read pixels in its first row and column."""
    shape = Shape(1, 16, 16, 10, 13, 3, 1, padding)
    bench = Bench(mode)
    source, w = bench.draw(*(shape.y if transposed else shape.x)), bench.draw(*shape.w)
    clean = bench.read(gathered(bench, shape, source, w, transposed))
    before = 2 - padding if transposed else padding  # rows that the first tile begins above the image
    tiles = np.indices(clean.shape[2:]) // winograd.OUT
    for pixel in np.ndindex(*source.shape[2:]):
        if 0 not in pixel:
            continue
        bench, spoiled = Bench(mode), source.copy()
        spoiled[0, :, pixel[0], pixel[1]] = np.nan
        found = bench.read(gathered(bench, shape, spoiled, w, transposed))
        within = np.array(pixel).reshape(2, 1, 1) + before - winograd.OUT * tiles  # place of the pixel in each output's tile
        reads = ((within >= 0) & (within < winograd.EDGE)).all(0)
        assert np.isnan(found[0, :, reads]).any()
        np.testing.assert_array_equal(found[0][:, ~reads], clean[0][:, ~reads])


@pytest.mark.parametrize("channels", [64, 512])
def test_error_is_near_that_of_direct_sums(channels):
    """Root mean square, on inputs as ReLU leaves them: the points are chosen for it."""
    shape = Shape(2, channels, 32, 16, 16, 3, 1, 1)
    bench = Bench(Mode("fp32", "vector"))
    x, w = np.maximum(bench.draw(*shape.x), 0), bench.draw(*shape.w)
    expected = reference.conv_forward(x, w, *shape.window)

    def error(y):
        return np.sqrt(np.square(bench.read(y) - expected).mean())

    transformed = error(gathered(bench, shape, x, w, transposed=False))
    bench = Bench(Mode("fp32", "vector"))
    found, y = conv_of(bench, shape), bench.out_image(shape.y)
    packed = bench.scratch(conv.packed_shape(found, False))
    conv.pack(bench.plan, "pack", found, bench.array(w), packed, False)
    conv.forward(bench.plan, "conv", found, bench.image(x), packed, y)
    bench.run()
    assert transformed < 3 * error(y)


@each_vector
def test_weights_are_rounded_to_the_storage_precision(mode):
    """One tap in the middle: of its transform, the point at 0 is the weight times the constants of that point."""
    w = np.zeros((16, 16, 3, 3))
    w[3, 5, 2, 2] = 1 / 3
    shape = Shape(1, 16, 16, 4, 4, 3, 1, 1)
    bench = Bench(mode)
    packed = bench.out_array(*winograd.packed_shape(conv_of(bench, shape), False))
    winograd.pack(bench.plan, "pack", conv_of(bench, shape), bench.array(w), packed, False)
    bench.run()
    stored = bench.stored(packed)
    assert stored[0, 35, 5, 3] == np.float32(w[3, 5, 2, 2]).astype(mode.storage)  # infinity x infinity: the last tap
    assert np.count_nonzero(stored[0, 35]) == 1


@pytest.mark.parametrize("shape", [SHAPES[6], SHAPES[7], SHAPES[10]], ids=str)
@pytest.mark.parametrize("path", ["vector", "narrow"])
@pytest.mark.parametrize(
    ("gather", "weight", "cache"),
    [
        (WinogradGather(4, 1, 1, 32), WinogradWeight(3, 8, 32), 0),
        (WinogradGather(7, 3, 3, 64), WinogradWeight(12, 24, 64), 2**40),
    ],
    ids=str,
)
def test_work_group_sizes_change_no_bit(monkeypatch, shape, path, gather, weight, cache):
    """Sizes as a file of tuned ones gives them are those that are launched."""
    mode = Mode("fp32", path)
    usual = passes(shape, mode=mode)
    monkeypatch.setattr(winograd, "LAST_LEVEL_BYTES", cache)
    others = tuned_device(mode, {"winograd_gather": gather, "winograd_weight": weight})
    for bits, tuned in zip(usual, passes(shape, others, mode), strict=True):
        np.testing.assert_array_equal(bits, tuned)
    found = conv_of(Bench(mode, others), shape)
    assert found.tile_rows("winograd_gather") == gather.rows and found.tile_rows("winograd_weight") == weight.rows
    if found.local_bytes >= 2**20:  # with less memory of its own a work-group takes fewer
        assert winograd.gather_groups(found, False).group_tiles == gather.rows * gather.tiles * (1 if cache else 2)


@pytest.mark.parametrize("shape", [SHAPES[6], Shape(20, 80, 70, 4, 3, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("facts", [{"local_bytes": 2**17 + winograd.RESERVE}, {"compute_units": 1}, {"compute_units": 64}])
def test_local_memory_and_compute_units_change_no_bit(shape, facts):
    other = type("Other", (Device,), facts)(choose_device())
    for bits, others in zip(passes(shape), passes(shape, other), strict=True):
        np.testing.assert_array_equal(bits, others)


def test_what_is_left_to_the_direct_sums():
    found = conv_of(Bench(Mode("fp32", "vector")), SHAPES[3])
    others = [{"kernel": 1, "padding": 0}, {"stride": 2}, {"groups": 2}, {"in_channels": 3}, {"vector": 1}]
    others.append({"local_bytes": 2**13})
    assert not any(winograd.possible(replace(found, **change)) for change in others)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (Shape(16, 64, 64, 4, 4, 3, 1, 1), True),
        (Shape(15, 64, 64, 4, 4, 3, 1, 1), False),  # the weights are transformed for too few tiles
        (Shape(64, 64, 64, 2, 2, 3, 1, 1), False),  # three quarters of each tile are outside
        (Shape(64, 64, 64, 4, 3, 3, 1, 0), False),  # forward: 2x1 outputs of a tile
        (Shape(64, 64, 64, 2, 1, 3, 1, 2), False),  # gradient of the input
        (Shape(64, 64, 64, 7, 7, 3, 1, 1), True),
        (Shape(64, 3, 64, 32, 32, 3, 1, 1), False),
    ],
    ids=str,
)
def test_only_many_and_well_filled_tiles_are_worth_it(shape, expected):
    bench = Bench(Mode("fp32", "vector"))
    found = conv.conv_for(bench.plan, bench.plan.image("x", *shape.x), shape.outs, shape.kernel, *shape.window)
    assert winograd.suits(found) == expected


def test_segments_are_worth_the_transform_of_their_sums(monkeypatch):
    monkeypatch.undo()
    bench = Bench(Mode("fp32", "vector"))
    shapes = [Shape(images, 16, 16, size, size, 3, 1, 1) for images, size in [(32, 4), (32, 8), (128, 32)]]
    assert [winograd.segments(conv_of(bench, shape)) for shape in shapes] == [1, 4, 32]


def test_order_of_the_weight_gradient_is_the_same_for_every_device():
    found = replace(conv_of(Bench(Mode("fp32", "vector")), SHAPES[7]), images=100)
    devices = [(8, 2**20, 2), (16, 2**18, 64)]  # lanes, bytes of local memory, compute units
    assert len({winograd.segments(replace(found, vector=v, local_bytes=b, units=u)) for v, b, u in devices}) == 1


def test_kernels_are_the_ones_expected():
    bench = Bench(Mode("fp16", "vector"))
    weight_gradient(bench, SHAPES[10], bench.draw(*SHAPES[10].y), bench.draw(*SHAPES[10].x))
    assert [f"{e.stem}_{e.verb}" for e in bench.plan if isinstance(e, Launch)] == ["winograd_weight", "winograd_reduce"]
    bench = Bench(Mode("fp16", "vector"))
    weight_gradient(bench, SHAPES[12], bench.draw(*SHAPES[12].y), bench.draw(*SHAPES[12].x))
    assert [f"{e.stem}_{e.verb}" for e in bench.plan if isinstance(e, Launch)] == ["winograd_weight"]
    assert device_for("vector").vector > 1


def test_geometry_is_the_struct_of_the_kernels():
    struct = struct_in("winograd", "Geometry")
    assert [field.name for field in fields(winograd.Geometry)] == list(struct.names)
    assert all(struct[name] == np.int32 for name in struct.names)
