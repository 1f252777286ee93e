// linear.cl - the classifier: y [images][out_pad] = x [images][in_pad] w^T + b, outputs in fp32. in_pad and out_pad are
// multiples of BLOCK, padding is zero. Built with VEC = 8 on every device: the lanes are part of the order of the sums.

// Working copy of the weights [out][in_pad], rounded to fp16 when activations are. One work-item per output.
__kernel void linear_pack(__global const float *restrict master, __global float *restrict packed, const int in, const int in_pad)
{
    const long o = get_global_id(0);
    for (int i = 0; i < in_pad; i += VEC) {
        vec v = 0;
        for (int l = 0; l < VEC; l++)
            if (i + l < in) ((float *)&v)[l] = master[o * in + i + l];
#if HALF
        v = ROUND_HALF(v);
#endif
        STOREF(v, packed + o * in_pad + i);
    }
}

// One work-item per (output with padding, image).
__kernel void linear_forward(__global const act *restrict x, __global const float *restrict packed,
                             __global const float *restrict bias, __global float *restrict y, const int in_pad, const int out)
{
    const int o = get_global_id(0), n = get_global_id(1);
    vec sum = 0;
    if (o < out)
        for (int i = 0; i < in_pad; i += VEC) sum += LOAD(x + (long)n * in_pad + i) * LOADF(packed + (long)o * in_pad + i);
    const float *s = (const float *)&sum;
    const float dot = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
    y[(long)n * get_global_size(0) + o] = o < out ? dot + bias[o] : 0;
}

// dx [images][in_pad] = dy [images][out_pad] w. One work-item per (vector of inputs, image).
__kernel void linear_backward_data(__global const float *restrict dy, __global const float *restrict packed,
                                   __global act *restrict dx, const int out, const int out_pad)
{
    const int i = get_global_id(0) * VEC, in_pad = get_global_size(0) * VEC;
    const long n = get_global_id(1);
    vec sum = 0;
    for (int o = 0; o < out; o++) sum += dy[n * out_pad + o] * LOADF(packed + (long)o * in_pad + i);
    STORE(sum, dx + n * in_pad + i);
}

// dw [out][in] = dy^T x, db [out] = sum of dy over the images. One work-item per (vector of inputs, output).
__kernel void linear_backward_weight(__global const float *restrict dy, __global const act *restrict x, __global float *restrict dw,
                                     __global float *restrict db, const int images, const int in, const int out_pad)
{
    const int i = get_global_id(0) * VEC, in_pad = get_global_size(0) * VEC;
    const long o = get_global_id(1);
    vec sum = 0;
    float bias = 0;
    for (int n = 0; n < images; n++) {
        sum += dy[(long)n * out_pad + o] * LOAD(x + (long)n * in_pad + i);
        bias += dy[(long)n * out_pad + o];
    }
    for (int l = 0; l < VEC; l++)
        if (i + l < in) dw[o * in + i + l] = ((float *)&sum)[l];
    if (i == 0) db[o] = bias;
}
