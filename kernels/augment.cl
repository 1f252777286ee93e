// augment.cl - 8-bit images to normalised activations, as the table of views says: crop, flip and all that training may add.
//
// x [images][CHANNELS][height][width] u8 -> y [images][1][rows][columns][BLOCK] = pixels * scale + offset, in one pixel of
// which a vector holds channels. affine [2][BLOCK] = scale, offset: 1 / (255 deviation) and -mean / deviation, zeros in the
// padding lanes. Pixels beyond the border are 0 before normalisation.
// CHANNELS  of the image, at most BLOCK
// One work-item per (row of y, image).
//
// What only some runs need is a kernel of its own, built with RESIZE, JITTER, HOLES and MIX as 0 or 1.
#ifndef RESIZE

// Crops and flips.
__kernel void augment_normalise(__global const uchar *restrict x, __global const View *restrict views, __global act *restrict y,
                                __global const Control *restrict control, __constant float *restrict affine,
                                const int height, const int width, const int columns)
{
    const int row = get_global_id(0), rows = get_global_size(0);
    const long n = get_global_id(1);
    const int h = row + views[n].crop_top, left = views[n].crop_left, flip = views[n].flip;

    // Column `col` of y is column start + col * step of x; within the image for first <= col < last.
    const int step = flip ? -1 : 1, start = flip ? left + columns - 1 : left, begin = flip ? start + 1 - width : -left;
    const int outside = h < 0 || h >= height || n >= control->valid;
    const int first = outside ? columns : clamp(begin, 0, columns), last = outside ? columns : clamp(begin + width, 0, columns);
    __global const uchar *image = x + (n * CHANNELS * height + h) * width;
    __global act *pixels = y + (n * rows + row) * columns * BLOCK;
    for (int part = 0; part < BLOCK; part += VEC) {
        const vec scale = *(__constant const vec *)(affine + part), offset = *(__constant const vec *)(affine + BLOCK + part);
        for (int col = 0; col < first; col++) STORE(offset, pixels + col * BLOCK + part);
        for (int col = first; col < last; col++) {
            veci value = 0;
            UNROLL for (int l = 0; l < VEC; l++)
                if (part + l < CHANNELS) ((int *)&value)[l] = image[(part + l) * height * width + start + col * step];
            STORE(CONVERT(value, float) * scale + offset, pixels + col * BLOCK + part);
        }
        for (int col = last; col < columns; col++) STORE(offset, pixels + col * BLOCK + part);
    }
}

#else

// A pixel of a view, the size of views, and that of stored images.
typedef struct {
    int row, col, rows, columns, height, width;
} Place;

// Whether it lies in the rectangle `name` of a view.
#define INSIDE(view, name, at) \
    ((uint)(at.row - view->name##_top) < view->name##_height && (uint)(at.col - view->name##_left) < view->name##_width)

#if RESIZE
// The weight of stored pixel `k` for pixel i of a view: a triangle around where i lies, as wide as the scale if that is above
// 1, times 2 * count. `box` stored pixels make `count` of the view; all lengths are times 2 * count, so they are whole.
int augment_weight(const int k, const int i, const int box, const int count)
{
    return max(0, 2 * max(box, count) - (int)abs((2 * k + 1) * count - (2 * i + 1) * box));
}

// The first pixel of the box with a weight, or one before; the last is not beyond count - 1 - (that of the mirrored pixel).
int augment_first(const int i, const int box, const int count)
{
    return clamp(((2 * i + 1) * box - 2 * max(box, count)) / (2 * count), 0, box - 1);
}

// Separable: each column of the box is filtered downwards, and these are filtered across. Neighbouring pixels of y share few
// columns, so nothing is kept for the next one, and no private array grows with the image. Weights are exact.
void augment_resize(float *v, __global const uchar *image, __global const View *view, const Place at)
{
    const int row = at.row, col = view->flip ? at.columns - 1 - at.col : at.col;
    const int tall = view->crop_height, wide = view->crop_width;
    const int top = augment_first(row, tall, at.rows), bottom = tall - 1 - augment_first(at.rows - 1 - row, tall, at.rows);
    const int left = augment_first(col, wide, at.columns);
    const int right = wide - 1 - augment_first(at.columns - 1 - col, wide, at.columns);
    int down = 0, across = 0;
    for (int h = top; h <= bottom; h++) down += augment_weight(h, row, tall, at.rows);
    for (int w = left; w <= right; w++) across += augment_weight(w, col, wide, at.columns);
    for (int c = 0; c < CHANNELS; c++) {
        __global const uchar *corner = image + (c * at.height + view->crop_top) * at.width + view->crop_left;
        float sum = 0;
        for (int w = left; w <= right; w++) {
            float column = 0;
            for (int h = top; h <= bottom; h++) column += augment_weight(h, row, tall, at.rows) * (float)corner[h * at.width + w];
            sum += augment_weight(w, col, wide, at.columns) * (column / down);
        }
        v[c] = sum / across;
    }
}
#endif

#if JITTER
// Brightness, contrast and saturation, in this order, each clipped to what 8 bits can hold.
void augment_jitter(float *v, __global const View *view)
{
    float luma = 0;
    for (int c = 0; c < CHANNELS; c++) {
        v[c] = clamp(v[c] * view->brightness, 0.0f, 255.0f);
        v[c] = clamp(view->grey + view->contrast * (v[c] - view->grey), 0.0f, 255.0f);
#if CHANNELS != 3
        luma += v[c] / CHANNELS;
#endif
    }
#if CHANNELS == 3
    luma = 0.299f * v[0] + 0.587f * v[1] + 0.114f * v[2];
#endif
#if CHANNELS > 1
    for (int c = 0; c < CHANNELS; c++) v[c] = clamp(luma + view->saturation * (v[c] - luma), 0.0f, 255.0f);
#endif
}
#endif

// All channels of one pixel of a view, normalised, times `kept` and added to v.
void augment_add(float *v, const float kept, __global const uchar *image, __global const View *view,
                 __constant float *restrict affine, const Place at)
{
    float seen[CHANNELS];
#if HOLES
    if (INSIDE(view, erased, at) || INSIDE(view, cutout, at)) return;  // 0
#endif
#if RESIZE
    augment_resize(seen, image, view, at);
#else
    const int h = view->crop_top + at.row, w = view->crop_left + (view->flip ? at.columns - 1 - at.col : at.col);
    const int outside = h < 0 || h >= at.height || w < 0 || w >= at.width;
    for (int c = 0; c < CHANNELS; c++) seen[c] = outside ? 0 : image[(c * at.height + h) * at.width + w];
#endif
#if JITTER
#if RESIZE
    augment_jitter(seen, view);
#else
    if (!outside) augment_jitter(seen, view);
#endif
#endif
    for (int c = 0; c < CHANNELS; c++) v[c] += kept * (seen[c] * affine[c] + affine[BLOCK + c]);
}

__kernel void augment_transform(__global const uchar *restrict x, __global const View *restrict views, __global act *restrict y,
                                __global const Control *restrict control, __constant float *restrict affine,
                                const int height, const int width, const int columns)
{
    const int row = get_global_id(0), rows = get_global_size(0);
    const long n = get_global_id(1), bytes = (long)CHANNELS * height * width;
    __global const View *view = views + n;
    __global act *pixels = y + (n * rows + row) * columns * BLOCK;
    for (int col = 0; col < columns; col++) {
        const Place at = {row, col, rows, columns, height, width};
        float v[BLOCK] __attribute__((aligned(4 * BLOCK))) = {0};
        if (n < control->valid) {
            float kept = 1;
#if MIX
            kept = view->pasted_height == 0 ? view->share : !INSIDE(view, pasted, at);
            if (kept < 1) augment_add(v, 1 - kept, x + view->partner * bytes, views + view->partner, affine, at);
#endif
            if (kept > 0) augment_add(v, kept, x + n * bytes, view, affine, at);
        } else {
            for (int c = 0; c < CHANNELS; c++) v[c] = affine[BLOCK + c];
        }
        for (int part = 0; part < BLOCK; part += VEC) STORE(*(const vec *)(v + part), pixels + col * BLOCK + part);
    }
}

#endif
