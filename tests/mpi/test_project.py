"""The projection as a program: its inputs are measured, and a job checks it against its own step."""

import json

import pytest

from tests.launching import mpirun, python

TINY = ("--arch", "resnet20", "--image", "8", "--batch", "4", "--turn", "0.01", "--rounds", "2")


def test_one_process_projects(tmp_path):
    argv = ["-m", "dpresnet.bench", "project", *TINY, "--nodes", "1,4", "--ranks-per-node", "2", "--link", "1Gbit", "--latency",
            "20us", "--json", tmp_path / "out.json"]  # fmt: skip
    done = python(argv, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["results"]
    assert (found["machine"]["beta"], found["machine"]["alpha_s"]) == (125e6, pytest.approx(2e-5))
    assert [(row["nodes"], row["ranks"]) for row in found["rows"]] == [(1, 2), (4, 8)]
    one, four = found["rows"]
    assert found["step_s"] < one["step_s"] < four["step_s"]
    # 270 thousand parameters over 1 Gbit/s between 4 nodes
    assert four["under_way_s"] > 2 * 3 / 4 * 4 * 269_722 / 125e6
    assert done.stdout.count("\n4 ") == 1


def test_a_job_checks_the_model_with_its_own_step(tmp_path):
    done = mpirun(2, ["-m", "dpresnet.bench", "project", *TINY, "--json", tmp_path / "out.json"], timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["results"]
    assert (found["ranks"], found["layout"]["nodes"], found["layout"]["ranks_per_node"]) == (2, 1, 2)
    assert len(found["measured_s"]) == 2 and min(found["measured_s"]) > 0
    for row, measured, ratio in zip(found["predicted"], found["measured_s"], found["ratios"], strict=True):
        assert ratio == pytest.approx(row["step_s"] / measured) and 0.05 < ratio < 20
        assert row["under_way_s"] > 0 and row["held_s"] > 0
    assert "predicted" in done.stdout and "measured" in done.stdout


@pytest.mark.parametrize(("flags", "words"), [
    (("--link", "fast"), "--link fast: a number and one of"), (("--nodes", "0"), "--nodes 0: from..to"),
    (("--latency", "2"), "--latency 2: a number"), (("--png", "/nowhere/x.png"), "--png"),
])  # fmt: skip
def test_bad_flags_are_refused_before_anything_is_measured(flags, words):
    done = python(["-m", "dpresnet.bench", "project", *flags])
    assert done.returncode == 78 and words in done.stderr and done.seconds < 20
