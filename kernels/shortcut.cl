// shortcut.cl - the shortcut without parameters (option A of He et al. 2015, section 3.3): every stride-th pixel, and zeros for
// the channels that the input does not have. x [images][in_blocks][height][width][BLOCK], y likewise with out_blocks.

// One work-item per (row of y, output block, image).
__kernel void shortcut_forward(__global const act *restrict x, __global act *restrict y, const int in_blocks, const int height,
                               const int width, const int out_width, const int stride)
{
    const int row = get_global_id(0), block = get_global_id(1), n = get_global_id(2);
    const long from = (((long)n * in_blocks + block) * height + row * stride) * width * BLOCK;
    const long to = (((long)n * get_global_size(1) + block) * get_global_size(0) + row) * out_width * BLOCK;
    for (int c = 0; c < out_width; c++)
        for (int lane = 0; lane < BLOCK; lane += VEC) {
            vec v = 0;
            if (block < in_blocks) v = LOAD(x + from + c * stride * BLOCK + lane);
            STORE(v, y + to + c * BLOCK + lane);
        }
}

// Channels that only y has get no gradient. One work-item per (row of dx, input block, image).
__kernel void shortcut_backward(__global const act *restrict dy, __global act *restrict dx, const int out_blocks,
                                const int channels, const int width, const int out_height, const int out_width,
                                const int stride)
{
    const int row = get_global_id(0), block = get_global_id(1), n = get_global_id(2);
    const long from = (((long)n * out_blocks + block) * out_height + row / stride) * out_width * BLOCK;
    const long to = (((long)n * get_global_size(1) + block) * get_global_size(0) + row) * width * BLOCK;
    for (int lane = 0; lane < BLOCK; lane += VEC) {
        veci keep;  // all bits of the lanes that are channels
        for (int l = 0; l < VEC; l++) ((int *)&keep)[l] = -(block * BLOCK + lane + l < channels);
        __global const act *source = dy + from + lane;
        __global act *target = dx + to + lane;
        if (row % stride)
            for (int c = 0; c < width; c++) STORE((vec)(0), target + c * BLOCK);
        else
            for (int c = 0, next = 0; c < width; next += stride, source += BLOCK) {  // column `next` has a pixel of dy
                STORE(KEEP(LOAD(source), keep), target + c * BLOCK);
                for (c++; c < min(next + stride, width); c++) STORE((vec)(0), target + c * BLOCK);
            }
    }
}
