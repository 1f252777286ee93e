// tile.cl - register tiles of the convolution kernels: TILE_V vectors of output channels by so many rows, all of whose sums stay in
// registers while a loop runs over what is summed. The build puts this text in front of conv.cl and winograd.cl; the sizes
// come from dpresnet/tiles.py.
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

// Sums that are passed to a function must stay in registers. Without `restrict`: oclgrind does not know what LLVM makes of it.
#define INLINE __attribute__((always_inline))
