// relu.cl - y = max(x, 0), elementwise over flat arrays of `elements` (a multiple of BLOCK).

// NaN stays NaN, so that a bad value is not hidden from the overflow check.
__kernel void relu_forward(const int elements, __global const act *restrict x, __global act *restrict y)
{
    FLAT(i) {
        const vec v = LOAD(x + i);
        STORE(v < 0 ? (vec)(0) : v, y + i);
    }
}

// dx = dy where the output is positive.
__kernel void relu_backward(const int elements, __global const act *restrict dy, __global const act *restrict y,
                            __global act *restrict dx)
{
    FLAT(i) STORE(LOAD(y + i) > 0 ? LOAD(dy + i) : (vec)(0), dx + i);
}
