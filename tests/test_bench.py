"""The measurements: what they compute from samples, what they refuse, and one real run of each on a tiny network."""

import json
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from dpresnet.bench import __main__ as program
from dpresnet.bench import facts, layers, memory, ops, ours, step
from dpresnet.bench.peaks import Probes
from dpresnet.bench.workload import Layer, Workload
from dpresnet.device import Device, choose_device
from dpresnet.errors import Refused
from dpresnet.plan import Constant, Launch, Tensor

FP32 = np.dtype(np.float32)
TINY_WORK = Workload("resnet20", image=8, batch=4)
TINY = ["--arch", "resnet20", "--image", "8", "--batch", "4"]


def bench(*argv, folder):
    """The JSON facts of a real run, and what it printed."""
    file = folder / "found.json"
    command = [sys.executable, "-m", "dpresnet.bench", *argv, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


def assert_whence(found, command, printed, lanes=0):
    """Machine, versions, commit, date and arguments are there; the device with its vectors in a line of its own."""
    assert found["machine"]["cpu"]
    assert found["machine"]["cores"] >= 1
    assert found["versions"].keys() >= {"python", "dpresnet", "numpy", "pyopencl", "driver"}
    device = Device(choose_device(), vector=lanes)
    assert found["versions"]["driver"] == device.name_with_lanes
    assert found["versions"]["driver"] in printed.splitlines()
    assert (found["commit"] is None) == (not (facts.CHECKOUT / ".git").exists())
    assert found["date"][:2] == "20"
    assert found["arguments"]["command"] == command
    assert found["workload"]["arch"] == "resnet20"


# ---- real runs


def test_step_alone(tmp_path):
    found, printed = bench("step", *TINY, "--pairs", "3", "--turn", "0.05", folder=tmp_path)
    assert_whence(found, "step", printed)
    side, results = found["results"]["sides"]["ours"], found["results"]
    assert "ratio" not in results and "theirs" not in results["sides"]
    assert side["images_per_s"] == [4 * len(t["seconds"]) / sum(t["seconds"]) for t in side["turns"]]
    assert side["spread"]["least"] <= side["spread"]["median"] <= side["spread"]["most"]
    profile = side["overhead"]
    assert all(0 < kernels < wall for kernels, wall in zip(profile["kernels_s"], profile["wall_s"], strict=True))
    assert 0 <= profile["exchange_share"] < profile["share"] < 1
    assert (profile["exchange_share"] == 0) == Device(choose_device()).doubles, "one replica agrees with nobody"
    assert profile["launches"] > 200
    assert f"{side['spread']['median']:.1f}" in printed
    assert results["tuned"] == {"file": None, "entries": 0} and "tile sizes: as shipped" in printed


def test_inference(tmp_path):
    found, printed = bench("step", *TINY, "--infer", "--vector", "1", "--pairs", "1", "--turn", "0.01", folder=tmp_path)
    assert_whence(found, "step", printed, lanes=1)
    assert found["results"]["sides"]["ours"]["images_per_s"][0] > 0
    assert printed.count("evaluation forward") == 1


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_ops(tmp_path, precision):
    found, printed = bench("ops", *TINY, "--rounds", "2", "--precision", precision, folder=tmp_path)
    assert_whence(found, "ops", printed)
    results, rows = found["results"], found["results"]["rows"]
    assert results["tuned"] == {"file": None, "entries": 0} and "tile sizes: as shipped" in printed
    assert {row["plan"] for row in rows} == {"train", "check", "update"}
    assert len(rows) == results["step"]["launches"]
    lost = [row["lost_s"] for row in rows]
    assert lost == sorted(lost, reverse=True)
    lost = [kernel["lost_s"] for kernel in results["kernels"]]
    assert lost == sorted(lost, reverse=True) and len(lost) > 9
    for row in rows:
        assert len(row["seconds"]) == len(row["shares"]) == 2
        most = 4.8 if row["kernel"].startswith("winograd_") else 1.2  # flops are counted as those of direct sums
        assert all(0 < share <= most for share in row["shares"])
        assert row["limit"] == ("fma" if row["flops"] else "cache")
        assert row["name"] in printed
    assert sum(k["seconds"] for k in results["kernels"]) == pytest.approx(results["sum_s"])
    assert sum(k["launches"] for k in results["kernels"]) == len(rows)
    assert sum(k["of_sum"] for k in results["kernels"]) == pytest.approx(1)
    kernels = {"conv_gather", "conv_weight", "conv_weight_reduce", "winograd_gather", "winograd_weight", "winograd_reduce"}
    convolutions = sum(row["median_s"] for row in rows if row["kernel"] in kernels)
    assert results["outside_convolutions"]["of_sum"] == pytest.approx(1 - convolutions / results["sum_s"])
    assert all(len(samples) >= 8 for samples in results["peaks"]["fma"]["samples"])


def test_streams_are_through_memory_that_has_been_written():
    probes = Probes(Device(choose_device()))
    probes.device.finish()
    for array in probes._arrays:
        array.pull(0, array.nbytes)
        assert np.all(array.view(0, (array.nbytes // 4,), np.float32) == 1), "untouched pages would be read from the cache"


def test_layers_alone(tmp_path):
    found, printed = bench("layers", *TINY, "--pairs", "2", "--turn", "0.001", "--precision", "fp16", folder=tmp_path)
    assert_whence(found, "layers", printed)
    results = found["results"]
    assert [row["count"] for row in results["rows"]] == [1, 6, 1, 5, 1, 5]
    for row in results["rows"]:
        assert str(Layer(**row["layer"])) in printed
        for direction in ("forward", "backward"):
            assert "ratio" not in row[direction]
            assert len(row[direction]["seconds"]["ours"]) == 2 and min(row[direction]["seconds"]["ours"]) > 0
    assert results["peer"] is None and "PyTorch" not in printed


def test_ops_of_inference(tmp_path):
    found, _ = bench("ops", *TINY, "--infer", "--rounds", "1", folder=tmp_path)
    assert {row["plan"] for row in found["results"]["rows"]} == {"evaluate"}


def test_memory(tmp_path):
    found, printed = bench("memory", *TINY, "--runs", "2", "--steps", "1", folder=tmp_path)
    assert_whence(found, "memory", printed)
    side = found["results"]["sides"]["dpresnet"]
    assert len(side["peaks"]) == 2
    assert sum(side["parts"].values()) in side["peaks"]
    assert side["parts"].keys() >= {"libraries", "parameter", "momentum", "gradient", "work", "rest"}
    assert 20 * 2**20 < side["parts"]["libraries"] < side["spread"]["least"]
    assert side["parts"]["parameter"] >= 4 * 270_000  # parameters of ResNet-20
    assert "ratio" not in found["results"]
    assert "libraries" in printed


# ---- the command line


def test_stem_follows_the_image_and_threads_the_cores():
    def work(*argv):
        return program.workload(program.parser().parse_args(["step", *argv]))

    assert (work().stem, work("--image", "224").stem) == ("cifar", "imagenet")
    assert work("--image", "224", "--stem", "deep").stem == "deep"
    assert work().threads == facts.environment.usable_cores()
    assert work("--threads", "3", "--infer") == Workload(threads=3, infer=True)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "required"),
        (["step", "--variants", "fast"], "'fast': use contiguous, or words of channels_last, compile, bf16"),
        (["step", "--pairs", "0"], "0: at least 1"),
        (["ops", "--against", "torch"], "unrecognized"),
        (["layers", "--infer"], "unrecognized"),
        (["layers", "--variants", "bf16"], "unrecognized"),
        (["memory", "--infer"], "unrecognized"),
        (["step", "--arch", "resnet19"], "resnet18"),
    ],
)
def test_wrong_flags(argv, said, capsys):
    with pytest.raises(SystemExit):
        program.parser().parse_args(argv)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["step", "--against", "torch"], "PyTorch is not installed here: pip install 'dpresnet[bench]'"),
        (["layers", "--against", "torch"], "PyTorch is not installed here: pip install 'dpresnet[bench]'"),
        (["memory", "--against", "torch"], "PyTorch is not installed here: pip install 'dpresnet[bench]'"),
        (["ops", "--png", "ops.png"], "matplotlib is not installed here: pip install 'dpresnet[bench]'"),
        (["step", "--json", "/none/such.json"], "--json /none/such.json: there is no folder /none"),
        (["step", "--threads", "-1"], "--threads -1: at least 1"),
    ],
)
def test_refusals_come_first_in_one_line(argv, said, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert program.main(argv) == 78
    out, err = capsys.readouterr()
    assert said in err
    assert err.count("\n") == 1
    assert out == ""


# ---- from samples to figures


def turn(*seconds, waited=1.0, cpu=0.0, skipped=0):
    return {"seconds": list(seconds), "waited_s": waited, "waited_cpu_s": cpu, "skipped": skipped}


def two_sides(ours_turns, theirs_turns):
    return {"theirs": {"name": "PyTorch", "variant": "contiguous", "variants": {"contiguous": 1.0}, "turns": theirs_turns},
            "ours": {"name": "device", "turns": ours_turns}}  # fmt: skip


def test_ratios_are_taken_pair_by_pair():
    """The machine is twice as slow in the second pair; the ratio of medians would be 1.75, that of pairs is 2."""
    found = two_sides([turn(0.5), turn(1.0, 1.0), turn(0.5)], [turn(1.0), turn(2.0), turn(0.75)])
    results = step.summary(found, Workload(batch=8))
    assert results["ratios"] == [2.0, 2.0, 1.5]
    assert results["ratio"] == {"median": 2.0, "least": 1.5, "most": 2.0}
    assert results["sides"]["ours"]["images_per_s"] == [16, 8, 16]
    text = step.report(results, Workload(batch=8))
    assert "2.00 x PyTorch (1.50 to 2.00 x), median of 3 pairs" in text
    assert " ".join(text.split()).count("pair 2 4.0 8.0 2.00 x pair 3") == 1


def test_layers_are_compared_pair_by_pair_and_added_up_as_often_as_they_occur():
    layer = vars(Layer(1, 16, 32, 8, 8, 3, 2, 1, 4, False))

    def part(theirs, ours):
        return {"seconds": {"theirs": theirs, "ours": ours}, "variant": "contiguous"}

    rows = [{"layer": layer, "count": 3, "forward": part([2.0, 6.0, 4.0], [1.0, 2.0, 4.0]), "backward": part([1.0], [2.0])},
            {"layer": layer, "count": 1, "forward": part([1.0], [1.0]), "backward": part([4.0], [1.0])}]  # fmt: skip
    found = layers.summary(rows)
    assert found["rows"][0]["forward"]["ratios"] == [2.0, 3.0, 1.0]
    assert found["rows"][0]["forward"]["ratio"] == {"median": 2.0, "least": 1.0, "most": 3.0}
    assert found["totals"] == {"forward": {"theirs": 13.0, "ours": 7.0}, "backward": {"theirs": 7.0, "ours": 7.0}}
    found |= {"peer": "PyTorch 2", "device": "d", "tuned": None, "pairs": 3, "warnings": ["hm"]}
    text = layers.report(found, Workload())
    lines = [" ".join(line.split()) for line in text.splitlines()]
    name = "3x3/2 16 to 32 of 8x8, 4 groups"
    assert f"{name} 3 4000.000 2000.000 2.00 x 1.00..3.00 1000.000 2000.000 0.50 x 0.50..0.50" in lines
    assert "all of the network 4 13000.0 7000.0 1.86 x 7000.0 7000.0 1.00 x" in lines
    assert lines[-2] == f"slower than PyTorch: {name} backward"
    assert lines[-1] == "WARNING: hm"


def test_layers_tell_who_spins_and_who_refuses(monkeypatch):
    monkeypatch.setattr(layers, "Child", Talker)
    results = layers.measure(TINY_WORK, True, pairs=2, turn_s=0.01)
    assert results["warnings"] == ["their layers: 50% of a core was busy while it should have slept"]
    assert results["rows"][0]["backward"]["seconds"] == {"theirs": [1.0, 1.0], "ours": [1.0, 1.0]}
    with pytest.raises(Refused, match="no device has that in its name"):
        monkeypatch.undo()
        layers.measure(Workload(device="none such"), False, pairs=1, turn_s=0.01)


class Talker:
    """A child that answers at once; PyTorch's is said to have computed for half of the time that it waited."""

    def __init__(self, side, work, **arguments):
        self.side = side

    __enter__, __exit__ = (lambda self: self), (lambda self, *error: None)

    def hello(self):
        return [{"name": self.side}]

    def ask(self, do, **arguments):
        if do == "layers":
            layer = vars(Layer(1, 16, 32, 8, 8, 3, 2, 1, 1, False))
            return [{"layers": [{"layer": layer, "count": 2}], "tuned": None}]
        waited = {"waited_s": 1.0, "waited_cpu_s": 0.5 if self.side == "their layers" else 0.0}
        return [{"seconds": {"forward": 1.0, "backward": 1.0}} if do == "prepare" else {"seconds": 1.0, **waited}]


def test_a_side_that_spins_and_steps_without_update_are_told():
    spins = [turn(1.0, waited=10, cpu=5), turn(1.0, waited=10, cpu=1)]
    results = step.summary(two_sides([turn(1.0), turn(1.0, skipped=1)], spins), Workload())
    assert results["warnings"] == [
        "PyTorch: 10% of a core was busy while it should have slept",
        "device: the loss scaler dropped 1 of the timed steps, which so lack the update",
    ]


def test_clocks_run_until_the_device_is_done(monkeypatch):
    """A step takes 1 s until it returns, and the update that it leaves behind 10 s more."""
    now = [0.0]
    monkeypatch.setattr(ours.time, "perf_counter", lambda: now[0])
    side = ours.Ours.__new__(ours.Ours)
    side.comm = ours.Solo()
    side.step = lambda: bool(now.__setitem__(0, now[0] + 1))
    side.device = SimpleNamespace(finish=lambda: now.__setitem__(0, now[0] + 10))
    side.profiling, side._after_exchanges = lambda: nullcontext([]), set
    assert side.run(3) == {"seconds": [1, 1, 11], "skipped": 0}
    assert side.overhead(2)["wall_s"] == [11, 11]


def test_overhead_is_what_kernels_leave():
    samples = {"wall_s": [1.0, 2.0, 4.0], "kernels_s": [0.9, 1.9, 3.0], "thread_s": [0.1, 0.1, 0.1],
               "exchanges_s": [0.01, 0.02, 0.04], "launches": 3}  # fmt: skip
    profile = step.overhead(samples)
    assert profile["share"] == pytest.approx(0.1)
    assert profile["thread_share"] == pytest.approx(0.05)
    assert profile["exchange_share"] == pytest.approx(0.01)


def test_gaps_belong_to_the_launch_behind_them():
    spans = [(0, 1), (3, 4), (4, 6), (7, 8)]
    assert ours.gaps_before({20, 40}, [10, 20, 30, 40], spans) == 2 + 1
    assert ours.gaps_before({10, 30}, [10, 20, 30, 40], spans) == 0


def test_spans_that_overlap_count_once():
    assert ours.covered([(5, 6), (0, 2), (1, 3), (1, 1.5)]) == 4
    assert ours.covered([]) == 0


def sample(seconds, fma=((0, 100.0), (1, 400.0), (2, 200.0)), memory=10.0, cache=40.0):
    return ops.Round(seconds, list(fma), memory, cache)


def test_a_launch_is_compared_with_the_better_probe_beside_it():
    found = sample([])
    assert [found.peak(i, "fma") for i in (0, 1, 2)] == [400, 400, 200]
    assert (found.peak(1, "memory"), found.peak(1, "cache")) == (10, 40)
    assert sample([], fma=[(0, 3.0), (9, 2.0), (20, 1.0)]).peak(12, "fma") == 2


def tensor(elements, home="work"):
    return Tensor("", (elements,), FP32, home)


def launch(kernel, args, writes, flops=0):
    return Launch("name", *kernel.split("_", 1), (1,), tuple(args), tuple(writes), flops=flops)


def test_bytes_that_a_launch_touches():
    a, b, table = tensor(100), tensor(50), Constant(np.zeros(3, np.int32))
    assert ops.touched(launch("residual_add", [a, b, np.int32(3), table, a], [b])) == 4 * 150 + 12
    assert ops.touched(launch("optimizer_sgd", [a, b], [b])) == 4 * 200


def test_rows_know_their_limit():
    a = tensor(250)
    counted = ops.row(0, launch("conv_gather", [a], [a], flops=800), "train", [sample([4.0]), sample([2.0])], 1000)
    assert (counted.limit, counted.shares, counted.median_s, counted.rate) == ("fma", [0.5, 1.0], 3.0, 800 / 3)
    assert counted.lost_s == pytest.approx(0.75)
    fits = ops.row(0, launch("residual_add", [a], [a]), "train", [sample([50.0])], 1000)
    assert (fits.limit, fits.share) == ("cache", 0.5)
    exceeds = ops.row(0, launch("residual_add", [a], [a]), "train", [sample([50.0])], 999)
    assert (exceeds.limit, exceeds.share, exceeds.lost_s) == ("memory", 2.0, 0.0)


def test_memory_adds_up_to_the_median_peak():
    samples = [{"name": "x", "imported": 10, "parts": {"work": 20}, "peak": peak} for peak in (99, 50, 40)]
    side = memory.split(samples)
    assert side["parts"] == {"libraries": 10, "work": 20, "rest": 20}
    assert side["spread"] == {"median": 50, "least": 40, "most": 99}


# ---- where and when


def test_commit_says_when_the_checkout_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "CHECKOUT", tmp_path)
    assert facts.commit() is None

    def git(*argv):
        author = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", tmp_path, *author, *argv], check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    clean = facts.commit()
    assert len(clean) >= 7 and "dirty" not in clean
    (tmp_path / "file").write_text("2")
    assert facts.commit() == f"{clean}-dirty"


def test_caches_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "CACHES", tmp_path)
    for index, (level, kind, size) in enumerate([("1", "Data", "32K"), ("1", "Instruction", "64K"), ("3", "Unified", "4M")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{value}\n")
    (tmp_path / "index9").mkdir()
    assert facts.caches() == {"L1d": 2**15, "L1i": 2**16, "L3": 2**22}


def test_columns_line_up():
    assert facts.table(("a", "bb"), [("long", "1"), ("x", "222")]) == "a      bb\nlong    1\nx     222"
