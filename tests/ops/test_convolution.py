"""What a convolution is computed with: channels of a block, lanes of vectors. Recorded, not run."""

from dataclasses import replace

import pytest
from harness import Bench, Mode
from test_conv import Shape, conv_of, launches_of, recorded

from dpresnet.device import BLOCK
from dpresnet.plan import Launch


@pytest.mark.parametrize(
    ("channels", "lanes", "terms"), [(1, 1, 1), (2, 4, 2), (3, 4, 3), (4, 4, 4), (5, BLOCK, BLOCK), (20, BLOCK, BLOCK)]
)
@pytest.mark.parametrize("window", [(3, 2, 1), (7, 2, 3)], ids=str)  # first layers: deep, ImageNet
def test_missing_channels_are_not_multiplied(channels, lanes, terms, window):
    """Three channels lie in four lanes of a patch; the fourth has no weights."""
    mode, shape = Mode("fp16", "vector"), Shape(2, channels, 64, 15, 14, *window)
    conv, few = conv_of(Bench(mode), shape), replace(shape, ins=64, outs=channels)
    blocks, taps = -(-channels // BLOCK), window[0] ** 2
    assert conv.packed_shape(False)[1:4] == (blocks, taps, terms)
    assert conv.partial_shape()[3] == taps * terms
    launches = [launch for bench in recorded(mode, shape) for launch in bench.plan if isinstance(launch, Launch)]
    launches = [launch for launch in launches if launch.verb in ("gather", "weight")]
    backwards = launches_of(recorded(mode, few)[1], "gather")[0]  # with few channels of the output
    defines = [dict(launch.defines) for launch in (*launches, backwards)]
    first = (lanes, terms)
    assert [(d["CU"], d.get("TERMS", d["CU"])) for d in defines] == [first, (BLOCK, BLOCK), first, first]


@pytest.mark.parametrize(
    ("shape", "most"),
    [
        (Shape(2, 3, 32, 9, 8, 3, 2, 1), (16, 16, 16)),
        (Shape(2, 3, 64, 9, 8, 7, 2, 3), (16, 16, 16)),
        (Shape(2, 64, 48, 5, 4, 1), (16, 16, 16)),
        (Shape(2, 32, 32, 5, 4, 3, 1, 1, 8), (16, 16, 8)),  # groups of four: permutations of lanes cost less
        (Shape(2, 64, 64, 5, 4, 3, 1, 1, 8), (8, 8, 8)),  # groups of eight: one value for all lanes
        (Shape(2, 64, 64, 5, 4, 3, 1, 1, 4), (16, 16, 16)),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["vector", "narrow", "scalar"])
def test_vectors_are_as_wide_as_the_device_has_them(shape, most, path):
    mode = Mode("fp16", path)
    for bench, verb, wide in zip(recorded(mode, shape), ("gather", "gather", "weight"), most, strict=True):
        assert dict(launches_of(bench, verb)[0].defines)["VEC"] == min(mode.device.vector, wide)


@pytest.mark.parametrize("channels", [1, 2, 4, 8])
def test_small_groups_multiply_nothing_with_zero(channels):
    """Only the channels of a group are in the packed weights and in the sums of the weight gradient."""
    mode, shape = Mode("fp16", "vector"), Shape(2, 32, 32, 6, 5, 3, 1, 1, 32 // channels)
    for bench, verb in zip(recorded(mode, shape), ("gather", "gather", "weight"), strict=True):
        (launch,) = launches_of(bench, verb)
        assert dict(launch.defines)["GROUP"] == channels
    conv = conv_of(Bench(mode), shape)
    assert conv.packed_shape(False) == conv.packed_shape(True) == (2, 1, 9, channels, BLOCK)
    assert conv.partial_shape()[3:] == (9 * channels, BLOCK)
