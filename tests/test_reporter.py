"""The run folder and the display: what tools read back, what resuming cuts, what a terminal and a pipe show."""

import io
import itertools
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from dpresnet import reporter as module
from dpresnet.config import Config, from_json
from dpresnet.errors import Refused
from dpresnet.reporter import RESULT_KEYS, Reporter, write_json

CFG = Config(replicas=4, num_classes=10, shortcut="A", epochs=3)
STEP_KEYS = {"step", "epoch", "samples", "loss", "lr", "loss_scale", "skipped", "images_per_s"}
EPOCH_KEYS = {"step", "epoch", "samples", "train_loss", "train_accuracy", "test_loss", "test_accuracy"}
RESULT = dict.fromkeys(RESULT_KEYS, 0) | {"test_accuracy": 0.9875, "steps": 12, "wall_s": 61.25, "images_per_s": 1234.5}


def train(reporter: Reporter, steps: range, samples: int = 0) -> None:
    """Four steps of 128 samples to an epoch, each step and epoch reported with figures that depend on it alone."""
    for step in steps:
        epoch, samples = (step - 1) // 4, samples + 128
        reporter.step(step, epoch, samples, loss=2 / step, lr=0.1, loss_scale=65536.0, skipped=0, accuracy=step / 100,
                      images_per_s=1000.0)
        if step % 4 == 0:
            reporter.epoch(epoch, train_loss=1 / step, train_accuracy=0.5, test_loss=2 / step, test_accuracy=0.75)


def reporter(out: Path, **options) -> Reporter:
    return Reporter(out, CFG, **({"stderr": io.StringIO(), "ranks": 2} | options))


def whole_run(out: Path, **options) -> Reporter:
    made = reporter(out, **options)
    made.started(12)
    train(made, range(1, 13))
    made.finished(RESULT)
    return made


def lines(out: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (out / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------- files


def test_a_run_leaves_its_three_files_as_the_contract_has_them(tmp_path):
    whole_run(tmp_path / "new" / "run")
    out = tmp_path / "new" / "run"
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "metrics.jsonl", "result.json"]
    assert from_json(json.loads((out / "config.json").read_text())) == CFG
    assert json.loads((out / "result.json").read_text()) == RESULT
    entries = lines(out)
    assert [set(entry) for entry in entries] == ([STEP_KEYS] * 4 + [EPOCH_KEYS]) * 3
    assert entries[5] == {"step": 5, "epoch": 1, "samples": 640, "loss": 0.4, "lr": 0.1, "loss_scale": 65536.0,
                          "skipped": 0, "images_per_s": 1000.0}
    assert entries[9] == {"step": 8, "epoch": 1, "samples": 1024, "train_loss": 0.125, "train_accuracy": 0.5,
                          "test_loss": 0.25, "test_accuracy": 0.75}


def test_each_line_is_on_disk_as_soon_as_it_is_reported(tmp_path):
    made = reporter(tmp_path)
    made.started(12)
    for step in range(1, 4):
        train(made, range(step, step + 1))
        assert [entry["step"] for entry in lines(tmp_path)] == list(range(1, step + 1))
    made.close()


def test_what_is_not_finite_becomes_null_and_numpy_becomes_plain(tmp_path):
    with reporter(tmp_path) as made:
        made.started(12)
        made.step(np.int64(1), 0, np.int32(128), loss=float("nan"), lr=np.float32(0.5), loss_scale=np.float64(2.0),
                  skipped=1, accuracy=float("nan"), images_per_s=np.float32("inf"))
        made.epoch(0, train_loss=np.float32("-inf"), train_accuracy=0.1)
        made.finished(RESULT | {"test_loss": float("nan"), "more": {"list": [np.float32(1.5), float("inf"), "x"]}})
    assert lines(tmp_path) == [
        {"step": 1, "epoch": 0, "samples": 128, "loss": None, "lr": 0.5, "loss_scale": 2.0, "skipped": 1,
         "images_per_s": None},
        {"step": 1, "epoch": 0, "samples": 128, "train_loss": None, "train_accuracy": 0.1, "test_loss": None,
         "test_accuracy": None},
    ]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["test_loss"] is None and result["more"] == {"list": [1.5, None, "x"]}


def test_a_result_without_a_key_of_the_contract_is_not_written(tmp_path):
    with reporter(tmp_path) as made:
        made.started(12)
        with pytest.raises(ValueError, match="params_sha256"):
            made.finished({key: value for key, value in RESULT.items() if key != "params_sha256"})
    assert not (tmp_path / "result.json").exists()


def test_a_new_start_removes_the_result_of_the_run_before(tmp_path):
    whole_run(tmp_path)
    with reporter(tmp_path) as made:
        made.started(12)
    assert not (tmp_path / "result.json").exists()
    assert lines(tmp_path) == []


def test_json_files_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", {"value": 1})

    def power_cut(_: int) -> None:
        assert json.loads((tmp_path / "x.json").read_text()) == {"value": 1}
        raise OSError("power cut")

    monkeypatch.setattr(module.os, "fsync", power_cut)
    with pytest.raises(OSError, match="power cut"):
        write_json(tmp_path / "x.json", {"value": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"value": 1}


def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Refused, match=r"--out '.*file/run' cannot be written \(Not a directory\)"):
        reporter(tmp_path / "file" / "run").started(12)


# ------------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("step", range(13))
def test_a_resumed_run_leaves_the_metrics_of_the_uninterrupted_one(tmp_path, step):
    whole_run(tmp_path / "straight")
    whole = (tmp_path / "straight" / "metrics.jsonl").read_bytes()
    whole_run(tmp_path / "resumed")
    with reporter(tmp_path / "resumed") as made:
        made.started(12, step=step, samples=128 * step)
        kept = (tmp_path / "resumed" / "metrics.jsonl").read_bytes()
        assert whole.startswith(kept)
        assert kept.count(b"\n") == step + step // 4
        train(made, range(step + 1, 13), samples=128 * step)
    assert (tmp_path / "resumed" / "metrics.jsonl").read_bytes() == whole


@pytest.mark.parametrize("tail", [
    b'{"step": 3, "ep', b'{"samples": 3}', b"\0" * 40 + b"\n", b"[]\n", b"\xff\n", b"{}\n",
])
def test_a_torn_line_and_all_behind_it_go(tmp_path, tail):
    with reporter(tmp_path) as made:
        made.started(12)
        train(made, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    good = path.read_bytes()
    path.write_bytes(good + tail + (good if tail.endswith(b"\n") else b""))
    with reporter(tmp_path) as made:
        made.started(12, step=7, samples=7 * 128)
    assert path.read_bytes() == good


def test_a_skipped_step_after_the_checkpoint_goes_although_it_counts_no_step(tmp_path):
    with reporter(tmp_path) as made:
        made.started(12)
        train(made, range(1, 3))
        made.step(2, 0, 384, loss=1.0, lr=0.1, loss_scale=1024.0, skipped=1, accuracy=0.5, images_per_s=1.0)
    with reporter(tmp_path) as made:
        made.started(12, step=2, samples=256)
    assert [entry["samples"] for entry in lines(tmp_path)] == [128, 256]


def test_epoch_lines_after_a_resume_at_an_epochs_end_know_their_position(tmp_path):
    with reporter(tmp_path) as made:
        made.started(12, step=8, samples=1024)
        made.epoch(1, train_loss=0.5, train_accuracy=0.5)
    assert lines(tmp_path)[0] | {"step": 8, "epoch": 1, "samples": 1024} == lines(tmp_path)[0]


# ----------------------------------------------------------------------------------------------------- display


def test_other_ranks_do_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stream = io.StringIO()
    with whole_run(Path("run"), enabled=False, stderr=stream) as made:
        made.note("unseen")
    assert list(tmp_path.iterdir()) == [] and stream.getvalue() == ""


def test_a_pipe_gets_a_headline_a_line_per_epoch_and_the_end(tmp_path):
    stream = io.StringIO()
    whole_run(tmp_path, stderr=stream)
    headline, *epochs, done = stream.getvalue().splitlines()
    assert headline == f"resnet20 on digits, fp16, 4 x 32 samples per step on 2 ranks, 12 steps -> {tmp_path}"
    assert epochs[1] == "epoch 2/3: step 8, train loss 0.1250 accuracy 50.0%, test loss 0.2500 accuracy 75.0%"
    assert len(epochs) == 3
    assert done == f"done: test accuracy 98.8%, 12 steps in 61.2 s, 1234 images/s -> {tmp_path / 'result.json'}"


def test_a_long_epoch_gets_a_line_every_thirty_seconds_with_the_time_left(tmp_path):
    stream, now = io.StringIO(), 100.0
    with reporter(tmp_path, stderr=stream, clock=lambda: now) as made:
        made.started(1000, step=400, samples=0)
        for step in range(401, 421):
            now += 5.0
            made.step(step, 0, 0, loss=0.5, lr=0.1, loss_scale=2.0**20, skipped=0, accuracy=0.5, images_per_s=25.6)
    resumed, *told = stream.getvalue().splitlines()
    assert "resumed at step 400" in resumed
    assert [re.search(r"step (\d+)", line)[1] for line in told] == ["406", "412", "418"]
    assert told[0] == ("epoch 1/3: step 406/1000 26 images/s loss 0.500 acc 50.0% scale 2^20 49:30 left")


def test_a_display_that_breaks_does_not_end_the_run(tmp_path):
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    whole_run(tmp_path, stderr=Gone(), clock=itertools.count(0, 31).__next__)  # every step has its line
    assert len(lines(tmp_path)) == 15 and (tmp_path / "result.json").exists()


RUN = """
import sys, time
from pathlib import Path
from dpresnet.config import Config
from dpresnet.reporter import Reporter
with Reporter(Path(sys.argv[1]), Config(replicas=4, epochs=3), ranks=4) as reporter:
    reporter.started(12)
    for step in range(1, 13):
        time.sleep(0.03)
        reporter.step(step, (step - 1) // 4, 128 * step, 0.125, 0.1, 65536.0, 0, 0.975, 1234.4)
        if step == 6:
            reporter.note("a checkpoint was refused")
print("tqdm" in sys.modules)
"""


def on_a_terminal(argv: list[str]) -> tuple[str, str]:
    """Run a command whose standard error is a terminal of 80 columns; returns (what it shows, standard output)."""
    main, side = pty.openpty()
    termios.tcsetwinsize(side, (24, 80))
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=side, text=True,
                               env=os.environ | {"PYTHONUTF8": "1"}, start_new_session=True)
    os.close(side)
    shown = []
    reader = threading.Thread(target=read_all, args=(main, shown))
    reader.start()
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        reader.join(10)
        os.close(main)
    assert process.returncode == 0, shown
    return b"".join(shown).decode(), output


def read_all(descriptor: int, chunks: list[bytes]) -> None:
    try:
        while chunk := os.read(descriptor, 4096):
            chunks.append(chunk)
    except OSError:  # Linux says so when the other end is closed
        pass


def assert_a_bar(shown: str) -> None:
    frames = [frame for frame in re.split(r"[\r\n]+", shown) if re.search(r"^epoch \d/3 \|", frame)]
    assert len(frames) >= 3
    last = r"^epoch 3/3 \|█+\| \d\d:\d\d left, 1234 images/s loss 0\.125 acc 97\.5% scale 2\^16 *$"
    assert re.search(last, frames[-1]), frames[-1]
    assert all(len(frame) <= 80 for frame in frames)
    assert len({frame.count("█") for frame in frames}) >= 3  # it grows
    assert re.search(r"[\r\n]a checkpoint was refused *\r?\n", shown)  # on a line of its own


def test_a_terminal_shows_a_progress_bar(tmp_path):
    shown, output = on_a_terminal([sys.executable, "-c", RUN, str(tmp_path)])
    assert_a_bar(shown)
    assert output == "True\n"


def launcher(folder: Path) -> str:
    """A stand-in for mpirun: it gives what it starts pipes, and copies them to its own output."""
    script = folder / "mpirun"
    script.write_text('#!/bin/sh\n{ "$@" 2>&1 1>&3 | cat >&2; } 3>&1\n')
    script.chmod(0o755)
    return str(script)


def test_a_rank_under_mpirun_draws_on_the_terminal_of_mpirun(tmp_path):
    shown, _ = on_a_terminal([launcher(tmp_path), sys.executable, "-c", RUN, str(tmp_path / "run")])
    assert_a_bar(shown)


def test_a_rank_under_mpirun_writes_lines_if_mpirun_was_redirected(tmp_path):
    redirected = [launcher(tmp_path), sys.executable, "-c", RUN, str(tmp_path / "run")]
    shell = ["sh", "-c", '"$@" 2>' + str(tmp_path / "log"), "sh", *redirected]
    shown, _ = on_a_terminal(shell)
    assert shown == ""
    assert_plain((tmp_path / "log").read_text())


def assert_plain(text: str) -> None:
    assert text.startswith("resnet20 on digits") and text.endswith("\na checkpoint was refused\n")
    assert "\r" not in text and "█" not in text and len(text.splitlines()) == 2


def test_a_pipe_shows_no_bar_and_needs_no_tqdm(tmp_path):
    done = subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "False\n")
    assert_plain(done.stderr)


def events(folder):
    """(step, name, value) of all scalars, and the steps from which each file replaces what was there before."""
    scalars, begins = [], []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):  # TFRecord: length, its checksum, the record, its checksum
            (length,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            if event.session_log.status == event_pb2.SessionLog.START:
                begins.append(event.step)
    return scalars, begins


def test_event_files_hold_what_the_metrics_hold(tmp_path):
    for begin, end in ((0, 6), (4, 13)):
        with Reporter(tmp_path, replace(CFG, tensorboard=True), stderr=io.StringIO()) as made:
            made.started(12, step=begin, samples=128 * begin)
            train(made, range(begin + 1, end), samples=128 * begin)
    scalars, begins = events(tmp_path / "tensorboard")
    assert begins == [1, 5], "what the first run did after the checkpoint is replaced"
    valid = {(step, name): value for step, name, value in scalars}  # the later ones win
    expected = {(line["step"], name): value for line in lines(tmp_path) for name, value in line.items()
                if name not in ("step", "epoch", "samples")}  # fmt: skip
    assert valid == {key: pytest.approx(value, rel=1e-6) for key, value in expected.items()}


def test_no_event_files_unless_asked_for(tmp_path):
    whole_run(tmp_path)
    assert not (tmp_path / "tensorboard").exists()


def test_event_files_without_their_library_are_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"pip install 'dpresnet\[tensorboard\]'"):
        module.check_tensorboard()
