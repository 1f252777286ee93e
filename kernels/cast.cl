// cast.cl - images from the host into the layout of activations.

// x [images][channels][height][width] fp32 -> y [images][blocks][height][width][BLOCK]. One work-item per (row, block, image).
__kernel void cast_pack(__global const float *restrict x, __global act *restrict y, const int channels, const int width)
{
    const int row = get_global_id(0), block = get_global_id(1), height = get_global_size(0);
    const long n = get_global_id(2);
    for (int w = 0; w < width; w++)
        for (int lane = 0; lane < BLOCK; lane += VEC) {
            vec v = 0;
            for (int l = 0; l < VEC; l++) {
                const int c = block * BLOCK + lane + l;
                if (c < channels) ((float *)&v)[l] = x[((n * channels + c) * height + row) * width + w];
            }
            STORE(v, y + (((n * get_global_size(1) + block) * height + row) * width + w) * BLOCK + lane);
        }
}
