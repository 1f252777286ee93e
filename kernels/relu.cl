// relu.cl - y = max(x, 0), elementwise over flat arrays of `elements` (a multiple of BLOCK).

// Signs are read from the bits: as integers, negative numbers are those up to the bits of minus infinity, NaN excluded.
// (Comparing a converted fp16 value with a constant, LLVM compares as fp16 instead, element by element.)
#if VEC == 1
#define BITS(v) as_int(v)
#else
#define BITS(v) PASTE(as_int, VEC)(v)
#endif

// NaN stays NaN, so that a bad value is not hidden from the overflow check.
__kernel void relu_forward(const int elements, __global const act *restrict x, __global act *restrict y)
{
    FLAT(i) {
        const vec v = LOAD(x + i);
        STORE(BITS(v) <= as_int(-INFINITY) ? (vec)(0) : v, y + i);
    }
}

// dx = dy where the output is positive.
__kernel void relu_backward(const int elements, __global const act *restrict dy, __global const act *restrict y,
                            __global act *restrict dx)
{
    FLAT(i) {
        const vec v = LOAD(y + i), d = LOAD(dy + i);
        STORE(BITS(v) > 0 ? d : (vec)(0), dx + i);
    }
}
