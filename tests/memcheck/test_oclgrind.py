import numpy as np, pytest
from checked import Bench, stderr_text
from harness import Mode, each_mode
from dpresnet import device
SRC = """
__kernel void broken_read(__global const float *x, __global float *y) { y[get_global_id(0)] = x[get_global_id(0) + 1]; }
__kernel void broken_write(__global const float *x, __global float *y) { y[get_global_id(0) + 1] = x[get_global_id(0)]; }
__kernel void broken_local(__global const float *x, __global float *y, __local float *z) { z[get_global_id(0) + 1] = 0; y[get_global_id(0)] = x[0]; }
__kernel void broken_race(__global const float *x, __global float *y) { y[get_global_id(0)/2] = 1; }
__kernel void broken_private(__global const float *x, __global float *y) { float z[2]; z[0] = x[0]; y[get_global_id(0)] = z[get_global_id(0) & 1]; }
__kernel void broken_input(__global float *x, __global float *y) { x[0] = 1; y[get_global_id(0)] = x[0]; }
"""
@pytest.mark.parametrize("verb", ["read", "write", "race", "private", "input"])
def test_x(verb, monkeypatch):
    usual = device.kernel_source
    monkeypatch.setattr(device, "kernel_source", lambda s: usual("relu") + SRC)
    b = Bench(Mode("fp32", "vector"))
    x, y = b.array(np.ones(4)), b.out_array(4)
    b.plan.launch("x", f"broken_{verb}", (4,), [x, y], [y])
    import checked
    checked.readable = lambda s: s
    b.run()
