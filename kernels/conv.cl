// conv.cl - convolution by register tiles: forward and gradient of the input (conv_gather), gradient of the weights
// (conv_weight, conv_weight_reduce), and the copies of the weights that they read (conv_pack).
//
// Forward and gradient of the input are one computation. Output pixel (a, b) of a grid gathers, over the taps t,
//
//   y[n, o, a * out_step + out_row, b * out_step + out_col] =
//       sum over input blocks i, taps t, channels c of
//       x[n, i, a * in_step + row(t), b * in_step + col(t), c] * w[o, i, t, c]
//
// Forward: one grid, in_step = stride, row(t) = kh - padding. Gradient of the input with stride s: s * s grids ("phases"),
// each with out_step = s, in_step = 1 and the taps that hit it. So any kernel size, stride, padding and group count is a
// matter of the tables the host passes, and one compiled program serves a whole network.
//
// A work-group (one work-item) takes a few rows of the grid (or several small images). It first converts the input rows it
// needs to fp32 in local memory - the patch [image][block][row][column][CU], with zeros outside the image - and then runs
// over output channels and pixels with TILE_P x TILE_V vectors of accumulators in registers. Each output element is one
// sum in the order (block, tap, channel), whatever the tile: tile sizes never change a bit of the result.
//
// TILE_V  vectors of output channels per register tile       (2; with VEC = 16: 2 = 32 channels)
// TILE_P  pixels per register tile                           (6 for 16 registers, 8 or more for 32)
// TILE_E  rows (tap, channel) of the weight-gradient tile    (6 for 16 registers, 8 for 32)
// CU      channels of a block that are computed: 16; 4 or 1 for images with that few channels
//
// Packed weights: [output tile][input block][tap][CU][TILE_O], TILE_O = TILE_V * VEC.
#ifndef TILE_V
#define TILE_V 2
#endif
#ifndef TILE_P
#define TILE_P 6
#endif
#ifndef TILE_E
#define TILE_E 6
#endif
#ifndef CU
#define CU 16
#endif
#define TILE_O (TILE_V * VEC)

// Geometry of one launch, in the order of the fields of `Geometry` in dpresnet/ops/conv.py.
typedef struct {
    int images, in_blocks, in_height, in_width;  // x [images][in_blocks][in_height][in_width][BLOCK]
    int out_blocks, out_height, out_width;       // y
    int grid_height, grid_width;                 // output pixels that this launch computes per image
    int out_step, out_row, out_col, in_step;
    int taps, all_taps;                          // taps used here; taps in the packed weights
    int row_min, col_min;                        // smallest row(t) and col(t)
    int patch_width, row_step, col_step;         // a patch keeps every row_step-th row, col_step-th column
    int patch_span;                              // patch rows = (grid rows - 1) * in_step / row_step + patch_span
    int group_images, group_rows;                // what one work-group computes
    int out_group, in_group;                     // channels per convolution group
    int tile_blocks;                             // input blocks that one output tile reads
    int tiles_per_group;                         // output tiles that one work-group computes
    int segments;                                // conv_weight: parts into which the images are divided
    int out_channels, in_channels;
    int transposed;                              // conv_pack: 1 = weights of the gradient of the input
    int tile_channels;                           // TILE_O of the packed weights
} Geometry;

// The first input block that the output channels from `channel` on are connected to.
int conv_first_block(const Geometry g, const int channel)
{
    const int first = channel / g.out_group * g.in_group / BLOCK;
    return max(0, min(first, g.in_blocks - g.tile_blocks));
}

#if VEC > 1
// Copies one row of an image into the patch, as fp32, with zeros outside the image.
void conv_load_row(__global const act *restrict image, __local float *restrict row, const int ih, const Geometry g)
{
    __global const act *source = image + (long)ih * g.in_width * BLOCK;
    const int inside = ih >= 0 && ih < g.in_height;
    for (int c = 0; c < g.patch_width; c++) {
        const int iw = g.col_min + c * g.col_step;
        const int used = inside && iw >= 0 && iw < g.in_width;
#if CU >= VEC
        UNROLL for (int lane = 0; lane < CU; lane += VEC) {
            vec v = 0;
            if (used) v = LOAD(source + iw * BLOCK + lane);
            STOREL(v, row + c * CU + lane);
        }
#else
        vec v = 0;
        if (used) v = LOAD(source + iw * BLOCK);
        UNROLL for (int lane = 0; lane < CU; lane++) row[c * CU + lane] = ((float *)&v)[lane];
#endif
    }
}

__kernel SINGLE void conv_gather(
    __global const act *restrict x, __global const float *restrict w, __global act *restrict y,
    __global const int *restrict taps,  // [taps][2]: offset in the patch, index in the packed weights
    __constant Geometry *restrict geometry,
    __local float *restrict patch,
    __local int *restrict table)        // [pixels + TILE_P][2]: offset in the patch, offset in y
{
    const Geometry g = *geometry;
    const int row_groups = (g.grid_height + g.group_rows - 1) / g.group_rows;
    const int n0 = get_global_id(0) / row_groups * g.group_images;
    const int a0 = get_global_id(0) % row_groups * g.group_rows;
    const int images = min(g.group_images, g.images - n0);
    const int rows = min(g.group_rows, g.grid_height - a0);
    const int row_skip = g.in_step / g.row_step, col_skip = g.in_step / g.col_step;
    const int patch_rows = (rows - 1) * row_skip + g.patch_span;
    const int plane = ((g.group_rows - 1) * row_skip + g.patch_span) * g.patch_width * CU;
    const int out_plane = g.out_height * g.out_width * BLOCK;

    for (int n = 0; n < images; n++)
        for (int i = 0; i < g.in_blocks; i++)
            for (int r = 0; r < patch_rows; r++)
                conv_load_row(x + ((long)(n0 + n) * g.in_blocks + i) * g.in_height * g.in_width * BLOCK,
                              patch + (n * g.in_blocks + i) * plane + r * g.patch_width * CU,
                              a0 * g.in_step + g.row_min + r * g.row_step, g);

    int pixels = 0;
    for (int n = 0; n < images; n++)
        for (int a = 0; a < rows; a++)
            for (int b = 0; b < g.grid_width; b++, pixels++) {
                table[2 * pixels] = n * g.in_blocks * plane + (a * row_skip * g.patch_width + b * col_skip) * CU;
                table[2 * pixels + 1] = n * g.out_blocks * out_plane
                    + (((a0 + a) * g.out_step + g.out_row) * g.out_width + b * g.out_step + g.out_col) * BLOCK;
            }
    for (int p = 0; p < TILE_P; p++) table[2 * (pixels + p)] = 0;  // the last tile computes these and drops them

    const int tiles = (g.out_blocks * BLOCK + TILE_O - 1) / TILE_O;
    const int first_tile = get_global_id(1) * g.tiles_per_group;
    for (int tile = first_tile; tile < min(tiles, first_tile + g.tiles_per_group); tile++) {
        const int first_block = conv_first_block(g, tile * TILE_O);
        for (int pixel = 0; pixel < pixels; pixel += TILE_P) {
            int offset[TILE_P];
            vec sum[TILE_V][TILE_P];
            UNROLL for (int p = 0; p < TILE_P; p++) offset[p] = table[2 * (pixel + p)];
            UNROLL for (int v = 0; v < TILE_V; v++)
                UNROLL for (int p = 0; p < TILE_P; p++) sum[v][p] = 0;
            for (int i = 0; i < g.tile_blocks; i++)
                for (int t = 0; t < g.taps; t++) {
                    __local const float *xs = patch + (first_block + i) * plane + taps[2 * t];
                    __global const float *ws =
                        w + ((long)(tile * g.tile_blocks + i) * g.all_taps + taps[2 * t + 1]) * CU * TILE_O;
                    UNROLL for (int c = 0; c < CU; c++) {
                        vec weight[TILE_V];
                        UNROLL for (int v = 0; v < TILE_V; v++) weight[v] = LOADF(ws + c * TILE_O + v * VEC);
                        UNROLL for (int p = 0; p < TILE_P; p++) {
                            const vec value = (vec)(xs[offset[p] + c]);
                            UNROLL for (int v = 0; v < TILE_V; v++) sum[v][p] += value * weight[v];
                        }
                    }
                }
            UNROLL for (int p = 0; p < TILE_P; p++)
                if (pixel + p < pixels)
                    UNROLL for (int v = 0; v < TILE_V; v++) {
                        const int o = tile * TILE_O + v * VEC;
                        if (o < g.out_blocks * BLOCK)
                            STORE(sum[v][p], y + ((long)n0 * g.out_blocks + o / BLOCK) * out_plane + o % BLOCK
                                                 + table[2 * (pixel + p) + 1]);
                    }
        }
    }
}

// Partial gradient of the weights: dw[segment][output tile][input block][tap * CU + c][TILE_O], summed over the images of
// the segment, rows and columns in that order. Work-group = (segment, output tile, input block of the tile).
__kernel SINGLE void conv_weight(
    __global const act *restrict x, __global const act *restrict dy, __global float *restrict dw,
    __global const int *restrict taps, __constant Geometry *restrict geometry,
    __local float *restrict patch,  // rows of x, one block
    __local float *restrict grad,   // [pixels][TILE_O] rows of dy
    __local float *restrict tile_sum,  // [entries][TILE_O]
    __local int *restrict table,    // [pixels] offset in the patch
    __local int *restrict entry)    // [entries] offset in the patch
{
    const Geometry g = *geometry;
    const int segment = get_global_id(0), tile = get_global_id(1);
    const int block = conv_first_block(g, tile * TILE_O) + get_global_id(2);
    const int entries = g.taps * CU, padded = (entries + TILE_E - 1) / TILE_E * TILE_E;
    const int row_skip = g.in_step / g.row_step, col_skip = g.in_step / g.col_step;

    for (int e = 0; e < padded; e++) entry[e] = e < entries ? taps[2 * (e / CU)] + e % CU : 0;
    for (int i = 0; i < padded * TILE_O; i += VEC) STOREL((vec)(0), tile_sum + i);
    for (int a = 0, p = 0; a < g.group_rows; a++)
        for (int b = 0; b < g.grid_width; b++, p++) table[p] = (a * row_skip * g.patch_width + b * col_skip) * CU;

    for (int n = (long)g.images * segment / g.segments; n < (long)g.images * (segment + 1) / g.segments; n++)
        for (int a0 = 0; a0 < g.grid_height; a0 += g.group_rows) {
            const int rows = min(g.group_rows, g.grid_height - a0), pixels = rows * g.grid_width;
            for (int r = 0; r < (rows - 1) * row_skip + g.patch_span; r++)
                conv_load_row(x + ((long)n * g.in_blocks + block) * g.in_height * g.in_width * BLOCK,
                              patch + r * g.patch_width * CU, a0 * g.in_step + g.row_min + r * g.row_step, g);
            UNROLL for (int v = 0; v < TILE_V; v++) {
                const int o = tile * TILE_O + v * VEC, used = o < g.out_blocks * BLOCK;
                __global const act *source =
                    dy + (((long)n * g.out_blocks + o / BLOCK) * g.out_height + a0) * g.out_width * BLOCK + o % BLOCK;
                for (int p = 0; p < pixels; p++) {
                    vec value = 0;
                    if (used) value = LOAD(source + p * BLOCK);
                    STOREL(value, grad + p * TILE_O + v * VEC);
                }
            }
            for (int e = 0; e < padded; e += TILE_E) {
                __local const float *xs[TILE_E];
                vec sum[TILE_E][TILE_V];
                UNROLL for (int j = 0; j < TILE_E; j++) xs[j] = patch + entry[e + j];
                UNROLL for (int j = 0; j < TILE_E; j++)
                    UNROLL for (int v = 0; v < TILE_V; v++) sum[j][v] = LOADL(tile_sum + (e + j) * TILE_O + v * VEC);
                for (int p = 0; p < pixels; p++) {
                    const int offset = table[p];
                    vec dys[TILE_V];
                    UNROLL for (int v = 0; v < TILE_V; v++) dys[v] = LOADL(grad + p * TILE_O + v * VEC);
                    UNROLL for (int j = 0; j < TILE_E; j++) {
                        const vec value = (vec)(xs[j][offset]);
                        UNROLL for (int v = 0; v < TILE_V; v++) sum[j][v] += value * dys[v];
                    }
                }
                UNROLL for (int j = 0; j < TILE_E; j++)
                    UNROLL for (int v = 0; v < TILE_V; v++) STOREL(sum[j][v], tile_sum + (e + j) * TILE_O + v * VEC);
            }
        }
    __global float *out = dw + (((long)segment * get_global_size(1) + tile) * g.tile_blocks + get_global_id(2))
                               * entries * TILE_O;
    for (int i = 0; i < entries * TILE_O; i += VEC) STOREF(LOADL(tile_sum + i), out + i);
}

#else  // VEC == 1: one work-item per output element, for devices without a kernel of their own; same sums, same order

// Global size: (channels of y with padding, grid pixels, images); taps hold (row(t), index in the packed weights, col(t)).
__kernel void conv_gather(
    __global const act *restrict x, __global const float *restrict w, __global act *restrict y,
    __global const int *restrict taps, __constant Geometry *restrict geometry)
{
    const Geometry g = *geometry;
    const int o = get_global_id(0), b = get_global_id(1) % g.grid_width, a = get_global_id(1) / g.grid_width;
    const int n = get_global_id(2), tile = o / g.tile_channels, first_block = conv_first_block(g, tile * g.tile_channels);
    float sum = 0;
    for (int i = 0; i < g.tile_blocks; i++)
        for (int t = 0; t < g.taps; t++) {
            const int ih = a * g.in_step + taps[3 * t], iw = b * g.in_step + taps[3 * t + 2];
            if (ih < 0 || ih >= g.in_height || iw < 0 || iw >= g.in_width) continue;
            __global const act *xs =
                x + ((((long)n * g.in_blocks + first_block + i) * g.in_height + ih) * g.in_width + iw) * BLOCK;
            __global const float *ws = w + ((long)(tile * g.tile_blocks + i) * g.all_taps + taps[3 * t + 1])
                                               * CU * g.tile_channels + o % g.tile_channels;
            for (int c = 0; c < CU; c++) sum += LOAD(xs + c) * ws[c * g.tile_channels];
        }
    STORE(sum, y + ((((long)n * g.out_blocks + o / BLOCK) * g.out_height + a * g.out_step + g.out_row) * g.out_width
                    + b * g.out_step + g.out_col) * BLOCK + o % BLOCK);
}

// Global size: (entries * tile_channels, output tiles * tile_blocks, segments).
__kernel void conv_weight(
    __global const act *restrict x, __global const act *restrict dy, __global float *restrict dw,
    __global const int *restrict taps, __constant Geometry *restrict geometry)
{
    const Geometry g = *geometry;
    const int lane = get_global_id(0) % g.tile_channels, e = get_global_id(0) / g.tile_channels;
    const int tile = get_global_id(1) / g.tile_blocks, segment = get_global_id(2);
    const int block = conv_first_block(g, tile * g.tile_channels) + get_global_id(1) % g.tile_blocks;
    const int t = e / CU, c = e % CU, o = tile * g.tile_channels + lane;
    float sum = 0;
    for (int n = (long)g.images * segment / g.segments; n < (long)g.images * (segment + 1) / g.segments; n++)
        for (int a = 0; a < g.grid_height; a++) {
            const int ih = a * g.in_step + taps[3 * t];
            if (ih < 0 || ih >= g.in_height) continue;
            for (int b = 0; b < g.grid_width; b++) {
                const int iw = b * g.in_step + taps[3 * t + 2];
                if (iw < 0 || iw >= g.in_width) continue;
                sum += LOAD(x + ((((long)n * g.in_blocks + block) * g.in_height + ih) * g.in_width + iw) * BLOCK + c)
                     * LOAD(dy + ((((long)n * g.out_blocks + o / BLOCK) * g.out_height + a) * g.out_width + b) * BLOCK
                               + o % BLOCK);
            }
        }
    dw[((long)segment * get_global_size(1) + get_global_id(1)) * get_global_size(0) + get_global_id(0)] = sum;
}
#endif

// Adds the segments pairwise in a fixed binary tree and writes the gradient in the order of the parameter
// [out_channels][in_group][tap]. One work-item per (channel of the block, input block of the tile, output tile).
__kernel void conv_weight_reduce(
    __global const float *restrict partial, __global float *restrict dw, __constant Geometry *restrict geometry)
{
    const Geometry g = *geometry;
    const int c = get_global_id(0), tile = get_global_id(2);
    const int i = (conv_first_block(g, tile * g.tile_channels) + get_global_id(1)) * BLOCK + c;
    const long stride = (long)get_global_size(2) * g.tile_blocks * g.taps * CU * g.tile_channels;
    if (i >= g.in_channels) return;
    const int group = i / g.in_group, first = group * g.out_group;  // output channels that i is connected to
    for (int lane = 0; lane < g.tile_channels; lane += VEC) {
        const int o = tile * g.tile_channels + lane;
        __global const float *source =
            partial + ((long)(tile * g.tile_blocks + get_global_id(1)) * g.taps * CU + c) * g.tile_channels + lane;
        __global float *out = dw + ((long)o * g.in_group + i - group * g.in_group) * g.taps;
        for (int t = 0; t < g.taps; t++, source += CU * g.tile_channels) {
            vec part[64];  // segments <= 64, see ops/conv.py
            for (int s = 0; s < g.segments; s++) part[s] = LOADF(source + s * stride);
            for (int width = g.segments; width > 1; width = (width + 1) / 2)
                for (int s = 0; s < width / 2; s++) part[s] += part[s + (width + 1) / 2];
            for (int l = 0; l < VEC; l++)
                if (o + l >= first && o + l < first + g.out_group)
                    out[(long)l * g.in_group * g.taps + t] = ((float *)part)[l];
        }
    }
}

// Working copy of the weights in the order conv_gather reads, zeros where channels are not connected, rounded to fp16 when
// activations are fp16. It stays fp32 in memory: converting in the inner loop would cost more than the bytes save.
// One work-item per (tap and channel of the block, input block of the tile, output tile).
__kernel void conv_pack(__global const float *restrict master, __global float *restrict packed,
                        __constant Geometry *restrict geometry)
{
    const Geometry g = *geometry;
    const int t = get_global_id(0) / CU, c = get_global_id(0) % CU, tile = get_global_id(2);
    const int i = (conv_first_block(g, tile * g.tile_channels) + get_global_id(1)) * BLOCK + c;
    __global float *out = packed + (((long)tile * g.tile_blocks + get_global_id(1)) * g.all_taps * CU + get_global_id(0))
                                       * g.tile_channels;
    const int group = i / g.in_group, first = group * g.out_group;  // output channels that i is connected to
    for (int lane = 0; lane < g.tile_channels; lane += VEC) {
        const int o = tile * g.tile_channels + lane;
        // master [o][i of the group][t], or transposed [i][o of the group][t]
        __global const float *source = g.transposed ? master + ((long)i * g.out_group + o - first) * g.all_taps + t
                                                    : master + ((long)o * g.in_group + i - group * g.in_group) * g.all_taps + t;
        const long step = g.transposed ? g.all_taps : (long)g.in_group * g.all_taps;
        vec v = 0;
        for (int l = 0; l < VEC; l++)
            if (i < g.in_channels && o + l >= first && o + l < first + g.out_group) ((float *)&v)[l] = source[l * step];
#if HALF
        v = ROUND_HALF(v);
#endif
        STOREF(v, out + lane);
    }
}
