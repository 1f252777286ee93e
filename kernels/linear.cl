// linear.cl - the classifier: y [images][out_pad] = x [images][in_pad] w^T + b, outputs in fp32. in_pad and out_pad are
// multiples of BLOCK, padding is zero. Built with VEC = 8 on every device: the lanes are part of the order of the sums.
// The tiles below are not: each sum has its own accumulator, whose terms come in the order of their index.
//
// Weights are many and images few, so a work-item takes a tile of images (and one of outputs): a weight that came from
// memory serves all of them. Where a tile hangs over the end, its last row is computed again and not stored.
//
// IMAGES   images whose sums are in registers at the same time
// OUTPUTS  outputs of a work-item, at most BLOCK
// GROUP    images of a work-item of the gradient of x, a multiple of IMAGES
// STRIP    vectors of neighbouring inputs that a work-item of a gradient handles, even: two at a time are in registers
// ROWS     outputs after which the gradient of x turns to the next inputs: ROWS x STRIP weights stay in L1
#ifndef IMAGES
#define IMAGES 1
#endif
#ifndef OUTPUTS
#define OUTPUTS 1
#endif
#ifndef GROUP
#define GROUP 1
#endif
#ifndef STRIP
#define STRIP 2
#endif
#define ROWS 16

// Working copy of the weights [out][in_pad], rounded to fp16 when activations are. One work-item per output.
__kernel void linear_pack(__global const float *restrict master, __global float *restrict packed, const int in, const int in_pad)
{
    const long o = get_global_id(0);
    const int whole = in % VEC ? 0 : in;  // else a row may begin in the middle of a vector
    for (int i = 0; i < in_pad; i += VEC) {
        vec v = 0;
        if (i < whole)
            v = LOADF(master + o * in + i);
        else
            for (int l = 0; l < VEC; l++)
                if (i + l < in) ((float *)&v)[l] = master[o * in + i + l];
#if HALF
        v = ROUND_HALF(v);
#endif
        STOREF(v, packed + o * in_pad + i);
    }
}

// One work-item per (tile of images, tile of outputs with padding).
__kernel void linear_forward(__global const act *restrict x, __global const float *restrict packed,
                             __global const float *restrict bias, __global float *restrict y, const int images,
                             const int in_pad, const int out, const int out_pad)
{
    const int first_n = get_global_id(0) * IMAGES, first_o = get_global_id(1) * OUTPUTS;
    long row[IMAGES], weights[OUTPUTS];
    UNROLL for (int n = 0; n < IMAGES; n++) row[n] = (long)min(first_n + n, images - 1) * in_pad;
    UNROLL for (int o = 0; o < OUTPUTS; o++) weights[o] = (long)min(first_o + o, out - 1) * in_pad;

    vec sum[IMAGES][OUTPUTS];
    UNROLL for (int n = 0; n < IMAGES; n++)
        UNROLL for (int o = 0; o < OUTPUTS; o++) sum[n][o] = 0;
    for (int i = 0; i < in_pad; i += VEC) {
        vec w[OUTPUTS];
        UNROLL for (int o = 0; o < OUTPUTS; o++) w[o] = LOADF(packed + weights[o] + i);
        UNROLL for (int n = 0; n < IMAGES; n++) {
            const vec v = LOAD(x + row[n] + i);
            UNROLL for (int o = 0; o < OUTPUTS; o++) sum[n][o] += v * w[o];
        }
    }

    UNROLL for (int n = 0; n < IMAGES; n++)
        UNROLL for (int o = 0; o < OUTPUTS; o++) {
            const vec s = sum[n][o];
            const float dot = ((s.s0 + s.s1) + (s.s2 + s.s3)) + ((s.s4 + s.s5) + (s.s6 + s.s7));
            if (first_n + n < images && first_o + o < out_pad)
                y[(long)(first_n + n) * out_pad + first_o + o] = first_o + o < out ? dot + bias[first_o + o] : 0;
        }
}

// dx [images][in_pad] = dy [images][out_pad] w. One work-item per (strip of inputs, group of images). Its sums rest in
// private memory between one block of ROWS outputs and the next.
__kernel void linear_backward_data(__global const float *restrict dy, __global const float *restrict packed,
                                   __global act *restrict dx, const int images, const int in_pad, const int out,
                                   const int out_pad)
{
    const int first_i = get_global_id(0) * STRIP * VEC, strip = min(STRIP, (in_pad - first_i) / VEC);
    const int first_n = get_global_id(1) * GROUP, group = min(GROUP, images - first_n);
    vec sums[GROUP][STRIP];
    for (int n = 0; n < GROUP; n++)
        for (int s = 0; s < STRIP; s++) sums[n][s] = 0;

    for (int first_o = 0; first_o < out; first_o += ROWS)
        for (int tile = 0; tile < group; tile += IMAGES) {
            long row[IMAGES];
            UNROLL for (int n = 0; n < IMAGES; n++) row[n] = (long)(first_n + min(tile + n, group - 1)) * out_pad;
            for (int s = 0; s < strip; s += 2) {
                vec sum[IMAGES][2];
                UNROLL for (int n = 0; n < IMAGES; n++)
                    UNROLL for (int p = 0; p < 2; p++) sum[n][p] = sums[tile + n][s + p];
                for (int o = first_o; o < min(first_o + ROWS, out); o++) {
                    __global const float *w = packed + (long)o * in_pad + first_i + s * VEC;
                    const vec left = LOADF(w), right = LOADF(w + VEC);
                    UNROLL for (int n = 0; n < IMAGES; n++) {
                        const float d = dy[row[n] + o];
                        sum[n][0] += d * left;
                        sum[n][1] += d * right;
                    }
                }
                UNROLL for (int n = 0; n < IMAGES; n++)
                    UNROLL for (int p = 0; p < 2; p++) sums[tile + n][s + p] = sum[n][p];
            }
        }

    for (int n = 0; n < group; n++)
        for (int s = 0; s < strip; s++) STORE(sums[n][s], dx + (long)(first_n + n) * in_pad + first_i + s * VEC);
}

// The first lanes of v as far as a row [in] goes. `row` is aligned where rows are whole vectors.
void linear_store(const vec v, __global float *row, const int i, const int in)
{
    if (in % VEC == 0) {
        if (i < in) STOREF(v, row + i);
    } else
        for (int l = 0; l < VEC; l++)
            if (i + l < in) row[i + l] = ((const float *)&v)[l];
}

// dw [out][in] = dy^T x, db [out] = sum of dy over the images. One work-item per (strip of inputs, tile of outputs).
__kernel void linear_backward_weight(__global const float *restrict dy, __global const act *restrict x, __global float *restrict dw,
                                     __global float *restrict db, const int images, const int in, const int in_pad,
                                     const int out, const int out_pad)
{
    const int first_i = get_global_id(0) * STRIP * VEC, last_i = min(first_i + STRIP * VEC, in_pad);
    const int first_o = get_global_id(1) * OUTPUTS;
    for (int i = first_i; i < last_i; i += 2 * VEC) {
        vec sum[OUTPUTS][2];
        UNROLL for (int o = 0; o < OUTPUTS; o++) sum[o][0] = sum[o][1] = 0;
        for (int n = 0; n < images; n++) {
            const vec left = LOAD(x + (long)n * in_pad + i), right = LOAD(x + (long)n * in_pad + i + VEC);
            UNROLL for (int o = 0; o < OUTPUTS; o++) {
                const float d = dy[(long)n * out_pad + first_o + o];  // zero in the padding
                sum[o][0] += d * left;
                sum[o][1] += d * right;
            }
        }
        UNROLL for (int o = 0; o < OUTPUTS; o++)
            if (first_o + o < out) {
                linear_store(sum[o][0], dw + (long)(first_o + o) * in, i, in);
                linear_store(sum[o][1], dw + (long)(first_o + o) * in, i + VEC, in);
            }
    }
    if (first_i == 0)
        for (int o = first_o; o < min(first_o + OUTPUTS, out); o++) {
            float bias = 0;
            for (int n = 0; n < images; n++) bias += dy[(long)n * out_pad + o];
            db[o] = bias;
        }
}
