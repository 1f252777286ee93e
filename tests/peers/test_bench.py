"""The side that speed is compared with: it computes the same step, runs in the comparison, and everything found is drawn."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from judge import random_walk
from launching import sleeps_between_turns
from problems import Case

import dpresnet
from dpresnet import reference
from dpresnet.bench import layers, picture
from dpresnet.bench.child import Child
from dpresnet.bench.their_layers import Single, TheirLayers
from dpresnet.bench.theirs import Theirs, Variant
from dpresnet.bench.workload import Layer, Sgd, Workload

TINY = ["--arch", "resnet20", "--image", "8", "--batch", "4"]
WORK = Workload("resnet20", image=8, batch=4)
IMAGENET = Workload("resnet20", stem="imagenet", image=32, batch=4)


@pytest.mark.parametrize("work", [WORK, IMAGENET], ids=str)
@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
def test_both_sides_take_the_same_step(work, name):
    """The losses of two steps and the last layer after them, from the same weights and images."""
    theirs, sgd = Variant(work, name), Sgd()
    shape = (3, work.image, work.image)
    net = dpresnet.Network(work.arch, num_classes=work.classes, image=shape, batch=work.batch, precision="fp32", stem=work.stem)
    net.load_state_dict({key: value.numpy() for key, value in theirs.net.state_dict().items()})
    before = theirs.net.fc.weight.detach().numpy().copy()
    images, labels = theirs.images.numpy(), theirs.labels.numpy()
    tolerance = 10 * random_walk(Case(work.arch, shape, work.batch, options={"stem": work.stem}))  # some layers in a row
    for _ in range(2):
        loss = net.train_step(images, labels, lr=sgd.lr, momentum=sgd.momentum, weight_decay=sgd.weight_decay)
        assert float(theirs.step()) == pytest.approx(loss, rel=tolerance)
    after = theirs.net.fc.weight.detach().numpy()
    change = np.abs(after - before).max()
    np.testing.assert_allclose(net.state_dict()["fc.weight"], after, rtol=0, atol=tolerance * change)


def test_inference_is_that_of_evaluation():
    """It uses running statistics, which stay as they are: an image's logits do not depend on the others."""
    theirs = Variant(Workload("resnet20", image=8, batch=4, infer=True), "contiguous")
    together = theirs.step()
    theirs.images = theirs.images[:1]
    assert not together.requires_grad
    torch.testing.assert_close(theirs.step(), together[:1], rtol=1e-5, atol=1e-5)


def test_the_fastest_variant_stays(monkeypatch):
    side = Theirs(WORK, ["contiguous", "channels_last", "bf16"])
    slow = {"contiguous": 0.3, "channels_last": 0.1, "bf16": 0.2}
    monkeypatch.setattr(Variant, "run", lambda self, steps: [slow[self.name]] * steps)
    warm = side.warm()
    assert (warm["variant"], warm["step_s"], warm["variants"]) == ("channels_last", 0.1, slow)
    assert side.run(2) == {"seconds": [0.1, 0.1]}


LAYERS = [
    Layer(2, 3, 8, 9, 8, kernel=7, stride=2, padding=3, groups=1, first=True),
    Layer(2, 32, 16, 6, 6, kernel=3, stride=1, padding=1, groups=8, first=False),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("variant", ["contiguous", "channels_last"])
def test_their_layer_is_the_convolution(layer, variant):
    single = Single(layer, variant)
    x, w, dy = (array.detach().numpy() for array in (single.x, single.weight, single.dy))
    how = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
    dw, *dx = single.backward()
    pairs = [(single.forward(), reference.conv_forward(x, w, **how))]
    pairs.append((dw, reference.conv_backward_weight(dy, x, w.shape, **how)))
    pairs += [(found, reference.conv_backward_data(dy, w, x.shape, **how)) for found in dx]
    assert len(dx) == (not layer.first)
    for found, expected in pairs:
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_fastest_format_of_each_direction_stays(monkeypatch):
    slow = {("contiguous", "forward"): 0.3, ("channels_last", "forward"): 0.1, ("contiguous", "backward"): 0.2,
            ("channels_last", "backward"): 0.4}  # fmt: skip
    monkeypatch.setattr(Single, "__init__", lambda self, layer, variant: setattr(self, "variant", variant))
    monkeypatch.setattr(Single, "run", lambda self, direction, calls: slow[self.variant, direction] if calls > 1 else 1e-3)
    side = TheirLayers(WORK, layers.VARIANTS)
    ready = side.prepare(vars(LAYERS[0]))
    assert ready["seconds"] == {"forward": 0.1, "backward": 0.2}
    assert ready["variant"] == {"forward": "channels_last", "backward": "contiguous"}
    assert (side.run("forward", 2), side.run("backward", 2)) == ({"seconds": 0.1}, {"seconds": 0.2})


def bench(*argv, folder):
    """JSON facts, what was printed, and the size in pixels of the picture of a real run."""
    json_file, png = folder / "found.json", folder / "found.png"
    command = [sys.executable, "-m", "dpresnet.bench", *argv, "--json", str(json_file), "--png", str(png)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    header = png.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return json.loads(json_file.read_text()), done.stdout, struct.unpack(">II", header[16:])


def test_step_against_torch(tmp_path):
    found, printed, pixels = bench("step", *TINY, "--against", "torch", "--pairs", "3", "--turn", "0.05", folder=tmp_path)
    results = found["results"]
    theirs, ours = (results["sides"][name] for name in ("theirs", "ours"))
    assert theirs["name"].startswith("PyTorch 2")
    assert theirs["variant"] in theirs["variants"].keys() == {"contiguous", "channels_last"}
    assert results["ratios"] == [a / b for a, b in zip(ours["images_per_s"], theirs["images_per_s"], strict=True)]
    assert results["ratio"]["median"] == sorted(results["ratios"])[1]
    assert len(theirs["turns"]) == len(ours["turns"]) == 3
    assert f"{results['ratio']['median']:.2f} x PyTorch" in printed
    assert found["versions"]["torch"].startswith("2.13")
    assert min(pixels) > 500


def test_layers_against_torch(tmp_path):
    found, printed, pixels = bench("layers", *TINY, "--against", "torch", "--pairs", "3", "--turn", "0.001", folder=tmp_path)
    results = found["results"]
    for row in results["rows"]:
        for direction in ("forward", "backward"):
            part = row[direction]
            assert part["ratios"] == [a / b for a, b in zip(part["seconds"]["theirs"], part["seconds"]["ours"], strict=True)]
            assert part["ratio"]["median"] == sorted(part["ratios"])[1]
            assert part["variant"] in layers.VARIANTS
            assert f"{part['ratio']['median']:.2f} x" in printed
    assert results["peer"].startswith("PyTorch 2")
    assert min(pixels) > 400
    chart = picture.layers(results, WORK).axes[0]
    drawn = [bar.get_width() for bar in chart.patches]
    assert drawn == [row[name]["ratio"]["median"] for name in ("forward", "backward") for row in results["rows"]]
    assert len(chart.get_yticks()) == len(results["rows"])


def test_scaling_against_torch(tmp_path):
    argv = ["--against", "torch", "--pairs", "2", "--turn", "0.05"]
    found, printed, pixels = bench("scaling", *TINY, *argv, folder=tmp_path)
    results = found["results"]
    alone, ddp, job = (results["sides"][name] for name in ("ddp one", "ddp", "job"))
    assert ddp["warm"][0]["variant"] == alone["warm"][0]["variant"]
    assert [len(turn) for turn in ddp["turns"]] == [2, 2] and len(results["ratios"]["weak"]) == 2
    assert results["ratios"]["ddp_weak"] == [a / b for a, b in zip(alone["seconds"], ddp["seconds"], strict=True)]
    assert results["ratios"]["against_ddp"] == [a / b for a, b in zip(ddp["seconds"], job["seconds"], strict=True)]
    assert f"DistributedDataParallel with gloo, {alone['warm'][0]['variant']}, fp32: each process normalises by" in printed
    assert min(pixels) > 500
    bars = picture.scaling(results, WORK).axes[1].patches
    spreads = results["spreads"]
    assert [bar.get_height() for bar in bars] == [1.0, *(spreads[name]["median"] for name in ("ceiling", "weak", "ddp_weak"))]


def test_processes_of_ddp_sleep_between_turns():
    with Child("ddp", WORK, 2, variant="contiguous") as child:
        sleeps_between_turns(child)


DDP = """
import sys
import torch
from dpresnet.bench.theirs import Ddp
from dpresnet.bench.workload import Workload
_, folder, rank, variant = sys.argv
side = Ddp(Workload("resnet20", image=8, batch=4), variant, int(rank), 2, f"{folder}/store")
side.run(2)
best = side._best
torch.save((best.images, best.labels, dict(best.net.named_parameters())), f"{folder}/{rank}.pt")
"""


@pytest.mark.parametrize("variant", ["contiguous", "channels_last"])
def test_processes_of_ddp_train_one_network(variant, tmp_path):
    """On the mean of the losses of both, each with images and batch statistics of its own."""
    commands = [[sys.executable, "-c", DDP, str(tmp_path), str(rank), variant] for rank in range(2)]
    assert [process.wait() for process in [subprocess.Popen(command) for command in commands]] == [0, 0]
    (images, labels, found), (others, their_labels, same) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert not torch.equal(images, others)
    alone = Variant(WORK, variant)
    before = {name: value.detach().clone() for name, value in alone.net.named_parameters()}
    for _ in range(2):
        alone.optimizer.zero_grad()
        losses = [alone.criterion(alone.net(x), y) for x, y in ((images, labels), (others, their_labels))]
        (sum(losses) / 2).backward()
        alone.optimizer.step()
    for name, value in alone.net.named_parameters():
        assert torch.equal(found[name], same[name])
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-3 * float((value.detach() - before[name]).abs().max()))


def test_memory_against_torch(tmp_path):
    found, printed, pixels = bench("memory", *TINY, "--against", "torch", "--runs", "1", "--steps", "1", folder=tmp_path)
    results = found["results"]
    peaks = {name: side["spread"]["median"] for name, side in results["sides"].items()}
    smallest = min((name for name in peaks if name != "dpresnet"), key=peaks.get)
    assert (results["compared_with"], results["ratio"]) == (smallest, peaks["dpresnet"] / peaks[smallest])
    assert peaks.keys() == {"dpresnet", "PyTorch contiguous", "PyTorch channels_last"}
    assert f"{results['ratio']:.2f} x {smallest}" in printed
    assert min(pixels) > 500


def test_every_launch_is_drawn(tmp_path):
    """Once, in one of the two charts, and every kernel has its bar."""
    found, _, _ = bench("ops", *TINY, "--rounds", "1", folder=tmp_path)
    rows = found["results"]["rows"]
    with_flops, without, bars = picture.ops(found["results"], WORK).axes
    drawn = [sum(len(group.get_offsets()) for group in chart.collections) for chart in (with_flops, without)]
    assert drawn == [sum(bool(row["flops"]) for row in rows), sum(not row["flops"] for row in rows)]
    lengths = [bar.get_width() for bar in bars.patches]
    assert sum(lengths) == pytest.approx(1e3 * found["results"]["sum_s"])
    for chart in (with_flops, without):
        (left, right), (bottom, top) = chart.get_xlim(), chart.get_ylim()
        points = [point for group in chart.collections for point in group.get_offsets()]
        assert all(left < x < right and bottom < y < top for x, y in points)
