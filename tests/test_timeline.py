"""What is counted of a trace."""

import pytest

from dpresnet import timeline, trace
from dpresnet.trace import Part
from tests.launching import python

EXCHANGE = {"channel": "exchange", "number": 1}


def part(rank: int, late: float) -> Part:
    """Two steps of 10 s; in the second everything is twice as long."""
    spans = []
    for begin, factor in ((100.0, 1.0), (120.0, 2.0)):

        def add(track, name, first, last, begin=begin + late, factor=factor, **facts):
            spans.append(trace.Span(track, name, begin + factor * first, begin + factor * last, facts))

        add("host", f"step {int(factor)}", 0, 10)
        add("host", "forward and backward", 0, 7)
        add("host", "statistics of bn1", 2, 3, **EXCHANGE)
        add("host", "wait for gradients", 7, 9)
        add("device", "update", -1, 0.5, kernel="optimizer_sgd")  # of the step before
        add("device", "input", 0.5, 2, kernel="augment_normalise")
        add("device", "loss", 3, 4, kernel="loss_softmax")
        add("device", "conv1.weight.grad", 4, 6, kernel="conv_weight")
        add("bucket 0", "bucket 0", 5, 8)
        add("bucket 1", "bucket 1", 6, 9)
        add("MPI", "the parts of bucket 0", 5, 6, number=2)
    return Part(rank, "here", late, 0.0, spans)


@pytest.fixture
def path(tmp_path):
    trace.write(tmp_path / "t.json", [part(0, 0.0), part(1, 50.0)])
    return tmp_path / "t.json"


def test_what_a_step_was_spent_on(path):
    spans = timeline.load(path)
    steps = timeline.steps_of(spans)
    assert list(steps) == [1, 2] and all(list(ranks) == [0, 1] for ranks in steps.values())
    for rank in (0, 1):
        assert timeline.account(spans, rank, steps[1][rank]) == pytest.approx(
            {"step": 1e4, "kernels": 5e3, "exchanges": 1e3, "gradients": 4e3, "exposed": 2e3})  # fmt: skip
        assert timeline.account(spans, rank, steps[2][rank])["kernels"] == pytest.approx(1e4)
    assert timeline.typical(steps) == 2


def test_overlapping_spans_count_once_and_only_within():
    spans = [(0.0, 1.0), (5.0, 12.0), (11.0, 13.0), (15.0, 16.0), (19.0, 30.0), (40.0, 50.0)]
    assert trace.covered(spans, 10.0, 20.0) == 5.0


def test_backward_begins_with_the_loss(path):
    device = timeline.load(path)[1, "device"]
    kinds = [(kind, row.name) for kind, row in timeline.kinds(device)][:4]
    assert kinds == [("update", "update"), ("forward", "input"), ("forward", "loss"), ("backward", "conv1.weight.grad")]


def test_a_row_for_each_step_and_rank(path):
    done = python(["-m", "dpresnet.timeline", path])
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[1] == ["1", "0", "10000.0", "5000.0", "1000.0", "4000.0", "2000.0"]
    assert [row[:2] for row in rows[1:5]] == [["1", "0"], ["1", "1"], ["2", "0"], ["2", "1"]]


@pytest.mark.parametrize("content", [None, "", "{}", '{"traceEvents": []}'])
def test_other_files_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "t").write_text(content)
    done = python(["-m", "dpresnet.timeline", tmp_path / "t"])
    assert done.returncode == 78 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "trace" in done.stderr
