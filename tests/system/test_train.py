"""Whole runs of the program, as users start it: the same bits on any number of ranks, through kills, stops and overflows.

Every run here has 4 replicas of 32 digits (12 steps an epoch, the last one short) unless it says otherwise.
"""

import json
import re
import shutil
import socket
from pathlib import Path

import h5py
import numpy as np
import pytest

from dpresnet.checkpoint import load
from dpresnet.environment import own_cores
from dpresnet.setup import claim
from tests.launching import Finished, mpirun, python

WORKER = Path(__file__).with_name("worker_train.py")
FLAGS = ("--replicas", "4", "--warmup-epochs", "1", "--epochs", "4", "--save-every-epochs", "1")


def train(ranks: int, out: Path, *flags: str, fault: str = "", base: tuple[str, ...] = FLAGS) -> Finished:
    """One run; ``ranks`` 0 is a plain process without mpirun."""
    env = {"FAULT": fault} if fault else {}
    argv = [str(WORKER)] if fault else ["-m", "dpresnet.train"]
    argv += [*base, "--out", str(out), *flags]
    return mpirun(ranks, argv, env=env, timeout=280) if ranks else python(argv, env=env, timeout=280)


def succeed(*args: object, **kwargs: object) -> dict:
    """A run that must end well; returns its result.json."""
    done = train(*args, **kwargs)
    assert done.returncode == 0, done.stderr
    return json.loads((args[1] / "result.json").read_text())


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def curve(out: Path) -> list[tuple]:
    """What must be equal between two runs: everything in the metrics but the speed."""
    speed = ("images_per_s", "slowest_rank", "slowest_ratio", "input_ms", "sent_mb", "comm_ms", "exposed_ms")
    return [tuple(sorted((k, v) for k, v in line.items() if k not in speed)) for line in metrics(out)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """30 steps, two and a half epochs, in one process without MPI."""
    out = tmp_path_factory.mktemp("runs") / "reference"
    succeed(0, out, "--steps", "30")
    return out


def sha(out: Path) -> str:
    return json.loads((out / "result.json").read_text())["params_sha256"]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_number_of_ranks_gives_the_same_bits(reference, tmp_path, ranks):
    result = succeed(ranks, tmp_path, "--steps", "30")
    assert result["params_sha256"] == sha(reference)
    assert result["ranks"] == ranks
    assert curve(tmp_path) == curve(reference)


def test_same_bits_for_many_buckets_of_replicas_that_are_no_power_of_two(tmp_path):
    base = ("--replicas", "6", "--batch", "8", "--steps", "10", "--first-bucket-mb", "0.01", "--bucket-mb", "0.1")
    results = [succeed(ranks, tmp_path / str(ranks), base=base) for ranks in (0, 2, 3)]
    assert len({result["params_sha256"] for result in results}) == 1
    assert curve(tmp_path / "0") == curve(tmp_path / "2") == curve(tmp_path / "3")


def test_arithmetic_follows_the_replicas_and_the_seed(reference, tmp_path):
    shas = {sha(reference)}
    for i, flags in enumerate([("--replicas", "2"), ("--seed", "1"), ("--bn", "local"), ("--precision", "fp32")]):
        shas.add(succeed(0, tmp_path / str(i), "--steps", "30", *flags)["params_sha256"])
    assert len(shas) == 5


def test_result_and_config_keep_the_contract(reference):
    result = json.loads((reference / "result.json").read_text())
    assert {"arch", "dataset", "precision", "test_accuracy", "test_loss", "images_per_s"} <= set(result)
    assert {"wall_s", "peak_rss_mb", "device", "params_sha256", "ranks"} <= set(result)
    assert (result["steps"], result["epochs"], result["replicas"]) == (30, 2.5, 4)
    config = json.loads((reference / "config.json").read_text())
    assert (config["replicas"], config["num_classes"], config["shortcut"]) == (4, 10, "A")
    steps = [line for line in metrics(reference) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 31))
    assert steps[11]["samples"] == 1438  # each sample of the training split once
    assert {"step", "epoch", "samples", "loss", "lr", "loss_scale", "skipped", "images_per_s"} <= set(steps[0])


@pytest.mark.parametrize(("first", "second"), [(2, 4), (4, 0)])
def test_killed_run_resumes_bit_for_bit_on_other_ranks(reference, tmp_path, first, second):
    flags = ("--steps", "30", "--save-every-steps", "5")
    killed = train(first, tmp_path, *flags, fault="kind=kill,rank=1,step=19")
    assert killed.returncode != 0
    assert killed.seconds < 60
    assert not (tmp_path / "result.json").exists()
    assert max(line["step"] for line in metrics(tmp_path)) >= 16  # beyond the checkpoint, in mid-epoch
    assert succeed(second, tmp_path, *flags, "--resume", "auto")["params_sha256"] == sha(reference)
    assert curve(tmp_path) == curve(reference)


def test_stop_request_on_one_rank_saves_on_all_and_resumes(reference, tmp_path):
    stopped = train(4, tmp_path, "--steps", "30", fault="kind=term,rank=2,step=7")
    assert stopped.returncode == 75, stopped.stderr
    steps = re.findall(r"Stopped: stopped on request after step (\d+)", stopped.stderr)
    assert steps in (["7"], ["8"])  # the signal comes during step 7; one line from all ranks together
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{int(steps[0]):08d}.h5"]
    assert succeed(2, tmp_path, "--steps", "30", "--resume", "auto")["params_sha256"] == sha(reference)
    assert curve(tmp_path) == curve(reference)


@pytest.mark.parametrize("step", [11, 12])
def test_stop_at_the_end_of_an_epoch_loses_no_line(reference, tmp_path, step):
    """The signal of step 11 or 12 is seen before or after the last step of the epoch, which is step 12."""
    stopped = train(0, tmp_path, "--steps", "30", fault=f"kind=term,step={step}")
    assert stopped.returncode == 75, stopped.stderr
    assert succeed(0, tmp_path, "--steps", "30", "--resume", "auto")["params_sha256"] == sha(reference)
    assert curve(tmp_path) == curve(reference)


def test_stop_before_the_first_step(tmp_path):
    script = "import os, signal; from dpresnet import failure, train\n"
    script += "listen = failure.StopFlag.listen\n"
    script += "failure.StopFlag.listen = lambda self: (listen(self), os.kill(os.getpid(), signal.SIGTERM))[0]\n"
    script += "train.main()"
    done = python(["-c", script, "--out", str(tmp_path)], timeout=60)
    assert done.returncode == 75
    assert "before the first step" in done.stderr


def test_best_checkpoint_is_that_of_the_best_epoch(tmp_path):
    """Whatever the interval of the others: the accuracy inside best.h5 is the highest of the metrics."""
    succeed(0, tmp_path, "--epochs", "6", "--save-every-epochs", "0")
    accuracies = [line["test_accuracy"] for line in metrics(tmp_path) if "test_accuracy" in line]
    best = load(tmp_path / "checkpoints" / "best.h5").meta["progress"]
    assert best["best_accuracy"] == max(accuracies)
    assert best["step"] == 12 * (1 + accuracies.index(max(accuracies)))


def test_finished_run_resumes_to_the_same_result(reference, tmp_path):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    result = succeed(0, tmp_path, "--steps", "30", "--resume", "auto")
    assert result["params_sha256"] == sha(reference)
    assert result["images_per_s"] is None
    assert curve(tmp_path) == curve(reference)


def test_fresh_run_puts_the_checkpoints_of_an_earlier_one_aside(reference, tmp_path):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    fresh = train(0, tmp_path, "--steps", "3")
    assert fresh.returncode == 0, fresh.stderr
    assert "are now in" in fresh.stderr
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003.h5"]
    assert (tmp_path / "checkpoints.previous" / "step-00000030.h5").exists()
    assert succeed(0, tmp_path, "--steps", "4", "--resume", "auto")["steps"] == 4


def test_second_run_in_one_folder_is_refused(tmp_path):
    with claim(tmp_path):
        done = train(2, tmp_path, "--steps", "2")
    assert done.returncode == 78
    assert done.stderr.count("another run is writing there") == 1
    assert train(2, tmp_path, "--steps", "2").returncode == 0


def test_full_disk_ends_the_run_in_one_line(tmp_path):
    """The file size limit stands for a full disk: the first save fails, and at the end one is required."""
    script = "import resource, signal; from dpresnet import checkpoint, train\n"
    script += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); save = checkpoint.save\n"
    script += "limited = lambda *a: (resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, -1)), save(*a))[1]\n"
    script += "checkpoint.save = limited; train.main()"
    done = python(["-c", script, *FLAGS, "--steps", "13", "--out", str(tmp_path)], timeout=60)
    assert done.returncode == 78, done.stderr
    assert "WARNING" in done.stderr
    assert "training goes on" in done.stderr
    assert done.stderr.count("Refused: ") == 1
    assert not list((tmp_path / "checkpoints").iterdir())


def test_overflow_on_one_rank_skips_the_step_on_all(reference, tmp_path):
    fault = "kind=overflow,replica=2,step=5"
    shas = {succeed(ranks, tmp_path / str(ranks), "--steps", "30", fault=fault)["params_sha256"] for ranks in (0, 2, 4)}
    assert len(shas) == 1
    assert shas != {sha(reference)}
    lines = [line for line in metrics(tmp_path / "4") if "loss" in line]
    assert [line["skipped"] for line in lines[3:6]] == [0, 1, 1]
    assert [line["loss_scale"] for line in lines[3:6]] == [65536, 65536, 32768]
    assert lines[4]["lr"] == lines[5]["lr"]  # the schedule waited


def test_loss_scale_and_schedule_survive_a_resume(tmp_path):
    """After a skipped step, neither the scale nor the position of the schedule is what a fresh run would have."""
    fault = "kind=overflow,replica=2,step=3"
    whole = succeed(0, tmp_path / "whole", "--steps", "9", fault=fault)
    succeed(0, tmp_path / "parts", "--steps", "5", fault=fault)
    assert succeed(0, tmp_path / "parts", "--steps", "9", "--resume", "auto")["params_sha256"] == whole["params_sha256"]
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


@pytest.mark.parametrize("fault", ["kind=exception,rank=1,step=3", "kind=loader,replica=1,step=2"])
def test_exception_on_one_rank_ends_the_job(tmp_path, fault):
    calm = train(4, tmp_path / "calm", "--steps", "4")
    failed = train(4, tmp_path / "failed", "--steps", "400", fault=fault)
    assert failed.returncode not in (0, 70, 75, 78)
    assert failed.seconds < calm.seconds + 5
    text = failed.stderr
    assert "[rank 1 host " in text
    assert "Traceback" in text
    assert ("what went wrong" if "exception" in fault else "the disk fell off") in text


def test_numerical_give_up_names_the_layer_and_saves_nothing(tmp_path):
    failed = train(2, tmp_path, "--steps", "30", "--precision", "fp32", fault="kind=bad-weight,rank=1,step=3")
    assert failed.returncode == 70, failed.stderr
    assert "layer2.0.conv2" in failed.stderr
    assert "replica 2" in failed.stderr
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(("ranks", "flags", "step", "said"), [
    (3, ("--check-every", "3"), 6, "rank 1 on {host} holds other parameters than the other 2 ranks"),
    (2, ("--check-every", "0"), 8, "rank 0 on {host}, rank 1 on {host} hold different parameters, and no majority"),
])  # fmt: skip
def test_a_bit_that_flips_on_one_rank_is_found_and_not_saved(tmp_path, ranks, flags, step, said):
    """Within --check-every steps, and at the latest before the next checkpoint."""
    base = ("--replicas", str(ranks), "--batch", "8", "--steps", "12", "--save-every-steps", "4")
    done = train(ranks, tmp_path, *flags, fault="kind=flip,rank=1,step=5", base=base)
    assert done.returncode == 70, done.stderr
    text = " ".join(done.stderr.split())
    assert f"GaveUp: after step {step} {said.format(host=socket.gethostname())}" in text
    assert "last checkpoint: step 4" in text
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*.h5")] == ["step-00000004.h5"]


def test_damaged_checkpoints_are_passed_over(reference, tmp_path):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    newest, previous = sorted((tmp_path / "checkpoints").glob("step-*.h5"), reverse=True)[:2]
    raw = bytearray(newest.read_bytes())
    raw[len(raw) // 2] ^= 1
    newest.write_bytes(raw)
    resumed = train(2, tmp_path, "--steps", "30", "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert f"passed over checkpoint {newest}" in resumed.stderr.replace("\n", " ")
    assert sha(tmp_path) == sha(reference)
    for path in (tmp_path / "checkpoints").glob("*.h5"):
        path.write_bytes(path.read_bytes()[:-1])
    refused = train(2, tmp_path, "--steps", "30", "--resume", "auto")
    assert refused.returncode == 78
    assert refused.stderr.count("Refused: none of the ") == 1
    assert previous.exists()


def test_checkpoint_opens_with_plain_h5py(reference):
    newest = max((reference / "checkpoints").glob("step-*.h5"))
    with h5py.File(newest) as file:
        assert file["param/layer3.2.conv2.weight"].shape == (64, 64, 3, 3)
        assert np.isfinite(file["momentum/fc.weight"][()]).all()
        assert (file["buffer/bn1.running_var"][()] > 0).all()


REFUSED = [
    (("--replicas", "5"), 2, "--replicas 5 cannot be divided among 2 ranks: use 1, 5 ranks"),
    (("--dataset", "nowhere.h5"), 0, "'nowhere.h5'"),
    (("--dataset", "synthetic", "--image", "224", "--batch", "100000"), 0, "--batch 100000"),
    (("--num-classes", "3"), 0, "the data set digits has 10 classes"),
    (("--arch", "resnet21"), 0, "did you mean"),
    (("--device", "no such thing"), 0, "no device has that in its name"),
    (("--device", "99"), 0, "--device 99"),
    (("--resume", "nothing.h5"), 2, "nothing.h5"),
    (("--debug",), 2, "--debug runs in a single process"),
]


@pytest.mark.parametrize(("flags", "ranks", "words"), REFUSED)
def test_what_cannot_work_is_one_line_and_78(tmp_path, flags, ranks, words):
    done = train(ranks, tmp_path / "run", *flags, base=())
    assert done.returncode == 78, done.stderr
    lines = [line for line in done.stderr.splitlines() if "refused" in line.lower()]
    assert len(lines) == 1, done.stderr
    assert words in lines[0]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.h5"))


def test_other_mathematics_are_not_resumed(reference, tmp_path):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    done = train(0, tmp_path, "--steps", "40", "--resume", "auto", "--lr", "0.3")
    assert done.returncode == 78
    assert "--lr was 0.4, now 0.3" in done.stderr


def test_ranks_with_different_flags_are_told_apart(tmp_path):
    script = tmp_path / "differ.py"
    script.write_text(
        "import sys\nfrom dpresnet.launcher import launched\nfrom dpresnet import train\n"
        "sys.argv += ['--lr', str(0.1 + launched().rank)]\ntrain.main()\n"
    )
    done = mpirun(2, [str(script), "--out", str(tmp_path / "run")], timeout=60)
    assert done.returncode == 78
    assert "rank 1 on " in done.stderr


def test_debug_mode_needs_no_mpi_and_names_the_first_bad_entry(reference, tmp_path):
    script = "import sys; sys.modules['mpi4py'] = None; from dpresnet import train; train.main()"
    done = python(["-c", script, *FLAGS, "--steps", "30", "--debug", "--out", str(tmp_path / "a")], timeout=110)
    assert done.returncode == 0, done.stderr
    assert sha(tmp_path / "a") == sha(reference)
    bad = train(0, tmp_path / "b", "--steps", "30", "--debug", fault="kind=bad-weight,step=4")
    assert bad.returncode == 70
    assert "(layer2.0.conv2) of replica 0" in bad.stderr


def test_dry_run_prints_the_plan_and_trains_nothing(tmp_path):
    done = train(0, tmp_path, "--dry-run", "--arch", "resnet50", "--dataset", "synthetic", "--image", "64", "--batch", "2")
    assert done.returncode == 0, done.stderr
    for words in ("layer4.2.conv3", "exchange statistics", "bucket 1", "arena work", "parameters", "MFLOP per image"):
        assert words in done.stdout
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.limit(300)
def test_default_run_learns_the_digits(tmp_path):
    """The default settings, as 4 ranks train them (the same bits in one process), reach 98 % on the test split."""
    result = succeed(0, tmp_path, base=("--replicas", "4"))
    assert result["test_accuracy"] >= 0.98


def test_each_kernel_compiles_once_on_a_node(tmp_path):
    """The first rank of a node compiles everything before the others start: afterwards nothing new enters the cache."""
    out, cache = tmp_path / "run", tmp_path / "cache"
    cache.mkdir()
    argv = [str(WORKER), *FLAGS, "--steps", "13", "--out", str(out)]
    env = {"POCL_CACHE_DIR": str(cache), "FAULT": f"kind=list-cache,file={tmp_path / 'list'}"}
    done = mpirun(4, argv, env=env, timeout=110)
    assert done.returncode == 0, done.stderr
    compiled = {str(path): path.stat().st_mtime_ns for path in cache.rglob("*.so")}
    assert len(compiled) > 20
    assert compiled == json.loads((tmp_path / "list").read_text())


def test_ranks_keep_to_separate_cores(tmp_path):
    """Where there is only one they share it."""
    base = ("--replicas", "2", "--batch", "8", "--steps", "1")

    def cores(rank: int, *flags: str) -> tuple[set[str], bool]:
        done = train(2, tmp_path, *flags, fault=f"kind=cores,rank={rank},step=1", base=base)
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("cores")]
        library, listed = re.fullmatch(r"cores (.*?)((?: \d+)+)", line).groups()
        return set(listed.split()), "MPICH" in library

    every = set(map(str, own_cores()))
    first, second = cores(0)[0], cores(1)[0]
    assert first and second and first | second <= every
    assert not first & second if len(every) > 1 else first == second
    free, mpich = cores(0, "--no-bind")
    assert free == every if mpich else free <= every  # another MPI may bind by itself
