// batchnorm.cl - batch normalisation (Ioffe and Szegedy 2015) with statistics apart from application, so that replicas can
// agree in between, and in the same pass what follows it: a residual addition and ReLU.
//
//   statistics -> merge -> (replicas exchange) -> apply          forward, training
//   running -> apply                                             forward, evaluation
//   backward_reduce -> sum -> (replicas exchange) -> backward    gradient
//
//   z = relu(scale (x - mean) + bias + r),   scale = weight * inverse
//
// Activations (x, r, z and their gradients) are [images][blocks][pixels][BLOCK]; moments = mean, 1 / sqrt(variance + eps), and
// all other statistics are fp32 [2][blocks * BLOCK]. Means and squared deviations are merged as (count, mean, M2) (Chan, Golub
// and LeVeque 1983), never from a sum of squares.
//
// RELU      1: z is rectified. backward_reduce and backward then find the mask again, see MASK; 0: no ReLU.
// RESIDUAL  0: there is no r. 1: r is added as it is. 2: r is the other branch, normalised with moments of its own (r_...).
//           backward_reduce then stores g, the masked sum of the terms of dz: it is the gradient of what is added, so dr where
//           r is a plain tensor, and backward reads it instead of dz.
// LARGE     1: z or dx does not stay in the caches until it is read, and is stored past them. 0: it may, or takes the place of
//           what is read.
// GIVEN     1: dz is that g already, a convolution has joined the terms (JOIN in conv.cl). 0: it is not.
// DOUBLES   1: merge and sum also write what the host makes of their results for a replica that agrees with nobody else, in double
//           precision and with the same bits (`Trainer` in dpresnet/trainer.py): that one need not wait for the host. Where
//           replicas do agree, the host overwrites it. 0: they do not.
// TERMS     1 or 2: dz is given as one tensor, or as the two gradients dz + dz2 of an activation that was used twice.
#ifndef RELU
#define RELU 0
#endif
#ifndef RESIDUAL
#define RESIDUAL 0
#endif
#ifndef DOUBLES
#define DOUBLES 0
#endif
#if DOUBLES
#pragma OPENCL EXTENSION cl_khr_fp64 : enable
#endif
#ifndef TERMS
#define TERMS 1
#endif
#ifndef GIVEN
#define GIVEN 0
#endif
#ifndef LARGE
#define LARGE 0
#endif
#if LARGE
#define RESULT(v, p) STREAM(v, p)
#else
#define RESULT(v, p) STORE(v, p)
#endif

// A work-item handles WIDE neighbouring vectors of each pixel: all of a block on CPUs (a cache line is read once), one lane on
// GPUs (neighbouring work-items read neighbouring lanes). Over activations work-items are (channels / WIDTH, image), and where
// nothing is summed (..., part of the image), of `span` pixels.
#define LEAST(a, b) ((a) < (b) ? (a) : (b))  // min() may be a call, for which the sums leave their registers
#define WIDE (VEC == 1 ? 1 : PARTS)
#define WIDTH (WIDE * VEC)
#define CHANNELS ((int)get_global_size(0) * WIDTH)
#define CHANNEL ((int)get_global_id(0) * WIDTH)
#define VECTORS(k) UNROLL for (int k = 0; k < WIDE; k++)
#define PIXELS(p) \
    for (int p = get_global_id(2) * span; p < LEAST(pixels, ((int)get_global_id(2) + 1) * span); p++)

// Where the first pixel of the image lies.
#define START (((long)get_global_id(1) * (CHANNELS / BLOCK) + CHANNEL / BLOCK) * pixels * BLOCK + CHANNEL % BLOCK)

// Sums over pixels go by runs of 32 that are then added: the rounding of a long sum grows with its longest chain.
#define RUNS(start) for (int start = 0; start < pixels; start += 32)
#define RUN(p, start) for (int p = start; p < LEAST(start + 32, pixels); p++)

// One expression for forward and for the mask in backward: the same roundings, so the same sign.
#define NORMALISED(centred, scale, shift) ((centred) * (scale) + (shift))

#if TERMS == 2
#define GRADIENT(i) (LOAD(dz + (i)) + LOAD(dz2 + (i)))
#else
#define GRADIENT(i) LOAD(dz + (i))
#endif

// Mean and M2 of each image and channel: partial[image][2][channels].
__kernel void batchnorm_statistics(__global const act *restrict x, __global float *restrict partial, const int pixels)
{
    __global const act *image = x + START;
    __global float *out = partial + (long)get_global_id(1) * 2 * CHANNELS + CHANNEL;
    vec mean[WIDE], m2[WIDE], part[WIDE];
    VECTORS(k) mean[k] = m2[k] = 0;
    RUNS(start) {
        VECTORS(k) part[k] = 0;
        RUN(p, start) VECTORS(k) part[k] += LOAD(image + p * BLOCK + k * VEC);
        VECTORS(k) mean[k] += part[k];
    }
    VECTORS(k) mean[k] /= (float)pixels;
    RUNS(start) {
        VECTORS(k) part[k] = 0;
        RUN(p, start) VECTORS(k) {
            const vec d = LOAD(image + p * BLOCK + k * VEC) - mean[k];
            part[k] += d * d;
        }
        VECTORS(k) m2[k] += part[k];
    }
    VECTORS(k) STOREF(mean[k], out + k * VEC);
    VECTORS(k) STOREF(m2[k], out + CHANNELS + k * VEC);
}

// Merges the valid images of this replica, in order: merged[2][channels] = mean, M2. One work-item per WIDTH channels.
__kernel void batchnorm_merge(__global const float *restrict partial, __global float *restrict merged,
                              __global const Control *restrict control, const int pixels
#if DOUBLES
                              , __global float *restrict moments, const double eps
#endif
                              )
{
    vec mean[WIDE], m2[WIDE];
    VECTORS(k) mean[k] = m2[k] = 0;
    for (int n = 0; n < control->valid; n++) {
        __global const float *image = partial + (long)n * 2 * CHANNELS + CHANNEL;
        VECTORS(k) {
            const vec d = LOADF(image + k * VEC) - mean[k];
            mean[k] += d / (float)(n + 1);
            m2[k] += LOADF(image + CHANNELS + k * VEC) + d * d * ((float)pixels * n / (n + 1));
        }
    }
    VECTORS(k) STOREF(mean[k], merged + CHANNEL + k * VEC);
    VECTORS(k) STOREF(m2[k], merged + CHANNELS + CHANNEL + k * VEC);
#if DOUBLES
    const double count = (double)control->valid * pixels;
    for (int c = CHANNEL; c < CHANNEL + WIDTH; c++) {
        moments[c] = merged[c];
        moments[CHANNELS + c] = count > 0 ? 1 / sqrt(merged[CHANNELS + c] / count + eps) : 0;
    }
#endif
}

// moments from the running statistics. One work-item per WIDTH channels.
__kernel void batchnorm_running(__global const float *restrict mean, __global const float *restrict var,
                                __global float *restrict moments, const float eps)
{
    VECTORS(k) {
        const int channel = CHANNEL + k * VEC;
        STOREF(LOADF(mean + channel), moments + channel);
        for (int l = channel; l < channel + VEC; l++) moments[CHANNELS + l] = 1.0f / sqrt(var[l] + eps);
    }
}

// z.
__kernel void batchnorm_apply(__global const act *restrict x, __global const float *restrict moments,
                              __global const float *restrict weight, __global const float *restrict bias,
#if RESIDUAL
                              __global const act *restrict r,
#endif
#if RESIDUAL == 2
                              __global const float *restrict r_moments, __global const float *restrict r_weight,
                              __global const float *restrict r_bias,
#endif
                              __global act *restrict z, const int pixels, const int span)
{
    vec mean[WIDE], scale[WIDE], shift[WIDE];
    VECTORS(k) {
        const int channel = CHANNEL + k * VEC;
        mean[k] = LOADF(moments + channel);
        scale[k] = LOADF(moments + CHANNELS + channel) * LOADF(weight + channel);
        shift[k] = LOADF(bias + channel);
    }
#if RESIDUAL == 2
    vec r_mean[WIDE], r_scale[WIDE];
    VECTORS(k) {
        const int channel = CHANNEL + k * VEC;
        r_mean[k] = LOADF(r_moments + channel);
        r_scale[k] = LOADF(r_moments + CHANNELS + channel) * LOADF(r_weight + channel);
        shift[k] += LOADF(r_bias + channel);
    }
#endif
    const long start = START;
    PIXELS(p) VECTORS(k) {
        const long i = start + p * BLOCK + k * VEC;
        vec v = NORMALISED(LOAD(x + i) - mean[k], scale[k], shift[k]);
#if RESIDUAL == 1
        v += LOAD(r + i);
#elif RESIDUAL == 2
        v = NORMALISED(LOAD(r + i) - r_mean[k], r_scale[k], v);
#endif
        RESULT(RELU ? RECTIFIED(v) : v, z + i);
    }
}

// Per image: sum of g, and sum of g times the normalised input: partial[image][2][channels], and the same for the other branch,
// r_partial. g is dz where z is positive; without a residual that sign is computed again from x.
__kernel void batchnorm_backward_reduce(__global const act *dz,
#if TERMS == 2
                                        __global const act *dz2,
#endif
                                        __global const act *restrict x, __global const float *restrict moments,
#if RELU && !RESIDUAL
                                        __global const float *restrict weight, __global const float *restrict bias,
#elif RELU
                                        __global const act *restrict z,
#endif
#if RESIDUAL && !GIVEN
                                        __global act *g,
#endif
#if RESIDUAL == 2
                                        __global const act *restrict r, __global const float *restrict r_moments,
                                        __global float *restrict r_partial,
#endif
                                        __global float *restrict partial, const int pixels)
{
    const int n = get_global_id(1);
    vec mean[WIDE], inverse[WIDE];
    VECTORS(k) mean[k] = LOADF(moments + CHANNEL + k * VEC);
    VECTORS(k) inverse[k] = LOADF(moments + CHANNELS + CHANNEL + k * VEC);
#if RELU && !RESIDUAL
    vec scale[WIDE], shift[WIDE];
    VECTORS(k) scale[k] = inverse[k] * LOADF(weight + CHANNEL + k * VEC);
    VECTORS(k) shift[k] = LOADF(bias + CHANNEL + k * VEC);
#endif
#if RESIDUAL == 2
    vec r_mean[WIDE];
    VECTORS(k) r_mean[k] = LOADF(r_moments + CHANNEL + k * VEC);
#endif
    const long image = START;
    vec sum[WIDE], product[WIDE], sum_part[WIDE], product_part[WIDE];
    VECTORS(k) sum[k] = product[k] = 0;
#if RESIDUAL == 2
    vec r_product[WIDE], r_part[WIDE];
    VECTORS(k) r_product[k] = 0;
#endif
    RUNS(start) {
        VECTORS(k) sum_part[k] = product_part[k] = 0;
#if RESIDUAL == 2
        VECTORS(k) r_part[k] = 0;
#endif
        RUN(p, start) VECTORS(k) {
            const long i = image + p * BLOCK + k * VEC;
            const vec centred = LOAD(x + i) - mean[k];
            vec d = GRADIENT(i);
#if RELU && !RESIDUAL
            d = MASKED(d, NORMALISED(centred, scale[k], shift[k]));
#elif RELU
            d = MASKED(d, LOAD(z + i));
#endif
#if RESIDUAL && !GIVEN
            STORE(d, g + i);
#endif
            sum_part[k] += d;
            product_part[k] += d * centred;
#if RESIDUAL == 2
            r_part[k] += d * (LOAD(r + i) - r_mean[k]);
#endif
        }
        VECTORS(k) sum[k] += sum_part[k];
        VECTORS(k) product[k] += product_part[k];
#if RESIDUAL == 2
        VECTORS(k) r_product[k] += r_part[k];
#endif
    }
    const long out = (long)n * 2 * CHANNELS + CHANNEL;
    VECTORS(k) STOREF(sum[k], partial + out + k * VEC);
    VECTORS(k) STOREF(product[k] * inverse[k], partial + out + CHANNELS + k * VEC);
#if RESIDUAL == 2
    VECTORS(k) {
        const vec r_inverse = LOADF(r_moments + CHANNELS + CHANNEL + k * VEC);
        STOREF(sum[k], r_partial + out + k * VEC);
        STOREF(r_product[k] * r_inverse, r_partial + out + CHANNELS + k * VEC);
    }
#endif
}

// Adds the images in order. The two sums are the gradients of bias and weight, and what the replicas exchange.
// One work-item per WIDTH channels.
__kernel void batchnorm_sum(__global const float *restrict partial, __global float *restrict sums,
                            __global float *restrict grad_bias, __global float *restrict grad_weight, const int images
#if DOUBLES
                            , __global float *restrict means, __global const Control *restrict control, const int pixels
#endif
                            )
{
    vec sum[WIDE], product[WIDE];
    VECTORS(k) sum[k] = product[k] = 0;
    for (int n = 0; n < images; n++) {
        __global const float *image = partial + (long)n * 2 * CHANNELS + CHANNEL;
        VECTORS(k) sum[k] += LOADF(image + k * VEC);
        VECTORS(k) product[k] += LOADF(image + CHANNELS + k * VEC);
    }
    VECTORS(k) {
        const int channel = CHANNEL + k * VEC;
        STOREF(sum[k], sums + channel);
        STOREF(product[k], sums + CHANNELS + channel);
        STOREF(sum[k], grad_bias + channel);
        STOREF(product[k], grad_weight + channel);
    }
#if DOUBLES
    const double count = control->valid > 0 ? (double)control->valid * pixels : 1;
    for (int c = CHANNEL; c < CHANNEL + WIDTH; c++) {
        means[c] = sums[c] / count;
        means[CHANNELS + c] = sums[CHANNELS + c] / count;
    }
#endif
}

// dx = scale * (g - mean(g) - normalised x * mean(g * normalised x)), zero for images that do not count; means[2][channels] are
// over all replicas. With RESIDUAL 2 likewise dr of the other branch, whose mean(g) is the same. g is dz, masked if RELU (and
// then without a residual).
__kernel void batchnorm_backward(__global const act *dz,
#if TERMS == 2
                                 __global const act *dz2,
#endif
                                 __global const act *restrict x, __global act *dx,
                                 __global const float *restrict moments, __global const float *restrict means,
                                 __global const float *restrict weight,
#if RELU
                                 __global const float *restrict bias,
#endif
#if RESIDUAL == 2
                                 __global const act *restrict r, __global act *restrict dr,
                                 __global const float *restrict r_moments, __global const float *restrict r_means,
                                 __global const float *restrict r_weight,
#endif
                                 __global const Control *restrict control, const int pixels, const int span)
{
    vec mean[WIDE], scale[WIDE], slope[WIDE], mean_g[WIDE];
    VECTORS(k) {
        const int channel = CHANNEL + k * VEC;
        const vec inverse = LOADF(moments + CHANNELS + channel);
        mean[k] = LOADF(moments + channel);
        scale[k] = inverse * LOADF(weight + channel);
        slope[k] = inverse * LOADF(means + CHANNELS + channel);
        mean_g[k] = LOADF(means + channel);
    }
#if RELU
    vec shift[WIDE];
    VECTORS(k) shift[k] = LOADF(bias + CHANNEL + k * VEC);
#endif
#if RESIDUAL == 2
    vec r_mean[WIDE], r_scale[WIDE], r_slope[WIDE];
    VECTORS(k) {
        const int channel = CHANNEL + k * VEC;
        const vec inverse = LOADF(r_moments + CHANNELS + channel);
        r_mean[k] = LOADF(r_moments + channel);
        r_scale[k] = inverse * LOADF(r_weight + channel);
        r_slope[k] = inverse * LOADF(r_means + CHANNELS + channel);
    }
#endif
    const long start = START;
    const float counts = get_global_id(1) < control->valid ? 1 : 0;
    PIXELS(p) VECTORS(k) {
        const long i = start + p * BLOCK + k * VEC;
        const vec centred = LOAD(x + i) - mean[k];
        vec d = GRADIENT(i);
#if RELU
        d = MASKED(d, NORMALISED(centred, scale[k], shift[k]));
#endif
        d -= mean_g[k];
        RESULT((d - centred * slope[k]) * (scale[k] * counts), dx + i);
#if RESIDUAL == 2
        STORE((d - (LOAD(r + i) - r_mean[k]) * r_slope[k]) * (r_scale[k] * counts), dr + i);
#endif
    }
}
