"""One mathematics on any number of ranks: random shapes of a run, and runs that go on with other ranks in mid-epoch.

The cases are drawn from fixed seeds: each is a data set of some size, V replicas, a batch, micro-batches, groups that
share statistics, a precision and two numbers of ranks.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from dpresnet import events
from dpresnet.data import Split
from dpresnet.datasets import schema
from tests.launching import python
from tests.sweeps import in_sweeps
from tests.system.test_train import curve, metrics, sha, succeed

CLASSES = 3


@dataclass(frozen=True)
class Case:
    """One drawn run."""

    seed: int
    flags: tuple[str, ...] = field(init=False)
    size: int = field(init=False)
    ranks: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        draw = random.Random(self.seed)
        replicas = draw.choice([3, 4, 5, 6, 12])
        batch, accumulate = draw.randint(1, 6), draw.choice([1, 1, 2, 3])
        divisors = [n for n in range(1, replicas + 1) if replicas % n == 0]
        bn = draw.choice(["sync", "local", f"group:{draw.choice(divisors)}"])
        precision = draw.choice(["fp16", "fp32"])
        step = replicas * batch * accumulate
        values = {
            "flags": ("--replicas", str(replicas), "--batch", str(batch), "--accumulate", str(accumulate), "--bn", bn,
                      "--precision", precision, "--seed", str(self.seed), "--epochs", "2"),
            "size": 2 * step + draw.randint(1, step),  # two whole steps and one that is most likely short
            "ranks": tuple(draw.sample([n for n in divisors if 1 < n <= 6], 2) if replicas in (4, 6, 12) else (replicas, 1)),
        }  # fmt: skip
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        return " ".join(flag for flag in self.flags if not flag.startswith("--")) + f", {self.size} images"


CASES = [Case(seed) for seed in (7, 0, 10, 12)]


def make_dataset(case: Case, folder: Path) -> Path:
    """Random images, so that every bit of every sample counts."""
    rng = np.random.default_rng(case.seed)

    def split(count: int) -> Split:
        images = rng.integers(0, 256, (count, 3, 8, 8), np.uint8)
        return Split(images, (np.arange(count) % CLASSES).astype(np.int32))

    names = tuple("abc")
    schema.write(folder / "random.h5", schema.assemble("random", "made here", "none", names, split(case.size), split(7)))
    return folder / "random.h5"


@pytest.mark.parametrize("case", [CASES[0], *in_sweeps(*CASES[1:])], ids=str)
@pytest.mark.limit(400)
def test_ranks_change_no_bit_and_a_run_goes_on_with_others(case, tmp_path):
    """Three runs of six steps: alone; on some ranks; and stopped after four of them, in mid-epoch, to go on with others."""
    base = ("--dataset", str(make_dataset(case, tmp_path)), *case.flags, "--save-every-epochs", "0", "--save-every-steps", "2")
    first, second = case.ranks
    alone, together, parted = (tmp_path / name for name in ("alone", "together", "parted"))
    result = succeed(0, alone, base=base)
    assert result["steps"] == 6
    assert metrics(alone)[-1]["step"] == 6 and max(line.get("samples", 0) for line in metrics(alone)) == 2 * case.size
    assert succeed(first, together, base=base)["params_sha256"] == sha(alone)
    assert curve(together) == curve(alone)
    succeed(first, parted, "--steps", "4", base=base)
    assert succeed(second, parted, "--resume", "auto", base=base)["params_sha256"] == sha(alone)
    assert curve(parted) == curve(alone)


def test_sixteen_bits_on_the_wire_round_alike_on_any_ranks(tmp_path):
    """However many replicas a rank has, wherever its buckets end, and whether ranks exchange messages or share memory."""
    base = ("--replicas", "4", "--batch", "8", "--steps", "6", "--bn", "local", "--first-bucket-mb", "0.01",
            "--check-every", "0")  # fmt: skip
    digests = {}
    everywhere = ((0, "25"), (2, "0.1"), (4, "0.03"))
    for wire, runs in (("fp32", everywhere[:1]), ("fp16", everywhere), ("bf16", everywhere[::2])):
        for ranks, mb in runs:
            out = tmp_path / f"{wire}-{ranks}"
            succeed(ranks, out, "--wire", wire, "--bucket-mb", mb, base=base)
            digests.setdefault(wire, []).append((sha(out), curve(out)))
        assert all(found == digests[wire][0] for found in digests[wire])
    assert len({found[0][0] for found in digests.values()}) == 3


def test_ranks_on_several_nodes_give_the_same_bits(tmp_path, monkeypatch):
    """MPICH pretends that there are two; without overlap too."""
    base = ("--replicas", "4", "--batch", "8", "--steps", "6", "--wire", "fp16", "--bucket-mb", "0.1")
    succeed(0, tmp_path / "alone", base=base)
    monkeypatch.setenv("MPIR_CVAR_NUM_CLIQUES", "2")
    for ranks, flags in ((2, ()), (4, ()), (4, ("--no-overlap", "--no-bind"))):
        out = tmp_path / f"{ranks}-{len(flags)}"
        succeed(ranks, out, *flags, base=base)
        assert sha(out) == sha(tmp_path / "alone") and curve(out) == curve(tmp_path / "alone")


def test_the_mpi_library_may_add(tmp_path):
    """Within rounding the same run; one that adds so cannot be repeated bit for bit, and says so."""
    base = ("--replicas", "4", "--batch", "8", "--steps", "3", "--precision", "fp32")
    losses = []
    for reduce in ("tree", "mpi"):
        succeed(4, tmp_path / reduce, "--reduce", reduce, base=base)
        losses.append([line["loss"] for line in metrics(tmp_path / reduce) if "loss" in line])
        used = {event.channel for event in events.read(tmp_path / reduce / "events")[0].events}
        assert ("alltoall" in used, "allreduce" in used) == (reduce == "tree", reduce == "mpi")
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    refused = python(["-m", "dpresnet.verify", tmp_path / "mpi"])
    assert refused.returncode == 78 and "only --reduce tree can be repeated" in refused.stderr


def test_lines_of_the_metrics_tell_what_communication_took(tmp_path):
    """What was sent, for how long something was under way, and for how long nothing else was done."""
    base = ("--replicas", "2", "--batch", "8", "--steps", "4")
    succeed(2, tmp_path, base=base)
    lines = [line for line in metrics(tmp_path) if "loss" in line]
    gradients = 4e-6 * 269_434  # MB; a rank sends one half to be summed, and the sum of the other half
    for line in lines:
        assert gradients < line["sent_mb"] < 1.1 * gradients
        seconds = 2 * 8 / line["images_per_s"]
        assert 0 < line["exposed_ms"] < 1e3 * seconds and 0 < line["comm_ms"] < 1e3 * seconds


def test_an_epoch_sums_up_its_own_steps(tmp_path):
    base = ("--replicas", "2", "--accumulate", "3", "--epochs", "2", "--warmup-epochs", "1", "--save-every-epochs", "0")
    succeed(0, tmp_path, base=base)
    lines = metrics(tmp_path)
    for epoch in range(2):
        steps = [line for line in lines if line["epoch"] == epoch and "loss" in line]
        seen = np.array([line["samples"] for line in steps])
        counts = np.diff(seen, prepend=1438 * epoch)
        [closed] = [line for line in lines if line["epoch"] == epoch and "train_loss" in line]
        assert counts.sum() == 1438 and counts[0] == 192
        assert np.isclose(closed["train_loss"], np.dot(counts, [line["loss"] for line in steps]) / 1438, rtol=1e-12)


def test_cases_are_varied():
    """What was drawn covers what the promise is about."""
    words = [case.flags for case in CASES]
    assert {"fp16", "fp32"} <= {word for flags in words for word in flags}
    assert len({flags[1] for flags in words}) >= 3 and {flags[5] for flags in words} >= {"1", "2", "3"}
    assert {flags[7].split(":")[0] for flags in words} == {"sync", "local", "group"}
