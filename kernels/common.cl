// common.cl - what every kernel shares; the build puts this text in front of each source.
//
// Activations are stored as [image][channel block][row][column][BLOCK]: BLOCK = 16 neighbouring channels lie together, so
// that one vector holds channels of one pixel. Lanes beyond the last channel are zero, always: no kernel has to mask them.
//
// HALF   1: activations and their gradients are stored as fp16; 0: as fp32. Arithmetic is fp32 either way.
// VEC    lanes of the vectors the device computes with: 16 (AVX-512), 8 (AVX2, NEON pairs), 1 (a GPU: lanes are work-items).
// ITEMS  vectors that one work-item of an elementwise kernel handles, one after the other.
// AVX512 defined where the build made the compiler target AVX-512, see `AVX512` in dpresnet/pocl.py.
#ifndef HALF
#define HALF 0
#endif
#ifndef VEC
#define VEC 8
#endif
#ifndef ITEMS
#define ITEMS 1
#endif

#define BLOCK 16
#define PARTS (BLOCK / VEC)  // vectors that make up one pixel of a channel block
#define UNROLL __attribute__((opencl_unroll_hint))
#define SINGLE __attribute__((reqd_work_group_size(1, 1, 1)))

#pragma OPENCL FP_CONTRACT ON  // a * b + c is one fused operation; calling fma() may not be inlined

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)

#if VEC == 1
typedef float vec;
typedef int veci;
#else
typedef PASTE(float, VEC) vec;
typedef PASTE(int, VEC) veci;
#endif

// v where all bits of the mask are set, 0 where none is: whatever v is, unlike a product with 0.
#if VEC == 1
#define KEEP(v, mask) as_float(as_int(v) & (mask))
#else
#define KEEP(v, mask) PASTE(as_float, VEC)(PASTE(as_int, VEC)(v) & (veci)(mask))
#endif

// fp32 memory: plain dereferences, so every address must be a multiple of the vector (arenas and blocks are).
#define LOADF(p) (*(__global const vec *)(p))
#define STOREF(v, p) (*(__global vec *)(p) = (v))
#define LOADL(p) (*(__local const vec *)(p))
#define STOREL(v, p) (*(__local vec *)(p) = (v))

// Stores past the caches, for results that are not read soon: the cache line is not read first, if all of it is written. Work
// is handed from thread to thread with locked instructions, which order these stores too.
#if VEC > 1 && defined(__clang__)
#define STREAMF(v, p) __builtin_nontemporal_store((v), (__global vec *)(p))
#else
#define STREAMF(v, p) STOREF(v, p)
#endif

// Conversions of whole vectors. A runtime whose compiler does not know the CPU cannot inline its own functions for vectors (a
// call each), so where the compiler offers the instruction itself we name it.
#if VEC == 1
#define CONVERT(v, type) ((type)(v))
#define LOADH(p) vload_half(0, (p))
#define STOREH(v, p) vstore_half((v), 0, (p))
#else
#ifdef __clang__
#define CONVERT(v, type) __builtin_convertvector((v), PASTE(type, VEC))
#else
#define CONVERT(v, type) PASTE(PASTE(convert_, type), VEC)(v)
#endif
#if VEC == 16 && defined(AVX512)
#define FROM_HALF(bits) __builtin_ia32_vcvtph2ps512_mask((bits), (vec)(0), -1, 4)  // all lanes, current rounding
#define TO_HALF(v) __builtin_ia32_vcvtps2ph512_mask((v), 0, (short16)(0), -1)      // all lanes, to nearest
#elif VEC == 8 && defined(__F16C__) && defined(__clang__)
#define FROM_HALF(bits) __builtin_ia32_vcvtph2ps256(bits)
#define TO_HALF(v) __builtin_ia32_vcvtps2ph256((v), 0)
#endif
#ifdef TO_HALF
#define LOADH(p) FROM_HALF(*(__global const PASTE(short, VEC) *)(p))
#define STOREH(v, p) (*(__global PASTE(short, VEC) *)(p) = TO_HALF(v))
#else
#define LOADH(p) PASTE(vload_half, VEC)(0, (p))
#define STOREH(v, p) PASTE(vstore_half, VEC)((v), 0, (p))
#endif
#endif

// The value that fp16 storage would give back.
#ifdef TO_HALF
#define ROUND_HALF(v) FROM_HALF(TO_HALF(v))
#else
vec ROUND_HALF(const vec v)
{
    ushort bits[VEC];
#if VEC == 1
    vstore_half(v, 0, (half *)bits);
    return vload_half(0, (half *)bits);
#else
    PASTE(vstore_half, VEC)(v, 0, (half *)bits);
    return PASTE(vload_half, VEC)(0, (half *)bits);
#endif
}
#endif

// Asks for a cache line that is used soon. An interpreter (oclgrind, which compiles to SPIR) has no such instruction.
#if defined(__clang__) && !defined(__SPIR__)
#define PREFETCH(p) __builtin_prefetch(p)
#define PREFETCH_LATER(p) __builtin_prefetch((p), 0, 2)  // into the second-level cache: it is used some 10 us later
#else
#define PREFETCH(p)
#define PREFETCH_LATER(p)
#endif

#if HALF
typedef half act;
#define LOAD(p) LOADH(p)
#define STORE(v, p) STOREH(v, p)
#define STREAM(v, p) STOREH(v, p)  // half a line
#else
typedef float act;
#define LOAD(p) LOADF(p)
#define STORE(v, p) STOREF(v, p)
#define STREAM(v, p) STREAMF(v, p)
#endif

// ReLU. Signs are read from the bits: as integers, negative numbers are those up to the bits of minus infinity, NaN excluded, so
// that a bad value is not hidden from the overflow check. (Comparing a converted fp16 value with a constant, LLVM compares as
// fp16 instead, element by element.)
#if VEC == 1
#define BITS(v) as_int(v)
#else
#define BITS(v) PASTE(as_int, VEC)(v)
#endif
#define RECTIFIED(v) (BITS(v) <= as_int(-INFINITY) ? (vec)(0) : (v))
#define MASKED(d, v) (BITS(v) > 0 ? (d) : (vec)(0))  // the gradient passes where the output is positive

// The elements of one work-item of an elementwise kernel.
#define FLAT(i) \
    for (int i = get_global_id(0) * ITEMS * VEC; i < min(elements, ((int)get_global_id(0) + 1) * ITEMS * VEC); i += VEC)

// What the host tells a replica before each step; see `Control` in dpresnet/plan.py.
typedef struct {
    int valid;         // images of this batch that count; the others are padding of a short last batch
    float grad_scale;  // loss scale / number of images in the global batch
} Control;
