// batchnorm.cl - batch normalisation (Ioffe and Szegedy 2015) with statistics apart from application, so that replicas can
// agree in between. x [images][blocks][pixels][BLOCK]; statistics are fp32 [2][blocks * BLOCK].
//
//   statistics -> merge -> (replicas exchange) -> apply          forward, training
//   inference                                                    forward, evaluation
//   backward_reduce -> sum -> (replicas exchange) -> backward    gradient
//
// Means and squared deviations are merged as (count, mean, M2) (Chan, Golub and LeVeque 1983), never from a sum of squares.

#define CHANNELS (get_global_size(0) * BLOCK)

// Sums over pixels go by runs of 32 that are then added: the rounding of a long sum grows with its longest chain.
#define RUNS(start) for (int start = 0; start < pixels; start += 32)
#define RUN(p, start) for (int p = start; p < min(start + 32, pixels); p++)

// Mean and M2 of each image and channel: partial[image][2][channels]. One work-item per (block, image).
__kernel void batchnorm_statistics(__global const act *restrict x, __global float *restrict partial, const int pixels)
{
    const int block = get_global_id(0), n = get_global_id(1);
    __global const act *image = x + ((long)n * get_global_size(0) + block) * pixels * BLOCK;
    __global float *out = partial + (long)n * 2 * CHANNELS + block * BLOCK;
    for (int lane = 0; lane < BLOCK; lane += VEC) {
        vec sum = 0, m2 = 0;
        RUNS(start) {
            vec part = 0;
            RUN(p, start) part += LOAD(image + p * BLOCK + lane);
            sum += part;
        }
        const vec mean = sum / (float)pixels;
        RUNS(start) {
            vec part = 0;
            RUN(p, start) {
                const vec d = LOAD(image + p * BLOCK + lane) - mean;
                part += d * d;
            }
            m2 += part;
        }
        STOREF(mean, out + lane);
        STOREF(m2, out + CHANNELS + lane);
    }
}

// Merges the valid images of this replica, in order: merged[2][channels] = mean, M2. One work-item per block.
__kernel void batchnorm_merge(__global const float *restrict partial, __global float *restrict merged,
                              __global const Control *restrict control, const int pixels)
{
    const int channel = get_global_id(0) * BLOCK;
    for (int lane = channel; lane < channel + BLOCK; lane += VEC) {
        vec mean = 0, m2 = 0;
        for (int n = 0; n < control->valid; n++) {
            __global const float *image = partial + (long)n * 2 * CHANNELS + lane;
            const vec d = LOADF(image) - mean;
            mean += d / (float)(n + 1);
            m2 += LOADF(image + CHANNELS) + d * d * ((float)pixels * n / (n + 1));
        }
        STOREF(mean, merged + lane);
        STOREF(m2, merged + CHANNELS + lane);
    }
}

// y = (x - mean) * inverse deviation * weight + bias; moments[2][channels]. One work-item per (block, image).
__kernel void batchnorm_apply(__global const act *restrict x, __global act *restrict y, __global const float *restrict moments,
                              __global const float *restrict weight, __global const float *restrict bias, const int pixels)
{
    const int channel = get_global_id(0) * BLOCK;
    const long start = ((long)get_global_id(1) * get_global_size(0) + get_global_id(0)) * pixels * BLOCK;
    for (int lane = 0; lane < BLOCK; lane += VEC) {
        const vec mean = LOADF(moments + channel + lane), shift = LOADF(bias + channel + lane);
        const vec scale = LOADF(moments + CHANNELS + channel + lane) * LOADF(weight + channel + lane);
        for (int p = 0; p < pixels; p++) {
            const long i = start + (long)p * BLOCK + lane;
            STORE((LOAD(x + i) - mean) * scale + shift, y + i);
        }
    }
}

// The same with running statistics. One work-item per (block, image).
__kernel void batchnorm_inference(__global const act *restrict x, __global act *restrict y,
                                  __global const float *restrict running_mean, __global const float *restrict running_var,
                                  __global const float *restrict weight, __global const float *restrict bias,
                                  const int pixels, const float eps)
{
    const int channel = get_global_id(0) * BLOCK;
    const long start = ((long)get_global_id(1) * get_global_size(0) + get_global_id(0)) * pixels * BLOCK;
    for (int lane = 0; lane < BLOCK; lane += VEC) {
        const vec mean = LOADF(running_mean + channel + lane), shift = LOADF(bias + channel + lane);
        const vec scale = LOADF(weight + channel + lane) / sqrt(LOADF(running_var + channel + lane) + eps);
        for (int p = 0; p < pixels; p++) {
            const long i = start + (long)p * BLOCK + lane;
            STORE((LOAD(x + i) - mean) * scale + shift, y + i);
        }
    }
}

// Per image: sum of dy, and sum of dy times the normalised input: partial[image][2][channels]. One work-item per (block, image).
__kernel void batchnorm_backward_reduce(__global const act *restrict dy, __global const act *restrict x,
                                        __global const float *restrict moments, __global float *restrict partial,
                                        const int pixels)
{
    const int channel = get_global_id(0) * BLOCK, n = get_global_id(1);
    const long start = ((long)n * get_global_size(0) + get_global_id(0)) * pixels * BLOCK;
    __global float *out = partial + (long)n * 2 * CHANNELS + channel;
    for (int lane = 0; lane < BLOCK; lane += VEC) {
        const vec mean = LOADF(moments + channel + lane), inverse = LOADF(moments + CHANNELS + channel + lane);
        vec sum = 0, product = 0;
        RUNS(begin) {
            vec sum_part = 0, product_part = 0;
            RUN(p, begin) {
                const vec d = LOAD(dy + start + p * BLOCK + lane);
                sum_part += d;
                product_part += d * (LOAD(x + start + p * BLOCK + lane) - mean);
            }
            sum += sum_part;
            product += product_part;
        }
        STOREF(sum, out + lane);
        STOREF(product * inverse, out + CHANNELS + lane);
    }
}

// Adds the images in order. The two sums are the gradients of bias and weight, and what the replicas exchange.
// One work-item per block.
__kernel void batchnorm_sum(__global const float *restrict partial, __global float *restrict sums,
                            __global float *restrict grad_bias, __global float *restrict grad_weight, const int images)
{
    const int channel = get_global_id(0) * BLOCK;
    for (int lane = channel; lane < channel + BLOCK; lane += VEC) {
        vec sum = 0, product = 0;
        for (int n = 0; n < images; n++) {
            sum += LOADF(partial + (long)n * 2 * CHANNELS + lane);
            product += LOADF(partial + (long)n * 2 * CHANNELS + CHANNELS + lane);
        }
        STOREF(sum, sums + lane);
        STOREF(product, sums + CHANNELS + lane);
        STOREF(sum, grad_bias + lane);
        STOREF(product, grad_weight + lane);
    }
}

// dx = weight * inverse deviation * (dy - mean(dy) - normalised x * mean(dy * normalised x)), zero for images that do not
// count; means[2][channels] are over all replicas. One work-item per (block, image).
__kernel void batchnorm_backward(__global const act *restrict dy, __global const act *restrict x, __global act *restrict dx,
                                 __global const float *restrict moments, __global const float *restrict means,
                                 __global const float *restrict weight, __global const Control *restrict control,
                                 const int pixels)
{
    const int channel = get_global_id(0) * BLOCK;
    const long start = ((long)get_global_id(1) * get_global_size(0) + get_global_id(0)) * pixels * BLOCK;
    const float counts = get_global_id(1) < control->valid ? 1 : 0;
    for (int lane = 0; lane < BLOCK; lane += VEC) {
        const vec mean = LOADF(moments + channel + lane), inverse = LOADF(moments + CHANNELS + channel + lane);
        const vec scale = inverse * LOADF(weight + channel + lane) * counts;
        const vec mean_dy = LOADF(means + channel + lane);
        const vec slope = LOADF(means + CHANNELS + channel + lane) * inverse;
        for (int p = 0; p < pixels; p++) {
            const long i = start + (long)p * BLOCK + lane;
            STORE((LOAD(dy + i) - mean_dy - (LOAD(x + i) - mean) * slope) * scale, dx + i);
        }
    }
}
