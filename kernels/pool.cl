// pool.cl - max pooling with the position of the maximum, and global average pooling.
// x [images][blocks][height][width][BLOCK]; images and blocks are one axis, `planes`, here.

// The first maximum in row order wins; NaN wins over numbers. One work-item per (output row, plane).
__kernel void pool_max_forward(__global const act *restrict x, __global act *restrict y, __global uchar *restrict index,
                               const int height, const int width, const int out_width, const int kernel_size, const int stride,
                               const int padding)
{
    const int row = get_global_id(0), plane = get_global_id(1);
    __global const act *image = x + (long)plane * height * width * BLOCK;
    const long out = ((long)plane * get_global_size(0) + row) * out_width * BLOCK;
    for (int col = 0; col < out_width; col++)
        for (int lane = 0; lane < BLOCK; lane += VEC) {
            vec best = -INFINITY;
            veci where = -1;
            for (int t = 0; t < kernel_size * kernel_size; t++) {
                const int h = row * stride - padding + t / kernel_size, w = col * stride - padding + t % kernel_size;
                if (h < 0 || h >= height || w < 0 || w >= width) continue;
                const vec v = LOAD(image + ((long)h * width + w) * BLOCK + lane);
                const veci better = (v > best) | (v != v) | (where < 0);
                where = better ? (veci)(t) : where;
                best = better ? v : best;
            }
            const long i = out + col * BLOCK + lane;
            STORE(best, y + i);
            for (int l = 0; l < VEC; l++) index[i + l] = ((int *)&where)[l];
        }
}

// Each input pixel collects from the windows whose maximum it is. One work-item per (input row, plane).
__kernel void pool_max_backward(__global const act *restrict dy, __global const uchar *restrict index, __global act *restrict dx,
                                const int width, const int out_height, const int out_width, const int kernel_size,
                                const int stride, const int padding)
{
    const int h = get_global_id(0), plane = get_global_id(1);
    const long out = (long)plane * out_height * out_width * BLOCK;
    for (int w = 0; w < width; w++)
        for (int lane = 0; lane < BLOCK; lane += VEC) {
            vec sum = 0;
            for (int t = kernel_size * kernel_size - 1; t >= 0; t--) {  // windows in row order
                const int down = h + padding - t / kernel_size, right = w + padding - t % kernel_size;
                const int row = down / stride, col = right / stride;
                if (down < 0 || right < 0 || down % stride || right % stride || row >= out_height || col >= out_width) continue;
                const long i = out + ((long)row * out_width + col) * BLOCK + lane;
                vec v = LOAD(dy + i);
                for (int l = 0; l < VEC; l++)
                    if (index[i + l] != t) ((float *)&v)[l] = 0;
                sum += v;
            }
            STORE(sum, dx + (((long)plane * get_global_size(0) + h) * width + w) * BLOCK + lane);
        }
}

// y [planes][BLOCK] = mean over the pixels. One work-item per plane.
__kernel void pool_average_forward(__global const act *restrict x, __global act *restrict y, const int pixels)
{
    const long plane = get_global_id(0);
    for (int lane = 0; lane < BLOCK; lane += VEC) {
        vec sum = 0;
        for (int p = 0; p < pixels; p++) sum += LOAD(x + (plane * pixels + p) * BLOCK + lane);
        STORE(sum / (float)pixels, y + plane * BLOCK + lane);
    }
}

__kernel void pool_average_backward(__global const act *restrict dy, __global act *restrict dx, const int pixels)
{
    const long plane = get_global_id(0);
    for (int lane = 0; lane < BLOCK; lane += VEC) {
        const vec v = LOAD(dy + plane * BLOCK + lane) / (float)pixels;
        for (int p = 0; p < pixels; p++) STORE(v, dx + (plane * pixels + p) * BLOCK + lane);
    }
}
