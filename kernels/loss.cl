// loss.cl - softmax cross-entropy with label smoothing (Szegedy et al. 2016, section 7) and its gradient, in fp32.
// logits, dlogits [images][pad]; the target of class k is (1 - smoothing) [k == label] + smoothing / classes.
// dlogits carries loss scale / global batch, so gradients need no later division. One work-item per image.
// MIXED  1: an image has two labels, its own and its partner's; the target is the mean by their shares (mixup, cutmix).

__kernel void loss_softmax(__global const float *restrict logits, __global const int *restrict labels,
                           __global float *restrict loss,     // [images], 0 for images that do not count
                           __global float *restrict correct,  // [images], 1 where the label's is the first largest logit, none NaN;
                                                              // of two labels the one with the larger share counts
                           __global float *restrict dlogits, __global const Control *restrict control, const int classes,
                           const int pad, const float smoothing
#if MIXED
                           , __global const View *restrict views
#endif
)
{
    const long n = get_global_id(0);
    __global const float *z = logits + n * pad;
    __global float *dz = dlogits + n * pad;
    for (int k = 0; k < pad; k++) dz[k] = 0;
    loss[n] = correct[n] = 0;
    if (n >= control->valid) return;

    int best = 0;
    float total = 0, sum = 0;
    for (int k = 1; k < classes; k++)
        if (z[k] > z[best]) best = k;
    for (int k = 0; k < classes; k++) {
        total += exp(z[k] - z[best]);
        sum += z[k] - z[best];
    }
    const float norm = log(total), even = smoothing / classes;
    const int label = labels[n];
#if MIXED
    const int other = labels[views[n].partner];
    const float own = (1 - smoothing) * views[n].share, rest = (1 - smoothing) * (1 - views[n].share);
    loss[n] = norm - own * (z[label] - z[best]) - rest * (z[other] - z[best]) - even * sum;
    correct[n] = best == (own < rest ? other : label) && !isnan(total);
    for (int k = 0; k < classes; k++) {
        const float target = (k == label ? own : 0) + (k == other ? rest : 0);
        dz[k] = (exp(z[k] - z[best] - norm) - target - even) * control->grad_scale;
    }
#else
    loss[n] = norm - (1 - smoothing) * (z[label] - z[best]) - even * sum;
    correct[n] = best == label && !isnan(total);
    for (int k = 0; k < classes; k++)
        dz[k] = (exp(z[k] - z[best] - norm) - (k == label ? 1 - smoothing : 0) - even) * control->grad_scale;
#endif
}
