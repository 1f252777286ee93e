// winograd.cl - 3x3 convolution with stride 1 by the minimal filtering algorithm F(4x4, 3x3) of Winograd (1980) as used by Lavin
// and Gray (2016): 36 multiplications give a 4x4 tile of outputs that take 144 directly. Everything is fp32.
//
//   y tile = A^T [ (G w G^T) * (B^T x B) ] A              x: the 6x6 pixels under the tile; * is elementwise, summed over channels
//   dw     = G^T [ sum over tiles (A dy A^T) * (B^T x B) ] G      the adjoint, with the same transforms
//
// The transforms are those of transform.cl.
//
// winograd_gather  y from x and U = G w G^T; with the transposed, turned weights: the gradient of the input
// winograd_weight  gradient of the weights, one array for each segment of the images; winograd_reduce adds the segments
// winograd_pack    U from the weights
//
// FRESH  1: winograd_gather transforms the weights itself, an output tile at a time. That saves large weights of few tiles a way to
//        memory and back; where more work-groups read the same ones, packing them once is faster. 0: they are packed.
//
// A sum over channels runs in their order, one over tiles in the order (image, tile row, tile column) of its segment: neither
// depends on the sizes of register tiles (see tile.cl) and work-groups.

#ifndef FRESH
#define FRESH 0
#endif
#define MOST_SEGMENTS 32
#define PAD BLOCK  // floats between the planes of two points, so that they fall into different cache sets
#if FRESH
#define WEIGHTS __local const float
#define WEIGHTS_VEC __local const vec
#else
#define WEIGHTS __global const float
#define WEIGHTS_VEC __global const vec
#endif

// Geometry of one launch, in the order of the fields of `Geometry` in dpresnet/ops/winograd.py.
typedef struct {
    int images, in_blocks, in_height, in_width;  // x [images][in_blocks][in_height][in_width][BLOCK]
    int out_blocks, out_height, out_width;       // y
    int tile_rows, tile_cols;                    // tiles of an image
    int padding;
    int group_tiles;     // tiles that a work-group transforms at once, a multiple of TILE_P in winograd_gather
    int chunk;           // input blocks that it transforms at once
    int panel;           // output channels that it computes, a multiple of TILE_O
    int segments;        // winograd_weight: parts into which the images are divided
    int segment_size;    // floats between their sums
    int out_channels, in_channels;
    int transposed;      // winograd_pack: 1 = weights of the gradient of the input
} Geometry;

// w[channel of a block][tap][TILE_O], one vector of it, from source[input channel * step_i + output channel * step_o + tap].
// `ins` and `outs` channels follow from there on; zero beyond them.
void winograd_load_weights(__global const float *restrict source, float *restrict w, const int ins, const int outs,
                           const long step_i, const long step_o, const int transposed)
{
    const int channels = transposed ? 1 : BLOCK, count = 9 * channels;  // whose weights of an output channel lie side by side
    for (int i = 0; i < BLOCK; i += channels) {
        const int beyond = count % VEC == 0 || ins > i + channels || outs >= 2 * VEC;  // what is read and dropped is there
        if (ins >= i + channels && outs >= VEC && beyond)
            for (int k = 0; k < count; k += VEC) {
                vec v[VEC];
                transpose(v, source + i * step_i + k, step_o, transposed ? step_i : 2 * BLOCK);
                UNROLL for (int r = 0; r < VEC; r++) *(vec *)(w + (i * 9 + k + r) * TILE_O) = v[r];
            }
        else
            for (int k = 0; k < count; k++)
                for (int o = 0; o < VEC; o++)
                    w[(i * 9 + k) * TILE_O + o] = i + k / 9 < ins && o < outs ? source[i * step_i + o * step_o + k] : 0;
    }
}

// w[channel of a block][tap][TILE_O] between the input channels from i0 and the output channels from o0 on, of master
// [out][in][9], or with `transposed` [in][out][9].
void winograd_load_block(__global const float *restrict master, float *restrict w, const int i0, const int o0, const Geometry g)
{
    const long step_i = g.transposed ? g.out_channels * 9 : 9, step_o = g.transposed ? 9 : g.in_channels * 9;
    for (int o = 0; o < TILE_O; o += VEC)
        winograd_load_weights(master + i0 * step_i + (o0 + o) * step_o, w + o, g.in_channels - i0, g.out_channels - o0 - o,
                              step_i, step_o, g.transposed);
}

// U of one channel of such a block, u[point][TILE_O]; with `transposed` turned by 180 degrees.
void winograd_channel(const float *restrict w, const int channel, float *restrict u, const int transposed)
{
    const int first = transposed ? 8 : 0, step = transposed ? -TILE_O : TILE_O;  // of the taps
    for (int o = 0; o < TILE_O; o += VEC) winograd_transform_weight(w + (channel * 9 + first) * TILE_O + o, step, u + o, TILE_O);
}

#define BLOCK_WEIGHTS ((9 * BLOCK + VEC) * TILE_O)  // floats of w: vectors go beyond the last tap
#define ALIGNED __attribute__((aligned(64)))

// packed [output tile][point][channel][TILE_O] from master, rounded to fp16 when activations are. One work-item per (input block,
// output tile): it writes whole cache lines.
__kernel SINGLE void winograd_pack(__global const float *restrict master, __global float *restrict packed,
                            __constant Geometry *restrict geometry)
{
    const Geometry g = *geometry;
    const int i0 = get_global_id(0) * BLOCK, o0 = get_global_id(1) * TILE_O, rows = get_global_size(0) * BLOCK;
    __global float *out = packed + ((long)get_global_id(1) * POINTS * rows + i0) * TILE_O;
    float w[BLOCK_WEIGHTS] ALIGNED, u[POINTS * TILE_O] ALIGNED;
    winograd_load_block(master, w, i0, o0, g);
    for (int i = 0; i < BLOCK; i++) {
        winograd_channel(w, i, u, g.transposed);
        for (int point = 0; point < POINTS; point++)
            UNROLL for (int o = 0; o < TILE_O; o += VEC)
                STREAMF(*(const vec *)(u + point * TILE_O + o), out + ((long)point * rows + i) * TILE_O + o);
    }
}

#if FRESH
// The same of `blocks` input blocks to local memory, u[POINTS]([channel][TILE_O] + PAD), where it is read at once.
void winograd_fresh(__global const float *restrict master, __local float *restrict u, const int block, const int blocks,
                    const int o0, const Geometry g)
{
    float w[BLOCK_WEIGHTS] ALIGNED, channel[POINTS * TILE_O] ALIGNED;
    for (int i = 0; i < blocks; i++) {
        winograd_load_block(master, w, (block + i) * BLOCK, o0, g);
        for (int c = 0; c < BLOCK; c++) {
            winograd_channel(w, c, channel, g.transposed);
            for (int point = 0; point < POINTS; point++)
                UNROLL for (int o = 0; o < TILE_O; o += VEC)
                    STOREL(*(const vec *)(channel + point * TILE_O + o),
                           u + point * (g.chunk * BLOCK * TILE_O + PAD) + (i * BLOCK + c) * TILE_O + o);
        }
    }
}
#endif

// products[TILE_P][TILE_O] of a register tile += x[block][TILE_P][BLOCK] * u[block][BLOCK][TILE_O], summed over blocks and
// channels; `step` floats lie between two blocks of x. All other offsets are constants: the loop needs two addresses.
void winograd_multiply(__local const float *restrict x, WEIGHTS *restrict u, __local float *restrict products,
                       const int blocks, const int step, const int first, WEIGHTS *restrict next)
{
    vec sum[TILE_V][TILE_P];
    UNROLL for (int v = 0; v < TILE_V; v++)
        UNROLL for (int p = 0; p < TILE_P; p++) sum[v][p] = 0;
    if (!first)
        UNROLL for (int v = 0; v < TILE_V; v++)
            UNROLL for (int p = 0; p < TILE_P; p++) sum[v][p] = LOADL(products + p * TILE_O + v * VEC);
    for (int i = 0; i < blocks; i++, x += step, u += BLOCK * TILE_O, next += BLOCK * TILE_O)
        UNROLL for (int l = 0; l < BLOCK; l++) {
            UNROLL for (int k = 0; k < TILE_O; k += 16) PREFETCH(next + l * TILE_O + k);
            vec weight[TILE_V];
            UNROLL for (int v = 0; v < TILE_V; v++) weight[v] = *(WEIGHTS_VEC *)(u + l * TILE_O + v * VEC);
            UNROLL for (int p = 0; p < TILE_P; p++) {
                const vec value = (vec)(x[p * BLOCK + l]);
                UNROLL for (int v = 0; v < TILE_V; v++) sum[v][p] += value * weight[v];
            }
        }
    UNROLL for (int p = 0; p < TILE_P; p++)
        UNROLL for (int v = 0; v < TILE_V; v++) STOREL(sum[v][p], products + p * TILE_O + v * VEC);
}

// Fetches pixel `point` of the 4x4 outputs of each of some tiles, from `first` to `last`, of the blocks from `block` on, or of an
// input the pixel at that place: of neighbouring tiles these are all pixels. Later points fetch nothing, and what lies beyond
// an image is fetched in vain. Spread over the points that are multiplied: memory would be too slow for all of it at once. It goes
// from tile to tile by additions: a division for each of so many pixels would cost more than the multiplications.
void winograd_fetch(__global const act *restrict array, const int all_blocks, const int height, const int width, const int first,
                    const int last, const int block, const int blocks, const int point, const Geometry g)
{
    if (point >= OUT * OUT) return;
    const int image_tiles = g.tile_rows * g.tile_cols, n = first / image_tiles, place = first % image_tiles;
    const int top = place / g.tile_cols, left = place % g.tile_cols;
    const long line = (long)OUT * (width - g.tile_cols) * BLOCK;  // from behind a row of tiles to the next one
    const long image = (long)(all_blocks * height - g.tile_rows * OUT) * width * BLOCK;
    for (int i = block; i < block + blocks; i++) {
        __global const act *pixel = array + ((((long)n * all_blocks + i) * height + top * OUT + point / OUT) * width
                                             + left * OUT + point % OUT) * BLOCK;
        for (int t = first, row = top, col = left; t < last; col = 0) {
            const int end = t + min(g.tile_cols - col, last - t);  // of the row of tiles
            for (; t < end; t++, pixel += OUT * BLOCK) PREFETCH_LATER(pixel);
            pixel += line;
            if (++row == g.tile_rows) row = 0, pixel += image;
        }
    }
}

// Where the outputs of a tile begin in y, from output channel o0 on.
INLINE long winograd_corner(const int tile, const int o0, const Geometry g)
{
    const int image_tiles = g.tile_rows * g.tile_cols, place = tile % image_tiles;
    return ((((long)(tile / image_tiles) * g.out_blocks + o0 / BLOCK) * g.out_height + place / g.tile_cols * OUT) * g.out_width
            + place % g.tile_cols * OUT) * BLOCK;
}

// Work-group = (group of tiles, panel of the output channels). It transforms a chunk of input blocks, adds what they give to the
// products of all its output channels, and goes on with the next chunk: both stay in the second-level cache.
// u [output tile][point][input channel][TILE_O].
__kernel SINGLE void winograd_gather(
    __global const act *restrict x, __global const float *restrict u, __global act *restrict y,  // FRESH: u is the master
#if JOIN  // see conv.cl
    __global const act *restrict z,
#endif
    __constant Geometry *restrict geometry,
    __local float *restrict inputs,    // [POINTS]([chunk][group_tiles][BLOCK] + PAD): transformed input
    __local float *restrict products   // [POINTS]([panel / TILE_O][group_tiles][TILE_O] + PAD)
#if FRESH
    , __local float *restrict weights  // [POINTS]([chunk][BLOCK][TILE_O] + PAD): U of an output tile
#endif
    )
{
    const Geometry g = *geometry;
    const int image_tiles = g.tile_rows * g.tile_cols;
    const int first = get_global_id(0) * g.group_tiles, tiles = min(g.group_tiles, g.images * image_tiles - first);
    const int o0 = get_global_id(1) * g.panel, outs = min(g.panel, g.out_blocks * BLOCK - o0);
    const int step = g.group_tiles * BLOCK, plane = g.chunk * step + PAD, product_plane = g.group_tiles * g.panel + PAD;

    for (int i0 = 0; i0 < g.in_blocks; i0 += g.chunk) {
        const int blocks = min(g.chunk, g.in_blocks - i0);
        for (int i = 0; i < blocks; i++)
            for (int t = 0; t < tiles; t++) {
                const int n = (first + t) / image_tiles, place = (first + t) % image_tiles;
                __global const act *image = x + ((long)n * g.in_blocks + i0 + i) * g.in_height * g.in_width * BLOCK;
                UNROLL for (int lane = 0; lane < BLOCK; lane += VEC)
                    winograd_transform_in(image + lane, inputs + i * step + t * BLOCK + lane, plane,
                                          place / g.tile_cols * OUT - g.padding, place % g.tile_cols * OUT - g.padding,
                                          g.in_height, g.in_width);
            }
        for (int t = tiles; t % TILE_P; t++)  // the last register tile computes these and drops them
            for (int point = 0; point < POINTS; point++)
                for (int i = 0; i < blocks * BLOCK; i += VEC)
                    STOREL((vec)(0), inputs + point * plane + i / BLOCK * step + t * BLOCK + i % BLOCK);

        const int more = i0 + blocks < g.in_blocks;  // of these tiles, else what the next ones begin with
        const int ahead = more ? first : first + tiles, until = min(ahead + tiles, g.images * image_tiles);
        const int block = more ? i0 + blocks : 0, count = min(g.chunk, g.in_blocks - block);
        const int together = FRESH ? TILE_O : outs;  // output channels at each point
        for (int begin = 0; begin < outs; begin += together) {
#if FRESH
            winograd_fresh(u, weights, i0, blocks, o0 + begin, g);
#endif
            for (int point = 0; point < POINTS; point++) {
                if (begin == 0) winograd_fetch(x, g.in_blocks, g.in_height, g.in_width, ahead, until, block, count, point, g);
                for (int o = begin; o < begin + together; o += TILE_O) {
#if FRESH
                    WEIGHTS *us = weights + point * (g.chunk * BLOCK * TILE_O + PAD), *next = us;
#else
                    const int wrap = o + TILE_O >= outs;  // the weights that are used next: of the next channels, or the next point
                    WEIGHTS *us = u + (((long)(o0 + o) / TILE_O * POINTS + point) * g.in_blocks + i0) * BLOCK * TILE_O;
                    WEIGHTS *next = us + (wrap ? 1 - o / TILE_O * POINTS : POINTS) * g.in_blocks * BLOCK * TILE_O;
#endif
                    for (int t = 0; t < tiles; t += TILE_P)
                        winograd_multiply(inputs + point * plane + t * BLOCK, us,
                                          products + point * product_plane + o * g.group_tiles + t * TILE_O, blocks, step,
                                          i0 == 0, next);
                }
            }
        }
    }
    for (int t = 0; t < tiles; t++) {
        const int place = (first + t) % image_tiles, row = place / g.tile_cols * OUT, col = place % g.tile_cols * OUT;
        const long corner = winograd_corner(first + t, o0, g);
        for (int o = 0; o < outs; o += VEC) {
            const long at = corner + (long)o / BLOCK * g.out_height * g.out_width * BLOCK + o % BLOCK;
#if JOIN
            const long ahead = at - corner + winograd_corner(min(first + t + 1, g.images * image_tiles - 1), o0, g);
            for (int p = 0; p < OUT * OUT; p++) {  // what the next tile finds there
                const long pixel = ahead + (p / OUT * g.out_width + p % OUT) * BLOCK;
                PREFETCH(y + pixel);
                PREFETCH(z + pixel);
            }
#endif
            winograd_transform_out(products + o / TILE_O * TILE_O * g.group_tiles + t * TILE_O + o % TILE_O, product_plane, y + at,
#if JOIN
                                   z + at,
#endif
                                   g.out_width, g.out_height - row, g.out_width - col);
        }
    }
}

// sums[TILE_E][TILE_O] += x[tile][e] * y[tile][TILE_O], summed over the tiles; `step` floats lie between two tiles of x.
void winograd_accumulate(__local const float *restrict x, __local const float *restrict y, __local float *restrict sums,
                         const int tiles, const int step)
{
    vec sum[TILE_E][TILE_V];
    UNROLL for (int e = 0; e < TILE_E; e++)
        UNROLL for (int v = 0; v < TILE_V; v++) sum[e][v] = LOADL(sums + e * TILE_O + v * VEC);
    for (int t = 0; t < tiles; t++, x += step, y += TILE_O) {
        vec grad[TILE_V];
        UNROLL for (int v = 0; v < TILE_V; v++) grad[v] = LOADL(y + v * VEC);
        UNROLL for (int e = 0; e < TILE_E; e++) {
            const vec value = (vec)(x[e]);
            UNROLL for (int v = 0; v < TILE_V; v++) sum[e][v] += value * grad[v];
        }
    }
    UNROLL for (int e = 0; e < TILE_E; e++)
        UNROLL for (int v = 0; v < TILE_V; v++) STOREL(sum[e][v], sums + e * TILE_O + v * VEC);
}

// out[output channel * step + input channel * 9 + tap] = rows[input channel * 9 + tap][output channel], of so many of either. A
// segment is added to others at once, the gradient itself is read by the optimizer, much later.
void winograd_write_gradient(vec rows[BLOCK * 9], __global float *restrict out, const long step, const int ins, const int outs,
                             const int segments)
{
    if (outs == VEC && step % BLOCK == 0)  // and so whole blocks of input channels
        for (int k = 0; k < 9 * BLOCK; k += VEC) {
            transpose_rows(rows + k);
            UNROLL for (int o = 0; o < VEC; o++)
                if (segments == 1)
                    STREAMF(rows[k + o], out + o * step + k);
                else
                    STOREF(rows[k + o], out + o * step + k);
        }
    else
        for (int o = 0; o < outs; o++)
            for (int k = 0; k < 9 * ins; k++) out[o * step + k] = ((const float *)rows)[k * VEC + o];
}

// Work-group = (segment of the images, part of the input channels, part of the output channels).
// dw [segment][out_channels][in_channels][9], `segment_size` floats apart.
__kernel SINGLE void winograd_weight(
    __global const act *restrict x, __global const act *restrict dy, __global float *restrict dw,
    __constant Geometry *restrict geometry,
    __local float *restrict inputs,  // [POINTS]([group_tiles][row] + PAD): transformed input, row = chunk * BLOCK up to TILE_E
    __local float *restrict grads,   // [POINTS]([panel / TILE_O][group_tiles][TILE_O] + PAD): transformed gradient
    __local float *restrict sums)    // [POINTS]([panel / TILE_O][row][TILE_O] + PAD)
{
    const Geometry g = *geometry;
    const int segment = get_global_id(0), i0 = get_global_id(1) * g.chunk * BLOCK, o0 = get_global_id(2) * g.panel;
    const int ins = min(g.chunk, g.in_blocks - i0 / BLOCK) * BLOCK, outs = min(g.panel, g.out_blocks * BLOCK - o0);
    const int padded = (g.chunk * BLOCK + TILE_E - 1) / TILE_E * TILE_E, row = (padded + BLOCK - 1) / BLOCK * BLOCK;
    const int plane = g.group_tiles * row + PAD, grad_plane = g.group_tiles * g.panel + PAD, sum_plane = padded * g.panel + PAD;
    const int image_tiles = g.tile_rows * g.tile_cols;
    const int last = (int)((long)g.images * (segment + 1) / g.segments) * image_tiles;

    for (int i = 0; i < POINTS * sum_plane; i += VEC) STOREL((vec)(0), sums + i);
    for (int i = 0; i < POINTS * plane; i += VEC) STOREL((vec)(0), inputs + i);       // columns beyond the channels stay zero
    for (int i = 0; i < POINTS * grad_plane; i += VEC) STOREL((vec)(0), grads + i);

    for (int first = (int)((long)g.images * segment / g.segments) * image_tiles; first < last; first += g.group_tiles) {
        const int tiles = min(g.group_tiles, last - first);
        for (int t = 0; t < tiles; t++) {
            const int n = (first + t) / image_tiles, place = (first + t) % image_tiles;
            const int top = place / g.tile_cols * OUT, left = place % g.tile_cols * OUT;
            for (int i = 0; i < ins; i += VEC)
                winograd_transform_in(x + ((long)n * g.in_blocks + (i0 + i) / BLOCK) * g.in_height * g.in_width * BLOCK + i % BLOCK,
                                      inputs + t * row + i, plane, top - g.padding, left - g.padding, g.in_height, g.in_width);
            for (int o = 0; o < outs; o += VEC)
                winograd_transform_grad(
                    dy + (((long)n * g.out_blocks + (o0 + o) / BLOCK) * g.out_height * g.out_width
                          + top * g.out_width + left) * BLOCK + o % BLOCK,
                    grads + o / TILE_O * TILE_O * g.group_tiles + t * TILE_O + o % TILE_O, grad_plane, g.out_width,
                    g.out_height - top, g.out_width - left);
        }
        const int ahead = first + tiles, until = min(ahead + g.group_tiles, g.images * image_tiles);  // also of the next segment
        for (int point = 0; point < POINTS; point++) {
            winograd_fetch(x, g.in_blocks, g.in_height, g.in_width, ahead, until, i0 / BLOCK, ins / BLOCK, point, g);
            winograd_fetch(dy, g.out_blocks, g.out_height, g.out_width, ahead, until, o0 / BLOCK, outs / BLOCK, point, g);
            for (int o = 0; o < outs; o += TILE_O)
                for (int i = 0; i < ins; i += TILE_E)
                    winograd_accumulate(inputs + point * plane + i, grads + point * grad_plane + o * g.group_tiles,
                                        sums + point * sum_plane + o * padded + i * TILE_O, tiles, row);
        }
    }
    for (int o = 0; o < outs; o += VEC)
        for (int i = 0; i < ins; i += BLOCK) {
            vec rows[BLOCK * 9];
            for (int c = 0; c < BLOCK; c++)
                winograd_transform_weight_grad(
                    sums + o / TILE_O * TILE_O * padded + (i + c) * TILE_O + o % TILE_O, sum_plane, rows + c * 9);
            winograd_write_gradient(
                rows, dw + (long)segment * g.segment_size + ((long)(o0 + o) * g.in_channels + i0 + i) * 9,
                (long)g.in_channels * 9, min(BLOCK, g.in_channels - i0 - i), min(VEC, g.out_channels - o0 - o), g.segments);
        }
}

// dw = the segments added in a halving tree, as ((0 + 2) + (1 + 3)) for four.
__kernel void winograd_reduce(const int elements, __global const float *restrict partial, __global float *restrict dw,
                              const int segments, const int segment_size)
{
    FLAT(i) {
        vec part[MOST_SEGMENTS];
        for (int s = 0; s < segments; s++) part[s] = LOADF(partial + (long)s * segment_size + i);
        for (int width = segments; width > 1; width = (width + 1) / 2)
            for (int s = 0; s < width / 2; s++) part[s] += part[s + (width + 1) / 2];
        for (int l = 0; l < min(VEC, elements - i); l++) dw[i + l] = ((float *)part)[l];
    }
}
