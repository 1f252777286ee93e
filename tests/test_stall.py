"""How long steps wait for their images is measured, and said where it is much."""

import json

from dpresnet.stall import INTERVAL, Stall
from tests.launching import python


def test_waiting_is_warned_of_above_a_tenth_of_the_time_of_an_interval():
    stall = Stall()
    assert [stall.add(0.1, 1.0) for _ in range(INTERVAL)] == [""] * INTERVAL  # exactly a tenth
    said = [stall.add(0.25, 1.0) for _ in range(INTERVAL)]
    assert said[:-1] == [""] * (INTERVAL - 1)
    assert said[-1].startswith("WARNING: the last 100 steps waited for their images for 25% of the time: raise --data-mb")
    assert "disk" in said[-1]
    assert stall.add(9.0, 10.0) == "" and stall.steps == 1, "each interval begins anew"


SLOW_DISK = """
import sys, time
from dpresnet import data, stall, train

class Slow(data.Split):
    def take(self, indices):
        time.sleep(0.05)
        return super().take(indices)

stall.INTERVAL = 10
original = data.load
def load(*args, **options):
    dataset = original(*args, **options)
    object.__setattr__(dataset, "train", Slow(dataset.train.images, dataset.train.labels))
    return dataset

data.load = load
train.main()
"""


def test_a_run_tells_how_long_its_steps_waited(tmp_path):
    flags = ("--replicas", "1", "--batch", "2", "--steps", "20", "--arch", "resnet20", "--out", tmp_path)
    done = python(["-c", SLOW_DISK, *flags])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("WARNING: the last 10 steps waited for their images for ") == 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    waited = [line["input_ms"] for line in lines if "loss" in line]
    assert waited[0] >= 50, "nothing was made ahead of the first step"
    assert all(0 <= ms <= 1e3 * 2 / line["images_per_s"] + 1e-3 for ms, line in zip(waited, lines, strict=False))
