"""That oclgrind reports every kind of fault through the bench, so that its silence about the real kernels means something."""

import re
from pathlib import Path

import checked
import numpy as np
import pytest
from checked import KERNELS, Bench, Complaint
from harness import Mode, each_mode

from dpresnet import device
from dpresnet.plan import Local

BROKEN = Path(__file__).with_name("broken.cl").read_text()

OUTSIDE = {
    "read_beyond": "Invalid read of size 4 at global",
    "read_before": "Invalid read of size 4 at global",
    "write_beyond": "Invalid write of size 4 at global",
    "vector_beyond": "Invalid write of size 32 at global",
    "input_written": "Invalid write to read-only buffer",
    "local_beyond": "Invalid write of size 4 at local",
    "private_beyond": r"Index \(2\) exceeds static array size \(2\)",
}
RACES = {
    "two_writers": "Write-write data race at global",
    "same_value": "Write-write data race at global",
    "reader_and_writer": "Read-write data race at global",
}
UNSET = {
    "global_unset": "Uninitialized value written to global",
    "local_unset": "Uninitialized value written to global",
    "private_unset": "Uninitialized value written to global",
    "lane_unset": "Uninitialized value written to global",
    "branch_unset": "Controlflow depends on uninitialized value",
}


@pytest.fixture
def bench(monkeypatch):
    """With the kernels of broken.cl as a stem."""
    source = device.kernel_source
    for module in (device, checked):
        monkeypatch.setattr(module, "kernel_source", lambda stem: BROKEN if stem == "broken" else source(stem))
    return Bench(Mode("fp32", "vector"))


def launch(bench: Bench, verb: str) -> None:
    x, y = bench.array(np.arange(4)), bench.out_array(4)
    local = [Local(4)] if verb.startswith("local") else []
    bench.plan.launch("launch", f"broken_{verb}", (4,), [x, y, *local], [y])
    bench.run()
    np.testing.assert_array_equal(bench.read(y), np.arange(4))


def test_a_kernel_without_a_fault_is_not_reported(bench):
    launch(bench, "nothing")


@pytest.mark.parametrize(("verb", "message"), [*OUTSIDE.items(), *RACES.items(), *UNSET.items()])
def test_fault_is_reported(bench, verb, message):
    with pytest.raises(Complaint, match=rf"\n\n{message}[^\n]*\s+Kernel: broken_{verb}\n"):
        launch(bench, verb)


def test_every_broken_kernel_is_tried():
    assert {*re.findall(r"void broken_(\w+)", BROKEN)} == {"nothing", *OUTSIDE, *RACES, *UNSET}


def test_a_tensor_that_no_launch_wrote_is_reported(bench):
    """Also where memory of an earlier plan, written then, might be used again."""
    for _ in range(2):
        launch(bench, "nothing")
        bench = Bench(bench.mode)
        between, y = bench.scratch((4,)), bench.out_array(4)
        bench.plan.launch("launch", "broken_nothing", (4,), [between, y], [y])
        with pytest.raises(Complaint, match="Uninitialized value"):
            bench.run()
        bench = Bench(bench.mode)


@each_mode
def test_message_names_the_line_of_the_source(mode):
    """One vector more than there is."""
    bench = Bench(mode)
    x, y = bench.draw(1, 16, 1, 2), bench.out_image((1, 16, 1, 2))
    bench.plan.elementwise("add", "residual_add", 48, [bench.image(x), bench.image(x), y], [y])
    with pytest.raises(Complaint) as caught:
        bench.run()
    number, quoted = re.search(r"At kernels/residual\.cl:(\d+):\n\s*(.+)", str(caught.value)).groups()
    assert (KERNELS / "residual.cl").read_text().splitlines()[int(number) - 1].strip() == quoted
    assert "LOAD" in quoted
