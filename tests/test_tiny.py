"""The ten smallest things that must work. Run these first: if one fails, nothing else is worth reading."""

import numpy as np

from dpresnet import checkpoint, data
from dpresnet.amp import LossScaler
from dpresnet.config import Config
from dpresnet.device import Device, choose_device
from dpresnet.ops import conv
from dpresnet.plan import Memory, Plan, Tensor, bind, place_by_liveness, place_in_order
from dpresnet.schedule import lr_at
from dpresnet.tree import fold

FP32 = np.dtype(np.float32)


def open_device() -> Device:
    return Device(choose_device())


def add(a: float, b: float, dtype: type) -> float:
    """The first lane of a block of sums."""
    device = open_device()
    arena = device.arena(3 * 512)
    for offset, value in ((0, a), (512, b)):
        arena.view(offset, (16,), dtype)[:] = value
    arena.push(0, arena.nbytes)
    program = device.program("residual", HALF=int(dtype is np.float16), VEC=1, ITEMS=16)
    buffers = [arena.buffer(offset, 16 * np.dtype(dtype).itemsize) for offset in (0, 512, 1024)]
    program.residual_add(device.queue, (1,), (1,), np.int32(16), *buffers)
    arena.pull(0, arena.nbytes)
    return float(arena.view(1024, (16,), dtype)[0])


def test_device_opens():
    assert open_device().name


def test_kernel_adds():
    assert add(2.0, 3.0, np.float32) == 5.0


def test_fp16_round_trip():
    assert add(1 / 3, 0.0, np.float16) == float(np.float16(1 / 3))


def test_one_convolution():
    """Nine ones under a window of nine ones."""
    plan = Plan(open_device(), "fp32")
    x, y = plan.image("x", 1, 1, 3, 3), plan.image("y", 1, 1, 1, 1)
    shape = conv.conv_for(plan, x, 1, 3, 1, 0, 1)
    master, packed = Tensor("w", (1, 1, 3, 3), FP32), Tensor("packed", shape.packed_shape(False), FP32)
    for tensor in (x, y, master):
        tensor.home = "kept"
    conv.pack(plan, "pack", shape, master, packed, False)
    conv.forward(plan, "conv", shape, x, packed, y)
    [work], kept = place_by_liveness(plan, 2**20), place_in_order([x, y, master])
    memory = Memory({"work": [plan.device.arena(work)], "kept": [plan.device.arena(kept)]})
    memory.write(x, np.eye(1, 16))
    memory.write(master, 1)
    constants = {}  # alive until the kernels have run
    for entry, kernel in zip(plan, bind(plan, memory, constants), strict=True):
        plan.device.enqueue(kernel, entry.size)
    assert memory.read(y).ravel().tolist() == [9.0] + [0.0] * 15


def test_tree_of_two():
    leaves = [3, 4]
    assert fold(0, 2, lambda lo, hi: leaves[lo] if hi - lo == 1 else None, lambda left, right: left + right) == 7


def test_learning_rate_of_the_first_step():
    cfg = Config(replicas=1, batch=256, lr=0.5, warmup_epochs=1.0)
    assert lr_at(cfg, 0, steps_per_epoch=4, total_steps=40) == 0.5 / 5


def test_scaler_halves():
    assert LossScaler().after(found_inf=True).scale == LossScaler().scale / 2 == 32768


def test_checkpoint_of_one_number(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"param/x": np.float32([0.1])}, {"step": 1}, keep=1)
    assert checkpoint.load(path).arrays["param/x"].tolist() == [np.float32(0.1)]


def test_digits_has_all_images():
    digits = data.load("digits")
    assert len(digits.train) + len(digits.test) == 1797


def test_order_is_a_permutation():
    assert sorted(data.order(seed=0, epoch=0, n=100)) == list(range(100))
