// packing.cl - for conv_pack of conv.cl: the working copies of the weights that its other kernels read. The build puts this
// text, after that of convolution.cl, in front of that source.
//
//   packed[output tile][input block][tap][TERMS][TILE_O] = w(o, i, t), the weight at tap t between output channel
//   o = tile * TILE_O + lane and input channel i = block * BLOCK + term (where GROUP > 0: the channel `term` of the group of o)
//
// For the forward pass w comes from master[o][i of the group][t]. For the gradient of the input "output" and "input" change
// places, so that it comes from master[i][o of the group][t]. It is zero where channels are not connected, and rounded to fp16
// when activations are fp16; it stays fp32 in memory: converting in the inner loop would cost more than the bytes save.
//
// This moves memory and computes nothing. So each cache line is read in one go and written in one go, past the caches: the
// copies of a large network are larger than these, and without reading a line before it is written a third less is moved.

// One packed weight; c is the term of input channel i.
float conv_pack_value(__global const float *restrict master, const int o, const int i, const int c, const int t,
                      const Geometry g)
{
#if GROUP
    const int from = g.transposed ? (o / GROUP * GROUP + c) * GROUP + o % GROUP : o * GROUP + c;  // channel c of its group
    return o < g.out_channels ? master[from * g.taps + t] : 0;
#else
    const int group = i / g.in_group, first = group * g.out_group;  // output channels that i is connected to
    if (i >= g.in_channels || o < first || o >= first + g.out_group) return 0;
    const long from = g.transposed ? (long)i * g.out_group + o - first : (long)o * g.in_group + i - group * g.in_group;
    return master[from * g.taps + t];
#endif
}

#if VEC > 1
// Stores TILE_O weights, a cache line or two, rounded to fp16 when activations are.
void conv_pack_store(const float *restrict row, __global float *restrict out)
{
    UNROLL for (int v = 0; v < TILE_O; v += VEC) {
        vec value = *(const vec *)(row + v);
#if HALF
        value = ROUND_HALF(value);
#endif
        STREAMF(value, out + v);
    }
}

// A block and a tile that are wholly connected, of master [TILE_O][BLOCK][taps], `step` floats from one output channel to the
// next: four neighbouring floats of every channel at a time become four rows.
void conv_pack_columns(__global const float *restrict source, __global float *restrict out, const int taps, const long step)
{
    for (int k = 0, c = 0, t = 0; k < BLOCK * taps; k += 4) {
        float rows[4][TILE_O] __attribute__((aligned(64)));
        UNROLL for (int o = 0; o < TILE_O; o += 4) {
            float4 v[4];
            UNROLL for (int l = 0; l < 4; l++) {
                __global const float *s = source + (o + l) * step + k;
                v[l] = (float4)(s[0], s[1], s[2], s[3]);
            }
            *(float4 *)(rows[0] + o) = (float4)(v[0].s0, v[1].s0, v[2].s0, v[3].s0);
            *(float4 *)(rows[1] + o) = (float4)(v[0].s1, v[1].s1, v[2].s1, v[3].s1);
            *(float4 *)(rows[2] + o) = (float4)(v[0].s2, v[1].s2, v[2].s2, v[3].s2);
            *(float4 *)(rows[3] + o) = (float4)(v[0].s3, v[1].s3, v[2].s3, v[3].s3);
        }
        UNROLL for (int r = 0; r < 4; r++) {
            conv_pack_store(rows[r], out + (t * BLOCK + c) * TILE_O);
            if (++t == taps) t = 0, c++;
        }
    }
}

// The same of master [BLOCK][TILE_O][taps], `step` floats from one channel of the block to the next.
void conv_pack_rows(__global const float *restrict source, __global float *restrict out, const int taps, const long step)
{
    for (int c = 0; c < BLOCK; c++, source += step)
        for (int t = 0; t < taps; t++) {
            float row[TILE_O] __attribute__((aligned(64)));
            UNROLL for (int o = 0; o < TILE_O; o += 4) {
                __global const float *s = source + o * taps + t;
                if (taps == 1) *(float4 *)(row + o) = (float4)(s[0], s[1], s[2], s[3]);  // one load
                else *(float4 *)(row + o) = (float4)(s[0], s[taps], s[2 * taps], s[3 * taps]);
            }
            conv_pack_store(row, out + (t * BLOCK + c) * TILE_O);
        }
}
#endif
