// pool.cl - max pooling with the position of the maximum, and global average pooling.
// x [images][blocks][height][width][BLOCK]; images and blocks are one axis, `planes`, here.
//
// WINDOW  rows and columns of a window

#ifndef WINDOW
#define WINDOW 3
#endif

#if VEC == 1
typedef uchar vecu;
#define AS_INT(v) as_int(v)
#define AS_VEC(v) as_float(v)
#define SAME(a, b) (-((a) == (b)))  // all bits set, as vector comparisons give
#else
typedef PASTE(uchar, VEC) vecu;
#define AS_INT(v) PASTE(as_int, VEC)(v)
#define AS_VEC(v) PASTE(as_float, VEC)(v)
#define SAME(a, b) ((a) == (b))
#endif

// Integers in the order of the values: -0 and 0 are equal, NaN (INT_MAX) is above all. Comparing integers is a vector
// operation on every compiler; comparing floats is not.
veci pool_order(const vec v)
{
    const veci bits = AS_INT(v + 0.0f);  // -0 + 0 = 0
    const veci ordered = bits ^ ((bits >> 31) & 0x7fffffff);
    return (bits & 0x7fffffff) > 0x7f800000 ? (veci)(INT_MAX) : ordered;
}

// The first maximum in row order wins; NaN wins over what is before it. One work-item per (output row, plane).
__kernel void pool_max_forward(__global const act *restrict x, __global act *restrict y, __global uchar *restrict index,
                               const int height, const int width, const int out_width, const int stride, const int padding)
{
#define COMPARE(i, j)                                                                   \
    {                                                                                   \
        const vec v = LOAD(corner + ((long)(i) * width + (j)) * BLOCK);                 \
        const veci order = pool_order(v), better = (order > most) | (order == INT_MAX); \
        most = better ? order : most;                                                   \
        where = better ? (veci)((i) * WINDOW + (j)) : where;                            \
        best = better ? v : best;                                                       \
    }
    const int row = get_global_id(0), plane = get_global_id(1), top = row * stride - padding;
    const int first_row = max(0, -top), last_row = min(WINDOW, height - top);  // of the window, inside the image
    __global const act *line = x + ((long)plane * height + top) * width * BLOCK;
    const long out = ((long)plane * get_global_size(0) + row) * out_width * BLOCK;
    for (int col = 0; col < out_width; col++) {
        const int left = col * stride - padding, first_col = max(0, -left), last_col = min(WINDOW, width - left);
        for (int lane = 0; lane < BLOCK; lane += VEC) {
            __global const act *corner = line + left * BLOCK + lane;
            vec best = -INFINITY;
            veci most = INT_MIN, where = -1;
            if (last_row - first_row == WINDOW && last_col - first_col == WINDOW)
                UNROLL for (int i = 0; i < WINDOW; i++)
                    UNROLL for (int j = 0; j < WINDOW; j++) COMPARE(i, j)
            else
                for (int i = first_row; i < last_row; i++)
                    for (int j = first_col; j < last_col; j++) COMPARE(i, j)
            STORE(best, y + out + col * BLOCK + lane);
            *(__global vecu *)(index + out + col * BLOCK + lane) = CONVERT(where, uchar);
        }
    }
#undef COMPARE
}

// Each input pixel collects from the windows whose maximum it is, in row order. One work-item per (input row, plane).
__kernel void pool_max_backward(__global const act *restrict dy, __global const uchar *restrict index, __global act *restrict dx,
                                const int width, const int out_height, const int out_width, const int stride,
                                const int padding)
{
    const int h = get_global_id(0) + padding, plane = get_global_id(1);  // row of the padded image
    const int first_row = max(0, (h - WINDOW + stride) / stride), last_row = min(out_height - 1, h / stride);
    const long out = (long)plane * out_height * out_width * BLOCK;
    __global act *target = dx + ((long)plane * get_global_size(0) + get_global_id(0)) * width * BLOCK;
    for (int w = padding; w < width + padding; w++, target += BLOCK) {
        const int first_col = max(0, (w - WINDOW + stride) / stride), last_col = min(out_width - 1, w / stride);
        for (int lane = 0; lane < BLOCK; lane += VEC) {
            vec sum = 0;
            for (int row = first_row; row <= last_row; row++)
                for (int col = first_col; col <= last_col; col++) {
                    const long i = out + ((long)row * out_width + col) * BLOCK + lane;
                    const veci where = CONVERT(*(__global const vecu *)(index + i), int);
                    const veci chosen = SAME(where, (veci)((h - row * stride) * WINDOW + w - col * stride));
                    sum += AS_VEC(AS_INT(LOAD(dy + i)) & chosen);
                }
            STORE(sum, target + lane);
        }
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
