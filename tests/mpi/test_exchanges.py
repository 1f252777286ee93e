"""What the exchanges of a step cost: a tiny measurement with everything that a long one has."""

import json
from statistics import median
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from dpresnet import trace
from dpresnet.bench import exchanges
from dpresnet.comm import Solo
from tests.launching import mpirun, python

TINY = ("--arch", "resnet20", "--image", "8", "--batch", "4", "--turn", "0.01", "--rounds", "2", "--bucket-mb", "0.25")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("exchanges") / "out.json"
    done = mpirun(2, ["-m", "dpresnet.bench", "exchanges", *TINY, "--json", path], timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text())["results"]


def test_every_kind_takes_a_turn_in_every_round(run):
    _, found = run
    assert (found["ranks"], found["bn"], found["buckets"]) == (2, "sync", 2)
    kinds = {kind["name"]: kind for kind in found["kinds"]}
    assert list(kinds) == [kind.name for kind in exchanges.kinds("sync")]
    usual = kinds["as trained"]["samples"]["seconds"]
    for kind in kinds.values():
        seconds = kind["samples"]["seconds"]
        assert len(seconds) == 2 and min(seconds) > 0
        assert kind["ratio"]["median"] == pytest.approx(median(a / b for a, b in zip(seconds, usual, strict=True)))
        assert 0 < kind["spread"]["exposed_ms"]["median"] <= 1e3 * max(seconds)


def test_kinds_differ_in_what_they_send(run):
    """Without overlap nothing changes; statistics that are not shared do not travel. Within a node nothing is encoded."""
    sent = {kind["name"]: kind["spread"]["sent_mb"]["median"] for kind in run[1]["kinds"]}
    assert sent["no overlap"] == sent["traced"] == sent["as trained"]
    assert sent["as trained"] > sent["local BN"] > 4 * 269_722 / 1e6


def test_the_table_has_every_kind_and_both_shares(run):
    text, found = run
    for kind in found["kinds"]:
        assert f"\n{kind['name']} " in text
    assert "the exchanges of sync BN take" in text and "recording a trace takes" in text


@pytest.mark.parametrize("kind", exchanges.kinds("sync"), ids=lambda kind: kind.name)
def test_a_turn_trains_in_its_own_way(kind):
    """A step to begin with, then those that are timed; all with or without overlap, and traced or not."""
    seen = []
    device = SimpleNamespace(finish=lambda: None)
    job = SimpleNamespace(trainer=SimpleNamespace(overlap=None, replicas=SimpleNamespace(device=device)), device=device)
    job.step = lambda: seen.append((job.trainer.overlap, trace.recording()))
    traces = SimpleNamespace(start=lambda: kind.traced and trace.start(), step_done=lambda: None, finish=trace.stop)
    with patch.object(exchanges, "Tracer", lambda cfg, *rest: traces if bool(cfg.trace) == kind.traced else None):
        found = exchanges.turn(Solo(), job, kind, 3)
    assert seen == [(kind.overlap, kind.traced)] * 4
    assert found["seconds"] > 0 and found["sent_mb"] == 0


def test_only_shared_statistics_are_compared_with_local_ones():
    assert "local BN" not in [kind.name for kind in exchanges.kinds("local")]
    assert exchanges.share({"median": 0.75, "least": 0.5, "most": 1.0}) == "25.0% (0.0% to 50.0%)"


def test_one_process_has_no_exchanges():
    done = python(["-m", "dpresnet.bench", "exchanges"])
    assert done.returncode == 78 and "mpirun -n 2 python -m dpresnet.bench exchanges" in done.stderr
