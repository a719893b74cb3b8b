/* SMLM for one ISA variant; see smlm.c. T rows, K in, N out, R rank.
 *
 * Every result is summed in the same order whatever rows, ranks or columns share its tile, so a row's bits do not
 * depend on its neighbours or on the number of threads. */
#include "vec.h"

/* LQ_ROWS x 4 sums and their operands fill the registers; of one row, LQ_STRIP vectors of columns do. */
#if LQ_WIDTH == 16
#define LQ_ROWS 4
#define LQ_STRIP 16
#else
#define LQ_ROWS 2
#define LQ_STRIP 8
#endif

#define load LQ_NAME(lq_load)
#define store LQ_NAME(lq_store)
#define ELEMENT(array, at, bf16) ((const char *)(array) + (at) * ((bf16) ? 2 : 4))
#define HALF_LINE(at, bf16) ((bf16) && LQ_WIDTH == 16 && ((at) & LQ_WIDTH)) /* its cache line was asked for before */
#define OUTPUT(array, at, bf16) ((char *)(array) + (at) * ((bf16) ? 2 : 4))

/* s[t][r] = scale * sum_k x[t][k] * w[r][k] for `rows` x `ranks` of them, all in registers. */
LQ_INLINE void LQ_NAME(shrink_tile)(const void *x, int64_t x_stride, int x_bf16, const void *w, int w_bf16,
                                    int64_t size, float scale, float *s, int64_t s_stride, int rows, int ranks) {
    vf sum[4][8];
    for (int t = 0; t < rows; t++)
        for (int r = 0; r < ranks; r++) sum[t][r] = (vf){0};
    int64_t k = 0;
    for (; k + LQ_WIDTH <= size; k += LQ_WIDTH) {
        vf values[4];
        for (int t = 0; t < rows; t++) values[t] = load(x, t * x_stride + k, x_bf16);
        for (int r = 0; r < ranks; r++) {
            vf weight = load(w, r * size + k, w_bf16);
            /* The next ranks' lines: rows of w are too short for the processor to notice that it is a stream. */
            if (!HALF_LINE(k, w_bf16)) __builtin_prefetch(ELEMENT(w, (r + ranks) * size + k, w_bf16));
            for (int t = 0; t < rows; t++) sum[t][r] += values[t] * weight;
        }
    }
    if (k < size) {
        for (int r = 0; r < ranks; r++) {
            vf weight = LQ_NAME(lq_load_part)(w, r * size + k, size - k, w_bf16);
            for (int t = 0; t < rows; t++)
                sum[t][r] += LQ_NAME(lq_load_part)(x, t * x_stride + k, size - k, x_bf16) * weight;
        }
    }
    for (int t = 0; t < rows; t++)
        for (int r = 0; r < ranks; r++) s[t * s_stride + r] = scale * LQ_NAME(lq_sum)(sum[t][r]);
}

/* S[T, R] (stride s_stride) = scale * x[T, size] @ w[R, size]^T */
LQ_INLINE void LQ_NAME(shrink)(const void *x, int64_t x_stride, int x_bf16, const void *w, int w_bf16, int64_t size,
                               int64_t rank, float scale, float *s, int64_t s_stride, int64_t rows) {
    int64_t t = 0;
#define RANKS(tile_rows, tile_ranks)                                                                              \
    for (; r + tile_ranks <= rank; r += tile_ranks)                                                               \
        LQ_NAME(shrink_tile)(ELEMENT(x, t * x_stride, x_bf16), x_stride, x_bf16, ELEMENT(w, r * size, w_bf16),    \
                             w_bf16, size, scale, s + t * s_stride + r, s_stride, tile_rows, tile_ranks)
    for (; t + LQ_ROWS <= rows; t += LQ_ROWS) {
        int64_t r = 0;
        RANKS(LQ_ROWS, 4);
        RANKS(LQ_ROWS, 1);
    }
    for (; t < rows; t++) {
        int64_t r = 0;
        RANKS(1, 8);
        RANKS(1, 4);
        RANKS(1, 1);
    }
#undef RANKS
}

/* y[t][n..] += sum_r s[t][r] * w[r][n..] for `rows` rows and `vectors` vectors of columns. */
LQ_INLINE void LQ_NAME(expand_tile)(const float *s, int64_t rank, const void *w, int w_bf16, int64_t size, void *y,
                                    int64_t y_stride, int y_bf16, int rows, int vectors) {
    vf sum[4][LQ_STRIP];
    for (int t = 0; t < rows; t++)
        for (int v = 0; v < vectors; v++) sum[t][v] = (vf){0};
    for (int64_t r = 0; r < rank; r++) {
        for (int v = 0; v < vectors; v++) {
            vf weight = load(w, r * size + v * LQ_WIDTH, w_bf16);
            if (rows == 1 && !HALF_LINE(v * LQ_WIDTH, w_bf16))
                __builtin_prefetch(ELEMENT(w, (r + 4) * size + v * LQ_WIDTH, w_bf16));
            for (int t = 0; t < rows; t++) sum[t][v] += s[t * rank + r] * weight;
        }
    }
    for (int t = 0; t < rows; t++)
        for (int v = 0; v < vectors; v++) {
            int64_t at = t * y_stride + v * LQ_WIDTH;
            store(y, at, load(y, at, y_bf16) + sum[t][v], y_bf16);
        }
}

/* The last columns, fewer than a vector. */
LQ_CALLED void LQ_NAME(expand_tail)(const float *s, int64_t rank, const void *w, int w_bf16, int64_t size, void *y,
                                    int y_bf16, int64_t count) {
    vf sum = {0};
    for (int64_t r = 0; r < rank; r++) sum += s[r] * LQ_NAME(lq_load_part)(w, r * size, count, w_bf16);
    LQ_NAME(lq_store_part)(y, 0, count, LQ_NAME(lq_load_part)(y, 0, count, y_bf16) + sum, y_bf16);
}

/* y[T, columns] += S[T, R] @ w[R, columns], rows of w being `size` apart */
LQ_INLINE void LQ_NAME(expand)(const float *s, int64_t rank, const void *w, int w_bf16, int64_t size, int64_t columns,
                               void *y, int64_t y_stride, int y_bf16, int64_t rows) {
    int64_t t = 0;
#define STRIPS(tile_rows, vectors)                                                                                \
    for (; n + vectors * LQ_WIDTH <= columns; n += vectors * LQ_WIDTH)                                               \
        LQ_NAME(expand_tile)(s + t * rank, rank, ELEMENT(w, n, w_bf16), w_bf16, size,                             \
                             OUTPUT(y, t * y_stride + n, y_bf16), y_stride, y_bf16, tile_rows, vectors)
    for (; t + LQ_ROWS <= rows; t += LQ_ROWS) {
        int64_t n = 0;
        STRIPS(LQ_ROWS, 4);
        STRIPS(LQ_ROWS, 1);
        for (int64_t i = t; n < columns && i < t + LQ_ROWS; i++)
            LQ_NAME(expand_tail)(s + i * rank, rank, ELEMENT(w, n, w_bf16), w_bf16, size,
                                 OUTPUT(y, i * y_stride + n, y_bf16), y_bf16, columns - n);
    }
    for (; t < rows; t++) {
        int64_t n = 0;
        STRIPS(1, LQ_STRIP);
        STRIPS(1, 4);
        STRIPS(1, 1);
        if (n < columns)
            LQ_NAME(expand_tail)(s + t * rank, rank, ELEMENT(w, n, w_bf16), w_bf16, size,
                                 OUTPUT(y, t * y_stride + n, y_bf16), y_bf16, columns - n);
    }
#undef STRIPS
}

/* grad[r][d..] += sum_t s[t][r] * x[t][d..] for `ranks` ranks and `vectors` vectors of columns. */
LQ_INLINE void LQ_NAME(wgrad_tile)(const float *s, int64_t rank, const void *x, int64_t x_stride, int x_bf16,
                                   float *grad, int64_t size, int64_t rows, int ranks, int vectors) {
    vf sum[4][4];
    for (int r = 0; r < ranks; r++)
        for (int v = 0; v < vectors; v++) sum[r][v] = (vf){0};
    for (int64_t t = 0; t < rows; t++) {
        vf values[4];
        for (int v = 0; v < vectors; v++) values[v] = load(x, t * x_stride + v * LQ_WIDTH, x_bf16);
        for (int r = 0; r < ranks; r++)
            for (int v = 0; v < vectors; v++) sum[r][v] += s[t * rank + r] * values[v];
    }
    for (int r = 0; r < ranks; r++)
        for (int v = 0; v < vectors; v++) {
            int64_t at = r * size + v * LQ_WIDTH;
            store(grad, at, load(grad, at, 0) + sum[r][v], 0);
        }
}

/* grad[R, size][:, from:to] += S[T, R]^T @ x[T, size][:, from:to] */
LQ_INLINE void LQ_NAME(wgrad)(const float *s, int64_t rank, const void *x, int64_t x_stride, int x_bf16, float *grad,
                              int64_t size, int64_t from, int64_t to, int64_t rows) {
    int64_t d = from;
#define COLUMNS(vectors)                                                                                          \
    for (; d + vectors * LQ_WIDTH <= to; d += vectors * LQ_WIDTH) {                                               \
        int64_t r = 0;                                                                                            \
        for (; r + 4 <= rank; r += 4)                                                                             \
            LQ_NAME(wgrad_tile)(s + r, rank, ELEMENT(x, d, x_bf16), x_stride, x_bf16, grad + r * size + d, size,  \
                                rows, 4, vectors);                                                                \
        for (; r < rank; r++)                                                                                     \
            LQ_NAME(wgrad_tile)(s + r, rank, ELEMENT(x, d, x_bf16), x_stride, x_bf16, grad + r * size + d, size,  \
                                rows, 1, vectors);                                                                \
    }
    COLUMNS(LQ_ROWS)
    COLUMNS(1)
#undef COLUMNS
    for (; d < to; d++)
        for (int64_t r = 0; r < rank; r++) {
            float sum = 0;
            for (int64_t t = 0; t < rows; t++)
                sum += s[t * rank + r] * LQ_NAME(lq_load_one)(x, t * x_stride + d, x_bf16);
            grad[r * size + d] += sum;
        }
}

/* One function per pair of dtypes, so that the tiles exist once (bfloat16 weights come with bfloat16 rows); which one is decided per block of rows. */
#define SPECIALISED(x_bf16, w_bf16)                                                                               \
    LQ_TARGET static void LQ_NAME(shrink_##x_bf16##w_bf16)(const void *x, int64_t x_stride, const void *w,        \
                                                           int64_t size, int64_t rank, float scale, float *s,     \
                                                           int64_t s_stride, int64_t rows) {                      \
        LQ_NAME(shrink)(x, x_stride, x_bf16, w, w_bf16, size, rank, scale, s, s_stride, rows);                    \
    }                                                                                                             \
    LQ_TARGET static void LQ_NAME(expand_##x_bf16##w_bf16)(const float *s, int64_t rank, const void *w,           \
                                                           int64_t size, int64_t columns, void *y,                \
                                                           int64_t y_stride, int64_t rows) {                      \
        LQ_NAME(expand)(s, rank, w, w_bf16, size, columns, y, y_stride, x_bf16, rows);                            \
    }
SPECIALISED(0, 0)
SPECIALISED(1, 0)
SPECIALISED(1, 1)
#undef SPECIALISED

#define SELECTED(name) (a->w_bf16 ? LQ_NAME(name##_11) : a->x_bf16 ? LQ_NAME(name##_10) : LQ_NAME(name##_00))

/* Halves of a stack's deltas: bfloat16 rows, weights of either dtype. */
static void LQ_NAME(shrink_piece)(const uint16_t *x, int64_t x_stride, int64_t k, const LqPiece *p, float *s,
                                  int w_bf16) {
    (w_bf16 ? LQ_NAME(shrink_11) : LQ_NAME(shrink_10))(x + p->row * x_stride, x_stride, p->w, k, p->rank, (float)p->scale,
                                                       s + p->s_at, p->s_stride, p->rows);
}

static void LQ_NAME(expand_piece)(const float *s, const LqPiece *p, uint16_t *y, int64_t y_stride, int w_bf16) {
    (w_bf16 ? LQ_NAME(expand_11) : LQ_NAME(expand_10))(s + p->s_at, p->rank, p->w, p->size, p->columns,
                                                       y + p->row * y_stride + p->column, y_stride, p->rows);
}

static const void *LQ_NAME(row)(const Call *a, const void *x, int64_t at) {
    return ELEMENT(x, at, a->x_bf16);
}

static void LQ_NAME(forward_block)(const Call *a, const Segment *g, int64_t start, int64_t rows, float *s) {
    SELECTED(shrink)(LQ_NAME(row)(a, a->x, start * a->x_stride), a->x_stride, g->a, a->in, g->rank, g->scale, s, g->rank, rows);
    SELECTED(expand)(s, g->rank, g->b, a->out, a->out, OUTPUT(a->y, start * a->y_stride, a->x_bf16), a->y_stride, rows);
}

/* Scaled S and dS of a block of rows, kept for wgrad; dx. Here y is dx. */
static void LQ_NAME(backward_block)(const Call *a, const Segment *g, int64_t start, int64_t rows, float *s, float *ds) {
    const void *x = LQ_NAME(row)(a, a->x, start * a->x_stride), *dy = LQ_NAME(row)(a, a->dy, start * a->dy_stride);
    SELECTED(shrink)(x, a->x_stride, g->a, a->in, g->rank, g->scale, s, g->rank, rows);
    SELECTED(shrink)(dy, a->dy_stride, g->b, a->out, g->rank, g->scale, ds, g->rank, rows);
    SELECTED(expand)(ds, g->rank, g->a, a->in, a->in, OUTPUT(a->y, start * a->y_stride, a->x_bf16), a->y_stride, rows);
}

LQ_TARGET static void LQ_NAME(wgrad_f32)(const float *s, int64_t rank, const void *x, int64_t stride, float *grad,
                                         int64_t size, int64_t from, int64_t to, int64_t rows) {
    LQ_NAME(wgrad)(s, rank, x, stride, 0, grad, size, from, to, rows);
}

LQ_TARGET static void LQ_NAME(wgrad_bf16)(const float *s, int64_t rank, const void *x, int64_t stride, float *grad,
                                          int64_t size, int64_t from, int64_t to, int64_t rows) {
    LQ_NAME(wgrad)(s, rank, x, stride, 1, grad, size, from, to, rows);
}

/* Columns [from, to) of dA (`of_b` == 0) or dB of one segment. */
static void LQ_NAME(wgrad_columns)(const Call *a, const Segment *g, int of_b, int64_t from, int64_t to) {
    const void *values = of_b ? a->dy : a->x;
    int64_t stride = of_b ? a->dy_stride : a->x_stride;
    (a->x_bf16 ? LQ_NAME(wgrad_bf16) : LQ_NAME(wgrad_f32))(
        of_b ? g->s : g->ds, g->rank, LQ_NAME(row)(a, values, g->start * stride), stride, of_b ? g->grad_b : g->grad_a,
        of_b ? a->out : a->in, from, to, g->stop - g->start);
}

#undef SELECTED
#undef ELEMENT
#undef OUTPUT
#undef HALF_LINE
#undef load
#undef store
#undef LQ_ROWS
#undef LQ_STRIP
