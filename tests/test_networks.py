"""The networks without PyTorch: sizes known from the papers and from torchvision, names, options, memory."""

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from dpresnet.config import CIFAR_ARCHS, IMAGENET_ARCHS, PLAIN_ARCHS, Config
from dpresnet.device import Device, choose_device
from dpresnet.errors import Refused
from dpresnet.model import Model
from dpresnet.network import Network
from dpresnet.nn import Recorder
from dpresnet.plan import Entry, Exchange, Launch, lifetimes
from dpresnet.resnet import ARCHITECTURES, CHOICES, Options
from dpresnet.setup import check_memory
from dpresnet.state import State

PARAMETERS = {  # 1000 classes; the CIFAR family with 10 and shortcut A
    "resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032, "resnet101": 44_549_160, "resnet152": 60_192_808,
    "resnext50_32x4d": 25_028_904, "resnext101_32x8d": 88_791_336, "wide_resnet50_2": 68_883_240,
    "resnet20": 269_722, "resnet32": 464_154, "resnet44": 658_586, "resnet56": 853_018, "resnet110": 1_727_962,
}  # fmt: skip


@pytest.fixture(scope="module")
def device() -> Device:
    return Device(choose_device())


def model(device: Device, arch: str, image: int = 32, batch: int = 1, classes: int = 10, **options: object) -> Model:
    """A recorded network; nothing is allocated on the device."""
    return Model(device, arch, Options(num_classes=classes, **options), (3, image, image), batch, "fp32")


@pytest.mark.parametrize("arch", PARAMETERS)
def test_parameter_counts(device, arch):
    small = ARCHITECTURES[arch].small
    recorded = model(device, arch, classes=10 if small else 1000, stem="cifar" if small else "imagenet")
    assert recorded.parameter_count == PARAMETERS[arch]


def test_command_line_offers_exactly_the_architectures():
    assert set(IMAGENET_ARCHS + CIFAR_ARCHS + PLAIN_ARCHS) == set(ARCHITECTURES)


def test_plain_network_is_the_residual_one_without_shortcuts(device):
    residual, plain = (model(device, arch, stem="cifar") for arch in ("resnet20", "plain20"))
    assert {p.name: p.shape for p in residual.parameters} == {p.name: p.shape for p in plain.parameters}
    joins = [Counter(e.defines for e in net.evaluate.plan if e.verb == "apply") for net in (residual, plain)]
    assert [sum(n for defines, n in counts.items() if dict(defines)["RESIDUAL"]) for counts in joins] == [9, 0]
    stems = [[entry.stem for entry in net.evaluate.plan] for net in (residual, plain)]
    assert [names.count("shortcut") for names in stems] == [2, 0]


@pytest.mark.parametrize(("arch", "stem", "activations", "norms"), [
    ("resnet18", "cifar", 17, 20), ("resnet50", "imagenet", 49, 53),
])  # fmt: skip
def test_one_launch_per_activation_each_way(device, arch, stem, activations, norms):
    """All that a network is made of, but its convolutions: nothing is added, rectified or masked by itself.

    The shortcut's norm is part of the join, so there are fewer activations than norms. The max pool takes its gradient as one
    tensor, and two layers read what it pooled.
    """
    recorded, pools = model(device, arch, stem=stem, image=64), int(stem == "imagenet")
    forward = {"cast_pack": 1, "pool_max_forward": pools, "pool_average_forward": 1, "linear_forward": 1, "loss_softmax": 1,
               "batchnorm_apply": activations}  # fmt: skip
    evaluate, prepare = Counter(forward), Counter({"batchnorm_running": norms, "linear_pack": 1})
    train = Counter(forward | {"linear_pack": 1, "pool_max_backward": pools, "residual_add": pools, "pool_average_backward": 1,
                               "linear_backward_weight": 1, "linear_backward_data": 1})  # fmt: skip
    train.update({f"batchnorm_{verb}": norms for verb in ("statistics", "merge", "sum")})
    joined = ("exchange statistics", "exchange sums", "batchnorm_backward_reduce", "batchnorm_backward")
    train.update(dict.fromkeys(joined, activations))
    plans = (recorded.train.plan, train), (recorded.evaluate.plan, evaluate), (recorded.evaluate.prepare, prepare)
    for plan, expected in plans:
        assert Counter(kind for kind in map(kind_of, plan) if not kind.startswith(("conv_", "winograd_"))) == expected


@pytest.mark.parametrize(("arch", "stem", "joins"), [
    ("resnet18", "cifar", 8), ("resnet50", "imagenet", 15), ("plain20", "cifar", 0),
])  # fmt: skip
def test_gradients_of_a_shortcut_are_joined_by_the_convolution_beside_it(device, arch, stem, joins):
    """Wherever a rectified activation is read twice: by the last of its convolutions to go backward, which finds the other term
    in its output. The sums of the normalisation then have one term, without a mask.
    """
    plan = list(model(device, arch, stem=stem, image=64).train.plan)
    joining = [i for i, entry in enumerate(plan) if isinstance(entry, Launch) and dict(entry.defines).get("JOIN")]
    assert len(joining) == joins
    for i in joining:
        (dx,), following = plan[i].writes, plan[i + 1]
        earlier = [entry for entry in plan[:i] if isinstance(entry, Launch) and dx in entry.writes]
        assert earlier, plan[i]
        (z,) = (t for t in plan[i].tensors[3:] if t.shape == dx.shape)
        assert f"{z.name}.dx.reduce" == following.name
        assert (dx in following.tensors, dx in following.writes, z in following.tensors) == (True, False, False)
        assert dict(following.defines)["RELU"] == 0
    assert all(dict(e.defines)["TERMS"] == 1 for e in plan if isinstance(e, Launch) and e.verb == "backward_reduce")


@pytest.mark.parametrize(("arch", "stem", "winograd", "fresh", "direct"), [
    ("resnet18", "cifar", 13, 0, 7), ("resnet50", "imagenet", 13, 4, 40), ("resnet50", "deep", 15, 4, 40),
    ("resnet20", "cifar", 16, 0, 3), ("resnext50_32x4d", "imagenet", 0, 0, 53),
])  # fmt: skip
def test_convolutions_take_their_fast_path(device, arch, stem, winograd, fresh, direct):
    """All 3x3 convolutions with stride 1 but the first and the grouped ones are computed by F(4x4, 3x3), in all passes. In
    training, large weights of few tiles are not packed for it.
    """
    recorded = model(device, arch, stem=stem, image=128, batch=16)
    passes = Counter(map(kind_of, recorded.train.plan))
    found = [passes[f"winograd_{verb}"] for verb in ("gather", "weight", "pack")]
    assert found == [2 * winograd, winograd, 2 * winograd - fresh]
    assert sum(dict(entry.defines).get("FRESH", 0) for entry in recorded.train.plan if isinstance(entry, Launch)) == fresh
    assert passes["conv_weight"] == direct
    assert Counter(map(kind_of, recorded.evaluate.plan))["winograd_gather"] == winograd
    assert Counter(map(kind_of, recorded.evaluate.prepare))["winograd_pack"] == winograd
    lanes = {dict(e.defines)["VEC"] for e in recorded.train.plan if kind_of(e).startswith(("conv_", "winograd_"))}
    assert device.vector > 1
    assert lanes == {device.vector, 8 if arch.startswith("resnext") else device.vector}  # see `conv_for` about small groups


def kind_of(entry: Entry) -> str:
    return f"{entry.stem}_{entry.verb}" if isinstance(entry, Launch) else f"exchange {entry.kind}"


def test_entries_are_named_by_the_norm_they_end_with(device):
    plan = model(device, "resnet18", stem="cifar").train.plan
    applied = [(e.name, dict(e.defines)["RESIDUAL"]) for e in plan if isinstance(e, Launch) and e.verb == "apply"]
    assert applied[:5] == [("bn1", 0), ("layer1.0.bn1", 0), ("layer1.0.bn2", 1), ("layer1.1.bn1", 0), ("layer1.1.bn2", 1)]
    assert ("layer2.0.bn2", 2) in applied
    reduced = [e.name for e in plan if isinstance(e, Launch) and e.verb in ("backward_reduce", "sum", "backward")]
    assert reduced[-3:] == ["bn1.dx.reduce", "bn1.dx.sum", "bn1.dx"]
    assert "layer2.0.downsample.1.dx.sum" in reduced and "layer2.0.downsample.1.dx" not in reduced


def test_sums_without_a_norm_are_stored_once(device):
    """In v2 what is added is read raw by the next norm and by the next sum."""
    plans = [getattr(model(device, "resnet20", stem="cifar", block="v2"), kind).plan for kind in ("train", "evaluate")]
    added = [[e.name for e in plan if isinstance(e, Launch) and e.stem == "residual"] for plan in plans]
    assert added[1] == [f"add{i}" for i in range(1, 10)]
    assert added[0][:9] == added[1]
    assert all(name.endswith(".grad.sum") for name in added[0][9:])


def test_layers_that_cannot_be_fused_are_refused(device):
    net = Recorder(State(), device, "fp32", 1, train=True)
    x = net.input(3, 8, 8)
    y = net.conv("conv1", x, 16, 3)
    with pytest.raises(ValueError, match="relu of conv1: only what a norm returns"):
        net.relu(y)
    z = net.norm("bn1", y)
    net.conv("conv2", net.relu(z), 16, 3)
    with pytest.raises(ValueError, match="bn1 is used twice"):
        net.conv("conv3", z, 16, 3)
    w = net.norm("bn2", y)
    with pytest.raises(ValueError, match="bn2 is used twice"):
        net.max_pool(net.add(w, w), 3, 2, 1)


def test_an_activation_is_stored_where_it_is_needed_first(device):
    """Nothing is launched before, and nothing again after."""
    net = Recorder(State(), device, "fp32", 1, train=False)
    x = net.relu(net.norm("bn1", net.conv("conv1", net.input(3, 8, 8), 16, 3)))
    applied = [len([e for e in net.plan if kind_of(e) == "batchnorm_apply"])]
    for name in ("conv2", "conv3"):
        net.conv(name, x, 16, 3)
        applied.append(len([e for e in net.plan if kind_of(e) == "batchnorm_apply"]))
    assert applied == [0, 1, 1]


def test_names_and_shapes_of_a_bottleneck(device):
    shapes = {p.name: p.shape for p in model(device, "resnet50", classes=1000).parameters}
    assert shapes["conv1.weight"] == (64, 3, 7, 7)
    assert shapes["layer1.0.downsample.0.weight"] == (256, 64, 1, 1)
    assert shapes["layer2.0.conv2.weight"] == (128, 128, 3, 3)
    assert shapes["layer4.2.bn3.bias"] == (2048,)
    assert shapes["fc.weight"] == (1000, 2048)
    assert list(shapes)[-2:] == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize(("block", "first", "second"), [("v1", 2, 1), ("v1.5", 1, 2)])
def test_where_a_bottleneck_strides(device, block, first, second):
    recorded = model(device, "resnet50", stem="cifar", block=block)
    sizes = {t.name: t.height for t in recorded.evaluate.plan.tensors() if len(t.shape) == 5}
    assert sizes["layer1.2.conv3"] == 32
    assert sizes["layer2.0.conv1"] == 32 // first
    assert sizes["layer2.0.conv2"] == 16
    assert second * first == 2


def test_zero_init_residual_starts_every_block_as_its_shortcut():
    net = Network("resnet20", num_classes=10, image=(3, 8, 8), batch=2, precision="fp32", stem="cifar", zero_init_residual=True)
    state = net.state_dict()
    zeros = [name for name in state if name.endswith("bn2.weight")]
    assert len(zeros) == 9
    assert all((state[name] == 0).all() for name in zeros)
    assert (state["layer1.0.bn1.weight"] == 1).all()


def test_zero_init_residual_without_a_last_norm_starts_the_last_convolution_at_zero():
    options = {"stem": "cifar", "block": "v2", "zero_init_residual": True}
    state = Network("resnet20", num_classes=10, image=(3, 8, 8), batch=2, **options).state_dict()
    zeros = [name for name, value in state.items() if name.endswith("weight") and (value == 0).all()]
    assert len(zeros) == 9
    assert all(name.endswith("conv2.weight") for name in zeros)


def test_initial_values_follow_kaiming_fan_out():
    state = Network("resnet18", num_classes=10, image=(3, 32, 32), batch=1, stem="cifar", seed=3).state_dict()
    weight = state["layer4.1.conv2.weight"]
    assert weight.std() == pytest.approx(np.sqrt(2 / (512 * 9)), rel=0.01)
    assert abs(weight.mean()) < 5 * weight.std() / np.sqrt(weight.size)
    assert np.abs(state["fc.weight"]).max() <= 1 / np.sqrt(512)
    other = Network("resnet18", num_classes=10, image=(3, 32, 32), batch=1, stem="cifar", seed=4).state_dict()
    assert not np.array_equal(weight, other["layer4.1.conv2.weight"])


def test_state_dict_round_trip_and_its_complaints():
    net = Network("resnet20", num_classes=10, image=(1, 8, 8), batch=2, stem="cifar")
    state = {**net.state_dict(), "bn1.num_batches_tracked": np.array(7)}
    state["layer1.0.bn1.running_mean"] = np.arange(16, dtype=np.float32)
    assert net.load_state_dict(state) == 1
    again = net.state_dict()
    assert all(np.array_equal(again[name], state[name]) for name in again)
    del state["fc.bias"]
    state["fc.weight"] = np.zeros((3, 64), np.float32)
    state["extra"] = np.zeros(1)
    pattern = r"(?s)missing: fc.bias \[10\].*unexpected: extra.*wrong shape: fc.weight is \[3, 64\]"
    with pytest.raises(ValueError, match=pattern):
        net.load_state_dict(state)


@pytest.mark.parametrize("wrong", [
    {"shortcut": "b"}, {"stem": "Cifar"}, {"block": "v3"}, {"bn": "Sync"}, {"precision": "fp64"}, {"label_smoothing": 2},
    {"batch": 0}, {"image": (3, 0, 8)}, {"loss_scale": 0}, {"replicas": 0}, {"num_classes": 0},
])  # fmt: skip
def test_bad_options_are_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(Refused, match=name):
        Network("resnet20", **{"image": (1, 8, 8), "batch": 2, "num_classes": 10, **wrong})


def test_choices_of_the_command_line_are_those_of_the_networks():
    for name, choices in CHOICES.items():
        assert set(Config.__dataclass_fields__[name].metadata["choices"]) == set(choices)


def test_bad_arguments_name_value_and_remedy():
    with pytest.raises(Refused, match=r"unknown architecture 'resnet19': choose one of resnet18"):
        Network("resnet19")
    net = Network("resnet20", num_classes=10, image=(1, 8, 8), batch=2, stem="cifar")
    with pytest.raises(ValueError, match=r"\[2, 3, 8, 8\], not \[N, 1, 8, 8\]"):
        net.forward(np.zeros((2, 3, 8, 8)))
    with pytest.raises(ValueError, match=r"labels are in 0\.\.10, the classes in 0\.\.9"):
        net.loss_and_grads(np.zeros((2, 1, 8, 8)), np.array([0, 10]))
    with pytest.raises(ValueError, match="3 images: 1 to 2 fit"):
        net.loss_and_grads(np.zeros((3, 1, 8, 8)), np.array([0, 1, 2]))


def test_intermediates_share_memory(device):
    """The arena is far smaller than the sum of what lies in it, and not smaller than what lives at one moment."""
    recorded = model(device, "resnet50", image=64, batch=2)
    spans = lifetimes(recorded.train.plan)
    moments = range(len(recorded.train.plan.entries))
    alive = [sum(t.nbytes for t, (a, b) in spans.items() if a <= i <= b) for i in moments]
    arena = max(t.place[1] + t.nbytes for t in spans)
    assert max(alive) <= arena < 1.25 * max(alive)
    assert arena < 0.6 * sum(t.nbytes for t in spans)


def test_the_device_has_work_while_replicas_agree(device):
    """Between what an exchange needs and the exchange lie launches that wait for nothing: packing, gradients of weights."""
    entries = model(device, "resnet50", stem="imagenet", image=64).train.plan.entries
    fillers = Counter()
    for i, entry in enumerate(entries):
        if isinstance(entry, Exchange):
            last = max(j for j in range(i) if set(entry.sources) & set(entries[j].writes))
            between = [e for e in entries[last + 1 : i] if isinstance(e, Launch) and e.verb in ("pack", "weight")]
            fillers[entry.kind, bool(between)] += 1
            written = {tensor for e in between for tensor in e.writes}
            assert not any(target in written or target in e.tensors for target in entry.targets for e in between)
            assert entry.kind == "sums" or len(between) <= 1, "the weights of a shortcut are packed when they are used"
    assert fillers == {("sums", True): 49, ("statistics", True): 48, ("statistics", False): 1}, "but before the last activation"


def test_prepared_weights_outlive_every_replay(device):
    """Evaluation copies its weights once, into memory that no entry of its plan writes; training uses that memory meanwhile."""
    recorded = model(device, "resnet20", stem="cifar", image=32).evaluate
    kept, spans = lifetimes(recorded.prepare), lifetimes(recorded.plan)
    ranges = [(t.place[1], t.place[1] + t.nbytes) for t in {*kept, *spans}]
    for copy in kept:
        begin, end = copy.place[1], copy.place[1] + copy.nbytes
        assert sum(a < end and begin < b for a, b in ranges) == 1


def test_evaluation_follows_the_parameters():
    """Copies of weights are made anew after a training step and after loading."""
    net = Network("resnet20", num_classes=10, image=(1, 8, 8), batch=4, precision="fp32", stem="cifar")
    images = np.random.default_rng(0).standard_normal((4, 1, 8, 8)).astype(np.float32)
    before, state = net.forward(images), net.state_dict()
    net.load_state_dict(state | {"conv1.weight": 2 * state["conv1.weight"]})
    assert not np.array_equal(net.forward(images), before)
    net.load_state_dict(state)
    assert np.array_equal(net.forward(images), before)
    net.loss_and_grads(images, np.zeros(4, int))
    net.load_state_dict(state)
    assert np.array_equal(net.forward(images), before)


def test_any_number_of_images_can_be_evaluated():
    net = Network("resnet20", num_classes=10, image=(1, 8, 8), batch=4, precision="fp32", stem="cifar")
    images = np.random.default_rng(0).standard_normal((11, 1, 8, 8)).astype(np.float32)
    one_by_one = np.concatenate([net.forward(image[None]) for image in images])
    assert np.array_equal(net.forward(images), one_by_one)
    assert net.forward(images[:0]).shape == (0, 10)


def test_every_training_pass_enters_the_running_statistics():
    net = Network("resnet20", num_classes=10, image=(1, 8, 8), batch=4, precision="fp32", stem="cifar")
    images = np.random.default_rng(0).standard_normal((4, 1, 8, 8)).astype(np.float32)
    weight = net.state_dict()["conv1.weight"].astype(np.float64)
    padded = np.pad(images.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    first = np.einsum("nchwij,ocij->nohw", windows, weight).transpose(1, 0, 2, 3).reshape(16, -1)  # what bn1 sees
    net.forward(images)
    assert (net.state_dict()["bn1.running_mean"] == 0).all()
    net.forward(images, train=True)
    assert np.allclose(net.state_dict()["bn1.running_mean"], 0.1 * first.mean(1), rtol=1e-4, atol=1e-6)
    net.loss_and_grads(images, np.arange(4))
    state = net.state_dict()
    assert np.allclose(state["bn1.running_mean"], 0.19 * first.mean(1), rtol=1e-4, atol=1e-6)
    assert np.allclose(state["bn1.running_var"], 0.81 + 0.19 * first.var(1, ddof=1), rtol=1e-4)
    assert np.array_equal(state["conv1.weight"], weight.astype(np.float32))


def test_statistics_that_are_exchanged_together_stay_those_of_their_layers():
    """Where weights are zero, so are the activations; those of the shortcut beside them are not."""
    variant = {"stem": "cifar", "shortcut": "B"}
    net = Network("resnet20", num_classes=10, image=(1, 8, 8), batch=2, precision="fp32", replicas=2, **variant)
    state = net.state_dict()
    state["layer2.0.conv2.weight"][:] = 0
    net.load_state_dict(state)
    net.forward(np.random.default_rng(0).standard_normal((4, 1, 8, 8)).astype(np.float32), train=True)
    after = net.state_dict()
    assert (after["layer2.0.bn2.running_mean"] == 0).all() and np.allclose(after["layer2.0.bn2.running_var"], 0.9)
    assert (after["layer2.0.downsample.1.running_mean"] != 0).all() and (after["layer2.0.downsample.1.running_var"] > 0.9).all()


def test_a_pass_that_overflows_leaves_the_running_statistics():
    net = Network("resnet20", num_classes=10, image=(1, 8, 8), batch=4, precision="fp16", stem="cifar")
    before = net.state_dict()
    net.loss_and_grads(np.full((4, 1, 8, 8), 1e6, np.float32), np.arange(4))
    after = net.state_dict()
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_memory_is_counted_per_device(device):
    """Replicas times their own arenas plus the shared ones, for every rank on the device; one byte less is too little."""
    recorded = model(device, "resnet20", batch=2, stem="cifar")
    private = sum(sum(recorded.bytes[home]) for home in ("work", "gradient", "statistic", "io"))
    shared = sum(map(sum, recorded.bytes.values())) - private
    needed = 2 * (3 * private + shared)
    for has, fits in ((needed, True), (needed - 1, False)):
        recorded.device = SimpleNamespace(cl=SimpleNamespace(global_mem_size=has), name="a device")
        with nullcontext() if fits else pytest.raises(Refused, match="--batch 2: 6 replicas on one device need"):
            check_memory(recorded, 3, 2)
