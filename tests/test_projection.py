"""The model of steps on machines that are not here, against what can be added up by hand."""

from dataclasses import replace

import numpy as np
import pytest

from dpresnet.bench import projection
from dpresnet.bench.projection import RATES, TIMES, Layout, Machine, Profile, counts, exchange_s, project, quantity, rows, sum_s
from dpresnet.errors import Refused

FREE = Machine(alpha_s=0.0, beta=1e30, add=1e30, copy=1e30, host_s=0.0, merge_s=0.0)  # nothing costs anything
LOCAL = Layout(2, sync_bn=False)


def launch(*seconds):
    """In each of some steps."""
    return {"kind": "launch", "seconds": seconds}


def plan(entries, tail_s):
    samples = np.array([entry["seconds"] for entry in entries if entry["kind"] == "launch"]).T
    return Profile([{key: value for key, value in entry.items() if key != "seconds"} for entry in entries], tail_s, samples)


def ready(nbytes):
    return {"kind": "ready", "bytes": nbytes}


def exchange(after, nbytes=80):
    return {"kind": "exchange", "after": after, "bytes": nbytes}


def test_one_rank_takes_what_was_measured():
    profile = plan([launch(0.1), exchange(0), launch(0.2), ready(1e9)], 0.05)
    assert project(profile, Layout(1), replace(FREE, host_s=9.0, beta=1.0)) == pytest.approx(
        {"step_s": 0.35, "held_s": 0.0, "under_way_s": 0.0, "exposed_s": 0.0})  # fmt: skip


@pytest.mark.parametrize(("beta", "exposed"), [(1e10, 0.0), (5e9, 0.0), (2.5e9, 0.2), (1e9, 0.8)])
def test_a_bucket_hides_behind_what_follows(beta, exposed):
    """1 GB between two nodes travels for 1 GB / beta, from the end of the first launch on."""
    profile = plan([launch(0.1), ready(1e9), launch(0.2)], 0.05)
    found = project(profile, LOCAL, replace(FREE, beta=beta))
    assert found["under_way_s"] == pytest.approx(1e9 / beta)
    assert found["exposed_s"] == pytest.approx(exposed)
    assert found["step_s"] == pytest.approx(0.35 + exposed)


def test_buckets_follow_each_other():
    profile = plan([launch(0.1), ready(1e9), launch(0.1), ready(1e9)], 0.0)
    found = project(profile, LOCAL, replace(FREE, beta=4e9))
    assert found["under_way_s"] == pytest.approx(0.5)
    assert found["step_s"] == pytest.approx(0.1 + 0.25 + 0.25)


def test_the_host_works_on_a_bucket_while_the_next_travels():
    profile = plan([launch(0.1), ready(1e9), launch(0.1), ready(1e9)], 0.0)
    found = project(profile, LOCAL, replace(FREE, beta=4e9, add=5e9))  # 0.25 s on the way, then 0.1 s for the host
    assert found["step_s"] == pytest.approx(0.1 + 0.25 + 0.25 + 0.1)


def test_on_a_cpu_the_host_takes_its_time_from_the_kernels():
    profile = plan([launch(0.1), ready(1e9), launch(0.5)], 0.0)
    machine = replace(FREE, add=1e10)
    assert project(profile, LOCAL, machine)["step_s"] == pytest.approx(0.6)
    assert project(profile, LOCAL, replace(machine, steals=True))["step_s"] == pytest.approx(0.6 + 0.05)


def test_an_exchange_holds_the_next_launch_up_but_not_those_before_it():
    machine = replace(FREE, host_s=0.3)
    waits = project(plan([launch(0.1), exchange(0), launch(0.1)], 0.0), Layout(2), machine)
    assert waits["step_s"] == pytest.approx(0.1 + 0.3 + 0.1 + 0.3)  # and the losses at the end
    assert waits["held_s"] == pytest.approx(0.6)
    hidden = project(plan([launch(0.1), launch(0.2), exchange(0), launch(0.1)], 0.0), Layout(2), machine)
    assert hidden["step_s"] == pytest.approx(0.1 + 0.2 + 0.1 + 0.1 + 0.3)
    local = project(plan([launch(0.1), exchange(0), launch(0.1)], 0.0), LOCAL, machine)
    assert local["step_s"] == pytest.approx(0.2 + 0.3)


def test_sums_within_and_between_nodes():
    machine = Machine(alpha_s=0.5, beta=100.0, add=1000.0, copy=500.0, host_s=0, merge_s=0, round_s=0.01, link_cpu_s=0.002)
    within = 3 / 4 * 1200 * (1 / 1000 + 1 / 500)
    assert sum_s(1200, Layout(1, 4), machine) == pytest.approx((0, within))
    adding = 300 * (2 / 3 / 1000 + 1.5 * 0.01)
    travelling = 2 * 2 * (0.5 + 0.5 * 1200 / 3 / 100)
    seconds, computing = sum_s(1200, Layout(3, 4, wire=0.5), machine)
    assert seconds == pytest.approx(travelling)
    assert computing == pytest.approx(within + adding + 2 * 2 / 3 * 0.5 * 1200 / 4 * 0.002)


def test_exchanges_take_a_message_for_every_doubling_and_merge_all_rows():
    machine = replace(FREE, alpha_s=0.5, beta=100.0, copy=200.0, host_s=0.25, merge_s=0.125)
    assert exchange_s(50, Layout(1), machine) == 0.0
    assert exchange_s(50, Layout(1, 4), machine) == pytest.approx(0.25 + 3 * (50 / 200 + 0.125))
    assert exchange_s(50, Layout(3, 2), machine) == pytest.approx(0.25 + 3 * 0.5 + 5 * (50 / 100 + 0.125))


def test_more_nodes_are_never_more_efficient():
    profile = plan([launch(0.1), exchange(0), launch(0.1), ready(1e7), launch(0.1), ready(1e7)], 0.01)
    machine = Machine(alpha_s=2e-6, beta=1e9, add=1e10, copy=1e10, host_s=1e-4, merge_s=1e-5)
    found = rows(profile, counts("1..1024"), Layout(1), machine)
    assert [row["nodes"] for row in found] == [2**i for i in range(11)]
    efficiencies = [row["efficiency"] for row in found]
    assert efficiencies[0] == pytest.approx(1) and efficiencies == sorted(efficiencies, reverse=True)
    assert projection.text(found, 32).count("\n") == 11


@pytest.mark.parametrize(("text", "units", "value"), [
    ("100Gbit", RATES, 12.5e9), ("2.5 GB", RATES, 2.5e9), ("1Mbit", RATES, 125e3), ("2us", TIMES, 2e-6), ("1ms", TIMES, 1e-3),
])  # fmt: skip
def test_quantities(text, units, value):
    assert quantity(text, units, "--x") == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "100", "Gbit", "0Gbit", "-1Gbit", "1..2Gbit", "100Gbits", "100us"])
def test_quantities_that_are_none(text):
    with pytest.raises(Refused, match=r"--link .*a number and one of kbit, .*such as --link 10Mbit"):
        quantity(text, RATES, "--link")


@pytest.mark.parametrize(("text", "found"), [("1..8", [1, 2, 4, 8]), ("3..13", [3, 6, 12]), ("5", [5]), ("1,2,7", [1, 2, 7])])
def test_counts(text, found):
    assert counts(text) == found


@pytest.mark.parametrize("text", ["", "0", "0..8", "8..1", "a..b", "1,x", "-2", "1..2..3"])
def test_counts_that_are_none(text):
    with pytest.raises(Refused, match="--nodes"):
        counts(text)


def test_the_expected_largest_of_some_draws():
    assert projection.largest_of(1, np.array([3.0, 1.0])) == 2.0
    assert projection.largest_of(2, np.array([3.0, 1.0])) == pytest.approx(2.5)  # 1 with probability 1/4
    assert projection.largest_of(3, np.array([2.0, 2.0, 2.0])) == pytest.approx(2)
    assert projection.largest_of(10_000, np.array([1.0, 2.0, 7.0])) == pytest.approx(7)
    draws = np.random.default_rng(0).choice([1.0, 2.0, 4.0, 9.0], (100_000, 5)).max(axis=1).mean()
    assert projection.largest_of(5, np.array([9.0, 2.0, 4.0, 1.0])) == pytest.approx(draws, rel=0.01)


def test_ranks_that_meet_often_wait_more():
    """Two launches that take 1 or 3, never both 3: who meets in between waits at each, who meets at the end not at all."""
    profile = plan([launch(1, 3), exchange(0), launch(3, 1)], 0.0)
    assert profile.seconds == 4
    assert project(profile, Layout(2, sync_bn=False), FREE)["step_s"] == pytest.approx(4)
    assert project(profile, Layout(2), FREE)["step_s"] == pytest.approx(2.5 + 2.5)
    together = plan([launch(1, 3), exchange(0), launch(1, 3)], 0.0)
    assert project(together, Layout(2, sync_bn=False), FREE)["step_s"] == pytest.approx(5)


def test_an_exchange_queues_behind_a_bucket_on_the_link():
    entries = [launch(0.1), ready(1e9), launch(0.1), exchange(1), launch(0.1)]
    machine = replace(FREE, beta=2e9, queue_s=0.25)  # the bucket is on its way from 0.1 to 0.6
    assert project(plan(entries, 0.0), Layout(2), machine)["step_s"] == pytest.approx(0.2 + 0.25 + 0.1 + 0.05)
    machine = replace(FREE, beta=5e9, queue_s=0.25)  # it has arrived at 0.3
    assert project(plan(entries, 0.0), Layout(2), machine)["step_s"] == pytest.approx(0.3 + 0.1)
    assert project(plan(entries, 0.0), Layout(1, 2), machine)["step_s"] == pytest.approx(0.3)
