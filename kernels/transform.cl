// transform.cl - the transforms of F(4x4, 3x3) for winograd.cl: of inputs, outputs, gradients and weights, one vector of channels
// at a time. Each is applied down the columns of a tile and then across its rows.
//
// The matrices evaluate polynomials at the points 0, +-P, +-Q and infinity. P = 5/8 and Q = 3/2 are exact in binary and keep all
// coefficients near 1: the root mean square error is about twice that of direct sums in fp32; with the usual 1 and 2, five times.
//
//   B^T = | P2Q2    0    -P2-Q2     0       1   0 |   P2 = P * P, Q2 = Q * Q; rows and columns in the order 0, P, -P, Q, -Q, inf
//         |  0  -+PQ2     -Q2     +-P       1   0 |   (rows of +P and -P; with P and Q exchanged: rows of +Q and -Q)
//         |  0    P2Q2      0    -P2-Q2     0   1 |
//   G   = row of point p: (1, p, p^2) / product of (p - other points); row of infinity: (0, 0, 1)
//   A^T = column of point p: (1, p, p^2, p^3); column of infinity: (0, 0, 0, 1)

#define EDGE 6         // rows and columns of a transformed tile
#define POINTS 36      // EDGE * EDGE
#define OUT 4          // rows and columns of outputs of a tile

#define P 0.625f
#define Q 1.5f
#define P2 (P * P)
#define Q2 (Q * Q)
#define AT_0 (1 / (P2 * Q2))              // 1 / product of (p - other points) for p = 0, +-P, +-Q
#define AT_P (1 / (2 * P2 * (P2 - Q2)))
#define AT_Q (1 / (2 * Q2 * (Q2 - P2)))

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
    if (row0 >= 0 && col0 >= 0 && row0 + EDGE <= height && col0 + EDGE <= width) {
        __global const act *corner = image + ((long)row0 * width + col0) * BLOCK;
        UNROLL for (int c = 0; c < EDGE; c++) {
            vec v[EDGE];
            UNROLL for (int r = 0; r < EDGE; r++) v[r] = LOAD(corner + (r * width + c) * BLOCK);
            TRANSFORM_IN(v[0], v[1], v[2], v[3], v[4], v[5])
            UNROLL for (int r = 0; r < EDGE; r++) t[r][c] = v[r];
        }
    } else {  // reads some pixel instead of one outside, and clears its bits: faster than branches
        long row[EDGE];
        int inside[EDGE];
        UNROLL for (int r = 0; r < EDGE; r++) {
            inside[r] = -(row0 + r >= 0 && row0 + r < height);
            row[r] = (long)((row0 + r) & inside[r]) * width * BLOCK;
        }
        UNROLL for (int c = 0; c < EDGE; c++) {
            const int here = -(col0 + c >= 0 && col0 + c < width);
            __global const act *column = image + ((col0 + c) & here) * BLOCK;
            vec v[EDGE];
            UNROLL for (int r = 0; r < EDGE; r++) v[r] = KEEP(LOAD(column + row[r]), here & inside[r]);
            TRANSFORM_IN(v[0], v[1], v[2], v[3], v[4], v[5])
            UNROLL for (int r = 0; r < EDGE; r++) t[r][c] = v[r];
        }
    }
    UNROLL for (int r = 0; r < EDGE; r++) {
        TRANSFORM_IN(t[r][0], t[r][1], t[r][2], t[r][3], t[r][4], t[r][5])
        UNROLL for (int c = 0; c < EDGE; c++) STOREL(t[r][c], out + (r * EDGE + c) * plane);
    }
}

// Writes A^T m A, m[point * plane], to the outputs of a tile that lie in the image.
void winograd_transform_out(__local const float *restrict m, const int plane, __global act *restrict y,
#if JOIN
                            __global const act *restrict z,
#endif
                            const int width, const int rows, const int cols)
{
#define WRITE(c, v)                                    \
    if (cols > c) {                                    \
        const int at = (r * width + c) * BLOCK;        \
        STORE(JOINED(v, at), y + at);                  \
    }
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
        WRITE(0, t[r][0] + sum_p + sum_q)
        WRITE(1, P * dif_p + Q * dif_q)
        WRITE(2, P2 * sum_p + Q2 * sum_q)
        WRITE(3, P * P2 * dif_p + (Q * Q2 * dif_q + t[r][5]))
    }
#undef WRITE
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
    const int whole = rows >= OUT && cols >= OUT;
    UNROLL for (int c = 0; c < OUT; c++) {
        vec v[OUT];
        if (whole)
            UNROLL for (int r = 0; r < OUT; r++) v[r] = LOAD(dy + (r * width + c) * BLOCK);
        else
            UNROLL for (int r = 0; r < OUT; r++) {  // some pixel instead of one outside, its bits cleared
                const int inside = -(r < rows && c < cols);
                v[r] = KEEP(LOAD(dy + ((r * width + c) & inside) * BLOCK), inside);
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

// taps = G^T m G, m[point * plane].
void winograd_transform_weight_grad(__local const float *restrict m, const int plane, vec taps[9])
{
#define TRANSFORM_BACK(m0, m1, m2, m3, m4, m5, out)                       \
    {                                                                     \
        const vec sum_p = AT_P * (m1 + m2), dif_p = AT_P * P * (m1 - m2); \
        const vec sum_q = AT_Q * (m3 + m4), dif_q = AT_Q * Q * (m3 - m4); \
        out(0, AT_0 * m0 + (sum_p + sum_q));                              \
        out(1, dif_p + dif_q);                                            \
        out(2, m5 + (P2 * sum_p + Q2 * sum_q));                           \
    }
    vec t[3][EDGE];
    UNROLL for (int c = 0; c < EDGE; c++) {
        vec v[EDGE];
        UNROLL for (int r = 0; r < EDGE; r++) v[r] = LOADL(m + (r * EDGE + c) * plane);
#define DOWN(r, value) t[r][c] = value
        TRANSFORM_BACK(v[0], v[1], v[2], v[3], v[4], v[5], DOWN)
#undef DOWN
    }
    UNROLL for (int r = 0; r < 3; r++) {
#define ACROSS(c, value) taps[3 * r + c] = value
        TRANSFORM_BACK(t[r][0], t[r][1], t[r][2], t[r][3], t[r][4], t[r][5], ACROSS)
#undef ACROSS
    }
}

// U = G w G^T of one vector of output channels, w[tap * step] and out[point * row].
void winograd_transform_weight(const float *restrict w, const int step, float *restrict out, const int row)
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
            v[r] = *(const vec *)(w + (r * 3 + c) * step);
#if HALF
            v[r] = ROUND_HALF(v[r]);
#endif
        }
#define DOWN(r, value) t[r][c] = value
        TRANSFORM_WEIGHT(v[0], v[1], v[2], DOWN)
#undef DOWN
    }
    UNROLL for (int r = 0; r < EDGE; r++) {
#define ACROSS(c, value) *(vec *)(out + (r * EDGE + c) * row) = value
        TRANSFORM_WEIGHT(t[r][0], t[r][1], t[r][2], ACROSS)
#undef ACROSS
    }
}
