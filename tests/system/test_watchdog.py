"""A rank that does not come is named within --timeout, and the run can be explained afterwards, whatever ended it."""

import re
import socket

import pytest

from tests.launching import python
from tests.system.test_train import metrics, succeed, train

BASE = ("--replicas", "3", "--batch", "8", "--steps", "8", "--timeout", "1", "--check-every", "0")
HOST = socket.gethostname()


def explained(out) -> str:
    done = python(["-m", "dpresnet.explain", str(out)])
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_rank_that_sleeps_is_named_with_all_stacks(tmp_path):
    done = train(3, tmp_path, fault="kind=sleep,rank=1,step=4", base=BASE)
    assert done.returncode != 0 and done.seconds < 40
    event = r"statistics of bn1 of step 4 \(exchange \d+, \d+ bytes\)"
    assert re.search(rf"Late: waited \d+ s for {event}; not there", done.stderr)
    assert f"not there: rank 1 on {HOST} was last seen" in done.stderr
    assert "after losses of step 3" in done.stderr
    assert re.search(r"(Current t|T)hread 0x[0-9a-f]+ .*\n  File ", done.stderr)
    text = explained(tmp_path)
    assert f"rank 1 on {HOST} never came to statistics of bn1 of step 4" in text
    assert re.search(rf"rank 0 on {HOST} has waited for \d+ s in statistics of bn1 of step 4", text)


def test_rank_that_sleeps_while_buckets_are_under_way_is_named(tmp_path):
    """Sums of buckets that all ranks have started are not what the others wait for."""
    fault, many = "kind=sleep-in-backward,rank=1,step=4", ("--first-bucket-mb", "0.01", "--bucket-mb", "0.05")
    done = train(3, tmp_path, *many, fault=fault, base=BASE)
    assert done.returncode != 0 and done.seconds < 40
    assert re.search(r"Late: waited \d+ s for sums of layer1.1.bn1 of step 4 .*; not there: rank 1 on", done.stderr)
    assert f"rank 1 on {HOST} never came to sums of layer1.1.bn1" in explained(tmp_path)


@pytest.mark.parametrize("fault", ["kind=kill,rank=1,step=4,after=1", "kind=loader,replica=1,step=3"])
def test_rank_that_ends_is_named_afterwards(tmp_path, fault):
    done = train(3, tmp_path, fault=fault, base=BASE)
    assert done.returncode != 0 and done.seconds < 40
    assert f"rank 1 on {HOST} never came to statistics of bn1 of step 4" in explained(tmp_path)


def test_rank_that_skips_an_exchange_is_named_afterwards(tmp_path):
    done = train(3, tmp_path, fault="kind=skip,rank=2,step=4", base=BASE)
    assert done.returncode != 0 and done.seconds < 60
    text = explained(tmp_path)
    there, others = "statistics of layer1.0.bn1 of step 4", "statistics of bn1 of step 4"
    assert re.search(rf"rank 2 on {HOST} was at {there} .*, where the others were at {others}", text)
    assert "it skipped an exchange, or made one too many" in text


def test_a_network_that_delivers_nothing_is_suspected(tmp_path):
    done = train(3, tmp_path, fault="kind=cut,step=4", base=BASE)
    assert done.returncode != 0 and done.seconds < 60
    event = r"statistics of bn1 of step 4 \(exchange \d+, \d+ bytes\)"
    assert re.search(rf"Late: waited \d+ s for {event}; all are there: look at the network", done.stderr)
    assert "every rank has come to statistics of bn1 of step 4" in explained(tmp_path)


def test_slow_rank_is_named_in_the_metrics_and_in_a_warning(tmp_path):
    """It sleeps in every step; two ranks then wait for it."""
    base = ("--replicas", "3", "--batch", "8", "--steps", "5", "--check-every", "2")
    done = train(3, tmp_path, fault="kind=slow,rank=2,seconds=1", base=base)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"WARNING: rank 2 on {HOST} takes \d+\.\d times as long as the median rank", done.stderr)
    lines = {line["step"]: line for line in metrics(tmp_path) if "slowest_rank" in line}
    assert set(lines) >= {3, 5}  # the steps after those at which the ranks were compared
    assert lines[5]["slowest_rank"] == 2 and lines[5]["slowest_ratio"] > 1.5


def test_run_that_ends_well_leaves_nobody_waiting(tmp_path):
    for ranks in (3, 2):  # the second run removes what the first has noted
        succeed(ranks, tmp_path, base=("--replicas", str(ranks), "--batch", "8", "--steps", "3"))
    assert [path.name for path in sorted((tmp_path / "events").iterdir())] == ["rank-0.ring", "rank-1.ring"]
    assert "no rank was waiting for another" in explained(tmp_path)


def test_a_folder_without_events_is_refused(tmp_path):
    done = python(["-m", "dpresnet.explain", str(tmp_path)])
    assert done.returncode == 78 and f"error: {tmp_path} holds no events" in done.stderr
