// probe.cl - asks the device's compiler what it generates code for.

__kernel void probe_vector(__global int *lanes)
{
#if defined(__AVX512F__)
    lanes[0] = 16;
#else
    lanes[0] = 8;
#endif
}
