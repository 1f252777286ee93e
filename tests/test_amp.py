"""The loss scaler against a simulation written from the rules, and the rules at their edges."""

import json
import random
from dataclasses import FrozenInstanceError

import pytest

from dpresnet.amp import LossScaler
from dpresnet.errors import GaveUp


def simulate(overflows: list[bool], scale: float, ceiling: float) -> list[tuple]:
    """(scale, good steps, skipped, in a row) after each step, ending with "gave up" if it comes to that."""
    good = skipped = row = 0
    states = []
    for bad in overflows:
        if bad and scale == 1:
            return [*states, "gave up"]
        good, skipped, row = (0, skipped + 1, row + 1) if bad else (good + 1, skipped, 0)
        grows = good == 2000
        scale, good = (scale / 2, 0) if bad else (min(2 * scale, ceiling), 0) if grows else (scale, good)
        states.append((scale, good, skipped, row))
    return states


def run(scaler: LossScaler, overflows: list[bool]) -> list[tuple]:
    states = []
    for bad in overflows:
        try:
            scaler = scaler.after(bad)
        except GaveUp:
            return [*states, "gave up"]
        states.append((scaler.scale, scaler.good_steps, scaler.skipped, scaler.consecutive))
    return states


def sequence(seed: int, rate: float) -> list[bool]:
    rng = random.Random(seed)
    return [rng.random() < rate for _ in range(30_000)]


@pytest.mark.parametrize("rate, seed", [(rate, seed) for rate in (0.0, 1e-4, 4e-4, 2e-3, 0.5) for seed in range(3)])
def test_random_overflows_give_the_states_of_the_simulation(rate, seed):
    overflows = sequence(seed, rate)
    states = simulate(overflows, 65536.0, 2.0**24)
    assert run(LossScaler(), overflows) == states
    assert (states[-1] == "gave up") == (rate >= 2e-3)  # the cases cover both ends


@pytest.mark.parametrize("overflows, wanted", [
    ([], (65536.0, 0, 0, 0)),
    ([False], (65536.0, 1, 0, 0)),
    ([False] * 1999, (65536.0, 1999, 0, 0)),
    ([False] * 2000, (131072.0, 0, 0, 0)),
    ([False] * 1999 + [True], (32768.0, 0, 1, 1)),
    ([False] * 1999 + [True] + [False] * 1999, (32768.0, 1999, 1, 0)),
    ([False] * 1999 + [True] + [False] * 2000, (65536.0, 0, 1, 0)),
    ([True, True, False, True], (8192.0, 0, 3, 1)),
    ([False] * 2000 * 8, (2.0**24, 0, 0, 0)),
    ([False] * 2000 * 9, (2.0**24, 0, 0, 0)),
    ([True] * 16, (1.0, 0, 16, 16)),
])
def test_the_rules_at_their_edges(overflows, wanted):
    scaler = LossScaler()
    for bad in overflows:
        scaler = scaler.after(bad)
    assert (scaler.scale, scaler.good_steps, scaler.skipped, scaler.consecutive) == wanted


def test_an_overflow_at_scale_one_gives_up_and_says_after_how_many():
    scaler = LossScaler()
    for bad in [True, False] + [True] * 15:
        scaler = scaler.after(bad)
    assert scaler.scale == 1.0
    with pytest.raises(GaveUp, match=r"loss scale 1, .*\(16 steps in a row, 17 in all\): lower --lr") as caught:
        scaler.after(True)
    assert "\n" not in str(caught.value) and GaveUp.exit_code == 70
    assert scaler.after(False).consecutive == 0  # a finite step at the floor goes on


def test_a_run_gives_up_after_at_most_25_overflows_in_a_row():
    scaler = LossScaler()
    for _ in range(8 * 2000):
        scaler = scaler.after(False)
    assert len(run(scaler, [True] * 100)) == 25


def test_disabled_stays_at_one_and_gives_up_at_once():
    scaler = LossScaler.disabled()
    assert run(scaler, [False] * 5000) == simulate([False] * 5000, 1.0, 1.0)
    assert {state[0] for state in run(scaler, [False] * 5000)} == {1.0}
    assert run(scaler, [True]) == ["gave up"]


def test_the_scale_is_always_a_power_of_two_so_that_scaling_is_exact():
    for state in run(LossScaler(), sequence(7, 4e-4)):
        assert state[0].hex().split("p")[0] == "0x1.0000000000000"


@pytest.mark.parametrize("start", [LossScaler(), LossScaler.disabled()])
def test_a_saved_scaler_goes_on_as_if_never_stopped(start):
    overflows = [False] * 1990 + [start.scale > 1] + [False] * 3000
    straight = run(start, overflows)
    for bad in overflows[:2500]:
        start = start.after(bad)
    restored = LossScaler.from_dict(json.loads(json.dumps(start.to_dict())))
    assert restored == start
    assert run(restored, overflows[2500:]) == straight[2500:]


def test_a_scaler_is_a_value():
    scaler = LossScaler()
    scaler.after(True)
    assert scaler == LossScaler()
    with pytest.raises(FrozenInstanceError):
        scaler.scale = 2.0
