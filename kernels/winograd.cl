// winograd.cl - 3x3 convolution with stride 1 by the minimal filtering algorithm F(4x4, 3x3) of Winograd (1980) as used by Lavin
// and Gray (2016): 36 multiplications give a 4x4 tile of outputs that take 144 directly. Everything is fp32.
//
//   y tile = A^T [ (G w G^T) * (B^T x B) ] A              x: the 6x6 pixels under the tile; * is elementwise, summed over channels
//   dw     = G^T [ sum over tiles (A dy A^T) * (B^T x B) ] G      the adjoint, with the same transforms
//
// The matrices evaluate polynomials at the points 0, +-P, +-Q and infinity. P = 5/8 and Q = 3/2 are exact in binary and keep all
// coefficients near 1: the error is about twice that of a direct sum in fp32, an eighth of that with the usual 1 and 2.
//
//   B^T = | P2Q2    0    -P2-Q2     0       1   0 |   P2 = P * P, Q2 = Q * Q; rows and columns in the order 0, P, -P, Q, -Q, inf
//         |  0  -+PQ2     -Q2     +-P       1   0 |   (rows of +P and -P; with P and Q exchanged: rows of +Q and -Q)
//         |  0    P2Q2      0    -P2-Q2     0   1 |
//   G   = row of point p: (1, p, p^2) / product of (p - other points); row of infinity: (0, 0, 1)
//   A^T = column of point p: (1, p, p^2, p^3); column of infinity: (0, 0, 0, 1)
//
// winograd_gather  y from x and U = G w G^T; with the transposed, turned weights: the gradient of the input
// winograd_weight  gradient of the weights, one array for each segment of the images; winograd_reduce adds the segments
// winograd_pack    U from the weights
//
// A sum over channels runs in their order, one over tiles in the order (image, tile row, tile column) of its segment: neither
// depends on the sizes of register tiles and work-groups.
//
// TILE_V  vectors of output channels per register tile; TILE_O = TILE_V * VEC channels
// TILE_P  tiles per register tile of winograd_gather       (6 for 16 registers, 8 or more for 32)
// TILE_E  input channels per register tile of winograd_weight
#ifndef TILE_V
#define TILE_V 2
#endif
#ifndef TILE_P
#define TILE_P 6
#endif
#ifndef TILE_E
#define TILE_E 6
#endif
#define TILE_O (TILE_V * VEC)

#define EDGE 6         // rows and columns of a transformed tile
#define POINTS 36      // EDGE * EDGE
#define OUT 4          // rows and columns of outputs of a tile
#define MOST_SEGMENTS 32
#define PAD BLOCK      // floats between the planes of two points, so that they fall into different cache sets

#ifndef PREFETCH
#define PREFETCH(p) __builtin_prefetch(p)
#endif

#define P 0.625f
#define Q 1.5f
#define P2 (P * P)
#define Q2 (Q * Q)
#define AT_0 (1 / (P2 * Q2))              // 1 / product of (p - other points) for p = 0, +-P, +-Q
#define AT_P (1 / (2 * P2 * (P2 - Q2)))
#define AT_Q (1 / (2 * Q2 * (Q2 - P2)))

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

// v[0..5] = B^T v, one column or row of a tile.
#define TRANSFORM_IN(v0, v1, v2, v3, v4, v5)                             \
    {                                                                    \
        const vec even_p = v4 - Q2 * v2, odd_p = v3 - Q2 * v1;           \
        const vec even_q = v4 - P2 * v2, odd_q = v3 - P2 * v1;           \
        v0 = P2 * Q2 * v0 + (v4 - (P2 + Q2) * v2);                       \
        v5 = P2 * Q2 * v1 + (v5 - (P2 + Q2) * v3);                       \
        v1 = even_p + P * odd_p;                                         \
        v2 = even_p - P * odd_p;                                         \
        v3 = even_q + Q * odd_q;                                         \
        v4 = even_q - Q * odd_q;                                         \
    }

// Reads the 6x6 pixels of a tile, zeros outside the image, and writes B^T x B to out[point * plane].
void winograd_transform_in(__global const act *restrict image, __local float *restrict out, const int plane,
                           const int row0, const int col0, const int height, const int width)
{
    vec t[EDGE][EDGE];
    const int inside = row0 >= 0 && col0 >= 0 && row0 + EDGE <= height && col0 + EDGE <= width;
    __global const act *corner = image + ((long)row0 * width + col0) * BLOCK;
    UNROLL for (int c = 0; c < EDGE; c++) {
        vec v[EDGE];
        if (inside) {
            UNROLL for (int r = 0; r < EDGE; r++) v[r] = LOAD(corner + (r * width + c) * BLOCK);
        } else {
            UNROLL for (int r = 0; r < EDGE; r++) {
                v[r] = 0;
                if (row0 + r >= 0 && row0 + r < height && col0 + c >= 0 && col0 + c < width)
                    v[r] = LOAD(corner + (r * width + c) * BLOCK);
            }
        }
        TRANSFORM_IN(v[0], v[1], v[2], v[3], v[4], v[5])
        UNROLL for (int r = 0; r < EDGE; r++) t[r][c] = v[r];
    }
    UNROLL for (int r = 0; r < EDGE; r++) {
        TRANSFORM_IN(t[r][0], t[r][1], t[r][2], t[r][3], t[r][4], t[r][5])
        UNROLL for (int c = 0; c < EDGE; c++) STOREL(t[r][c], out + (r * EDGE + c) * plane);
    }
}

// Writes A^T m A, m[point * plane], to the outputs of a tile that lie in the image.
void winograd_transform_out(__local const float *restrict m, const int plane, __global act *restrict y, const int width,
                            const int rows, const int cols)
{
    vec t[OUT][EDGE];
    UNROLL for (int c = 0; c < EDGE; c++) {
        vec v[EDGE];
        UNROLL for (int r = 0; r < EDGE; r++) v[r] = LOADL(m + (r * EDGE + c) * plane);
        const vec sum_p = v[1] + v[2], dif_p = v[1] - v[2], sum_q = v[3] + v[4], dif_q = v[3] - v[4];
        t[0][c] = v[0] + sum_p + sum_q;
        t[1][c] = P * dif_p + Q * dif_q;
        t[2][c] = P2 * sum_p + Q2 * sum_q;
        t[3][c] = P * P2 * dif_p + (Q * Q2 * dif_q + v[5]);
    }
    UNROLL for (int r = 0; r < OUT; r++) {
        if (r >= rows) break;
        const vec sum_p = t[r][1] + t[r][2], dif_p = t[r][1] - t[r][2], sum_q = t[r][3] + t[r][4], dif_q = t[r][3] - t[r][4];
        __global act *out = y + r * width * BLOCK;
        STORE(t[r][0] + sum_p + sum_q, out);
        if (cols > 1) STORE(P * dif_p + Q * dif_q, out + BLOCK);
        if (cols > 2) STORE(P2 * sum_p + Q2 * sum_q, out + 2 * BLOCK);
        if (cols > 3) STORE(P * P2 * dif_p + (Q * Q2 * dif_q + t[r][5]), out + 3 * BLOCK);
    }
}

// products[TILE_P][TILE_O] of a register tile += x[block][TILE_P][BLOCK] * u[block][BLOCK][TILE_O], summed over blocks and
// channels; `step` floats lie between two blocks of x. All other offsets are constants: the loop needs two addresses.
void winograd_multiply(__local const float *restrict x, __global const float *restrict u, __local float *restrict products,
                       const int blocks, const int step, const int fresh, __global const float *restrict next)
{
    vec sum[TILE_V][TILE_P];
    UNROLL for (int v = 0; v < TILE_V; v++)
        UNROLL for (int p = 0; p < TILE_P; p++) sum[v][p] = 0;
    if (!fresh)
        UNROLL for (int v = 0; v < TILE_V; v++)
            UNROLL for (int p = 0; p < TILE_P; p++) sum[v][p] = LOADL(products + p * TILE_O + v * VEC);
    for (int i = 0; i < blocks; i++, x += step, u += BLOCK * TILE_O, next += BLOCK * TILE_O)
        UNROLL for (int l = 0; l < BLOCK; l++) {
            PREFETCH(next + l * TILE_O);
            vec weight[TILE_V];
            UNROLL for (int v = 0; v < TILE_V; v++) weight[v] = LOADF(u + l * TILE_O + v * VEC);
            UNROLL for (int p = 0; p < TILE_P; p++) {
                const vec value = (vec)(x[p * BLOCK + l]);
                UNROLL for (int v = 0; v < TILE_V; v++) sum[v][p] += value * weight[v];
            }
        }
    UNROLL for (int p = 0; p < TILE_P; p++)
        UNROLL for (int v = 0; v < TILE_V; v++) STOREL(sum[v][p], products + p * TILE_O + v * VEC);
}

// Work-group = (group of tiles, panel of the output channels). It transforms a chunk of input blocks, adds what they give to the
// products of all its output channels, and goes on with the next chunk: both stay in the second-level cache.
// u [output tile][point][input channel][TILE_O].
__kernel SINGLE void winograd_gather(
    __global const act *restrict x, __global const float *restrict u, __global act *restrict y,
    __constant Geometry *restrict geometry,
    __local float *restrict inputs,    // [POINTS]([chunk][group_tiles][BLOCK] + PAD): transformed input
    __local float *restrict products)  // [POINTS]([panel / TILE_O][group_tiles][TILE_O] + PAD)
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

        for (int point = 0; point < POINTS; point++)
            for (int o = 0; o < outs; o += TILE_O) {
                const int wrap = o + TILE_O >= outs;  // the weights that are used next: of the next channels, or the next point
                __global const float *us = u + (((long)(o0 + o) / TILE_O * POINTS + point) * g.in_blocks + i0) * BLOCK * TILE_O;
                __global const float *next = us + (wrap ? 1 - o / TILE_O * POINTS : POINTS) * g.in_blocks * BLOCK * TILE_O;
                for (int t = 0; t < tiles; t += TILE_P)
                    winograd_multiply(inputs + point * plane + t * BLOCK, us,
                                      products + point * product_plane + o * g.group_tiles + t * TILE_O, blocks, step, i0 == 0,
                                      next);
            }
    }
    for (int t = 0; t < tiles; t++) {
        const int n = (first + t) / image_tiles, place = (first + t) % image_tiles;
        const int row = place / g.tile_cols * OUT, col = place % g.tile_cols * OUT;
        for (int o = 0; o < outs; o += VEC)
            winograd_transform_out(products + o / TILE_O * TILE_O * g.group_tiles + t * TILE_O + o % TILE_O, product_plane,
                y + (((long)n * g.out_blocks + (o0 + o) / BLOCK) * g.out_height * g.out_width
                     + row * g.out_width + col) * BLOCK + (o0 + o) % BLOCK,
                g.out_width, g.out_height - row, g.out_width - col);
    }
}

// Reads the 4x4 gradients of a tile, zeros outside the image, and writes A dy A^T to out[point * plane].
void winograd_transform_grad(__global const act *restrict dy, __local float *restrict out, const int plane, const int width,
                             const int rows, const int cols)
{
#define TRANSFORM_GRAD(y0, y1, y2, y3, out)                              \
    {                                                                    \
        const vec even_p = y0 + P2 * y2, odd_p = P * y1 + P * P2 * y3;   \
        const vec even_q = y0 + Q2 * y2, odd_q = Q * y1 + Q * Q2 * y3;   \
        out(0, y0);                                                      \
        out(1, even_p + odd_p);                                          \
        out(2, even_p - odd_p);                                          \
        out(3, even_q + odd_q);                                          \
        out(4, even_q - odd_q);                                          \
        out(5, y3);                                                      \
    }
    vec t[EDGE][OUT];
    UNROLL for (int c = 0; c < OUT; c++) {
        vec v[OUT];
        UNROLL for (int r = 0; r < OUT; r++) {
            v[r] = 0;
            if (r < rows && c < cols) v[r] = LOAD(dy + (r * width + c) * BLOCK);
        }
#define DOWN(r, value) t[r][c] = value
        TRANSFORM_GRAD(v[0], v[1], v[2], v[3], DOWN)
#undef DOWN
    }
    UNROLL for (int r = 0; r < EDGE; r++) {
#define ACROSS(c, value) STOREL(value, out + (r * EDGE + c) * plane)
        TRANSFORM_GRAD(t[r][0], t[r][1], t[r][2], t[r][3], ACROSS)
#undef ACROSS
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

// Writes G^T m G, m[point * plane], to out[channel * step + tap] for `channels` neighbouring output channels.
void winograd_transform_weight_grad(__local const float *restrict m, const int plane, __global float *restrict out,
                                    const long step, const int channels)
{
#define TRANSFORM_BACK(m0, m1, m2, m3, m4, m5, out)                       \
    {                                                                     \
        const vec sum_p = AT_P * (m1 + m2), dif_p = AT_P * P * (m1 - m2); \
        const vec sum_q = AT_Q * (m3 + m4), dif_q = AT_Q * Q * (m3 - m4); \
        out(0, AT_0 * m0 + (sum_p + sum_q));                              \
        out(1, dif_p + dif_q);                                            \
        out(2, m5 + (P2 * sum_p + Q2 * sum_q));                           \
    }
    vec t[3][EDGE], taps[3][3];
    UNROLL for (int c = 0; c < EDGE; c++) {
        vec v[EDGE];
        UNROLL for (int r = 0; r < EDGE; r++) v[r] = LOADL(m + (r * EDGE + c) * plane);
#define DOWN(r, value) t[r][c] = value
        TRANSFORM_BACK(v[0], v[1], v[2], v[3], v[4], v[5], DOWN)
#undef DOWN
    }
    UNROLL for (int r = 0; r < 3; r++) {
#define ACROSS(c, value) taps[r][c] = value
        TRANSFORM_BACK(t[r][0], t[r][1], t[r][2], t[r][3], t[r][4], t[r][5], ACROSS)
#undef ACROSS
    }
    for (int l = 0; l < channels; l++)
        UNROLL for (int k = 0; k < 9; k++) out[l * step + k] = ((const float *)taps)[k * VEC + l];
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
        for (int point = 0; point < POINTS; point++)
            for (int o = 0; o < outs; o += TILE_O)
                for (int i = 0; i < ins; i += TILE_E)
                    winograd_accumulate(inputs + point * plane + i, grads + point * grad_plane + o * g.group_tiles,
                                        sums + point * sum_plane + o * padded + i * TILE_O, tiles, row);
    }
    for (int o = 0; o < outs; o += VEC)
        for (int i = 0; i < min(ins, g.in_channels - i0); i++)
            winograd_transform_weight_grad(
                sums + o / TILE_O * TILE_O * padded + i * TILE_O + o % TILE_O, sum_plane,
                dw + (long)segment * g.segment_size + ((long)(o0 + o) * g.in_channels + i0 + i) * 9, (long)g.in_channels * 9,
                min(VEC, g.out_channels - o0 - o));
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

// U = G w G^T of one vector of output channels, w[tap * TILE_O] and out[point * step].
void winograd_transform_weight(const float *restrict w, __global float *restrict out, const long step)
{
#define TRANSFORM_WEIGHT(w0, w1, w2, out)                                     \
    {                                                                         \
        const vec even_p = AT_P * w0 + AT_P * P2 * w2, odd_p = AT_P * P * w1; \
        const vec even_q = AT_Q * w0 + AT_Q * Q2 * w2, odd_q = AT_Q * Q * w1; \
        out(0, AT_0 * w0);                                                    \
        out(1, even_p + odd_p);                                               \
        out(2, even_p - odd_p);                                               \
        out(3, even_q + odd_q);                                               \
        out(4, even_q - odd_q);                                               \
        out(5, w2);                                                           \
    }
    vec t[EDGE][3];
    UNROLL for (int c = 0; c < 3; c++) {
        vec v[3];
        UNROLL for (int r = 0; r < 3; r++) {
            v[r] = *(const vec *)(w + (r * 3 + c) * TILE_O);
#if HALF
            v[r] = ROUND_HALF(v[r]);
#endif
        }
#define DOWN(r, value) t[r][c] = value
        TRANSFORM_WEIGHT(v[0], v[1], v[2], DOWN)
#undef DOWN
    }
    UNROLL for (int r = 0; r < EDGE; r++) {
#define ACROSS(c, value) STOREF(value, out + (r * EDGE + c) * step)
        TRANSFORM_WEIGHT(t[r][0], t[r][1], t[r][2], ACROSS)
#undef ACROSS
    }
}

// packed [output tile][point][channel][TILE_O] from master [out][in][9], rounded to fp16 when activations are; transposed: from
// [in][out][9], turned by 180 degrees. One work-item per (input block, output tile): it writes whole cache lines.
__kernel void winograd_pack(__global const float *restrict master, __global float *restrict packed,
                            __constant Geometry *restrict geometry)
{
    const Geometry g = *geometry;
    const int i0 = get_global_id(0) * BLOCK, o0 = get_global_id(1) * TILE_O, rows = get_global_size(0) * BLOCK;
    const int ins = min(BLOCK, g.in_channels - i0), outs = min(TILE_O, g.out_channels - o0);
    const long step_i = g.transposed ? g.out_channels * 9 : 9, step_o = g.transposed ? 9 : g.in_channels * 9;
    __global const float *source = master + i0 * step_i + o0 * step_o;
    __global float *out = packed + ((long)get_global_id(1) * POINTS * rows + i0) * TILE_O;
    float w[9 * TILE_O] __attribute__((aligned(64)));
    for (int k = 0; k < 9 * TILE_O; k++) w[k] = 0;
    for (int i = 0; i < BLOCK; i++, source += step_i) {
        if (i < ins)
            for (int o = 0; o < outs; o++)
                UNROLL for (int k = 0; k < 9; k++) w[k * TILE_O + o] = source[o * step_o + (g.transposed ? 8 - k : k)];
        else
            for (int k = 0; k < 9 * TILE_O; k++) w[k] = 0;
        for (int o = 0; o < TILE_O; o += VEC)
            winograd_transform_weight(w + o, out + i * TILE_O + o, (long)rows * TILE_O);
    }
}
