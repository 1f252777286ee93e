"""The page about runs, of a real run and of one with awkward names."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest

from dpresnet import report
from tests.launching import python
from tests.test_report import folder, step

PNG = b"\x89PNG\r\n\x1a\n"


class Cells(HTMLParser):
    """The texts of every row, and everything that a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.sources, self.tags, self.marked, self.inside = [], [], set(), [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.add(tag)
        self.sources += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "tr":
            self.rows.append([])
            if attributes.get("class") == "differs":
                self.marked.append(self.rows[-1])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data.strip()


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "real"
    done = python(["-m", "dpresnet.train", "--epochs", "2", "--out", out])
    assert done.returncode == 0, done.stderr
    return out


def test_a_page_tells_what_the_files_tell_and_fetches_nothing(real, tmp_path):
    page = tmp_path / "page.html"
    done = python(["-m", "dpresnet.report", real, "-o", page])
    assert done.returncode == 0, done.stderr
    cells = Cells(page.read_text())
    found = {row[0]: row[1:] for row in cells.rows if row}
    result, config = (json.loads((real / name).read_text()) for name in ("result.json", "config.json"))
    assert found["params_sha256"] == [result["params_sha256"]]
    assert found["test_accuracy"] == [f"{result['test_accuracy']:.4g}"]
    assert found["numpy"] == [result["versions"]["numpy"]] and found["seed"] == [str(config["seed"])]
    assert set(config) <= set(found) and not cells.marked
    assert all(source.startswith("data:image/png;base64,") for source in cells.sources)
    assert cells.tags.isdisjoint({"script", "link"})
    assert all(base64.b64decode(source.split(",")[1]).startswith(PNG) for source in cells.sources)


def test_several_runs_share_the_page(real, tmp_path):
    names = ["<b>cat", "dog & co"]
    confusion = {"classes": names, "matrix": [[3, 1], [0, 4]], "ema_matrix": [[4, 0], [0, 4]]}
    other = folder(tmp_path / "<i>other", [step(1), step(2, loss=None)], {"arch": "<b>", "lr": 7.0}, confusion=confusion)
    text = report.page([report.load(real), report.load(other)])
    cells = Cells(text)
    assert cells.tags.isdisjoint({"b", "i"}) and len(cells.sources) == 4
    assert ["arch", "resnet20", "<b>"] in cells.marked and ["lr", "0.4", "7"] in cells.marked
    assert "moving average" in text and re.search("Confusion matrix of &lt;i&gt;other", text)


@pytest.mark.parametrize("classes", [1, 21, 100])
def test_confusion_of_few_and_many_classes(classes):
    counts = [[int(row == column) for column in range(classes)] for row in range(classes)]
    chart = report.draw_confusion([f"class {k}" for k in range(classes)], counts).axes[0]
    assert len(chart.texts) == (classes if classes <= report.MOST_COUNTED else 0)
    assert ("class 0" in [label.get_text() for label in chart.get_yticklabels()]) == (classes <= report.MOST_NAMED)


def test_a_picture_has_the_curves_of_the_epochs(real, tmp_path):
    picture = tmp_path / "curves.png"
    done = python(["-m", "dpresnet.report", real, "-o", picture])
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(PNG)
    run = report.load(real)
    charts = {chart.get_title(): chart for chart in report.draw_curves([run]).axes}
    training, test = (line.get_ydata().tolist() for line in charts["accuracy"].lines)
    assert training == [line["train_accuracy"] for line in run.epochs] and len(training) == 2
    assert test == [line["test_accuracy"] for line in run.epochs]
