"""The learning rate against its definition, its end points and its continuity."""

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from math import cos, pi

import pytest

from dpresnet.config import Config
from dpresnet.schedule import last_step, lr_at, planned_steps

PER_EPOCH = 50
CFG = Config(replicas=4, batch=32, lr=0.4, epochs=40, warmup_epochs=2.0)
TOTAL = 40 * PER_EPOCH
PEAK = 0.4 * 128 / 256


def rates(cfg: Config, total: int = TOTAL) -> list[float]:
    return [lr_at(cfg, step, PER_EPOCH, total) for step in range(total)]


def expected(schedule: str, step: int, warmup: int, total: int) -> float:
    """The factor on the peak, from exact fractions of the run."""
    if step < warmup:
        return Fraction(step + 1, warmup + 1)
    if schedule == "step":
        return [1.0, 0.1, 0.01][(Fraction(step, total) >= Fraction(1, 2)) + (Fraction(step, total) >= Fraction(3, 4))]
    return 1.0 if schedule == "constant" else (1 + cos(pi * Fraction(step - warmup, total - warmup))) / 2


@pytest.mark.parametrize("schedule", ["cosine", "constant", "step"])
@pytest.mark.parametrize("warmup_epochs", [0.0, 0.5, 2.0, 3.35])
def test_every_step_equals_the_formula(schedule, warmup_epochs):
    cfg = replace(CFG, schedule=schedule, warmup_epochs=warmup_epochs)
    warmup = round(warmup_epochs * PER_EPOCH)
    wanted = [PEAK * float(expected(schedule, step, warmup, TOTAL)) for step in range(TOTAL)]
    assert rates(cfg) == pytest.approx(wanted, rel=1e-12)


def test_the_warm_up_rises_in_equal_increments_to_the_peak_and_no_further():
    lrs = rates(CFG)
    assert lrs[0] == pytest.approx(PEAK / 101)
    assert [b - a for a, b in pairwise(lrs[:101])] == pytest.approx([PEAK / 101] * 100)
    assert max(lrs) == lrs[100] == PEAK
    assert lrs.count(PEAK) == 1


def test_the_cosine_is_continuous_falls_all_the_way_and_ends_at_zero():
    lrs = [*rates(CFG), lr_at(CFG, TOTAL, PER_EPOCH, TOTAL)]
    assert max(abs(b - a) for a, b in pairwise(lrs)) <= PEAK / 101 * 1.0001
    assert all(a > b for a, b in pairwise(lrs[100:]))
    assert lrs[-1] == 0.0 < lrs[-2]
    middle = 100 + (TOTAL - 100) // 2
    assert lrs[middle] == pytest.approx(PEAK / 2)


def test_the_steps_fall_at_half_and_at_three_quarters():
    lrs = rates(replace(CFG, schedule="step"))
    falls = [step for step in range(101, TOTAL) if lrs[step] != lrs[step - 1]]
    assert falls == [TOTAL // 2, 3 * TOTAL // 4]
    assert [lrs[999], lrs[1000], lrs[1500], lrs[-1]] == pytest.approx([PEAK, PEAK / 10, PEAK / 100, PEAK / 100])


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_the_polynomial_by_its_formula(power):
    """Of what is left after the warm-up: at 0, 1/4, 1/2 and 3/4 of it, and at its end."""
    cfg = replace(CFG, schedule="polynomial", power=power)
    at = [lr_at(cfg, 100 + 1900 * quarter // 4, PER_EPOCH, TOTAL) / PEAK for quarter in range(5)]
    assert at == pytest.approx([1.0, 0.75**power, 0.5**power, 0.25**power, 0.0], rel=1e-12)
    lrs = rates(cfg)
    assert max(lrs) == lrs[100] == PEAK and all(a > b for a, b in pairwise(lrs[100:]))


@pytest.mark.parametrize("schedule", ["cosine", "polynomial"])
def test_a_final_share_bends_what_follows_the_warm_up_only(schedule):
    """Every factor f on the peak becomes 0.1 + 0.9 f; 0 leaves all bits."""
    to_zero, lifted = (rates(replace(CFG, schedule=schedule, final_lr=share)) for share in (0.0, 0.1))
    assert lifted[:101] == to_zero[:101]
    assert lifted == pytest.approx(to_zero[:100] + [0.1 * PEAK + 0.9 * lr for lr in to_zero[100:]], rel=1e-12)
    assert lr_at(replace(CFG, schedule=schedule, final_lr=0.1), 2 * TOTAL, PER_EPOCH, TOTAL) == pytest.approx(PEAK / 10)
    assert lr_at(replace(CFG, final_lr=1.0), TOTAL - 1, PER_EPOCH, TOTAL) == PEAK


def test_one_cycle_rises_from_a_25th_and_falls_to_a_250000th():
    cfg = replace(CFG, schedule="onecycle", warmup_epochs=12.0)
    lrs = [*rates(cfg), lr_at(cfg, TOTAL, PER_EPOCH, TOTAL)]
    assert [lrs[0], lrs[300], lrs[600], lrs[-1]] == pytest.approx([PEAK / 25, PEAK * 13 / 25, PEAK, PEAK / 25e4], rel=1e-12)
    assert max(lrs) == lrs[600] == PEAK
    assert [b - a for a, b in pairwise(lrs[:601])] == pytest.approx([PEAK * 24 / 25 / 600] * 600)
    fall = [PEAK / 25e4 + (PEAK - PEAK / 25e4) * (1 + cos(pi * step / 1400)) / 2 for step in range(1401)]
    assert lrs[600:] == pytest.approx(fall, rel=1e-12)


def test_milestones_are_epochs():
    """After 10 epochs, 22.5 and 30 (epochs of 50 steps) the rate falls to 0.5 of itself; the warm-up goes before."""
    cfg = replace(CFG, schedule="step", milestones="10,22.5,30", gamma=0.5)
    lrs = rates(cfg)
    assert [step for step in range(101, TOTAL) if lrs[step] != lrs[step - 1]] == [500, 1125, 1500]
    assert [lrs[499], lrs[500], lrs[1125], lrs[-1]] == [PEAK, PEAK / 2, PEAK / 4, PEAK / 8]
    assert rates(replace(cfg, milestones="1"))[99:101] == pytest.approx([PEAK * 100 / 101, PEAK / 2])


def test_the_peak_grows_with_the_global_batch_however_it_is_divided():
    assert lr_at(replace(CFG, replicas=8), 100, PER_EPOCH, TOTAL) == 2 * PEAK
    assert lr_at(replace(CFG, replicas=1, batch=128), 100, PER_EPOCH, TOTAL) == PEAK
    assert lr_at(replace(CFG, replicas=1, batch=256), 100, PER_EPOCH, TOTAL) == CFG.lr


def test_a_warm_up_as_long_as_the_run_only_rises():
    lrs = rates(replace(CFG, warmup_epochs=40.0))
    assert all(a < b for a, b in pairwise(lrs))
    assert lrs[-1] == pytest.approx(PEAK * TOTAL / (TOTAL + 1))
    assert lr_at(replace(CFG, warmup_epochs=40.0), TOTAL, PER_EPOCH, TOTAL) == PEAK


def test_past_the_end_the_cosine_stays_at_zero():
    assert lr_at(CFG, 2 * TOTAL - 100, PER_EPOCH, TOTAL) == 0.0


def test_a_step_limit_ends_the_run_early_and_leaves_its_schedule():
    limited = replace(CFG, steps=70)
    assert planned_steps(CFG, PER_EPOCH) == planned_steps(limited, PER_EPOCH) == TOTAL
    assert last_step(CFG, PER_EPOCH) == TOTAL
    assert last_step(limited, PER_EPOCH) == 70
    assert last_step(replace(CFG, steps=TOTAL + 1), PER_EPOCH) == TOTAL
    assert lr_at(limited, 60, PER_EPOCH, planned_steps(limited, PER_EPOCH)) == lr_at(CFG, 60, PER_EPOCH, TOTAL)


def test_an_unresolved_configuration_is_a_bug_of_the_caller():
    with pytest.raises(ValueError, match="replicas"):
        lr_at(replace(CFG, replicas=0), 0, PER_EPOCH, TOTAL)


def test_the_peak_grows_with_the_micro_batches():
    assert rates(replace(CFG, accumulate=3)) == pytest.approx([3 * rate for rate in rates(CFG)], rel=1e-12)
