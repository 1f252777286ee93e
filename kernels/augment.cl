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

// x [images][channels][height][width] u8 -> y [images][1][height][width][BLOCK] = (crop(x) / 255 - mean) / deviation.
// moments [2][channels] = mean, 1 / deviation. Pixels beyond the border are 0 before normalisation. At most BLOCK channels.
// One work-item per (row, image).
__kernel void augment_normalise(__global const uchar *restrict x, __global const uint *restrict sample, __global act *restrict y,
                                __global const Control *restrict control, __constant float *restrict moments,
                                const int channels, const int width, const int padding, const int flips)
{
    const int row = get_global_id(0), height = get_global_size(0);
    const long n = get_global_id(1);
    const uint key = augment_mix(control->seed ^ augment_mix(control->epoch ^ augment_mix(sample[n])));
    const int random = control->augment;
    const int down = random ? (int)(augment_mix(key ^ 1) % (2 * padding + 1)) - padding : 0;
    const int right = random ? (int)(augment_mix(key ^ 2) % (2 * padding + 1)) - padding : 0;
    const int flip = random && flips && (augment_mix(key ^ 3) & 1);
    const int h = row + down;
    for (int col = 0; col < width; col++) {
        const int w = (flip ? width - 1 - col : col) + right;
        const int inside = h >= 0 && h < height && w >= 0 && w < width && n < control->valid;
        for (int lane = 0; lane < BLOCK; lane += VEC) {
            vec v = 0;
            for (int l = 0; l < VEC; l++) {
                const int c = lane + l;
                if (c >= channels) continue;
                const float value = inside ? x[((n * channels + c) * height + h) * width + w] / 255.0f : 0.0f;
                ((float *)&v)[l] = (value - moments[c]) * moments[channels + c];
            }
            STORE(v, y + ((n * height + row) * width + col) * BLOCK + lane);
        }
    }
}
