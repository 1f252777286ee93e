"""What ranks note about their communication, and what is concluded from it."""

import json
import time

import numpy as np
import pytest

from dpresnet import comm, events, explain
from dpresnet.events import EVENT, HEADER_BYTES, SLOTS, Event, Rank, Ring


def test_a_ring_keeps_the_last_events_with_their_numbers(tmp_path):
    ring = Ring()
    for step in range(SLOTS + 10):
        ring.step, ring.what = step, f"statistics of bn{step}"
        ring.end(ring.begin("exchange", 8 * step))
        if step == 5:
            ring.keep(tmp_path, 1, 4, "node7")
    (rank,) = events.read(tmp_path)
    assert (rank.rank, rank.size, rank.host, len(rank.events)) == (1, 4, "node7", SLOTS)
    assert [event.number for event in rank.events] == list(range(11, SLOTS + 11))
    assert rank.events[-1].what == f"statistics of bn{SLOTS + 9}" and rank.events[-1].nbytes == 8 * (SLOTS + 9)
    assert all(event.began <= event.ended for event in rank.events) and rank.waits_for is None


def test_what_was_noted_before_the_folder_is_known_is_not_lost(tmp_path):
    ring = Ring()
    note = ring.begin("exchange", 16, "flags of all ranks")
    ring.keep(tmp_path, 0, 2, "here")
    assert events.read(tmp_path)[0].waits_for.what == "flags of all ranks"
    ring.end(note)
    assert events.read(tmp_path)[0].waits_for is None


def test_channels_are_numbered_apart_and_the_oldest_waits_first():
    ring = Ring()
    slow = ring.begin("alltoall", 4, "bucket 0")
    time.sleep(0.001)
    ring.begin("exchange", 8, "losses")
    ring.end(ring.begin("exchange", 8, "digests"))
    assert [(e.channel, e.number) for e in ring.waiting()] == [("alltoall", 1), ("exchange", 1)]
    ring.end(slow)
    assert [e.what for e in ring.waiting()] == ["losses"]


def test_an_operation_that_ends_after_its_slot_was_used_again_ends_no_other():
    ring = Ring()
    slow = ring.begin("alltoall", 4)
    for _ in range(SLOTS - 1):
        ring.end(ring.begin("exchange", 8))
    ring.begin("exchange", 8, "the last")
    ring.end(slow)
    assert [event.what for event in ring.waiting()] == ["the last"]


WHOLE = HEADER_BYTES + SLOTS * EVENT.itemsize


@pytest.mark.parametrize("content", [b"", b"x" * WHOLE, json.dumps({"format": 9}).encode().ljust(WHOLE)])
def test_other_files_are_left_out(tmp_path, content):
    (tmp_path / "rank-0.ring").write_bytes(content)
    Ring().keep(tmp_path, 1, 2, "here")
    assert [rank.rank for rank in events.read(tmp_path)] == [1]


# Conclusions. A rank is written as its exchanges in turn: (what, ended).


def rank_of(number: int, *exchanges: tuple[str, bool], size: int = 3) -> Rank:
    made = [
        Event("exchange", n + 1, 100.0 + n, 100.5 + n if ended else 0.0, 8, 7, what)
        for n, (what, ended) in enumerate(exchanges)
    ]
    return Rank(number, size, f"node{number}", made)


def said(*ranks: Rank) -> str:
    return explain.explain(list(ranks))


DONE, LATE = [("bn1", True), ("bn2", True)], [("bn1", True), ("bn2", False)]


def test_the_rank_that_never_came_is_named():
    text = said(rank_of(0, *LATE), rank_of(1, ("bn1", True)), rank_of(2, *LATE))
    assert "rank 1 on node1 never came to bn2 of step 7 (exchange 2, 8 bytes); the others waited there" in text
    assert "rank 0 on node0 has waited for 0 s in bn2" in text
    assert "rank 1 on node1 was last seen 0 s before, after bn1" in text


def test_buckets_under_way_do_not_hide_who_is_missing():
    """A bucket's sums are looked at between other things: what all have started need not have ended."""
    bucket = Event("alltoall", 1, 99.0, 0.0, 64, 7, "the parts of bucket 0")
    ranks = [rank_of(0, *LATE), rank_of(1, ("bn1", True)), rank_of(2, *LATE)]
    with_buckets = [Rank(rank.rank, rank.size, rank.host, [bucket, *rank.events]) for rank in ranks]
    assert "rank 1 on node1 never came to bn2" in said(*with_buckets)
    assert "rank 0 on node0 has waited for 0 s in bn2" in said(*with_buckets)


def test_a_bucket_that_a_sleeping_rank_has_under_way_accuses_nobody():
    """The rank that everybody waits for may itself have sums under way that others have not come to."""
    bucket = Event("allgather", 8, 100.2, 0.0, 64, 7, "the sum of bucket 8")
    asleep = Rank(1, 3, "node1", [*rank_of(1, ("bn1", True)).events, bucket])
    text = said(rank_of(0, *LATE), asleep, rank_of(2, *LATE))
    assert text.splitlines()[-1].startswith("rank 1 on node1 never came to bn2")


def test_a_node_that_waits_for_one_of_its_ranks_is_not_accused():
    """Ranks 0 and 1 are one node, which waits for the sums of the other one; there rank 2 waits for rank 3, later than they."""
    within = [Event("alltoall-1", 1, began, ended, 8, 7, "parts within") for began, ended in ((100, 101), (100, 101), (110, 0))]
    between = [Event("alltoall-2", 1, 101 + n, 0.0, 8, 7, "parts between") for n in range(2)]
    ranks = [Rank(n, 4, f"node{n // 2}", [within[n], between[n]]) for n in range(2)]
    ranks += [Rank(2, 4, "node1", [within[2]]), Rank(3, 4, "node1", [])]
    assert [rank.rank for rank in events.missing(ranks, between[0])] == [3]
    text = said(*ranks)
    assert text.splitlines()[-1].startswith("rank 3 on node1 never came to parts between of step 7")
    assert "rank 2 on node1 has waited for 0 s in parts within" in text


def test_a_farewell_is_no_exchange_that_others_miss():
    """A rank that has refused waits for the others to say so too; they wait for it elsewhere."""
    farewell = Event("farewell", 1, 99.0, 0.0, 32, 7, "")
    gave_up = [Event("timeout", 1, 105.0, 105.0, 0, 7, what) for what in ("bn2", "bn3")]
    refused = Rank(1, 3, "node1", [*rank_of(1, ("bn1", True)).events, farewell])
    others = [Rank(n, 3, f"node{n}", [*rank_of(n, *LATE).events, event]) for n, event in zip((0, 2), gave_up, strict=True)]
    text = said(others[0], refused, others[1])
    assert "rank 1 on node1 never came to bn2" in text and "skipped" not in text and "farewell" not in text.splitlines()[-1]


def test_a_farewell_alone_is_nothing_to_wait_for():
    farewell = Event("farewell", 1, 109.0, 0.0, 32, 7, "")
    left = Rank(1, 3, "node1", [*rank_of(1, *DONE).events, farewell])
    assert "no rank was waiting for another" in said(rank_of(0, *DONE), left, rank_of(2, *DONE))


def test_two_ranks_that_disagree_are_both_named():
    text = said(rank_of(0, ("bn2", True), size=2), rank_of(1, ("bn1", True), size=2))
    assert "rank 0 on node0 was at bn2" in text and "rank 1 on node1 was at bn1" in text and "no majority tells which" in text


def test_a_rank_that_left_nothing_is_named():
    assert "of 3 ranks, rank 2 has left nothing" in said(rank_of(0, *LATE), rank_of(1, *LATE))


def test_a_rank_that_skipped_an_exchange_is_named():
    text = said(rank_of(0, *DONE), rank_of(1, ("bn2", True), ("bn3", False)), rank_of(2, *DONE))
    assert "rank 1 on node1 was at bn2 of step 7 (exchange 1, 8 bytes), where the others were at bn1" in text


def test_an_operation_that_all_have_started_is_the_networks():
    assert "every rank has come to bn2 of step 7" in said(*(rank_of(n, *LATE) for n in range(3)))


def test_a_run_that_ended_well_had_nobody_waiting():
    assert "no rank was waiting for another" in said(*(rank_of(n, *DONE) for n in range(3)))


def test_events_of_random_rings_come_back(tmp_path):
    draw = np.random.default_rng(3)
    ring = Ring()
    for _ in range(100):
        note = ring.begin(str(draw.choice(["exchange", "alltoall"])), int(draw.integers(2**40)), f"thing {draw.integers(10)}")
        if draw.random() < 0.9:
            ring.end(note)
    ring.keep(tmp_path, 0, 1, "here")
    assert events.read(tmp_path)[0].events == events.in_order(ring.events)


@pytest.mark.parametrize(("pause", "counted"), [(0.25, 2.5), (500.0, 10.0)])
def test_the_time_that_a_process_is_stopped_is_nobodys_delay(monkeypatch, pause, counted):
    """Between two looks a suspended job may lie for hours; of each such pause one second counts."""
    clock, seen = iter(np.arange(12) * pause), []
    monkeypatch.setattr(comm.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(comm.time, "sleep", lambda seconds: None)
    looks = iter([False] * 10 + [True])
    comm.wait_until(lambda: next(looks), 0.0, seen.append)
    assert seen[-1] == counted and len(seen) == 10
