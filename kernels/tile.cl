// tile.cl - register tiles of the convolution kernels: TILE_V vectors of output channels by so many rows, all of whose sums stay in
// registers while a loop runs over what is summed. The build puts this text in front of conv.cl and winograd.cl; the sizes
// come from dpresnet/tiles.py. At the end, what packing weights for them needs.
//
// TILE_V  vectors of output channels; TILE_O = TILE_V * VEC channels
// TILE_P  rows of a tile of outputs (pixels; tiles in winograd.cl)
// TILE_E  rows of a tile of a weight gradient (tap and input channel; input channel in winograd.cl)
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
#ifndef JOIN
#define JOIN 0
#endif
#if JOIN
#define JOINED(v, at) MASKED(LOAD(y + (at)) + (v), LOAD(z + (at)))
#else
#define JOINED(v, at) (v)
#endif

// Sums that are passed to a function must stay in registers. Without `restrict`: oclgrind does not know what LLVM makes of it.
#define INLINE __attribute__((always_inline))

#if VEC > 1
typedef vec vec_anywhere __attribute__((aligned(4)));  // need not lie at a multiple of its size

// v[k][lane] = v[lane][k]. Each round moves the highest bit of the index (row, lane) to its end.
INLINE void transpose_rows(vec v[VEC])
{
    UNROLL for (int bit = 1; bit < VEC; bit *= 2) {
        vec w[VEC];
        UNROLL for (int r = 0; r < VEC; r++) w[r] = v[r];
        UNROLL for (int r = 0; r < VEC / 2; r++) {
            v[2 * r].even = w[r].lo, v[2 * r].odd = w[r + VEC / 2].lo;
            v[2 * r + 1].even = w[r].hi, v[2 * r + 1].odd = w[r + VEC / 2].hi;
        }
    }
}

// v[k][lane] = source[lane * step + k]: vectors from rows. Asks for what lies `ahead` floats further on and is read soon: the
// hardware does not follow so many rows.
INLINE void transpose(vec v[VEC], __global const float *source, const long step, const long ahead)
{
    UNROLL for (int r = 0; r < VEC; r++) {
        v[r] = *(__global const vec_anywhere *)(source + r * step);
        PREFETCH(source + r * step + ahead);
    }
    transpose_rows(v);
}
#endif
