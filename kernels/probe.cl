// probe.cl - how fast a device multiplies and adds, and moves memory, at best.

// CHAINS independent chains of fused multiply-adds in registers, `rounds` long: the ceiling of every other kernel.
// One work-item: 2 * CHAINS * VEC * rounds operations.
#define CHAINS 12
__kernel void probe_peak(__global float *out, const int rounds)
{
    vec sum[CHAINS];
    const vec factor = (vec)(out[0]), term = (vec)(out[1]);
    UNROLL for (int i = 0; i < CHAINS; i++) sum[i] = (vec)(i);
    for (int r = 0; r < rounds; r++) UNROLL for (int i = 0; i < CHAINS; i++) sum[i] = sum[i] * factor + term;
    vec total = 0;
    UNROLL for (int i = 0; i < CHAINS; i++) total += sum[i];
    STOREF(total, out + BLOCK * (get_global_id(0) + 1));
}

// c[i] = a[i] + factor * b[i] over `elements` (a multiple of VEC): two arrays read and one written, in order, ITEMS vectors
// per work-item. Arrays larger than the last cache give the bandwidth of memory, smaller ones that of the cache.
__kernel void probe_stream(const int elements, __global const float *restrict a, __global const float *restrict b,
                           __global float *restrict c, const float factor)
{
    FLAT(i) STOREF(LOADF(a + i) + (vec)(factor) * LOADF(b + i), c + i);
}
