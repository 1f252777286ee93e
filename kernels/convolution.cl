// convolution.cl - what the kernels of conv.cl build on: geometry, what is fetched ahead, the patch of the input and the output
// tile of dy that a work-group converts to fp32 in local memory, and how it writes a gradient of weights. The build puts this
// text in front of that source.
//
// CU, GROUP, TERMS, DIRECT and AHEAD are explained in conv.cl
#ifndef CU
#define CU 16
#endif
#ifndef GROUP
#define GROUP 0
#endif
#ifndef DIRECT
#define DIRECT 0
#endif
#define AHEAD 2
#ifndef TERMS
#define TERMS (GROUP ? GROUP : CU)
#endif

// Geometry of one launch, in the order of the fields of `Geometry` in dpresnet/convolution.py.
typedef struct {
    int images, in_blocks, in_height, in_width;  // x [images][in_blocks][in_height][in_width][BLOCK]
    int out_blocks, out_height, out_width;       // y
    int grid_height, grid_width;                 // cells of an image; a line is a row of cells
    int out_step, in_step;
    int phases;                                  // conv_gather: out_step * out_step
    int taps;                                    // of the window, in the packed weights
    int row_min, col_min;                        // smallest row(t) and col(t)
    int patch_width, row_step, col_step;         // a patch keeps every row_step-th row, col_step-th column
    int patch_span;                              // rows of a patch = (lines - 1) * in_step / row_step + patch_span
    int patch_rows;                              // most rows of a patch, over the images that the lines belong to
    int group_lines;                             // lines that are computed from one patch
    int group_blocks;                            // input blocks in a patch
    int read_blocks;                             // input blocks that one work-group reads, patch by patch
    int group_tiles;                             // output tiles that one work-group computes
    int out_group, in_group;                     // channels per convolution group
    int tile_blocks;                             // input blocks that one output tile reads
    int segments;                                // conv_weight: parts into which the lines are divided
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

// Lines are divided among segments as evenly as can be; this is where a segment begins.
int conv_segment(const Geometry g, const int segment)
{
    return (long)g.images * g.grid_height * segment / g.segments;
}

#if VEC > 1
// What term c of vector v of a tile is multiplied with at the pixel xs of a patch; c and v are constants.
INLINE vec conv_value(__local const float *xs, const int c, const int v)
{
#if GROUP == 0
    return (vec)(xs[c]);
#elif GROUP % VEC == 0
    return (vec)(xs[v * VEC + c]);
#else
    const vec all = LOADL(xs + v * VEC);
    vec value;
    UNROLL for (int l = 0; l < VEC; l++) ((float *)&value)[l] = ((const float *)&all)[l / GROUP * GROUP + c];
    return value;
#endif
}

#if DIRECT
#define SOURCE __global const float
#define SOURCE_VEC __global const vec
#define SOURCE_VALUE(xs, c, v) ((vec)((xs)[c]))
#else
#define SOURCE __local const float
#define SOURCE_VEC __local const vec
#define SOURCE_VALUE(xs, c, v) conv_value(xs, c, v)
#endif

// Fetches what TILE_P cells of a line read of a block of x, from the first of them on. Spread over the multiplications,
// as memory would be too slow for all that is copied into a patch at once.
INLINE void conv_fetch(__global const act *x, const Geometry g)
{
    const int rows = g.in_step / g.row_step, columns = TILE_P * (g.in_step / g.col_step);
    for (int r = 0; r < rows; r++, x += g.in_width * g.row_step * BLOCK)
        for (int c = 0; c < columns; c++) PREFETCH_LATER(x + c * g.col_step * BLOCK);
}

// Where x holds block `block` of cell `cell` of the lines from `line` on; beyond the last image, a place to fetch in vain.
INLINE __global const act *conv_cell(__global const act *x, const int line, const int cell, const int block, const Geometry g)
{
    const int l = line + cell / g.grid_width, n = l / g.grid_height, a = l % g.grid_height;
    return x + ((((long)n * g.in_blocks + block) * g.in_height + a * g.in_step) * g.in_width
                + cell % g.grid_width * g.in_step) * BLOCK;
}

// The block of x, and after those the block of dy, that a work-group fetches as its `fetched`-th; at last only the last one.
INLINE __global const act *conv_ahead(__global const act *x, __global const act *dy, const int fetched, const int block,
                                      const int blocks, const int first_tile, const int tiles, const Geometry g)
{
    const int last = min((first_tile + tiles) * TILE_O - 1, g.out_blocks * BLOCK - 1) / BLOCK;
    const int out = min(first_tile * TILE_O / BLOCK + fetched - blocks, last);
    return fetched < blocks ? x + (long)(block + fetched) * g.in_height * g.in_width * BLOCK
                            : dy + (long)out * g.out_height * g.out_width * BLOCK;
}

// Over how many of so many calls the fetching of each block is spread, as a power of two: as evenly as can be.
INLINE int conv_spread(const int calls, const int blocks)
{
    return calls >= 4 * blocks ? 2 : calls >= 2 * blocks;
}

// Copies row `ih` of an image into the patch, as fp32, with zeros outside the image.
void conv_load_row(__global const act *restrict image, __local float *restrict row, const int ih, const Geometry g)
{
    const int inside = ih >= 0 && ih < g.in_height;
    const int before = (max(0, -g.col_min) + g.col_step - 1) / g.col_step;  // columns left of the image
    const int until = max(0, (g.in_width - g.col_min + g.col_step - 1) / g.col_step);
    const int first = inside ? min(before, g.patch_width) : g.patch_width, last = max(first, min(until, g.patch_width));
    __global const act *source = image + ((long)ih * g.in_width + g.col_min) * BLOCK;
    for (int i = 0; i < first * CU; i++) row[i] = 0;
    for (int c = first; c < last; c++)
#if CU >= VEC
        UNROLL for (int lane = 0; lane < CU; lane += VEC)
            STOREL(LOAD(source + c * g.col_step * BLOCK + lane), row + c * CU + lane);
#else
    {
        const vec v = LOAD(source + c * g.col_step * BLOCK);
        UNROLL for (int lane = 0; lane < CU; lane++) row[c * CU + lane] = ((const float *)&v)[lane];
    }
#endif
    for (int i = last * CU; i < g.patch_width * CU; i++) row[i] = 0;
}

// The patch of `lines` lines from `line` on, of the blocks from `block` on.
void conv_load_patch(__global const act *restrict x, __local float *restrict patch, const int line, const int lines,
                     const int block, const int blocks, const Geometry g)
{
    const int plane = g.patch_rows * g.patch_width * CU;
    for (int done = 0, row = 0; done < lines;) {
        const int n = (line + done) / g.grid_height, a = (line + done) % g.grid_height;
        const int here = min(lines - done, g.grid_height - a);  // lines of this image
        const int rows = (here - 1) * (g.in_step / g.row_step) + g.patch_span;
        for (int i = 0; i < blocks; i++)
            for (int r = 0; r < rows; r++)
                conv_load_row(x + ((long)n * g.in_blocks + block + i) * g.in_height * g.in_width * BLOCK,
                              patch + i * plane + (row + r) * g.patch_width * CU,
                              a * g.in_step + g.row_min + r * g.row_step, g);
        row += rows;
        done += here;
    }
}

// Copies `pixels` pixels of an output tile of dy from line `line` on to fp32 [pixel][TILE_O].
void conv_load_grad(__global const act *restrict dy, __local float *restrict grad, const int line, const int lines,
                    const int tile, const Geometry g)
{
    for (int l = line; l < line + lines; l++)
        UNROLL for (int v = 0; v < TILE_V; v++) {
            const int o = tile * TILE_O + v * VEC, used = o < g.out_blocks * BLOCK;
            __global const act *source =
                dy + (((long)(l / g.grid_height) * g.out_blocks + (used ? o / BLOCK : 0)) * g.grid_height + l % g.grid_height)
                         * g.grid_width * BLOCK + o % BLOCK;
            __local float *target = grad + (l - line) * g.grid_width * TILE_O + v * VEC;
            if (used)
                for (int b = 0; b < g.grid_width; b++) STOREL(LOAD(source + b * BLOCK), target + b * TILE_O);
            else
                for (int b = 0; b < g.grid_width; b++) STOREL((vec)(0), target + b * TILE_O);
        }
}

// Lists the cells of `lines` lines whose pixel at (out_row, out_col) is inside the image, `step` integers for each: the offset
// of the cell in the patch (with DIRECT, in x), that of the pixel in y and, with step 4, that of the cell in x and the number of
// cells from here on that a loop can take with constant steps, which conv_runs fills in. Returns the number of cells.
#define AT_PATCH 0
#define AT_Y 1
#define AT_X 2
#define RUN 3
int conv_list(__local int *restrict table, const int step, const int line, const int lines, const int out_row,
              const int out_col, const Geometry g)
{
    const int row_skip = g.in_step / g.row_step, col_skip = g.in_step / g.col_step;
    const int in_plane = g.in_height * g.in_width * BLOCK;
    const int out_plane = g.out_height * g.out_width * BLOCK;
    int listed = 0;
    for (int l = line, row = 0; l < line + lines; l++) {
        const int n = l / g.grid_height, a = l % g.grid_height, oh = a * g.out_step + out_row;
        for (int b = 0, ow = out_col; b < g.grid_width && ow < g.out_width && oh < g.out_height; b++, ow += g.out_step) {
            __local int *entry = table + step * listed++;
            const int at = n * g.in_blocks * in_plane + (a * g.in_width + b) * g.in_step * BLOCK;
            entry[AT_PATCH] = DIRECT ? at : (row * g.patch_width + b * col_skip) * CU;
            entry[AT_Y] = n * g.out_blocks * out_plane + (oh * g.out_width + ow) * BLOCK;
            if (step > AT_X) entry[AT_X] = at;
        }
        row += a + 1 < g.grid_height ? row_skip : g.patch_span;
    }
    return listed;
}

// conv_list with step 4 and RUN: cells follow each other in a run where they lie `pitch` floats apart in the patch and, with
// DIRECT, are neighbours in y. (The copy of y is dense.)
int conv_runs(__local int *restrict table, const int line, const int lines, const int pitch, const Geometry g)
{
    const int cells = conv_list(table, 4, line, lines, 0, 0, g);
    for (int c = cells - 1; c >= 0; c--) {
        __local int *entry = table + 4 * c, *next = entry + 4;
        int joined = c + 1 < cells && next[AT_PATCH] - entry[AT_PATCH] == pitch;
#if DIRECT
        joined = joined && next[AT_Y] - entry[AT_Y] == BLOCK;
#endif
        entry[RUN] = joined ? next[RUN] + 1 : 1;
    }
    return cells;
}

#if GROUP == 0 && TERMS == BLOCK
// What conv_write_gradient does where tile and block are wholly connected, with `step` floats from one output channel to the
// next: VEC output channels by VEC neighbouring (channel, tap) at a time. The optimizer reads it much later.
void conv_write_whole(__local const float *restrict sums, __global float *restrict out, const int taps, const long step)
{
    for (int v = 0; v < TILE_V; v++, out += VEC * step)
        for (int k = 0, c = 0, t = 0; k < BLOCK * taps; k += VEC) {
            vec rows[VEC];
            UNROLL for (int r = 0; r < VEC; r++) {
                rows[r] = LOADL(sums + (t * TERMS + c) * TILE_O + v * VEC);
                if (++t == taps) t = 0, c++;
            }
            transpose_rows(rows);
            UNROLL for (int o = 0; o < VEC; o++) STREAMF(rows[o], out + o * step + k);
        }
}
#endif

// Writes the gradient between an output tile and an input block, [tap * TERMS + c][TILE_O], in the order of the parameter
// [out_channels][in_group][tap].
void conv_write_gradient(__local const float *restrict sums, __global float *restrict dw, const int tile, const int block,
                         const Geometry g)
{
    const int o0 = tile * TILE_O, outs = min(TILE_O, g.out_channels - o0);
#if GROUP == 0 && TERMS == BLOCK
    if (g.in_group == g.in_channels && g.in_group % BLOCK == 0 && outs == TILE_O) {
        conv_write_whole(sums, dw + ((long)o0 * g.in_group + block * BLOCK) * g.taps, g.taps, (long)g.in_group * g.taps);
        return;
    }
#endif
    for (int o = o0; o < o0 + outs; o++) {
        const int start = o / g.out_group * g.in_group;  // input channels that o is connected to
        const int first = max(block * BLOCK, start), last = min(block * BLOCK + (GROUP ? BLOCK : TERMS), start + g.in_group);
        __global float *out = dw + ((long)o * g.in_group + first - start) * g.taps;
        const int shift = GROUP ? start : block * BLOCK;  // the channel of the first term
        for (int i = first; i < last; i++)
            for (int t = 0; t < g.taps; t++) *out++ = sums[(t * TERMS + i - shift) * TILE_O + o - o0];
    }
}
#endif
