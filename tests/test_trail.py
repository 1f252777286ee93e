"""Digests of what the entries of a step have written: what is a difference, and which one is named first."""

import json

import numpy as np
import pytest

from dpresnet import trail
from dpresnet.errors import Refused
from dpresnet.trail import WHOLE_RANK, Mark, Trail

VALUES = np.arange(12, dtype=np.float32)


def step(*changes: tuple[int, str]) -> Trail:
    """Two replicas with two entries each and one common one; ``changes`` flip a bit of (replica, entry)."""
    made = Trail()
    for entry in ("conv1", "bn1"):
        for replica in (0, 1):
            made.add(0, replica, entry, "y", flipped(VALUES + replica, (replica, entry) in changes))
    made.add(0, WHOLE_RANK, "reduced", "fc.weight", flipped(VALUES, (WHOLE_RANK, "reduced") in changes))
    return made


def flipped(values: np.ndarray, wrong: bool) -> np.ndarray:
    values = values.copy()
    values.view(np.uint32)[5] ^= int(wrong)
    return values


def recorded(made: Trail, replicas: tuple[int, ...] = (0, 1)) -> trail.Recorded:
    return trail.Recorded(None, 0, "host", [mark for mark in made.marks if mark.replica in (*replicas, WHOLE_RANK)])


@pytest.mark.parametrize("replicas", [(0,), (1,), (0, 1)])
def test_same_bits_have_no_difference_whoever_owns_the_replicas(replicas):
    assert recorded(step(), replicas).first_difference(step()) is None


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ([(1, "bn1")], "bn1 of replica 1, tensor y"),
        ([(1, "conv1"), (0, "bn1")], "conv1 of replica 1, tensor y"),
        ([(WHOLE_RANK, "reduced"), (0, "bn1")], "bn1 of replica 0, tensor y"),
        ([(WHOLE_RANK, "reduced")], "reduced, tensor fc.weight"),
    ],
)
def test_the_first_difference_in_the_order_of_the_step_is_named(changes, first):
    assert str(recorded(step(*changes)).first_difference(step())) == first


def test_replicas_of_another_rank_do_not_count():
    assert recorded(step((1, "bn1")), (0,)).first_difference(step()) is None


def test_an_entry_that_was_not_repeated_is_a_difference():
    shorter = Trail([mark for mark in step().marks if mark.entry != "bn1"])
    assert recorded(step()).first_difference(shorter).entry == "bn1"


def test_micro_batches_are_told_apart():
    made = Trail()
    for micro_batch in range(3):
        made.add(micro_batch, 0, "conv1", "y", VALUES)
    assert [mark.order for mark in made.marks] == [0, 1, 2]
    assert str(made.marks[2]) == "conv1 of replica 0 in micro-batch 2, tensor y"


def test_files_hold_what_was_made_and_are_forgotten_beyond_a_step(tmp_path):
    for number, rank in ((2, 0), (2, 1), (4, 0)):
        trail.write(tmp_path, number, rank, f"host{rank}", step())
    found = trail.read(tmp_path)
    assert {number: [(r.rank, r.host) for r in of_step] for number, of_step in found.items()} == {
        2: [(0, "host0"), (1, "host1")], 4: [(0, "host0")]}  # fmt: skip
    assert found[4][0].marks == step().marks and isinstance(found[4][0].marks[0], Mark)
    trail.forget(tmp_path, after=2)
    assert list(trail.read(tmp_path)) == [2]
    trail.forget(tmp_path)
    assert trail.read(tmp_path) == {} == trail.read(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"format": 9, "rank": 0, "host": "a", "marks": []})])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / trail.file_name(3, 0)).write_text(content)
    with pytest.raises(Refused, match=r"step-00000003.rank-0.json is not a trail"):
        trail.read(tmp_path)
