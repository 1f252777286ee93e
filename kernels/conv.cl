// conv.cl - convolution by register tiles: forward and gradient of the input (conv_gather), gradient of the weights
// (conv_weight, conv_weight_reduce), and the copies of the weights that they read (conv_pack, see packing.cl).
//
// Forward and gradient of the input are one computation. Output pixels form cells of out_step x out_step; the pixel at
// (out_row, out_col) of cell (a, b), its phase, gathers over the taps t of that phase
//
//   y[n, o, a * out_step + out_row, b * out_step + out_col] =
//       sum over input blocks i, taps t, channels c of
//       x[n, i, a * in_step + row(t), b * in_step + col(t), c] * w[o, i, t, c]
//
// Forward: cells are pixels, in_step = stride, row(t) = kh - padding. Gradient of the input with stride s: cells of s x s
// pixels, in_step = 1, and each phase has the taps that hit it, if any. So any kernel size, stride, padding and group count
// is a matter of the tables the host passes, and one compiled program serves a whole network.
//
// A work-group (one work-item) takes a few lines (rows of cells; they count on from image to image). It first converts the
// input rows it needs to fp32 in local memory - the patch [block][row][column][CU], with zeros outside the image - and then
// runs over output channels and pixels with TILE_P x TILE_V vectors of accumulators in registers. Where there are many input
// channels it does so slice by slice, so that the weights of a slice stay in the first-level cache. Each output element is
// one sum in the order (block, tap, channel), whatever the tile (see tile.cl) and the slice: sizes never change a bit of it.
//
// CU      channels of a block that are computed: 16; 4 or 1 for images with that few channels
// GROUP   0, or 1, 2, 4, 8: convolution groups of that many channels in and out. A tile is one block then (TILE_O = 16) and
//         reads that block only; its lane l sums over the GROUP channels l / GROUP * GROUP + c, nothing else is multiplied.
// TERMS   channels of an input block that an output lane sums over: GROUP, or CU, or 2 or 3 of the 4 of CU
// DIRECT  1: conv_gather reads x, conv_weight x and dy where they lie, because their copies in local memory would be the same:
//         fp32 and 1x1 weights, without padding and with stride 1 (in the gradient of the input any)
// JOIN    1: conv_gather finds another term of the gradient of z in y, z = relu(...), and leaves there what goes on from their sum:
//         y = y + what it computes where z is positive, 0 elsewhere. 0: y is only written
// AHEAD   register tiles between what conv_gather multiplies and what it fetches with DIRECT; otherwise that is the next patch
//
// Packed weights: [output tile][input block][tap][TERMS][TILE_O].

#if VEC > 1
// sum[v][p] += the part of TILE_V x TILE_P outputs that `blocks` blocks of the patch contribute, `plane` floats apart; ws are
// their weights. With `row` (a constant) the pixels are neighbours in the patch: one address register instead of TILE_P.
// Meanwhile it fetches the same blocks of the cells at `ahead`, if that is not 0.
INLINE void conv_multiply(vec sum[TILE_V][TILE_P], SOURCE *patch, const int plane, __local const int *table,
                          const int row, __global const float *ws, __global const int *taps, const int tap_count,
                          const int blocks, __global const act *ahead, const Geometry g)
{
    int offset[TILE_P];
    UNROLL for (int p = 0; p < TILE_P; p++) offset[p] = row ? p * CU : table[2 * p];
    if (row) patch += table[0];
    for (int i = 0; i < blocks; i++) {
        if (ahead) conv_fetch(ahead + (long)i * g.in_height * g.in_width * BLOCK, g);
        for (int t = 0; t < tap_count; t++) {
            SOURCE *xt = patch + i * plane + taps[2 * t];
            __global const float *wt = ws + (i * g.taps + taps[2 * t + 1]) * TERMS * TILE_O;
            UNROLL for (int c = 0; c < TERMS; c++) {
                vec weight[TILE_V];
                UNROLL for (int v = 0; v < TILE_V; v++) weight[v] = LOADF(wt + c * TILE_O + v * VEC);
                UNROLL for (int p = 0; p < TILE_P; p++)
                    UNROLL for (int v = 0; v < TILE_V; v++) sum[v][p] += SOURCE_VALUE(xt + offset[p], c, v) * weight[v];
            }
        }
    }
}

// Work-group = (lines, output tiles).
__kernel SINGLE void conv_gather(
    __global const act *restrict x, __global const float *restrict w, __global act *restrict y,
#if JOIN
    __global const act *restrict z,
#endif
    __global const int *restrict phases,  // [phases][4]: out_row, out_col, first tap, number of taps
    __global const int *restrict taps,    // [taps][2]: offset in the patch, index in the packed weights
    __constant Geometry *restrict geometry,
#if !DIRECT
    __local float *restrict patch,
#endif
    __local float *restrict sums,         // [output tile][entry of the table][TILE_O]; only with several slices
    __local int *restrict table)          // [phases]: its end, then [entries][2]: offset in the patch (DIRECT: x), in y or -1
{
    const Geometry g = *geometry;
    const int line = get_global_id(0) * g.group_lines, lines = min(g.group_lines, g.images * g.grid_height - line);
    const int first_tile = get_global_id(1) * g.group_tiles;
    const int tiles = min(g.group_tiles, (g.out_blocks * BLOCK + TILE_O - 1) / TILE_O - first_tile);

    const int plane = DIRECT ? g.in_height * g.in_width * BLOCK : g.patch_rows * g.patch_width * CU;
    __local int *entry = table + g.phases;
    int entries = 0;
    for (int f = 0; f < g.phases; f++) {
        entries += conv_list(entry + 2 * entries, 2, line, lines, phases[4 * f], phases[4 * f + 1], g);
        for (; entries % TILE_P; entries++) {  // computed and dropped
            entry[2 * entries] = 0;
            entry[2 * entries + 1] = -1;
        }
        table[f] = entries;
    }
    const int base = conv_first_block(g, first_tile * TILE_O), read = min(g.read_blocks, g.in_blocks - base);
    for (int block = 0; block < read; block += g.group_blocks) {  // several times only without convolution groups
        const int blocks = min(g.group_blocks, read - block), last = block + blocks == read;
#if DIRECT
        SOURCE *patch = x + (long)(base + block) * plane;
#else
        conv_load_patch(x, patch, line, lines, base + block, blocks, g);
#endif
        for (int tile = first_tile; tile < first_tile + tiles; tile++) {
            const int first_block = conv_first_block(g, tile * TILE_O) - base;
            SOURCE *xs = patch + first_block * plane;
            const int summed = min(blocks, g.tile_blocks);
            __global const float *ws = w + ((long)tile * g.tile_blocks + block) * g.taps * TERMS * TILE_O;
            for (int f = 0, e = 0; f < g.phases; f++)
                for (int start = e; e < table[f]; e += TILE_P) {
                    __global const act *ahead = 0;  // what the first tile reads soon, the others find in the cache
#if DIRECT
                    if (tile == first_tile) ahead = xs + entry[2 * e] + AHEAD * TILE_P * BLOCK;
#else
                    if (tile == first_tile)
                        ahead = conv_cell(x, last ? line + lines : line, e - start,
                                          base + first_block + (last ? 0 : block + blocks), g);
#endif
                    __local float *kept = sums + ((tile - first_tile) * entries + e) * TILE_O;
                    const long plane_y = (long)g.out_height * g.out_width * BLOCK;
#if JOIN
                    if (last)
                        UNROLL for (int p = 0; p < TILE_P; p++)
                            UNROLL for (int v = 0; v < TILE_V; v++) {
                                const long at = (tile * TILE_O + v * VEC) / BLOCK * plane_y + entry[2 * (e + p) + 1];
                                PREFETCH(y + at);
                                PREFETCH(z + at);
                            }
#endif
                    vec sum[TILE_V][TILE_P];
                    UNROLL for (int v = 0; v < TILE_V; v++)
                        UNROLL for (int p = 0; p < TILE_P; p++)
                            sum[v][p] = block > 0 ? LOADL(kept + p * TILE_O + v * VEC) : (vec)(0);
                    __local const int *first = entry + 2 * e;
                    __global const int *taps_here = taps + 2 * phases[4 * f + 2];
                    if (first[2 * TILE_P - 2] - first[0] == (TILE_P - 1) * CU)
                        conv_multiply(sum, xs, plane, first, 1, ws, taps_here, phases[4 * f + 3], summed, ahead, g);
                    else
                        conv_multiply(sum, xs, plane, first, 0, ws, taps_here, phases[4 * f + 3], summed, ahead, g);
                    UNROLL for (int p = 0; p < TILE_P; p++)
                        UNROLL for (int v = 0; v < TILE_V; v++) {
                            const int o = tile * TILE_O + v * VEC, at = entry[2 * (e + p) + 1];
                            const long to = o / BLOCK * plane_y + o % BLOCK + at;
                            if (!last)
                                STOREL(sum[v][p], kept + p * TILE_O + v * VEC);
                            else if (at >= 0 && o < g.out_blocks * BLOCK)
                                STORE(JOINED(sum[v][p], to), y + to);
                        }
                }
        }
    }
}

// The term is part of an entry's address, unless a term is a permutation of lanes: then TILE_E is a multiple of GROUP.
#if GROUP % VEC
#define ENTRY_TERMS GROUP
#else
#define ENTRY_TERMS 1
#endif
// Entries of a register tile are neighbours where it takes them from one tap: one address register instead of TILE_E.
#define NEIGHBOURS (ENTRY_TERMS == 1 && TERMS % TILE_E == 0)

// Adds the products of TILE_E entries of the patch with an output tile of dy, over the pixels, to TILE_E rows of sums.
// With DIRECT, `patch` is the first of the input blocks in x and `grad` the first block of the tile in dy; `plane` floats after
// that lies the second. Pixels of a run have a `pitch` in the patch. Meanwhile one of 2^spread parts of a block of x or dy of the
// lines that come next is fetched, at the places (AT_X or AT_Y) in the table `next`: spread over the multiplications, as memory
// would be too slow for all of it at once.
INLINE void conv_accumulate(__local float *sums, SOURCE *patch, __local const int *entry, SOURCE *grad, const int plane,
                            __local const int *table, const int pixels, const int pitch, __global const act *ahead,
                            __local const int *next, const int spread)
{
    SOURCE *xs[TILE_E];
    vec sum[TILE_E][TILE_V];
    UNROLL for (int j = 0; j < TILE_E; j++) xs[j] = NEIGHBOURS ? patch + entry[0] + j : patch + entry[j];
    UNROLL for (int j = 0; j < TILE_E; j++)
        UNROLL for (int v = 0; v < TILE_V; v++) sum[j][v] = LOADL(sums + j * TILE_O + v * VEC);
    for (int p = 0; p < pixels;) {
        const int end = p + table[4 * p + RUN];
        long offset = table[4 * p + AT_PATCH];
        SOURCE *grads = grad + (DIRECT ? table[4 * p + AT_Y] : p * TILE_O);
        for (; p < end; p++, offset += pitch, grads += DIRECT ? BLOCK : TILE_O) {
            PREFETCH_LATER(ahead + next[4 * (p >> spread)]);
            vec dys[TILE_V];
            UNROLL for (int v = 0; v < TILE_V; v++)
                dys[v] = *(SOURCE_VEC *)(grads + (DIRECT ? v * VEC / BLOCK * plane + v * VEC % BLOCK : v * VEC));
            UNROLL for (int j = 0; j < TILE_E; j++)
                UNROLL for (int v = 0; v < TILE_V; v++)
                    sum[j][v] += SOURCE_VALUE(xs[j] + offset, j % ENTRY_TERMS, v) * dys[v];
        }
    }
    UNROLL for (int j = 0; j < TILE_E; j++)
        UNROLL for (int v = 0; v < TILE_V; v++) STOREL(sum[j][v], sums + j * TILE_O + v * VEC);
}

// Gradient of the weights between group_tiles output tiles and group_blocks input blocks, summed over the lines of a segment,
// pixel by pixel. With one segment it is the gradient itself; with several a part of it, for conv_weight_reduce:
// partial[segment][output tile][input block of the tile][tap * TERMS + c][TILE_O].
// Work-group = (segment, output tiles, input blocks).
__kernel SINGLE void conv_weight(
    __global const act *restrict x, __global const act *restrict dy, __global float *restrict dw,
    __global const int *restrict taps, __constant Geometry *restrict geometry,
#if !DIRECT
    __local float *restrict patch,
    __local float *restrict grad,   // [pixel][TILE_O] of dy, of one output tile
#endif
    __local float *restrict sums,   // [output tile][entry][TILE_O]
    __local int *restrict table,    // [these lines, the next][pixels][4], see conv_runs
    __local int *restrict entry)    // [entries = input block, tap, c] offset in the patch
{
    const Geometry g = *geometry;
    const int segment = get_global_id(0), first_tile = get_global_id(1) * g.group_tiles;
    const int tiles = min(g.group_tiles, (g.out_blocks * BLOCK + TILE_O - 1) / TILE_O - first_tile);
    const int first_block = get_global_id(2) * g.group_blocks;  // of those that the tile reads
    const int blocks = min(g.group_blocks, g.tile_blocks - first_block);
    const int block = conv_first_block(g, first_tile * TILE_O) + first_block;
    const int in_plane = g.in_height * g.in_width * BLOCK, out_plane = g.out_height * g.out_width * BLOCK;
    const int rows = g.taps * TERMS, entries = blocks * rows, padded = (entries + TILE_E - 1) / TILE_E * TILE_E;

    for (int i = 0; i < blocks; i++)
        for (int e = 0; e < rows; e++)
            entry[i * rows + e] = i * (DIRECT ? in_plane : g.patch_rows * g.patch_width * CU) + taps[2 * (e / TERMS)]
                                  + e % TERMS / ENTRY_TERMS;
    for (int e = entries; e < padded; e++) entry[e] = 0;
    for (int i = 0; i < tiles * padded * TILE_O; i += VEC) STOREL((vec)(0), sums + i);

    const int start = conv_segment(g, segment), end = conv_segment(g, segment + 1);
    const int pitch = DIRECT ? BLOCK : g.in_step / g.col_step * CU;
    int listed = conv_runs(table, start, min(g.group_lines, end - start), pitch, g);
    for (int line = start, turn = 0; line < end; line += g.group_lines, turn ^= 1) {
        const int lines = min(g.group_lines, end - line), after = min(g.group_lines, end - line - lines), pixels = listed;
        __local int *now = table + turn * 4 * g.group_lines * g.grid_width;
        __local int *next = after ? table + (turn ^ 1) * 4 * g.group_lines * g.grid_width : now;
        if (after) listed = conv_runs(next, line + lines, after, pitch, g);
#if DIRECT
        SOURCE *patch = x + (long)block * in_plane;
#else
        conv_load_patch(x, patch, line, lines, block, blocks, g);
#endif
        const int calls = tiles * (padded / TILE_E), spread = conv_spread(calls, blocks + tiles * TILE_O / BLOCK);
        for (int tile = 0, call = 0; tile < tiles; tile++) {
            const int out = (first_tile + tile) * TILE_O / BLOCK;
#if DIRECT
            SOURCE *grad = dy + (long)out * out_plane + (first_tile + tile) * TILE_O % BLOCK;
#else
            conv_load_grad(dy, grad, line, lines, first_tile + tile, g);
#endif
            for (int e = 0; e < padded; e += TILE_E, call++) {
                const int fetched = call >> spread, part = call - (fetched << spread);
                conv_accumulate(sums + (tile * padded + e) * TILE_O, patch, entry + e, grad,
                                out + 1 < g.out_blocks ? out_plane : 0, now, pixels, pitch,
                                conv_ahead(x, dy, fetched, block, blocks, first_tile, tiles, g),
                                next + (fetched < blocks ? AT_X : AT_Y) + 4 * (part * pixels >> spread), spread);
            }
        }
    }
    const long all_tiles = (g.out_blocks * BLOCK + TILE_O - 1) / TILE_O;
    for (int tile = 0; tile < tiles; tile++)
        for (int i = 0; i < blocks; i++) {
            __local const float *source = sums + (tile * padded + i * rows) * TILE_O;
            __global float *part =
                dw + ((segment * all_tiles + first_tile + tile) * g.tile_blocks + first_block + i) * rows * TILE_O;
            if (g.segments == 1)
                conv_write_gradient(source, dw, first_tile + tile, block + i, g);
            else
                for (int k = 0; k < rows * TILE_O; k += VEC) STOREF(LOADL(source + k), part + k);
        }
}

// Adds the segments pairwise in a fixed binary tree. Work-group = (input block of the tile, output tile).
__kernel SINGLE void conv_weight_reduce(
    __global const float *restrict partial, __global float *restrict dw, __constant Geometry *restrict geometry,
    __local float *restrict sums)  // [tap * TERMS + c][TILE_O]
{
    const Geometry g = *geometry;
    const int tile = get_global_id(1), size = g.taps * TERMS * TILE_O;
    const long stride = (long)get_global_size(1) * g.tile_blocks * size;
    __global const float *source = partial + ((long)tile * g.tile_blocks + get_global_id(0)) * size;
    for (int k = 0; k < size; k += VEC) {
        vec part[64];  // segments <= 64, see dpresnet/convolution.py
        for (int s = 0; s < g.segments; s++) part[s] = LOADF(source + s * stride + k);
        for (int width = g.segments; width > 1; width = (width + 1) / 2)
            for (int s = 0; s < width / 2; s++) part[s] += part[s + (width + 1) / 2];
        STOREL(part[0], sums + k);
    }
    conv_write_gradient(sums, dw, tile, conv_first_block(g, tile * TILE_O) + get_global_id(0), g);
}

#else  // VEC == 1: one work-item per output element, for devices without a kernel of their own; same sums, same order

// Global size: (channels of y with padding, pixels of y, images); taps hold (row(t), index in the packed weights, col(t)).
__kernel void conv_gather(
    __global const act *restrict x, __global const float *restrict w, __global act *restrict y,
#if JOIN
    __global const act *restrict z,
#endif
    __global const int *restrict phases, __global const int *restrict taps, __constant Geometry *restrict geometry)
{
    const Geometry g = *geometry;
    const int o = get_global_id(0), ow = get_global_id(1) % g.out_width, oh = get_global_id(1) / g.out_width;
    const int a = oh / g.out_step, b = ow / g.out_step, phase = oh % g.out_step * g.out_step + ow % g.out_step;
    const int first = phases[4 * phase + 2], last = first + phases[4 * phase + 3];
    const int n = get_global_id(2), tile = o / g.tile_channels, first_block = conv_first_block(g, tile * g.tile_channels);
    float sum = 0;
    for (int i = 0; i < g.tile_blocks; i++)
        for (int t = first; t < last; t++) {
            const int ih = a * g.in_step + taps[3 * t], iw = b * g.in_step + taps[3 * t + 2];
            if (ih < 0 || ih >= g.in_height || iw < 0 || iw >= g.in_width) continue;
            __global const act *xs =
                x + ((((long)n * g.in_blocks + first_block + i) * g.in_height + ih) * g.in_width + iw) * BLOCK;
            __global const float *ws = w + ((long)(tile * g.tile_blocks + i) * g.taps + taps[3 * t + 1])
                                               * TERMS * g.tile_channels + o % g.tile_channels;
            for (int c = 0; c < TERMS; c++) sum += LOAD(xs + c) * ws[c * g.tile_channels];
        }
    const long at = ((((long)n * g.out_blocks + o / BLOCK) * g.out_height + oh) * g.out_width + ow) * BLOCK + o % BLOCK;
    STORE(JOINED(sum, at), y + at);
}

// Global size: (entries * tile_channels, output tiles * tile_blocks, segments).
__kernel void conv_weight(
    __global const act *restrict x, __global const act *restrict dy, __global float *restrict partial,
    __global const int *restrict taps, __constant Geometry *restrict geometry)
{
    const Geometry g = *geometry;
    const int lane = get_global_id(0) % g.tile_channels, e = get_global_id(0) / g.tile_channels;
    const int tile = get_global_id(1) / g.tile_blocks, segment = get_global_id(2);
    const int block = conv_first_block(g, tile * g.tile_channels) + get_global_id(1) % g.tile_blocks;
    const int t = e / TERMS, c = e % TERMS, o = tile * g.tile_channels + lane;
    float sum = 0;
    for (int line = conv_segment(g, segment); line < conv_segment(g, segment + 1); line++) {
        const int n = line / g.grid_height, a = line % g.grid_height, ih = a * g.in_step + taps[3 * t];
        if (ih < 0 || ih >= g.in_height) continue;
        for (int b = 0; b < g.grid_width; b++) {
            const int iw = b * g.in_step + taps[3 * t + 2];
            if (iw < 0 || iw >= g.in_width) continue;
            sum += LOAD(x + ((((long)n * g.in_blocks + block) * g.in_height + ih) * g.in_width + iw) * BLOCK + c)
                 * LOAD(dy + ((((long)n * g.out_blocks + o / BLOCK) * g.out_height + a) * g.out_width + b) * BLOCK
                           + o % BLOCK);
        }
    }
    partial[((long)segment * get_global_size(1) + get_global_id(1)) * get_global_size(0) + get_global_id(0)] = sum;
}

// Adds the segments pairwise in a fixed binary tree and writes the gradient in the order of the parameter
// [out_channels][in_group][tap]. Global size: (tile_channels * TERMS, input blocks of the tile, output tiles).
__kernel void conv_weight_reduce(
    __global const float *restrict partial, __global float *restrict dw, __constant Geometry *restrict geometry)
{
    const Geometry g = *geometry;
    const int lane = get_global_id(0) % g.tile_channels, c = get_global_id(0) / g.tile_channels, tile = get_global_id(2);
    const int i = (conv_first_block(g, tile * g.tile_channels) + get_global_id(1)) * BLOCK + c;
    const int o = tile * g.tile_channels + lane, group = i / g.in_group;
    const long stride = (long)get_global_size(2) * g.tile_blocks * g.taps * TERMS * g.tile_channels;
    if (i >= g.in_channels || o >= g.out_channels || o / g.out_group != group) return;
    __global const float *source =
        partial + ((long)(tile * g.tile_blocks + get_global_id(1)) * g.taps * TERMS + c) * g.tile_channels + lane;
    for (int t = 0; t < g.taps; t++, source += TERMS * g.tile_channels) {
        float part[64];  // segments <= 64, see dpresnet/convolution.py
        for (int s = 0; s < g.segments; s++) part[s] = source[s * stride];
        for (int width = g.segments; width > 1; width = (width + 1) / 2)
            for (int s = 0; s < width / 2; s++) part[s] += part[s + (width + 1) / 2];
        dw[((long)o * g.in_group + i - group * g.in_group) * g.taps + t] = part[0];
    }
}
#endif

// Copies the weights into the order conv_gather reads.
// Work-item = (part of the input blocks of a tile, part of the output tiles); without vectors = (tap and channel, input block,
// output tile).
#if VEC > 1
__kernel SINGLE void conv_pack(__global const float *restrict master, __global float *restrict packed,
                               __constant Geometry *restrict geometry)
{
    const Geometry g = *geometry;
    const int tiles = (g.out_blocks * BLOCK + TILE_O - 1) / TILE_O, last = tiles * (get_global_id(1) + 1) / get_global_size(1);
    const int first_block = g.tile_blocks * get_global_id(0) / get_global_size(0);
    const int last_block = g.tile_blocks * (get_global_id(0) + 1) / get_global_size(0);
    for (int tile = tiles * get_global_id(1) / get_global_size(1); tile < last; tile++)
        for (int b = first_block; b < last_block; b++)
            conv_pack_tile(master, packed + ((long)tile * g.tile_blocks + b) * g.taps * TERMS * TILE_O, tile * TILE_O,
                           (conv_first_block(g, tile * TILE_O) + b) * BLOCK, g);
}
#else
__kernel void conv_pack(__global const float *restrict master, __global float *restrict packed,
                        __constant Geometry *restrict geometry)
{
    const Geometry g = *geometry;
    const int t = get_global_id(0) / TERMS, c = get_global_id(0) % TERMS, tile = get_global_id(2), b = get_global_id(1);
    const int o = tile * BLOCK, i = (conv_first_block(g, o) + b) * BLOCK + c;
    __global float *out = packed + (((long)tile * g.tile_blocks + b) * g.taps * TERMS + get_global_id(0)) * BLOCK;
    for (int l = 0; l < BLOCK; l++) {
        float value = conv_pack_value(master, o + l, i, c, t, g);
#if HALF
        value = ROUND_HALF(value);
#endif
        out[l] = value;
    }
}
#endif
