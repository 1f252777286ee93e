"""What a job is worth: who is asked what and when, what is made of the answers, and a real run on a tiny network."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from launching import OPEN_MPI, python, remove_shared_memory, workers

from dpresnet import setup
from dpresnet.bench import __main__ as program
from dpresnet.bench import facts, ours, scaling
from dpresnet.bench.workload import Workload
from dpresnet.comm import Solo
from dpresnet.errors import Refused

WORK = Workload("resnet20", image=8, batch=2)
TINY = ["scaling", "--arch", "resnet20", "--image", "8", "--batch", "2", "--pairs", "2", "--turn", "0.05"]
OURS = {"one": 1, "apart": 2, "job": 2, "whole": 1}  # processes


def bench(*argv, env=OPEN_MPI):
    return python(["-m", "dpresnet.bench", *argv], env=env)


def test_a_whole_run(tmp_path):
    file = tmp_path / "found.json"
    done = bench(*TINY, "--bn", "local", "--wire", "bf16", "--json", file)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["date"] in done.stdout and found["machine"]["cpu"] and found["versions"]["driver"]
    assert (found["workload"]["threads"], found["arguments"]["ranks"], found["arguments"]["bucket_mb"]) == (1, 2, 25)
    results = found["results"]
    sides = results["sides"]
    assert sides.keys() == OURS.keys()
    for name, side in sides.items():
        assert [len(turn) for turn in side["turns"]] == [OURS[name]] * 2
        slowest = [max(statistics.mean(answer["seconds"]) for answer in turn) for turn in side["turns"]]
        assert side["seconds"] == slowest
        assert side["images"] == 2 * (2 if name != "one" else 1)
        assert all(("traffic" in answer) == (name == "job") for turn in side["turns"] for answer in turn)
        assert f"{1e3 * side['spread']['median']:.2f}" in done.stdout
    for name, (above, below) in {"weak": ("one", "job"), "ceiling": ("one", "apart"), "of_ceiling": ("apart", "job"),
                                 "strong": ("whole", "job")}.items():  # fmt: skip
        assert results["ratios"][name] == [a / b for a, b in zip(sides[above]["seconds"], sides[below]["seconds"], strict=True)]
        assert f"{results['spreads'][name]['median']:.3f}" in done.stdout
    assert results["ratios"]["strong_efficiency"] == [ratio / 2 for ratio in results["ratios"]["strong"]]
    assert not results["ratios"].keys() & {"ddp_weak", "against_ddp"}
    parameters = 270_000  # of ResNet-20, each of them twice on its way, half of them to the other rank
    assert all(results["traffic"][key]["least"] > 0 for key in ("comm_ms", "exposed_ms"))
    assert results["traffic"]["sent_mb"]["median"] == pytest.approx(4 * parameters / 1e6, rel=0.1), "in common memory"
    assert results["options"]["bn"] == "local" and "none" not in results["mpi"] and results["mpi"] in done.stdout


def test_a_process_that_dies_ends_the_measurement(tmp_path):
    """While all sides are there, and the others sleep."""
    command = [sys.executable, "-m", "dpresnet.bench", *TINY, "--pairs", "1000000"]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                              env=os.environ | OPEN_MPI | {"TMPDIR": str(tmp_path)})  # fmt: skip
    with parent:
        while len(found := workers(tmp_path)) < sum(OURS.values()):
            assert parent.poll() is None
            time.sleep(0.05)
        os.kill(found[-1], signal.SIGKILL)
        assert parent.wait() == 1
        assert parent.stderr.read().count("of ours ended with exit code") == 1
    remove_shared_memory()
    assert workers(tmp_path) == [] and list(tmp_path.glob("dpresnet-*")) == []


@pytest.mark.parametrize(
    ("env", "argv", "said"),
    [
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, [], "run it without a Hydra mpirun (MPICH, Intel MPI), and say --ranks 4"),
        ({"PMIX_RANK": "0"}, [], "run it without a PMIx launcher, and say --ranks 2"),
        ({}, ["--device", "none such"], "no device has that in its name"),
    ],
)
def test_refusals_in_one_line(env, argv, said):
    done = bench(*TINY, *argv, env=OPEN_MPI | env)
    assert done.returncode == 78
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_without_an_mpirun_nothing_is_begun(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(program.mpirun.__globals__["sys"], "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "")
    assert program.main(TINY) == 78
    out, err = capsys.readouterr()
    assert "there is no mpirun" in err and out == ""


def test_threads_are_for_each_process(monkeypatch):
    def threads(*argv):
        return program.workload(program.parser().parse_args(["scaling", *argv])).threads

    monkeypatch.setattr(facts.environment, "usable_cores", lambda: 8)
    assert (threads(), threads("--threads", "3")) == (1, 3)
    assert (threads("--threads", "0"), threads("--threads", "0", "--ranks", "4")) == (4, 2)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--ranks", "1"], "1: at least 2"),
        (["--bucket-mb", "0"], "0.0: above 0"),
        (["--first-bucket-mb", "nan"], "nan: above 0"),
        (["--bn", "group:2"], "choose from"),
        (["--infer"], "unrecognized"),
    ],
)
def test_wrong_flags(argv, said, capsys):
    with pytest.raises(SystemExit):
        program.parser().parse_args(["scaling", *argv])
    assert said in capsys.readouterr().err


# ---- who is asked what


class Talker:
    """A side that answers at once; ``heard`` is what all of them were asked."""

    heard: list = []  # noqa: RUF012

    def __init__(self, side, work, processes=1, mpi=False, **arguments):
        self.what, self.processes = (side, work.batch, processes, mpi, arguments), processes

    __enter__, __exit__ = (lambda self: self), (lambda self, *error: None)

    def hello(self):
        return [{"name": self.what[0], "mpi": "MPI"}] * self.processes

    def ask(self, do, **arguments):
        self.heard.append((do, *self.what, arguments))
        answers = [{"step_s": 0.1 * (1 + rank), "tuned": None, "variant": "bf16"} for rank in range(self.processes)]
        traffic = {"traffic": {"sent_mb": 1.0, "comm_ms": 2.0, "exposed_ms": 3.0}}
        busy = 0.5 if self.what[0] == "ddp" else 0.0
        run = {"seconds": [1.0], "waited_s": 1.0, "waited_cpu_s": busy} | traffic
        return answers if do == "warm" else [run] * self.processes


def test_all_sides_are_built_one_by_one_and_take_turns(monkeypatch):
    monkeypatch.setattr(scaling, "Child", Talker)
    monkeypatch.setattr(Talker, "heard", [])
    options = {"bn": "local"}
    results = scaling.measure(WORK, 3, options, ["contiguous", "bf16"], pairs=2, turn_s=1.2)
    of_ours = [("ours", 2, 1, False, {}), ("ours", 2, 3, False, {}), ("ours", 2, 3, True, options), ("ours", 6, 1, False, {})]
    theirs = [("theirs", 2, 1, False, {"variants": ["contiguous", "bf16"]}), ("ddp", 2, 3, False, {"variant": "bf16"})]
    sides = [*of_ours, *theirs]
    steps = {1: 12, 3: 4}  # the slowest process took 0.1 or 0.3 s for one
    assert Talker.heard[:6] == [("warm", *side, {}) for side in sides]
    assert Talker.heard[6:] == 2 * [("run", *side, {"steps": steps[side[2]]}) for side in sides]
    assert results["warnings"] == [f"ddp, process {i}: 50% of a core was busy while it should have slept" for i in range(3)]
    assert [side["images"] for side in results["sides"].values()] == [2, 6, 6, 6, 2, 6]


# ---- from samples to figures


def side(images, *turns, traffic=(0.0,)):
    """A turn is the seconds of a step of each process."""
    waited = {"waited_s": 1.0, "waited_cpu_s": 0.0}
    answers = [[{"seconds": [s, s], **waited, "traffic": {"sent_mb": mb, "comm_ms": 0.0, "exposed_ms": 0.0}}
                for s, mb in zip(turn, traffic * len(turn), strict=False)] for turn in turns]  # fmt: skip
    return {"name": "device", "mpi": "MPI", "images": images, "warm": [{"tuned": None, "variant": "contiguous"}],
            "turns": answers}  # fmt: skip


def test_ratios_are_those_of_the_slowest_process_round_by_round():
    """The machine is twice as slow in the second round."""
    found = {"one": side(8, [1.0], [2.0], [1.0]), "apart": side(16, [1.0, 1.25], [2.5, 2.0], [1.0, 1.0]),
             "job": side(16, [2.0, 1.0], [4.0, 4.0], [1.25, 1.25], traffic=(1.0, 3.0)), "whole": side(16, [2.0], [4.0], [2.5]),
             "ddp one": side(8, [2.0], [4.0], [2.0]), "ddp": side(16, [4.0, 4.0], [5.0, 8.0], [5.0, 5.0])}  # fmt: skip
    results = scaling.summary(found, 2)
    assert results["ratios"] == {
        "weak": [0.5, 0.5, 0.8], "ceiling": [0.8, 0.8, 1.0], "of_ceiling": [0.625, 0.625, 0.8], "strong": [1.0, 1.0, 2.0],
        "strong_efficiency": [0.5, 0.5, 1.0], "ddp_weak": [0.5, 0.5, 0.4], "against_ddp": [2.0, 2.0, 4.0]}  # fmt: skip
    assert results["spreads"]["weak"] == {"median": 0.5, "least": 0.5, "most": 0.8}
    assert results["sides"]["job"]["images_per_s"] == [8, 4, 12.8]
    assert results["traffic"]["sent_mb"]["median"] == 2.0, "the mean of the ranks"
    text = " ".join(scaling.report(results | {"options": {"bn": "sync"}}, Workload(batch=8)).split())
    assert "round 2 2000.00 2500.00 4000.00 4000.00 4000.00 8000.00 round 3" in text
    assert "strong efficiency: that by ranks 0.500 0.500..1.000" in text
    assert "each process normalises by itself, because SyncBatchNorm is for GPUs only" in text
    assert "2.0 MB sent by a rank" in text


def test_a_rank_has_images_of_its_own_and_counts_those_of_all(monkeypatch):
    class Half(Solo):
        size = 2

    sides = []
    for rank in range(2):
        monkeypatch.setattr(Half, "rank", rank)
        sides.append(ours.Ours(WORK, Half(), bn="local", bucket_mb=0.1, first_bucket_mb=0.1))
    images, drawn = sides[0]._batches[0][0], sides[0].model.pixels.augmentation.drawn
    parts = np.arange(2 * ours.BATCHES * WORK.batch).reshape(-1, WORK.batch)
    expected = [drawn(0, 0, indices, images).tobytes() for indices in parts]
    assert sorted(views.tobytes() for half in sides for *_, views in half._batches) == sorted(expected)
    assert len(set(expected)) == len(parts)
    assert not np.array_equal(sides[0]._batches[0][0], sides[1]._batches[0][0])
    assert len(sides[0].trainer.buckets) > 3 and sides[0].trainer.sync_bn.alone == sides[0].device.doubles
    counts = []
    outcome = SimpleNamespace(skipped=False)
    monkeypatch.setattr(sides[1].trainer, "step", lambda batches, count, *rest: counts.append(count) or outcome)
    sides[1].step()
    assert counts == [2 * WORK.batch]


@pytest.mark.parametrize(("rank", "order"), [(0, ["compiles", "waits"]), (2, ["waits", "compiles"])])
def test_the_first_rank_of_a_node_compiles_before_the_others(rank, order):
    heard = []
    comm = SimpleNamespace(local_rank=rank, node_barrier=lambda: heard.append("waits"), events=SimpleNamespace())
    with pytest.raises(Refused), setup.in_turn(comm):
        heard.append("compiles")
        raise Refused("all of them will")
    assert heard == order
