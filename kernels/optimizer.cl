// optimizer.cl - one pass over the arena of all parameters: momentum, Nesterov, weight decay on fp32 masters.

typedef struct {
    float lr, momentum, weight_decay, nesterov;  // nesterov: 1 or 0
    float grad_factor;                           // 1 / loss scale
} Hyper;

// g = grad * grad_factor + weight_decay * p;  m = momentum * m + g;  p -= lr * (nesterov ? g + momentum * m : m)
// (Sutskever et al. 2013 in the form of PyTorch's SGD).
__kernel void optimizer_sgd(const int elements, __global float *restrict param, __global const float *restrict grad,
                         __global float *restrict momentum, __global const Hyper *restrict hyper)
{
    FLAT(i) {
        const vec p = LOADF(param + i);
        const vec g = LOADF(grad + i) * hyper->grad_factor + p * hyper->weight_decay;
        const vec m = LOADF(momentum + i) * hyper->momentum + g;
        const vec step = hyper->nesterov > 0 ? m * hyper->momentum + g : m;
        STOREF(m, momentum + i);
        STOREF(p - step * hyper->lr, param + i);
    }
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
