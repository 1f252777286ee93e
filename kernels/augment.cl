// augment.cl - 8-bit images to normalised activations, with random crop and flip while training.
//
// What happens to a sample is a pure function of (seed, epoch, sample index): no random state exists, so it does not matter
// which rank or work-item handles it, and a resumed run sees the same images.

// A full-avalanche 32-bit hash (Wellons, "Prospecting for hash functions", constants 7feb352d 846ca68b).
uint augment_mix(uint x)
{
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

// x [images][CHANNELS][height][width] u8 -> y [images][1][height][width][BLOCK] = crop(x) * scale + offset, in one pixel of
// which a vector holds channels. affine [2][BLOCK] = scale, offset: 1 / (255 deviation) and -mean / deviation, zeros in the
// padding lanes. Pixels beyond the border are 0 before normalisation.
// CHANNELS  of the image, at most BLOCK
// One work-item per (row, image).
__kernel void augment_normalise(__global const uchar *restrict x, __global const uint *restrict sample, __global act *restrict y,
                                __global const Control *restrict control, __constant float *restrict affine,
                                const int width, const int padding, const int flips)
{
    const int row = get_global_id(0), height = get_global_size(0);
    const long n = get_global_id(1);
    const uint key = augment_mix(control->seed ^ augment_mix(control->epoch ^ augment_mix(sample[n])));
    const int random = control->augment;
    const int down = random ? (int)(augment_mix(key ^ 1) % (2 * padding + 1)) - padding : 0;
    const int right = random ? (int)(augment_mix(key ^ 2) % (2 * padding + 1)) - padding : 0;
    const int flip = random && flips && (augment_mix(key ^ 3) & 1);

    // Column `col` of y is column start + col * step of x; within the image for first <= col < last.
    const int h = row + down, step = flip ? -1 : 1, start = flip ? width - 1 + right : right, shift = flip ? right : -right;
    const int outside = h < 0 || h >= height || n >= control->valid;
    const int first = outside ? width : clamp(shift, 0, width), last = outside ? width : clamp(width + shift, 0, width);
    __global const uchar *image = x + (n * CHANNELS * height + h) * width;
    __global act *pixels = y + (n * height + row) * width * BLOCK;
    for (int part = 0; part < BLOCK; part += VEC) {
        const vec scale = *(__constant const vec *)(affine + part), offset = *(__constant const vec *)(affine + BLOCK + part);
        for (int col = 0; col < first; col++) STORE(offset, pixels + col * BLOCK + part);
        for (int col = first; col < last; col++) {
            veci value = 0;
            UNROLL for (int l = 0; l < VEC; l++)
                if (part + l < CHANNELS) ((int *)&value)[l] = image[(part + l) * height * width + start + col * step];
            STORE(CONVERT(value, float) * scale + offset, pixels + col * BLOCK + part);
        }
        for (int col = last; col < width; col++) STORE(offset, pixels + col * BLOCK + part);
    }
}
