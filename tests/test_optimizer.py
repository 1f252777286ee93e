"""Updates of whole networks in one process: which parameters are treated how, norms, skipped steps, moving averages."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_trainer import CLASSES, IMAGE, Discrete, samples, split

from dpresnet import reference_optimizer as reference
from dpresnet.amp import LossScaler
from dpresnet.checkpoint import Checkpoint
from dpresnet.comm import Solo
from dpresnet.config import Config
from dpresnet.course import Course
from dpresnet.data import load
from dpresnet.device import Device, choose_device
from dpresnet.errors import Refused
from dpresnet.initial import initial_state
from dpresnet.model import Model
from dpresnet.optimizer import Hyper, ema_decay, trust_ratio
from dpresnet.resnet import Options
from dpresnet.setup import build_model, build_trainer
from dpresnet.trainer import Outcome, Trainer
from dpresnet.update import Rule

HYPER = Hyper(momentum=0.75, weight_decay=0.0625, nesterov=True, beta1=0.75, beta2=0.9375, eps=2.0**-20, trust=0.125,
              clip_norm=0.5, ema=0.99)  # fmt: skip
LR = 0.125
OPTIMIZERS = ("sgd", "lars", "adamw")
WITHOUT_DECAY = re.compile(r".*bn\d\.(weight|bias)|.*downsample\.1\.(weight|bias)|fc\.bias")


@pytest.fixture(scope="module")
def device() -> Device:
    return Device(choose_device())


def make(device: Device, rule: Rule, precision: str = "fp32", replicas: int = 1, arch: str = "resnet20", shortcut: str = "B",
         **options: object) -> Trainer:  # fmt: skip
    variant = Options(CLASSES, stem="cifar", shortcut=shortcut)
    model = Model(device, arch, variant, IMAGE, 4, precision, 0.1, rule=rule)
    trainer = Trainer(model, Solo(), replicas, **options)
    trainer.restore(initial_state(model.state, 1, rule))
    return trainer


def step(trainer: Trainer, number: int, hyper: Hyper = HYPER, change: Callable = lambda images: images,
         lr: float = LR) -> Outcome:  # fmt: skip
    """The step after ``number`` others."""
    count = 4 * len(trainer.replicas.all)
    images, labels = samples(count, number)
    return trainer.step(split(change(images), labels, 4, len(trainer.replicas.all)), count, lr, hyper, updates=number)


def gradients(trainer: Trainer) -> dict[str, np.ndarray]:
    """Those of the last step, in float64 and unscaled."""
    names = trainer.model.state.parameters
    return {name: trainer.replicas.parameter(name, "grad").astype(np.float64) / trainer.scaler.scale for name in names}


def expected(rule: Rule, number: int, before: dict[str, np.ndarray], grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the float64 reference makes of the state."""
    found = {}
    if rule.clip:
        grads = dict(zip(grads, reference.clipped(list(grads.values()), HYPER.clip_norm), strict=True))
    for name, grad in grads.items():
        excluded = rule.decay == "weights" and WITHOUT_DECAY.fullmatch(name)
        decay = 0.0 if excluded else HYPER.weight_decay
        param, momentum = before[f"param/{name}"], before[f"momentum/{name}"]
        if rule.optimizer == "adamw":
            moments = momentum, before[f"second_moment/{name}"], number + 1
            new = reference.optimizer_adamw(param, grad, *moments, LR, HYPER.beta1, HYPER.beta2, HYPER.eps, decay)
            found[f"second_moment/{name}"] = new[2]
        elif rule.optimizer == "sgd":
            new = reference.optimizer_sgd(param, grad, momentum, LR, HYPER.momentum, decay, nesterov=True)
        elif excluded:  # momentum SGD whose velocity holds the learning rate
            new = reference.optimizer_sgd(param, LR * grad, momentum, 1.0, HYPER.momentum)
        else:
            new = reference.optimizer_lars(param, grad, momentum, LR, HYPER.momentum, decay, HYPER.trust)
        found[f"param/{name}"], found[f"momentum/{name}"] = new[:2]
    return found


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("decay", ["all", "weights"])
@pytest.mark.parametrize("clip", [False, True], ids=["", "clip"])
def test_every_parameter_follows_the_reference(device, optimizer, decay, clip):
    """Three steps from where the one before has ended; rounding is 2^-24 of the values that are added, a few times."""
    rule = Rule(optimizer, decay, clip)
    trainer = make(device, rule)
    for number in range(3):
        before = trainer.arrays()
        outcome, after, grads = step(trainer, number), trainer.arrays(), gradients(trainer)
        norm = np.sqrt(sum(reference.optimizer_squares(grad) for grad in grads.values()))
        assert (outcome.grad_norm == pytest.approx(norm, rel=1e-6)) if clip else outcome.grad_norm is None
        assert norm > HYPER.clip_norm
        wanted = expected(rule, number, before, grads)
        assert wanted.keys() == {name for name in after if not name.startswith("buffer/")}
        for name, values in wanted.items():
            largest = max(np.abs(values).max(), np.abs(before[name]).max())
            assert np.abs(after[name] - values).max() <= 16 * 2.0**-24 * largest, name


def test_exactly_scales_shifts_and_biases_are_excluded(device):
    """By their names, which are those of the usual PyTorch implementation."""
    trainer = make(device, Rule("lars", "weights"))
    names = [parameter.name for parameter in trainer.model.update.parameters]
    step(trainer, 0)
    rates = trainer.replicas.memory.read(trainer.model.update.table.rates)
    excluded = {name for name, rate in zip(names, rates, strict=True) if rate["weight_decay"] == 0}
    assert excluded == {name for name in names if WITHOUT_DECAY.fullmatch(name)}
    assert len(excluded) == 2 * 21 + 1 and len(names) - len(excluded) == 21 + 1  # norms and fc.bias; convolutions and fc
    assert {float(rate["trust"]) for name, rate in zip(names, rates, strict=True) if name in excluded} == {1.0}


def test_without_need_there_is_neither_table_nor_norm_nor_further_arena(device):
    model = make(device, Rule()).model
    assert [len(plan.entries) for plan in model.update.plans] == [1, 0, 1, 0] and model.update.table is None
    assert not (model.bytes["second_moment"] or model.bytes["ema_parameter"] or model.bytes["ema_buffer"])


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_between_parameters_lie_zeros(device, shortcut):
    """So whole arenas may be added up; none of the classes, 5, and channels fills its slots."""
    trainer = make(device, Rule("adamw", clip=True), "fp16", replicas=2, shortcut=shortcut)
    trainer.replicas.warm()
    trainer.restore(initial_state(trainer.model.state, 1, trainer.model.rule))
    for number in range(2):
        step(trainer, number)
    trainer.replicas.pull_state()
    for home, part in (("parameter", "value"), ("gradient", "grad"), ("momentum", "momentum")):
        [arena] = trainer.replicas.memory.homes[home]
        nonzero = np.count_nonzero(arena.view(0, (arena.nbytes // 4,), np.float32))
        names = trainer.model.state.parameters
        assert nonzero == sum(np.count_nonzero(trainer.replicas.parameter(name, part)) for name in names) > 200_000


@pytest.mark.parametrize("rule", [Rule("adamw", "weights", True, True), Rule("lars", "weights", True, True)], ids=str)
def test_width_of_vectors_changes_no_bit(device, rule):
    found = []
    for lanes in {min(8, device.vector), device.vector}:
        trainer = make(Device(choose_device(), vector=lanes), rule, "fp16", replicas=2)
        norms = [step(trainer, number).grad_norm for number in range(2)]
        found.append((norms, {name: array.tobytes() for name, array in trainer.arrays().items()}))
    assert all(each == found[0] for each in found)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_step_changes_nothing_and_does_not_count(device, optimizer):
    """After it comes the update that would have come without it, at the loss scale that it has left."""
    rule = Rule(optimizer, "weights", True, True)
    disturbed, undisturbed = (make(device, rule, "fp16", replicas=2) for _ in range(2))
    for trainer in (disturbed, undisturbed):
        step(trainer, 0)
    before = disturbed.arrays()
    outcome = step(disturbed, 1, change=lambda images: images * np.float32(np.inf))
    assert outcome.skipped and outcome.grad_norm is None
    after = disturbed.arrays()
    assert all(np.array_equal(after[name], before[name]) for name in before)
    undisturbed.scaler = LossScaler(scale=2.0**15)
    assert step(disturbed, 1) == step(undisturbed, 1)
    ours, theirs = disturbed.arrays(), undisturbed.arrays()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("clip", "value", "skipped"), [(True, 1e20, True), (False, 1e20, False), (True, np.nan, True)])
def test_gradients_without_a_norm_count_as_overflow(device, clip, value, skipped):
    """Squares of fp32 numbers beyond 2e19 are infinite; nothing could be limited to their share."""
    trainer = make(device, Rule(clip=clip))
    step(trainer, 0)
    trainer.replicas.parameter("layer2.0.conv2.weight", "grad")[3, 2, 1, 0] = value
    [arena] = trainer.replicas.memory.homes["gradient"]
    arena.push(0, arena.nbytes)
    assert trainer.optimizer.overflowed() == skipped


def test_a_gradient_below_the_limit_is_left_alone(device):
    """To the bit, as without a limit."""
    free, limited = (make(device, Rule(clip=clip)) for clip in (False, True))
    for number in range(2):
        step(free, number)
        outcome = step(limited, number, Hyper(HYPER.momentum, HYPER.weight_decay, True, clip_norm=1e3))
        assert 0 < outcome.grad_norm < 1e3
    assert free.digest() == limited.digest()


@pytest.mark.parametrize(("param", "grad", "decay", "ratio"), [
    (5.0, 10.0, 0.5, 0.04), (0.0, 10.0, 0.5, 1.0), (5.0, 0.0, 0.5, 1.0), (5.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0, 1.0),
])  # fmt: skip
def test_trust_ratio(param, grad, decay, ratio):
    """0.1 * 5 / (10 + 0.5 * 5); 1 where a norm is 0, also where nothing decays."""
    assert trust_ratio(param, grad, Hyper(weight_decay=decay, trust=0.1)) == pytest.approx(ratio)


def course_of(device: Device, **flags: object) -> Course:
    """On the digits, with one replica of a batch of four."""
    cfg = Config(replicas=1, num_classes=10, shortcut="A", batch=4, **flags)
    dataset = load("digits")
    return Course(cfg, dataset, build_trainer(cfg, build_model(device, cfg, dataset), Solo()))


@pytest.mark.parametrize(("flags", "rule"), [
    ({}, Rule()),
    ({"optimizer": "lars", "decay": "weights"}, Rule("lars", "weights")),
    ({"clip_norm": 2.0}, Rule(clip=True)),
    ({"optimizer": "adamw", "ema": 0.5}, Rule("adamw", ema=True)),
])  # fmt: skip
def test_flags_choose_the_rule(device, flags, rule):
    assert course_of(device, **flags).trainer.model.rule == rule


def test_a_course_hands_over_its_flags_and_how_often_it_has_updated(device, monkeypatch):
    """The second of four steps overflows and does not count."""
    values = {"momentum": 0.1, "weight_decay": 0.2, "nesterov": False, "beta1": 0.3, "beta2": 0.4, "eps": 0.5, "trust": 0.6,
              "clip_norm": 0.7, "ema": 0.8}  # fmt: skip
    course, handed = course_of(device, **values), []

    def fake(shards: list, count: int, lr: float, hyper: Hyper, *, updates: int, **more: object) -> Outcome:
        handed.append((updates, lr, hyper))
        skipped = len(handed) == 2
        course.trainer.scaler = course.trainer.scaler.after(skipped)
        return Outcome(count, 0.0, 0, skipped)

    monkeypatch.setattr(course.trainer, "step", fake)
    rates = []
    for _, micro_batches in itertools.islice(course.rest_of_epoch(), 4):
        rates.append(course.lr)
        course.step(micro_batches)
    assert [updates for updates, *_ in handed] == [0, 1, 1, 2]
    assert [lr for _, lr, _ in handed] == rates and rates[1] == rates[2]
    assert [hyper for *_, hyper in handed] == [Hyper(**values)] * 4


@pytest.mark.parametrize("lacking", ["second_moment", "ema_param", "ema_buffer", "momentum"])
def test_a_checkpoint_without_the_state_of_its_optimizer_is_refused(device, lacking):
    """Before anything of the present state is touched."""
    course = course_of(device, optimizer="adamw", ema=0.9)
    course.begin(None)
    before = course.trainer.arrays()
    other = {name: array + 1 for name, array in before.items() if not name.startswith(f"{lacking}/")}
    with pytest.raises(Refused, match=f"x.h5 lacks {lacking}/.*--optimizer adamw and --ema 0.9 needs: resume from another"):
        course.begin(Checkpoint(Path("x.h5"), other, {}))
    after = course.trainer.arrays()
    assert all(np.array_equal(before[name], after[name]) for name in before)


# Moving averages


def test_the_average_keeps_little_at_first():
    assert [ema_decay(0.99, t) for t in (0, 1, 8)] == [1 / 10, 2 / 11, 9 / 18]
    assert ema_decay(0.99, 890) == 891 / 900 and ema_decay(0.99, 10**6) == 0.99 and ema_decay(0.05, 0) == 0.05


@pytest.mark.parametrize("kind", ["this device", "memory of its own"])
def test_averages_follow_a_loop_over_what_the_steps_have_left(device, kind):
    """Parameters and running statistics alike, from where they began; the last steps reach the decay that was asked for."""
    used, hyper = device if kind == "this device" else Discrete(), Hyper(0.75, ema=0.5)
    trainer = make(used, Rule(ema=True))
    start = trainer.arrays()
    averages = {name: start[name].astype(np.float64) for name in start if name.startswith(("param/", "buffer/"))}
    for number in range(12):
        step(trainer, number, hyper)
        now = trainer.arrays()
        decay = min(0.5, (1 + number) / (10 + number))
        averages = {name: decay * old + (1 - decay) * now[name] for name, old in averages.items()}
    for name, values in averages.items():
        assert np.abs(now[f"ema_{name}"] - values).max() <= 24 * 2.0**-24 * max(np.abs(values).max(), 1), name
        assert "running_var" in name or not np.array_equal(now[f"ema_{name}"], now[name]), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_averages_and_their_evaluation_do_not_disturb_training(device, optimizer, precision):
    """Every bit of what is trained, and of the evaluation of it, is as without them."""
    plain, averaging = (make(device, Rule(optimizer, ema=ema), precision, replicas=2) for ema in (False, True))
    [batches] = split(*samples(8, 99), 4, 2)
    for number in range(3):
        assert step(plain, number, lr=2.0**-10) == step(averaging, number, lr=2.0**-10)
        averaging.evaluate(batches, averaged=True)
        assert averaging.evaluate(batches) == plain.evaluate(batches)
        if number == 1:
            averaging.evaluate(batches, averaged=True)
    ours, theirs = averaging.arrays(), plain.arrays()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert averaging.digest() == plain.digest()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_evaluation_of_averages_is_that_of_a_network_which_holds_them(device, precision):
    """Logits to the bit, also after parameters were evaluated in between and after another step."""
    averaging, holder = make(device, Rule(ema=True), precision), make(device, Rule(), precision)
    [batches] = split(*samples(4, 99), 4, 1)
    for number in range(2):
        step(averaging, number)
        arrays = averaging.arrays()
        averages = {name.removeprefix("ema_"): array for name, array in arrays.items() if name.startswith("ema_")}
        holder.restore(averages)
        raw, average = (averaging.evaluate(batches, averaged=averaged) for averaged in (False, True))
        assert holder.evaluate(batches) == average != raw
        np.testing.assert_array_equal(averaging.logits(batches), holder.logits(batches))


def test_a_fingerprint_sees_the_averages(device):
    """A rank whose average has gone wrong is found, though nothing that is trained shows it."""
    trainer = make(device, Rule(ema=True))
    step(trainer, 0)
    digest, fingerprint = trainer.digest(), trainer.fingerprint()
    trainer.replicas.parameter("fc.bias", "ema")[0] += 1
    trainer.replicas.push_state()
    assert trainer.digest() == digest and trainer.fingerprint() != fingerprint
