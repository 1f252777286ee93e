// residual.cl - y = a + b, elementwise: the end of a residual block, and the sum of two gradients of one tensor.

__kernel void residual_add(const int elements, __global const act *restrict a, __global const act *restrict b,
                           __global act *restrict y)
{
    FLAT(i) STORE(LOAD(a + i) + LOAD(b + i), y + i);
}
