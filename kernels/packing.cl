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
// A work-item goes along the rows of the master, so that it reads neighbouring lines and pages one after the other.

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
// Stores a vector of weights, rounded to fp16 when activations are.
void conv_pack_store(const vec value, __global float *restrict out)
{
#if HALF
    STOREF(ROUND_HALF(value), out);
#else
    STOREF(value, out);
#endif
}

// A block, or one channel of it, and a tile that are wholly connected: of source[TILE_O][count], count = channels * taps, with
// `step` floats from one output channel to the next. Reads whole vectors and drops what is beyond `count`.
void conv_pack_columns(__global const float *restrict source, __global float *restrict out, const int taps, const int count,
                       const long step, const long ahead)
{
    for (int k = 0, c = 0, t = 0; k < count; k += VEC) {
        int at[VEC];
        UNROLL for (int r = 0; r < VEC; r++) {
            at[r] = (t * BLOCK + c) * TILE_O;
            if (++t == taps) t = 0, c++;
        }
        vec rows[TILE_V][VEC];
        UNROLL for (int v = 0; v < TILE_V; v++) transpose(rows[v], source + v * VEC * step + k, step, ahead);
        UNROLL for (int r = 0; r < VEC; r++)
            UNROLL for (int v = 0; v < TILE_V; v++)
                if (k + r < count) conv_pack_store(rows[v][r], out + at[r] + v * VEC);
    }
}

// The same with one tap of source[BLOCK][TILE_O], `step` floats from one channel of the block to the next.
void conv_pack_rows(__global const float *restrict source, __global float *restrict out, const long step)
{
    for (int c = 0; c < BLOCK; c++)
        UNROLL for (int o = 0; o < TILE_O; o += VEC)
            conv_pack_store(*(__global const vec_anywhere *)(source + c * step + o), out + c * TILE_O + o);
}

// Block i / BLOCK and tile o / TILE_O.
void conv_pack_tile(__global const float *restrict master, __global float *restrict out, const int o, const int i,
                    const Geometry g)
{
#if GROUP == 0 && TERMS == BLOCK
    const int group = i / g.in_group, group_in = i - group * g.in_group, group_out = o - group * g.out_group;
    const int whole = i < g.in_channels && group_in + BLOCK <= g.in_group  // wholly connected
                   && group_out >= 0 && group_out + TILE_O <= g.out_group;
    if (whole && !g.transposed) {
        const long step = g.in_group * g.taps;
        conv_pack_columns(master + o * step + group_in * g.taps, out, g.taps, BLOCK * g.taps, step, 2 * BLOCK);
        return;
    }
    const long step = g.out_group * g.taps;
    __global const float *source = master + i * step + group_out * g.taps;
    if (whole && g.taps == 1) {
        conv_pack_rows(source, out, step);
        return;
    }
    if (whole && (i + BLOCK < g.in_channels || o + TILE_O + VEC <= g.out_channels)) {  // more follows what is read and dropped
        for (int c = 0; c < BLOCK; c++) conv_pack_columns(source + c * step, out + c * TILE_O, g.taps, g.taps, g.taps, step);
        return;
    }
#endif
    for (int c = 0; c < TERMS; c++)
        for (int t = 0; t < g.taps; t++) {
            vec row[TILE_V];
            for (int l = 0; l < TILE_O; l++) ((float *)row)[l] = conv_pack_value(master, o + l, i + c, c, t, g);
            UNROLL for (int v = 0; v < TILE_V; v++) conv_pack_store(row[v], out + (t * TERMS + c) * TILE_O + v * VEC);
        }
}
#endif
