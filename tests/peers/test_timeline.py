"""The picture of a step."""

from matplotlib import pyplot

from dpresnet import timeline
from tests.launching import python
from tests.test_timeline import path

__all__ = ["path"]


def test_a_step_of_all_ranks_is_drawn(path, tmp_path):
    done = python(["-m", "dpresnet.timeline", path, "--step", "1", "--png", tmp_path / "t.png"])
    assert done.returncode == 0, done.stderr
    assert pyplot.imread(tmp_path / "t.png").std() > 0
    spans = timeline.load(path)
    titles = [title for title, _ in timeline.lanes(spans, 1)]
    assert titles == ["device", "host waits", "bucket 0", "bucket 1"]
    waits = [(kind, row.name) for kind, row in timeline.lanes(spans, 1)[1][1]][:3]
    assert waits == [("statistics, losses", "statistics of bn1"), ("statistics, losses", "statistics of bn1"),
                     ("waiting for gradients or images", "wait for gradients")]  # fmt: skip


def test_a_step_that_is_not_there_is_refused(path, tmp_path):
    done = python(["-m", "dpresnet.timeline", path, "--step", "7", "--png", tmp_path / "t.png"])
    assert done.returncode == 78 and "--step 7 is not in this trace: choose one of 1 to 2" in done.stderr
