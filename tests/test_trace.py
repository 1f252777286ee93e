"""What is noted while a rank works, and the file that it becomes."""

import gzip
import json
import threading

import pytest

from dpresnet import trace, tracing
from dpresnet.events import Ring
from dpresnet.trace import Part, Span


@pytest.fixture
def spans():
    yield trace.start()
    trace.stop()


def names(spans):
    return [(span.track, span.name) for span in spans]


def test_nothing_is_noted_unless_something_is_recorded():
    with trace.span("before"):
        spans = trace.start()
    trace.stop()
    with trace.span("after"):
        trace.note("host", "after", 0.0, 1.0)
    assert spans == [] and not trace.recording()


def test_blocks_nest_and_each_thread_has_a_track(spans):
    with trace.span("outer", step=3), trace.span("inner"):
        pass
    thread = threading.Thread(target=lambda: trace.span("load").__enter__(), name="idle")
    thread.start()
    thread.join()

    def load():
        with trace.span("images", batch=7):
            pass

    thread = threading.Thread(target=load, name="loader")
    thread.start()
    thread.join()
    assert names(spans) == [("host", "inner"), ("host", "outer"), ("loader", "images")]
    inner, outer, images = spans
    assert outer.began <= inner.began <= inner.ended <= outer.ended
    assert (outer.facts, images.facts) == ({"step": 3}, {"batch": 7})


def test_a_block_that_fails_leaves_no_span(spans):
    with pytest.raises(KeyError), trace.span("update"):
        raise KeyError
    assert spans == []


def test_a_recording_is_bounded(spans, monkeypatch):
    monkeypatch.setattr(trace, "MOST_SPANS", 2)
    for number in range(4):
        trace.note("device", f"kernel {number}", number, number + 0.5)
    assert names(spans) == [("device", "kernel 0"), ("device", "kernel 1")]


def test_operations_are_noted_where_the_rank_waits_or_beside_it(spans):
    ring = Ring()
    ring.step, ring.what = 5, "statistics of bn1"
    slow = ring.begin("alltoall", 400, "the parts of bucket 0")
    ring.end(ring.begin("exchange", 8))
    ring.end(slow)
    assert names(spans) == [("host", "statistics of bn1"), ("MPI", "the parts of bucket 0")]
    assert spans[0].facts == {"step": 5, "channel": "exchange", "number": 1, "bytes": 8}
    assert spans[1].began <= spans[0].began <= spans[0].ended <= spans[1].ended


PARTS = [
    Part(0, "node1", 0.0, 0.0, [Span("host", "step 1", 100.0, 101.0, {}), Span("device", "conv1", 100.25, 100.5, {"a": 1}),
                                Span("bucket 0", "bucket 0", 100.5, 101.0, {})]),
    Part(1, "node2", 50.0, 0.125, [Span("MPI", "the sum of bucket 0", 150.5, 150.75, {}),
                                   Span("MPI", "the sum of bucket 1", 150.5, 151.0, {})]),
]  # fmt: skip


@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
def test_a_file_has_all_ranks_on_the_clock_of_rank_0(tmp_path, name):
    trace.write(tmp_path / name, PARTS, version="x")
    raw = (tmp_path / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert json.loads(gzip.decompress(raw) if name.endswith("gz") else raw) == trace.read(tmp_path / name)
    found = trace.read(tmp_path / name)
    assert found["otherData"]["clocks"] == [{"rank": 0, "ahead_s": 0.0, "doubt_s": 0.0},
                                            {"rank": 1, "ahead_s": 50.0, "doubt_s": 0.125}]  # fmt: skip
    spans = {e["name"]: (e["pid"], e["tid"], e["ts"], e["dur"]) for e in found["traceEvents"] if e["ph"] == "X"}
    assert spans == {"step 1": (0, 0, 0.0, 1e6), "conv1": (0, 1, 0.25e6, 0.25e6), "bucket 0": (0, 2, 0.5e6, 0.5e6)}
    sums = [(e["ph"], e["pid"], e["id"], e["ts"]) for e in found["traceEvents"] if e["ph"] in "be"]
    assert len({key for _, _, key, _ in sums}) == 2  # each begin has an end of its own
    assert sorted(sums, key=lambda e: (e[2], e[0])) == [
        ("b", 1, sums[0][2], 0.5e6), ("e", 1, sums[0][2], 1e6), ("b", 1, sums[2][2], 0.5e6), ("e", 1, sums[2][2], 0.75e6),
    ]  # fmt: skip
    named = {(e["pid"], e.get("tid")): e["args"]["name"] for e in found["traceEvents"] if e["name"].endswith("_name")}
    assert named == {(0, None): "rank 0 on node1", (1, None): "rank 1 on node2", (0, 0): "host", (0, 1): "device",
                     (0, 2): "bucket 0", (1, 0): "host", (1, 1): "device", (1, 2): "MPI"}  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"[]", b'{"traceEvents": 3}', b"\x1f\x8bxx", b"x" * 100])
def test_other_files_are_no_traces(tmp_path, content):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises((ValueError, OSError)):
        trace.read(tmp_path / "t")


def test_clocks_are_compared_by_the_narrowest_bounds():
    assert tracing.middle([(-1.0, 5.0), (2.0, 9.0), (0.0, 4.0)]) == (3.0, 1.0)
