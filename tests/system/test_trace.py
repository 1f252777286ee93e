"""``--trace``: what the ranks of real runs did, on one clock."""

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest

from dpresnet import trace
from tests.system.test_train import sha, succeed, train

BASE = ("--replicas", "2", "--batch", "16", "--steps", "6", "--first-bucket-mb", "0.1", "--bucket-mb", "0.25")
STEPS, LEAST_US = 4, 1.0  # traced; what rounding of the clock may come to


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("traced")
    flags = ("--trace", str(out / "new" / "t.json.gz"), "--trace-steps", str(STEPS), "--save-every-steps", "3")
    # rank 1's clock is 5 s ahead
    done = train(2, out, *flags, fault="kind=clock,rank=1,seconds=5", base=BASE)
    assert done.returncode == 0, done.stderr
    assert f"a trace of {STEPS} steps, clocks compared to" in done.stderr
    return out


def spans(out: Path) -> dict[tuple[int, str], list[tuple[float, float, str, dict]]]:
    """(begin, end, name, facts) by rank and track, in the order of their begins."""
    events, found, tracks = trace.read(out / "new" / "t.json.gz")["traceEvents"], defaultdict(list), {}
    ends = {event["id"]: event["ts"] for event in events if event["ph"] == "e"}
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    for event in events:
        if event["ph"] in "Xb":
            begin = event["ts"]
            end = begin + event["dur"] if event["ph"] == "X" else ends[event["id"]]
            found[event["pid"], tracks[event["pid"], event["tid"]]].append((begin, end, event["name"], event["args"]))
    return {key: sorted(rows, key=lambda row: (row[0], -row[1])) for key, rows in found.items()}


def test_each_rank_has_its_tracks(run):
    tracks = {name for _, name in spans(run)}
    buckets = {name for name in tracks if name.startswith("bucket ")}
    assert len(buckets) >= 4
    assert tracks - buckets == {"host", "device", "MPI", "dpresnet-prefetch_0"}
    assert {rank for rank, _ in spans(run)} == {0, 1}


def test_spans_of_a_track_nest(run):
    for (_, track), rows in spans(run).items():
        open_until = []
        for begin, end, name, _ in rows if track != "MPI" else ():
            while open_until and open_until[-1] <= begin + LEAST_US:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + LEAST_US, (track, name)
            open_until.append(end)


def test_an_in_order_device_runs_one_kernel_at_a_time(run):
    for rank in (0, 1):
        rows = spans(run)[rank, "device"]
        assert all(begin >= end - LEAST_US for (_, end, *_), (begin, *_) in pairwise(rows))


def test_every_launch_of_every_step_is_there(run, tmp_path):
    planned = train(1, tmp_path, "--dry-run", base=(*BASE[2:], "--replicas", "1")).stdout.splitlines()
    launches = [line.split()[1:3] for line in planned if " -> " in line and line[:4].strip().isdecimal()]
    assert len(launches) > 100
    ran = [[name, facts["kernel"]] for _, _, name, facts in spans(run)[0, "device"]]
    first = ran.index(launches[0])
    assert ran[first : first + len(launches)] == launches
    assert [name for name, _ in ran].count("input") == STEPS
    assert [name for name, _ in ran].count("update") == STEPS


def test_what_the_host_did_is_inside_its_step(run):
    for rank in (0, 1):
        rows = spans(run)[rank, "host"]
        steps = [row for row in rows if row[2].startswith("step ")]
        assert [name for *_, name, _ in steps] == [f"step {number}" for number in range(1, STEPS + 1)]
        for number, (begin, end, *_) in enumerate(steps, 1):
            inside = [(name, facts) for b, e, name, facts in rows if begin <= b and e <= end]
            names = [name for name, _ in inside]
            for name in ("forward and backward", "wait for gradients", "losses", "update", "statistics of bn1", "sums of bn1"):
                assert names.count(name) == 1, name
            assert {facts["step"] for _, facts in inside if "channel" in facts} == {number}
    assert [name for *_, name, _ in spans(run)[0, "host"]].count("checkpoint") == 1
    assert "checkpoint" not in [name for *_, name, _ in spans(run)[1, "host"]]


def test_buckets_are_under_way_while_backward_goes_on(tmp_path):
    """While the first buckets are summed the device runs kernels of backward, which come after them in the plan."""
    flags = ("--dataset", "synthetic", "--bn", "local", "--trace", str(tmp_path / "new" / "t.json.gz"))
    succeed(2, tmp_path, *flags, base=BASE)
    for rank in (0, 1):
        device = [(begin, end, name) for begin, end, name, _ in spans(tmp_path)[rank, "device"]]
        for k in range(2):
            rows = spans(tmp_path)[rank, f"bucket {k}"]
            beside = {name for begin, end, *_ in rows for b, e, name in device if b < end and begin < e}
            assert len(rows) == 6 and beside and not {"input", "update"} & beside, (rank, k)


def test_without_overlap_backward_is_over_before_anything_is_summed(run, tmp_path):
    succeed(2, tmp_path, "--trace", str(tmp_path / "new" / "t.json.gz"), "--no-overlap", base=BASE)
    assert sha(tmp_path) == sha(run)
    rows = spans(tmp_path)
    last = [end for _, end, name, _ in rows[0, "device"] if name == "conv1.weight.grad.reduce"]
    sums = [begin for begin, _, name, _ in rows[0, "MPI"] if name.startswith("the parts of bucket 0")]
    assert len(last) == len(sums) == 6 and all(end < begin for end, begin in zip(last, sums, strict=True))


def test_sums_of_a_bucket_lie_within_it(run):
    for rank in (0, 1):
        for begin, end, name, _ in spans(run)[rank, "MPI"]:
            if name == "all to have the sums":
                continue
            rows = spans(run)[rank, f"bucket {name.rpartition('bucket ')[2]}"]
            assert any(b - LEAST_US <= begin and end <= e + LEAST_US for b, e, *_ in rows), name


def test_ranks_are_on_one_clock(run):
    """No rank may leave an exchange before every rank has entered it, also where its clock is wrong by seconds."""
    exchanges = defaultdict(list)
    for (_, track), rows in spans(run).items():
        for begin, end, name, facts in rows if track in ("host", "MPI") else ():
            if "channel" in facts and name != "the checkpoint of rank 0":  # a broadcast, from which rank 0 may go on
                exchanges[facts["channel"], facts["number"], name].append((begin, end))
    clocks = trace.read(run / "new" / "t.json.gz")["otherData"]["clocks"]
    assert clocks[1]["ahead_s"] == pytest.approx(5, abs=0.1) and 0 <= clocks[1]["doubt_s"] < 0.1
    doubt_us = 1e6 * clocks[1]["doubt_s"] + LEAST_US
    both = [pair for pair in exchanges.values() if len(pair) == 2]
    assert len(both) > 40 * STEPS
    assert all(max(begin for begin, _ in pair) <= min(end for _, end in pair) + doubt_us for pair in both)


def test_kernels_are_on_the_clock_of_the_host(run):
    """The merged statistics that an exchange sends were written before it began, after the step did."""
    for rank in (0, 1):
        host, device = spans(run)[rank, "host"], spans(run)[rank, "device"]
        steps = [(b, e) for b, e, name, _ in host if name.startswith("step ")]
        merges = [(b, e) for b, e, name, _ in device if name == "bn1.merge"]
        exchanges = [b for b, _, name, _ in host if name == "statistics of bn1"]
        for (begin, _), (merge, merged), exchange in zip(steps, merges, exchanges, strict=True):
            assert begin < merge < merged <= exchange + LEAST_US


def test_a_trace_changes_no_bit_and_one_process_can_be_traced(run, tmp_path):
    succeed(0, tmp_path, "--trace", str(tmp_path / "new" / "t.json.gz"), "--trace-steps", "0", base=BASE)
    assert sha(tmp_path) == sha(run)
    rows = spans(tmp_path)
    assert [name for *_, name, _ in rows[0, "host"] if name.startswith("step ")] == [f"step {n}" for n in range(1, 7)]
    assert "evaluation" in [name for *_, name, _ in rows[0, "host"]]


def test_a_stopped_run_leaves_its_trace(tmp_path):
    flags = ("--trace", str(tmp_path / "new" / "t.json.gz"), "--trace-steps", "0")
    done = train(2, tmp_path, *flags, fault="kind=term,rank=1,step=3", base=BASE)
    assert done.returncode == 75, done.stderr
    assert [name for *_, name, _ in spans(tmp_path)[1, "host"] if name.startswith("step ")][-1] == "step 4"


def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "t.json", tmp_path):
        done = train(0, tmp_path / "out", "--trace", str(path), base=BASE)
        assert done.returncode == 78 and f"--trace {path} cannot be written" in done.stderr
        assert not (tmp_path / "out" / "metrics.jsonl").exists()
        assert json.dumps(str(path)) not in done.stdout
