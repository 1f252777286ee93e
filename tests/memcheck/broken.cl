// broken.cl - kernels with one fault each, which tests/memcheck/test_oclgrind.py must see reported. They run with four
// work-items on x [4] and y [4]; the last argument of some is local memory for one float per work-item.

#define ID get_global_id(0)

__kernel void broken_nothing(__global const float *x, __global float *y) { y[ID] = x[ID]; }

__kernel void broken_read_beyond(__global const float *x, __global float *y) { y[ID] = x[ID + 1]; }
__kernel void broken_read_before(__global const float *x, __global float *y) { y[ID] = x[(int)ID - 1]; }
__kernel void broken_write_beyond(__global const float *x, __global float *y) { y[ID + 1] = x[ID]; }
__kernel void broken_vector_beyond(__global const float *x, __global float *y) { *(__global float8 *)y = 0; }
__kernel void broken_input_written(__global float *x, __global float *y) { y[ID] = x[ID] = 1; }
__kernel void broken_local_beyond(__global const float *x, __global float *y, __local float *z)
{
    z[get_local_id(0) + 1] = x[ID];
    y[ID] = 0;
}
__kernel void broken_private_beyond(__global const float *x, __global float *y)
{
    float z[2] = {0, 0};
    z[ID] = x[ID];
    y[ID] = z[0];
}

__kernel void broken_two_writers(__global const float *x, __global float *y) { y[ID / 2] = x[ID]; }
__kernel void broken_same_value(__global const float *x, __global float *y) { y[0] = 1; }
__kernel void broken_reader_and_writer(__global const float *x, __global float *y)
{
    y[ID] = x[ID];
    if (ID == 0) y[ID] = y[1];
}

__kernel void broken_global_unset(__global const float *x, __global float *y) { y[ID] += x[ID]; }
__kernel void broken_local_unset(__global const float *x, __global float *y, __local float *z) { y[ID] = z[get_local_id(0)]; }
__kernel void broken_private_unset(__global const float *x, __global float *y)
{
    float z[4];
    z[0] = x[0];
    y[ID] = z[ID];
}
__kernel void broken_lane_unset(__global const float *x, __global float *y)
{
    float8 v;
    v.s0123 = x[ID];
    y[ID] = v.s7;
}
__kernel void broken_branch_unset(__global const float *x, __global float *y)
{
    float z[2];
    z[0] = x[ID];
    y[ID] = 0;
    if (z[1] > 0) y[ID] = 1;
}
