"""Recorded runs are repeated bit for bit in one process, and the first difference is named."""

import json
import re
import shutil
import socket

import pytest

from dpresnet import checkpoint
from tests.launching import python
from tests.system.test_elastic import CASES, make_dataset
from tests.system.test_train import succeed, train

BASE = ("--replicas", "4", "--batch", "16", "--accumulate", "2", "--bn", "group:2", "--epochs", "2", "--warmup-epochs", "1",
        "--save-every-epochs", "0", "--save-every-steps", "6", "--record-every", "4")  # fmt: skip


def verify(*argv: object):
    return python(["-m", "dpresnet.verify", *map(str, argv)], timeout=200)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """16 steps, one epoch and a third, on two ranks of two replicas."""
    out = tmp_path_factory.mktemp("runs") / "recorded"
    succeed(2, out, "--steps", "16", base=BASE)
    return out


def test_run_of_two_ranks_is_repeated_in_one_process(recorded):
    done = verify(recorded)
    assert done.returncode == 0, done.stderr
    assert f"{recorded}: steps 1 to 16 repeated, every bit the same" in done.stdout
    for counted in ("16 steps", "8 recorded steps of a rank", "3 checkpoints", "1 epochs", "1 result"):
        assert counted in done.stdout


def test_some_steps_from_a_checkpoint_on(recorded):
    done = verify(recorded, "--from", "6", "--steps", "7")
    assert done.returncode == 0, done.stderr
    assert "steps 7 to 13 repeated, every bit the same (7 steps, 4 recorded steps of a rank, 1 checkpoints" in done.stdout


def test_what_earlier_steps_have_left_in_memory_does_not_count(tmp_path):
    """The last step of an epoch is short, and is recorded: replicas without images hold older ones, or none at all."""
    base = ("--replicas", "4", "--batch", "32", "--steps", "12", "--save-every-steps", "11", "--record-every", "12")
    succeed(0, tmp_path, base=base)
    done = verify(tmp_path, "--from", "11")
    assert done.returncode == 0, done.stderr
    assert "1 recorded steps of a rank" in done.stdout


@pytest.mark.parametrize(("record", "expected"), [
    ("1", "step 5: layer2.0.conv2.packed of replica 1, tensor layer2.0.conv2.packed, was another on rank 1 on {host}"),
    ("0", "step [5-8]: loss was "),  # rounding may hide it for a while
])  # fmt: skip
def test_a_bit_that_flipped_on_one_rank_is_traced_to_it(tmp_path, record, expected):
    """Training itself finds it only when it saves, after the last step."""
    base = ("--replicas", "2", "--batch", "16", "--steps", "8", "--save-every-epochs", "0", "--check-every", "0",
            "--record-every", record)  # fmt: skip
    done = train(2, tmp_path, fault="kind=flip,rank=1,step=5", base=base)
    assert done.returncode == 70, done.stderr
    found = verify(tmp_path)
    assert found.returncode == 70, found.stdout + found.stderr
    assert re.search(f"DIFFERENT: {expected.format(host=re.escape(socket.gethostname()))}", found.stderr)
    assert ("--record-every" in found.stderr) == (record == "0")


def test_difference_in_a_checkpoint_names_the_array(recorded, tmp_path):
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "trail")
    saved = checkpoint.load(tmp_path / "checkpoints" / "step-00000012.h5")
    saved.arrays["momentum/layer1.0.conv1.weight"][3, 2, 1, 1] *= 1 + 2**-23
    checkpoint.save(tmp_path / "checkpoints", 12, saved.arrays, saved.meta, keep=5)
    found = verify(tmp_path)
    assert found.returncode == 70
    assert "DIFFERENT: step 12: momentum/layer1.0.conv1.weight of" in found.stderr
    assert "step-00000012.h5 differs in 1 of 2304 values" in found.stderr


@pytest.mark.parametrize(("key", "step"), [("loss", 3), ("lr", 14), ("test_accuracy", 12)])
def test_difference_in_the_metrics_names_step_and_value(recorded, tmp_path, key, step):
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["step"] == step and key in line:
            line[key] += 2**-40
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = verify(tmp_path, *(("--from", "6") if step > 6 else ()))
    assert found.returncode == 70
    assert f"DIFFERENT: step {step}: {key} was " in found.stderr


def test_difference_in_the_result_is_found(recorded, tmp_path):
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    result = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps(result | {"params_sha256": "0" * 64, "device": "Acme One"}))
    found = verify(tmp_path, "--from", "12")
    assert found.returncode == 70
    assert "DIFFERENT: step 16: params_sha256 was" in found.stderr and "the run was on Acme One" in found.stderr


def test_another_version_of_the_data_set_is_refused(tmp_path):
    """By its name it is the same; going on with it, or comparing, would mislead."""
    data, out = make_dataset(CASES[0], tmp_path), tmp_path / "run"
    base = ("--dataset", str(data), "--replicas", "2", "--batch", "4", "--epochs", "1", "--steps", "3",
            "--save-every-steps", "2")  # fmt: skip
    succeed(0, out, base=base)
    make_dataset(CASES[1], tmp_path)
    for done in (verify(out, "--from", "2"), train(0, out, "--resume", "auto", base=base)):
        assert done.returncode == 78, done.stderr
        assert f"that run used another version of the data set {data}" in done.stderr


def test_a_torn_last_line_of_the_metrics_is_no_difference(recorded, tmp_path):
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 17, "lo')
    assert verify(tmp_path, "--from", "12").returncode == 0


@pytest.mark.parametrize(("flags", "words"), [
    (("--from", "5"), ["--from 5", "[6, 12, 16]"]),
    (("--from", "16"), ["nothing after step 16"]),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(recorded, flags, words):
    refused = verify(recorded, *flags)
    assert refused.returncode == 78
    assert all(word in refused.stderr for word in words)


def test_a_folder_without_a_run_is_refused(tmp_path):
    refused = verify(tmp_path)
    assert refused.returncode == 78
    assert f"error: {tmp_path} is not the folder of a run" in refused.stderr


def test_trail_of_an_earlier_run_does_not_stay(recorded, tmp_path):
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    succeed(4, tmp_path, "--steps", "13", "--resume", str(tmp_path / "checkpoints" / "step-00000006.h5"), base=BASE)
    names = sorted(path.name for path in (tmp_path / "trail").iterdir())
    assert names == [f"step-{step:08d}.rank-{rank}.json" for step, ranks in ((4, 2), (8, 4), (12, 4)) for rank in range(ranks)]
    done = verify(tmp_path)
    assert done.returncode == 0 and "1 result" in done.stdout
    succeed(0, tmp_path, "--steps", "3", base=BASE)
    assert list((tmp_path / "trail").iterdir()) == []
