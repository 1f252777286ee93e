"""The file of tuned sizes: who reads it, what is wrong with it, how it is written; and the program on a tiny network."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dpresnet import doctor, machine, tiles, tune
from dpresnet.bench import facts, ours
from dpresnet.bench.workload import Workload
from dpresnet.device import Device, choose_device, tuned_kernels
from dpresnet.tiles import DirectGather, DirectWeight, Tuned, WinogradGather, WinogradWeight
from tests.sweeps import in_sweeps

TINY = ["--arch", "resnet20", "--image", "8", "--batch", "4", "--rounds", "1"]
SIZES = {
    "conv_gather forward fp32 x": DirectGather(7, 96, 32),
    "conv_weight weight fp16 y": DirectWeight(4, 64, 64, 8),
    "winograd_gather data fp32 x": WinogradGather(8, 1, 4, 128),
    "winograd_weight weight fp32 x": WinogradWeight(4, 8, 64),
}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Where the tuned sizes of this test lie; there is nothing yet."""
    path = tmp_path / "cache" / "tuned.json"
    monkeypatch.setenv(tiles.VARIABLE, str(path))
    tiles._tuned.cache_clear()
    yield path
    tiles._tuned.cache_clear()


def program(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "dpresnet.tune", *argv], capture_output=True, text=True)


# ---- the file


def test_what_is_written_is_read(file):
    assert tiles.write(file, "this", "abc", SIZES) == 4
    assert tiles.tuned("this", "abc") == Tuned(SIZES, file)
    assert tiles.tuned("other", "abc") is tiles.SHIPPED_ONLY
    assert '"conv_gather forward fp32 x": {"rows": 7, "pixels": 96, "groups": 32}' in file.read_text()
    assert not list(file.parent.glob(".*")), "nothing is left beside it"


def test_devices_keep_their_entries(file, capsys):
    tiles.write(file, "one", "abc", SIZES)
    tiles.write(file, "two", "abc", {"conv_gather a": DirectGather(8, 96, 32)})
    first, *others = SIZES
    tiles.write(file, "one", "abc", {first: None, "conv_gather z": DirectGather(6, 96, 32)})
    assert tiles.tuned("one", "abc").entries.keys() == {*others, "conv_gather z"}
    assert tiles.tuned("two", "abc").entries.keys() == {"conv_gather a"}
    tiles.write(file, "one", "def", {first: SIZES[first]})
    assert tiles.tuned("one", "def").entries.keys() == {first}, "those for other kernels are gone"
    assert capsys.readouterr().err == ""


def test_without_a_file_nothing_is_said(file, capsys):
    assert tiles.tuned("this", "abc") is tiles.SHIPPED_ONLY
    assert capsys.readouterr().err == ""


def test_entries_for_other_kernels_are_ignored_and_reported_once(file, capsys):
    tiles.write(file, "this", "abc", SIZES)
    assert [tiles.tuned("this", "def") for _ in range(3)] == [tiles.SHIPPED_ONLY] * 3
    (line,) = capsys.readouterr().err.splitlines()
    assert str(file) in line and "run python -m dpresnet.tune again" in line


def content(**changes: object) -> str:
    """A file of one entry, with changes to it."""
    entry = {"rows": 8, "pixels": 96, "groups": 32} | changes.pop("entry", {})
    section = {"kernels": "abc", "sizes": {changes.pop("key", "conv_gather x"): entry}} | changes.pop("section", {})
    return json.dumps({"format": tiles.FORMAT, "devices": {"this": section}} | changes)


BROKEN = {
    "nothing": "",
    "half of it": content()[:40],
    "not text": "\udcff\udcfe",
    "a list": "[1]",
    "another program's": '{"version": 3}',
    "a later format": content(format=tiles.FORMAT + 1),
    "no kernels": content(section={"kernels": None}),
    "sizes that are a list": content(section={"sizes": [1]}),
    "an unknown kernel": content(key="pool_gather x"),
    "a size too many": content(entry={"tiles": 1}),
    "rows that no kernel has": content(entry={"rows": 32}),
    "a fraction": content(entry={"pixels": 1.5}),
    "a truth": content(entry={"pixels": True}),
    "zero": content(entry={"groups": 0}),
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_broken_and_foreign_files_are_reported_once_and_kept(file, capsys, text):
    file.parent.mkdir()
    file.write_bytes(text.encode(errors="surrogateescape"))
    assert [tiles.tuned(device, "abc") for device in ("this", "this")] == [tiles.SHIPPED_ONLY] * 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {file}: ") and f"remove it, or set {tiles.VARIABLE}" in line
    with pytest.raises(tiles.Foreign):
        tiles.write(file, "this", "abc", SIZES)
    assert file.read_bytes() == text.encode(errors="surrogateescape")


def test_the_file_that_the_broken_ones_are_made_of_is_a_good_one(file):
    file.parent.mkdir()
    file.write_text(content())
    assert tiles.tuned("this", "abc").entries == {"conv_gather x": DirectGather(8, 96, 32)}


def test_a_folder_in_its_place_is_reported(file, capsys):
    file.mkdir(parents=True)
    assert tiles.tuned("this", "abc") is tiles.SHIPPED_ONLY
    assert "cannot be read (Is a directory)" in capsys.readouterr().err


def test_a_write_that_fails_leaves_the_old_file(file, monkeypatch):
    tiles.write(file, "this", "abc", SIZES)
    before = file.read_text()

    def fail(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        tiles.write(file, "this", "abc", {"conv_gather a": DirectGather(8, 96, 32)})
    assert file.read_text() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_readers_see_whole_files_only(file, monkeypatch):
    """The new text lies complete beside the old file before it takes its name."""
    tiles.write(file, "this", "abc", SIZES)
    before, seen, replace_path = file.read_text(), [], os.replace

    def watched(source, target):
        seen.append((file.read_text(), json.loads(Path(source).read_text())["devices"].keys()))
        replace_path(source, target)

    monkeypatch.setattr(os, "replace", watched)
    tiles.write(file, "other", "abc", SIZES)
    assert seen == [(before, {"this", "other"})]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({tiles.VARIABLE: "/a/b", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/dpresnet/tuned.json"),
        ({"HOME": "/h"}, "/h/.cache/dpresnet/tuned.json"),
        ({tiles.VARIABLE: "", "HOME": "/h"}, "None"),
        ({}, "None"),
    ],
    ids=str,
)
def test_place(monkeypatch, settings, expected):
    for name in (tiles.VARIABLE, "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert str(tiles.place()) == expected


def test_the_file_is_read_once(file, monkeypatch):
    tiles.write(file, "this", "abc", SIZES)
    reads, read = [], tiles.read
    monkeypatch.setattr(tiles, "read", lambda path: reads.append(path) or read(path))
    assert all(tiles.tuned("this", "abc").entries == SIZES for _ in range(5))
    assert reads == [file]


# ---- a network


def odd(sizes: tiles.Sizes) -> tiles.Sizes:
    """Others than the shipped ones."""
    return replace(sizes, **{name: {"rows": 3, "pixels": 50, "panel": 32, "tiles": 5}.get(name, 1) for name in vars(sizes)})


def launches(side: ours.Ours) -> list:
    """Of the convolutions: what they are compiled with and how many work-groups there are."""
    plan = side.model.train.plan
    return [(e.defines, e.size) for e in plan if getattr(e, "flops", 0) and e.stem in ("conv", "winograd")]


def trained(work: Workload) -> tuple[dict[str, np.ndarray], list, ours.Ours]:
    """Parameters and statistics after some steps, and the launches."""
    side = ours.Ours(work)
    side.warm()
    side.run(2)
    return side.trainer.arrays(), launches(side), side


@pytest.mark.parametrize("vector", [0, *in_sweeps(8)])
@pytest.mark.parametrize("network", [("resnet20", "fp16"), *in_sweeps(("resnet20", "fp32"), ("resnext50_32x4d", "fp32"))],
                         ids="-".join)  # fmt: skip
def test_training_leaves_the_same_bits_with_every_file(file, network, vector):
    from dpresnet import tuning
    from dpresnet.resnet import Options

    device = Device(choose_device(), vector=vector)
    if device.vector == 1:
        pytest.skip("this device has no register tiles")
    arch, precision = network
    work = Workload(arch, image=16, batch=3, precision=precision, vector=vector)
    usual, shipped, side = trained(work)
    assert side.device.tuned.facts == {"file": None, "entries": 0}
    found = tuning.tasks_of(device, arch, Options(work.classes, work.stem), work.image, work.batch, precision, False)
    winners = {task.key: odd(task.conv.sizes(task.kernel, task.transposed)) for task in found}
    tiles.write(file, device.tuning_name, tuned_kernels(), winners)
    others, tuned, side = trained(work)
    assert side.device.tuned.facts == {"file": str(file), "entries": len(winners)}
    same = [dict(a[0]) for a, b in zip(tuned, shipped, strict=True) if a == b]
    assert all("GROUP" in defines for defines in same), "rows of small groups are multiples, so both may be equal"
    assert len(same) < len(shipped) / 5
    assert usual.keys() == others.keys()
    for name, bits in usual.items():
        np.testing.assert_array_equal(bits, others[name], err_msg=name)


# ---- the program


@pytest.mark.sweep
def test_program_measures_writes_and_shows(file, capsys):
    done = program(*TINY, "--precision", "fp16")
    assert done.returncode == 0, done.stderr
    device = Device(choose_device())
    if device.vector == 1:
        assert "nothing to choose" in done.stdout
        return
    assert device.tuning_name in done.stdout and "sum " in done.stdout
    ((name, found),) = tiles.read(file).items()
    assert name == device.tuning_name and found["kernels"] == tuned_kernels()
    assert all(" fp16 4x" in key for key in found["sizes"])
    assert f"({len(found['sizes'])} launches of this device)" in done.stdout
    shown = program("--show")
    assert shown.returncode == 0 and all(key in shown.stdout for key in found["sizes"])


def test_dry_run_writes_nothing(file):
    done = program(*TINY, "--dry-run", "--infer")
    assert done.returncode == 0, done.stderr
    assert not file.exists()
    assert " data " not in done.stdout and " weight " not in done.stdout


def refused(capsys, *argv: str) -> str:
    assert tune.main(argv) == 78
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_refuses_a_file_that_is_not_its_own(file, capsys):
    file.parent.mkdir()
    file.write_text("important")
    assert "error: " in (line := refused(capsys, *TINY)) and str(file) in line and "remove it" in line
    assert "remove it" in refused(capsys, "--show")
    assert file.read_text() == "important"


def test_refuses_before_it_measures(file, capsys, monkeypatch):
    file.mkdir(parents=True)
    assert str(file) in refused(capsys, *TINY)
    monkeypatch.setenv(tiles.VARIABLE, "/proc/no/tuned.json")
    monkeypatch.setattr(tune, "measure", None)
    assert "cannot be written (No such file or directory): set DPRESNET_TUNED" in refused(capsys, *TINY)
    monkeypatch.setenv(tiles.VARIABLE, "")
    assert "there is no place for the file" in refused(capsys, *TINY)


@pytest.mark.parametrize("argv", [["--rounds", "0"], ["--arch", "resnet19"], ["--batch", "-1"], ["--precision", "8"]], ids=str)
def test_refuses_flags(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        tune.main(argv)
    assert caught.value.code == 2 and argv[0] in capsys.readouterr().err


def test_nothing_to_show(file, capsys):
    assert tune.main(["--show"]) == 0
    assert "nothing is tuned" in capsys.readouterr().out


def test_reports_say_which_sizes():
    assert facts.tuned_text(None) == facts.tuned_text({"file": None, "entries": 0}) == "tile sizes: as shipped"
    assert "for 3 launches (/a/b)" in facts.tuned_text({"file": "/a/b", "entries": 3})
    assert "python -m dpresnet.tune" in str(Tuned()) and "1 launches in f" in str(Tuned({"a": DirectGather(1, 1, 1)}, "f"))


def test_doctor_says_which_sizes(file):
    assert "python -m dpresnet.tune" in machine.probe_compiler()["tuned"]
    tiles.write(file, Device(choose_device()).tuning_name, tuned_kernels(), SIZES)
    found = machine.probe_compiler()
    assert found["tuned"] == f"tile sizes of 4 launches in {file}"
    none = {"error": ""}
    facts = SimpleNamespace(opencl=none, compiler=found, cache="", cache_error="", cores=1, ranks=1, settings={}, mpi=none,
                            launchers=(), hdf5=none)  # fmt: skip
    assert f"  tuned    {found['tuned']}" in list(doctor.describe(facts))
