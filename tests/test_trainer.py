"""Training steps in one process: what replicas, buckets, short batches and overflows may and may not change."""

from types import SimpleNamespace

import numpy as np
import pyopencl as cl
import pytest

from dpresnet.amp import LossScaler
from dpresnet.comm import Solo
from dpresnet.device import Device, choose_device
from dpresnet.errors import GaveUp
from dpresnet.initial import initial_state
from dpresnet.model import Model
from dpresnet.ops import winograd
from dpresnet.optimizer import Hyper
from dpresnet.plan import Exchange
from dpresnet.resnet import Options
from dpresnet.trainer import Trainer

IMAGE, CLASSES = (3, 8, 8), 5
HYPER = Hyper(momentum=0.9, weight_decay=1e-3, nesterov=True)


@pytest.fixture(scope="module")
def device() -> Device:
    return Device(choose_device())


def make(device: Device, batch: int, replicas: int, precision: str = "fp32", accumulate: bool = False,
         arch: str = "resnet20", shortcut: str = "A", **options: object) -> Trainer:  # fmt: skip
    variant = Options(CLASSES, stem="cifar", shortcut=shortcut)
    model = Model(device, arch, variant, IMAGE, batch, precision, 0.1, accumulate=accumulate)
    trainer = Trainer(model, Solo(), replicas, **options)
    trainer.restore(initial_state(model.state, seed=1))
    return trainer


def samples(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, *IMAGE)).astype(np.float32), rng.integers(0, CLASSES, count).astype(np.int32)


def split(images: np.ndarray, labels: np.ndarray, batch: int, replicas: int, micro_batches: int = 1) -> list[list[tuple]]:
    """Micro-batches of what each replica gets."""
    cuts = [slice(v * batch, (v + 1) * batch) for v in range(replicas * micro_batches)]
    parts = [(images[cut], labels[cut], None) for cut in cuts]
    return [parts[m * replicas : (m + 1) * replicas] for m in range(micro_batches)]


def gradients(trainer: Trainer, images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Unscaled gradients of the batch."""
    parts = split(images, labels, trainer.model.batch, len(trainer.replicas.all))
    trainer.forward_backward(parts, len(images))
    scale = trainer.scaler.scale
    return {p.name: trainer.replicas.parameter(p.name, "grad") / scale for p in trainer.model.parameters}


def worst(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> float:
    return max(np.abs(left[name] - right[name]).max() / np.abs(right[name]).max() for name in right)


@pytest.mark.parametrize(("replicas", "shortcut"), [(2, "A"), (3, "A"), (4, "A"), (3, "C")])
def test_replicas_with_shared_statistics_are_one_large_batch(device, replicas, shortcut):
    """Also where they agree on the norm of a shortcut together with the one it is added to."""
    images, labels = samples(12)
    whole, parts = (make(device, 12 // n, n, shortcut=shortcut) for n in (1, replicas))
    expected, got = gradients(whole, images, labels), gradients(parts, images, labels)
    assert worst(got, expected) < 4 * np.sqrt(12 * 64) * 2**-24 * 19  # rounding of 19 layers in a row
    for trainer in (whole, parts):
        trainer.step(split(images, labels, trainer.model.batch, len(trainer.replicas.all)), 12, 0.1, HYPER)
    for name in whole.model.state.buffers:
        a, b = (t.replicas.buffer(name) for t in (whole, parts))
        assert np.allclose(a, b, rtol=1e-4, atol=1e-6), name


def test_local_statistics_are_those_of_each_replica_alone(device):
    """Two replicas that do not share give the mean of the gradients of two separate runs."""
    images, labels = samples(8)
    both = gradients(make(device, 4, 2, group=1), images, labels)
    alone = make(device, 4, 1)
    first, second = (gradients(alone, images[cut], labels[cut]) for cut in (slice(0, 4), slice(4, 8)))
    expected = {name: (first[name] + second[name]) / 2 for name in first}
    assert worst(both, expected) < 1e-6
    assert worst(both, gradients(make(device, 4, 2), images, labels)) > 1e-3


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_buckets_change_no_bit(device, precision):
    one = make(device, 4, 2, precision, first_bucket_mb=1e6)
    many = make(device, 4, 2, precision, first_bucket_mb=0.01, bucket_mb=0.05)
    assert len(one.buckets) == 1
    assert len(many.buckets) > 5
    for trainer in (one, many):
        for seed in range(3):
            trainer.step(split(*samples(8, seed), 4, 2), 8, 0.1, HYPER)
    assert one.digest() == many.digest()


def test_last_gradient_of_every_bucket_comes_before_its_mark(device):
    plan = make(device, 2, 1, first_bucket_mb=0.01, bucket_mb=0.05).model.train.plan
    done: set = set()
    marks = []
    for entry in plan:
        if hasattr(entry, "bucket"):
            assert done.issuperset(entry.gradients)
            marks.append(entry.bucket)
        else:
            done.update(entry.tensors)
    assert marks == list(range(len(marks)))
    assert plan.entries.index(next(e for e in plan if hasattr(e, "bucket"))) < len(plan.entries) * 0.75  # early, not at the end


def test_buckets_are_reduced_while_backward_goes_on(device):
    """The first bucket starts as soon as its kernels are done, long before the last exchange of the backward pass."""
    trainer = make(device, 4, 2, first_bucket_mb=0.01, bucket_mb=0.05)
    log = []
    for name in ("_start_bucket", "_agree"):
        method = getattr(trainer, name)
        setattr(trainer, name, lambda *what, name=name, method=method: (log.append((name, what[0])), method(*what))[1])
    gradients(trainer, *samples(8))
    started = [what for name, what in log if name == "_start_bucket"]
    assert started == list(range(len(trainer.buckets)))
    exchanges_left = [sum(other == "_agree" for other, _ in log[i:]) for i, (name, _) in enumerate(log) if name != "_agree"]
    assert exchanges_left[0] > 10
    assert exchanges_left == sorted(exchanges_left, reverse=True)


class Late:
    """In place of an event: not complete when it is looked at the first ``looks`` times; writes down who waits for it."""

    def __init__(self, name: str, looks: int, log: list[str]) -> None:
        self.name, self.looks, self.log = name, looks, log

    @property
    def command_execution_status(self) -> int:
        self.looks -= 1
        return (cl.command_execution_status.RUNNING, cl.command_execution_status.COMPLETE)[self.looks < 0]

    def wait(self) -> None:
        self.log.append(f"wait for {self.name}")


@pytest.mark.parametrize(
    ("ranks", "ready", "running", "expected"),
    [
        (2, True, True, {"start 7", "progress"}),
        (2, True, False, {"wait for bucket", "start 7", "progress"}),  # there is nothing to poll for
        (2, False, True, {"progress"}),
        (2, False, False, set()),
        (1, True, True, set()),  # nobody waits for the sums of one rank
    ],
)
def test_buckets_go_on_while_several_ranks_wait_for_an_exchange(device, monkeypatch, ranks, ready, running, expected):
    """Before the host waits for what is exchanged, which nothing else could then interrupt."""
    trainer, log = make(device, 2, 1), []
    monkeypatch.setattr(trainer, "comm", SimpleNamespace(size=ranks))
    monkeypatch.setattr(trainer, "_reduce", SimpleNamespace(running=running, progress=lambda: log.append("progress")))
    monkeypatch.setattr(trainer, "_start_bucket", lambda bucket: log.append(f"start {bucket}"))
    bucket = Late("bucket", 1, log)
    bucket.wait = lambda: (log.append("wait for bucket"), setattr(bucket, "looks", 0))
    trainer._ready = [(7, bucket)] if ready else []
    trainer._wait_for(Late("statistics", 4, log))
    assert log.pop() == "wait for statistics"
    assert set(log) == expected


def test_buckets_go_on_until_the_last_one_is_ready(device, monkeypatch):
    """The host has nothing else to do then, and without exchanges of statistics it waits for most of backward there."""
    trainer, log = make(device, 2, 1), []
    monkeypatch.setattr(trainer, "comm", SimpleNamespace(size=2))
    reduce = SimpleNamespace(running=True, progress=lambda: log.append("progress"), wait=lambda: log.append("all"))
    monkeypatch.setattr(trainer, "_reduce", reduce)
    monkeypatch.setattr(trainer, "_start_bucket", lambda bucket: log.append(f"start {bucket}"))
    monkeypatch.setattr(trainer, "_replay", lambda *what: trainer._ready.append((7, Late("bucket", 4, log))))
    trainer.forward_backward(split(*samples(2), 2, 1), 2)
    assert log[0] == "progress" and log.count("start 7") == 1 and log[-1] == "all"


def test_exchanges_wait_for_the_last_replica_and_nothing_else(device, monkeypatch):
    """The values of the others, which are launched before it in the same queue, are there then; what is launched after it runs
    meanwhile.
    """
    trainer = make(device, 2, 3, shortcut="B")
    latest, exchanged, waits = {}, [], []
    trainer.replicas.observe = lambda launch, event: latest.update(dict.fromkeys(launch.writes, event))
    monkeypatch.setattr(device, "finish", lambda: waits.append(True))
    agree = trainer._agree

    def checked(entry: Exchange, event: cl.Event) -> None:
        waits.clear()
        agree(entry, event)
        exchanged.append(event == latest[entry.sources[-1]] and not waits)

    monkeypatch.setattr(trainer, "_agree", checked)
    batches = split(*samples(6), 2, 3)
    trainer.forward_backward(batches, 6)
    device.queue.finish()
    assert exchanged == [True] * 38  # statistics and sums of 19 norms, two of them together with that of a shortcut


@pytest.mark.parametrize(("replicas", "group", "micro_batches"), [(1, 0, 1), (1, 1, 1), (3, 1, 1), (1, 0, 2)])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_replicas_that_agree_with_nobody_have_the_same_bits_without_the_host(
    device, monkeypatch, replicas, group, micro_batches, precision
):
    """A device without double precision leaves what lies between two launches to the host. Batches are short in the end."""
    if not device.doubles:
        pytest.skip("the host is asked on this device anyway")
    plain = Device(choose_device())
    plain.doubles = False
    alone, asked = (make(d, 4, replicas, precision, micro_batches > 1, group=group) for d in (device, plain))
    assert alone.sync_bn.alone and not asked.sync_bn.alone
    monkeypatch.setattr(alone, "_agree", None)
    most = 4 * replicas * micro_batches
    for seed, count in enumerate((most, most, most - 4 * replicas + 3)):
        for trainer in (alone, asked):
            trainer.step(split(*samples(count, seed), 4, replicas, micro_batches), count, 0.1, HYPER)
        assert alone.digest() == asked.digest()


def test_replicas_with_shared_statistics_are_not_alone(device):
    assert not make(device, 4, 2).sync_bn.alone


@pytest.mark.parametrize("count", [1, 3, 5, 7])
def test_short_last_batch_weighs_by_its_images(device, count):
    """Replicas with fewer or no images: the gradient is that of one batch of exactly these images."""
    images, labels = samples(count)
    expected = gradients(make(device, count, 1), images, labels)
    trainer = make(device, 4, 2)
    gradients(trainer, *samples(8, seed=9))  # leaves other images and gradients behind
    assert worst(gradients(trainer, images, labels), expected) < 1e-4


@pytest.mark.parametrize("group", [0, 1])
def test_overflow_leaves_everything_but_the_scaler_untouched(device, group):
    trainer = make(device, 4, 2, "fp16", group=group)
    trainer.step(split(*samples(8), 4, 2), 8, 0.1, HYPER)
    before = {name: array.copy() for name, array in trainer.arrays().items()}
    images, labels = samples(8, seed=5)
    images[6] = 3e4  # of the second replica: fp16 overflows behind the first convolution
    images[6, :, ::2] = -3e4
    outcome = trainer.step(split(images * 2, labels, 4, 2), 8, 0.1, HYPER)
    assert outcome.skipped
    assert trainer.scaler == LossScaler(scale=2.0**15, good_steps=0, skipped=1, consecutive=1)
    after = trainer.arrays()
    assert all(np.array_equal(after[name], before[name]) for name in before)
    assert not trainer.step(split(*samples(8, seed=6), 4, 2), 8, 0.1, HYPER).skipped


def test_give_up_names_the_first_bad_entry(device):
    trainer = make(device, 4, 2, scaler=LossScaler.disabled())
    images, labels = samples(8)
    images[5, 0, 0, 0] = np.nan
    with pytest.raises(GaveUp, match=r"loss scale 1.*first: entry 0 \(input\) of replica 1 wrote .* into input"):
        trainer.step(split(images, labels, 4, 2), 8, 0.1, HYPER)
    trainer.check = False
    trainer.replicas.parameter("layer2.1.conv1.weight")[3, 2, 1, 0] = np.inf
    trainer.replicas.push_state()
    with pytest.raises(GaveUp, match=r"\(layer2\.1\.conv1\.packed\) of replica 0"):
        trainer.step(split(*samples(8), 4, 2), 8, 0.1, HYPER)


def test_half_precision_follows_single(device):
    """The same ten steps in fp16 and fp32: losses stay close, and parameters differ by far less than they have moved."""
    losses, states = {}, {}
    for precision in ("fp32", "fp16"):
        trainer = make(device, 8, 1, precision)
        start = trainer.arrays()
        losses[precision] = [trainer.step(split(*samples(8, s % 2), 8, 1), 8, 0.005, HYPER).loss / 8 for s in range(10)]
        states[precision] = trainer.arrays()
    assert np.allclose(losses["fp16"], losses["fp32"], rtol=0.02)
    assert losses["fp16"][-1] < 0.95 * losses["fp16"][0]
    moved, apart = (
        np.sqrt(sum(((states[a][k] - b[k]) ** 2).sum() for k in start if k.startswith("param/")))
        for a, b in (("fp32", start), ("fp16", states["fp32"]))
    )
    assert apart < 0.25 * moved  # batch statistics of 8 small images amplify the rounding of each of 19 layers


def test_memory_does_not_move_between_steps(device):
    """Repeating a step from the same state gives the same bits: nothing is left over from one replay to the next."""
    trainer = make(device, 4, 2, "fp16")
    start = trainer.arrays()
    digests = set()
    for other in (3, 4):
        trainer.step(split(*samples(8, other), 4, 2), 8, 0.1, HYPER)
        trainer.restore(start)
        trainer.scaler = LossScaler()
        trainer.step(split(*samples(8), 4, 2), 8, 0.1, HYPER)
        digests.add(trainer.digest())
    assert len(digests) == 1


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_width_of_vectors_changes_no_bit(device, precision):
    """So a run may go on where there is no AVX-512."""
    digests = set()
    for lanes in {min(8, device.vector), device.vector}:
        trainer = make(Device(choose_device(), vector=lanes), 16, 2, precision)
        for seed in range(2):
            trainer.step(split(*samples(31, seed), 16, 2), 31, 0.1, HYPER)
        digests.add(trainer.digest())
    assert len(digests) == 1


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_evaluation_sees_the_weights_of_now(device, precision):
    """They are packed once for all batches of an evaluation, and again after anything that changes them or their memory."""
    trainer, fresh = make(device, 4, 2, precision), make(device, 4, 2, precision)
    [batches] = split(*samples(8), 4, 2)
    for seed in range(2):
        trainer.evaluate(batches)
        trainer.step(split(*samples(8, seed), 4, 2), 8, 0.1, HYPER)
        fresh.restore(trainer.arrays())
        assert trainer.evaluate(batches).loss == fresh.evaluate(batches).loss


def test_evaluation_packs_once(device):
    trainer, [batches], launches = make(device, 4, 1), split(*samples(4), 4, 1), []
    trainer.replicas.observe = lambda launch, event: launches.append((launch.stem, launch.verb))
    counts = []
    for _ in range(3):
        launches.clear()
        trainer.evaluate(batches)
        counts.append(sum(verb == "pack" and stem != "cast" for stem, verb in launches))  # images are cast every time
    assert counts == [20, 0, 0]  # 19 convolutions and the classifier


class Discrete(Device):
    """This device, used as if it had memory of its own: scalar kernels, staging buffers, copies in both directions."""

    def __init__(self) -> None:
        super().__init__(choose_device())
        self.host_memory = False


@pytest.mark.parametrize(
    ("precision", "group", "micro_batches"), [("fp32", 0, 1), ("fp16", 0, 1), ("fp32", 1, 1), ("fp32", 0, 3)]
)
def test_memory_of_its_own(device, precision, group, micro_batches, monkeypatch):
    """A device whose arenas are not host memory trains the same, up to the rounding of other kernels."""
    monkeypatch.setattr(winograd, "suits", lambda conv: False)  # which only vectors take
    facts = {"group": group, "first_bucket_mb": 0.1, "accumulate": micro_batches > 1}
    trainers = [make(used, 4, 2, precision, **facts) for used in (device, Discrete())]
    assert trainers[1].model.device.vector == 1
    for trainer in trainers:
        start = trainer.arrays()
        for seed in range(2):
            count = 8 * micro_batches - 1
            trainer.step(split(*samples(count, seed), 4, 2, micro_batches), count, 0.02, HYPER)
    ours, theirs = (trainer.arrays() for trainer in trainers)
    moved = {name: np.abs(ours[name] - start[name]).max() for name in ours}
    limit = 1e-3 if precision == "fp32" else 0.2  # of the way that a tensor has gone
    for name in ours:
        assert np.abs(theirs[name] - ours[name]).max() <= limit * moved[name] + 1e-7, name
    assert np.isclose(*(t.evaluate(split(*samples(8), 4, 2)[0]).loss for t in trainers), rtol=0.02)
