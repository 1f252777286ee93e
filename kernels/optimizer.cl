// optimizer.cl - passes over the arenas of all parameters: the update of fp32 masters by SGD, LARS or AdamW, and what goes before
// and after it. All arenas have one layout; what lies between the parameters is zero, and stays zero.
//
// TABLE  1: parameters are treated apart: `owner` says of each SLOT values which parameter they belong to, `rates` what that gets.
#ifndef TABLE
#define TABLE 0
#endif

typedef struct {
    float lr, momentum, weight_decay, nesterov;  // nesterov: 1 or 0
    float grad_factor;                           // 1 / loss scale, times what clipping leaves
    float beta1, beta2, fresh1, fresh2;          // AdamW; fresh: 1 - beta
    float correct1, correct2, eps;               // 1 / (1 - beta1^t), 1 / sqrt(1 - beta2^t) in update t
    float share;                                 // of new values in a moving average
} Hyper;

typedef struct {
    float trust, weight_decay;  // trust: local learning rate of LARS
} Rate;

#if TABLE
#define RATES , __global const int *restrict owner, __global const Rate *restrict rates
#define TRUST(i) rates[owner[(i) / SLOT]].trust
#define DECAY(i) rates[owner[(i) / SLOT]].weight_decay
#else
#define RATES
#define DECAY(i) hyper->weight_decay
#endif

// Square roots of whole vectors; a runtime whose compiler does not know the CPU cannot call its own function for them.
#ifdef __has_builtin
#if __has_builtin(__builtin_elementwise_sqrt)
#define ROOT(v) __builtin_elementwise_sqrt(v)
#endif
#endif
#ifndef ROOT
vec ROOT(vec v)
{
    for (int l = 0; l < VEC; l++) ((float *)&v)[l] = sqrt(((float *)&v)[l]);
    return v;
}
#endif

// g = grad * grad_factor + weight_decay * p;  m = momentum * m + g;  p -= lr * (nesterov ? g + momentum * m : m)
// (Sutskever et al. 2013 in the form of PyTorch's SGD).
__kernel void optimizer_sgd(const int elements, __global float *restrict param, __global const float *restrict grad,
                            __global float *restrict momentum, __global const Hyper *restrict hyper RATES)
{
    FLAT(i) {
        const vec p = LOADF(param + i);
        const vec g = LOADF(grad + i) * hyper->grad_factor + p * DECAY(i);
        const vec m = LOADF(momentum + i) * hyper->momentum + g;
        const vec step = hyper->nesterov > 0 ? m * hyper->momentum + g : m;
        STOREF(m, momentum + i);
        STOREF(p - step * hyper->lr, param + i);
    }
}

#if TABLE
// m = momentum * m + lr * trust * (grad * grad_factor + weight_decay * p);  p -= m  (You et al. 2017, algorithm 1).
__kernel void optimizer_lars(const int elements, __global float *restrict param, __global const float *restrict grad,
                             __global float *restrict momentum, __global const Hyper *restrict hyper RATES)
{
    FLAT(i) {
        const vec p = LOADF(param + i);
        const vec g = LOADF(grad + i) * hyper->grad_factor + p * DECAY(i);
        const vec m = LOADF(momentum + i) * hyper->momentum + g * (hyper->lr * TRUST(i));
        STOREF(m, momentum + i);
        STOREF(p - m, param + i);
    }
}
#endif

// m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2, with g = grad * grad_factor;
// p -= lr * (correct1 m / (correct2 sqrt(v) + eps) + weight_decay * p)  (Loshchilov and Hutter 2019, algorithm 2).
__kernel void optimizer_adamw(const int elements, __global float *restrict param, __global const float *restrict grad,
                              __global float *restrict momentum, __global float *restrict second_moment,
                              __global const Hyper *restrict hyper RATES)
{
    FLAT(i) {
        const vec p = LOADF(param + i);
        const vec g = LOADF(grad + i) * hyper->grad_factor;
        const vec m = LOADF(momentum + i) * hyper->beta1 + g * hyper->fresh1;
        const vec v = LOADF(second_moment + i) * hyper->beta2 + g * g * hyper->fresh2;
        STOREF(m, momentum + i);
        STOREF(v, second_moment + i);
        const vec step = m * hyper->correct1 / (ROOT(v) * hyper->correct2 + hyper->eps);
        STOREF(p - (step + p * DECAY(i)) * hyper->lr, param + i);
    }
}

// average += share * (values - average).
__kernel void optimizer_average(const int elements, __global float *restrict average, __global const float *restrict values,
                                __global const Hyper *restrict hyper)
{
    FLAT(i) {
        const vec old = LOADF(average + i);
        STOREF(old + (LOADF(values + i) - old) * hyper->share, average + i);
    }
}

// sums[chunk]: the squares of the values from chunk.x up to chunk.y, both multiples of BLOCK. Each of BLOCK lanes is added in
// order, then the lanes in a halving tree: the same bits for every VEC.
__kernel void optimizer_squares(__global const float *restrict values, __global const int2 *restrict chunks,
                                __global float *restrict sums)
{
    const int2 chunk = chunks[get_global_id(0)];
    vec parts[PARTS];
    for (int k = 0; k < PARTS; k++) parts[k] = 0;
    for (int i = chunk.x; i < chunk.y; i += BLOCK)
        UNROLL for (int k = 0; k < PARTS; k++) {
            const vec v = LOADF(values + i + k * VEC);
            parts[k] += v * v;
        }
    float *lanes = (float *)parts;
    for (int half_of = BLOCK / 2; half_of > 0; half_of /= 2)
        for (int l = 0; l < half_of; l++) lanes[l] += lanes[l + half_of];
    sums[get_global_id(0)] = lanes[0];
}

// sum = sum + grad, or grad if the sum is `fresh`: the gradients of micro-batches, added in their order.
__kernel void optimizer_accumulate(const int elements, __global const float *restrict grad, __global float *restrict sum,
                                   const int fresh)
{
    FLAT(i) STOREF(fresh ? LOADF(grad + i) : LOADF(sum + i) + LOADF(grad + i), sum + i);
}

// grad = sum + grad: the last micro-batch.
__kernel void optimizer_complete(const int elements, __global float *restrict grad, __global const float *restrict sum)
{
    FLAT(i) STOREF(LOADF(sum + i) + LOADF(grad + i), grad + i);
}

// found[work-item] = 1 where a gradient is infinite or NaN (all exponent bits set), else 0.
__kernel void optimizer_check(const int elements, __global const float *restrict grad, __global int *restrict found)
{
    veci bad = 0;
    FLAT(i) bad |= (*(__global const veci *)(grad + i) & 0x7f800000) == 0x7f800000;
    int any_bad = 0;
    for (int l = 0; l < VEC; l++) any_bad |= ((const int *)&bad)[l];
    found[get_global_id(0)] = any_bad != 0;
}
