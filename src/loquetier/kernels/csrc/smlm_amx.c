/* SMLM for long segments of bfloat16 rows on AMX tiles: the products of smlm.c at the rate of the base's GEMM.
 *
 * Weights are packed as bfloat16 per call (a sliver of the rows' work); S and dS are rounded to bfloat16, sums
 * are float32. Rows go 32 at a time. In and out must be multiples of 32: a tile reads whole lines. As in smlm.c the
 * gradients are strips of columns, summed over rows in order, so they do not depend on threads. */
#include "amx.h"

#include <stdlib.h>

enum { ROWS = LQ_LONG_BLOCK, COLUMNS = LQ_LONG_LINE };

typedef struct {
    const uint16_t *x, *dy;
    uint16_t *y; /* forward: the output; backward: dx */
    int64_t x_stride, dy_stride, y_stride, in, out, rows, padded_rows, rank, rank16, rank32;
    float scale;
    const float *a, *b;
    float *grad_a, *grad_b;
    uint16_t *shrink_a, *shrink_b; /* [rank16/16][in or out / 2][16][2] */
    uint16_t *expand;              /* [out or in / 16][rank32/2][16][2]: B in the forward, A in the backward */
    uint16_t *s_t, *ds_t;          /* [rank16, padded_rows] */
} Long;

static int64_t up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

#if LQ_X86
/* 32 numbers of w as bfloat16. */
LQ_TARGET_AMX static inline __m512i line_of(const void *w, int64_t at, int bf16) {
    if (bf16) return _mm512_loadu_si512((const uint16_t *)w + at);
    const float *from = (const float *)w + at;
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
}

/* 16 numbers of w as bfloat16; zeros behind its last row. */
LQ_TARGET_AMX static inline __m256i half_line_of(const void *w, int64_t at, int exists, int bf16) {
    if (!exists) return _mm256_setzero_si256();
    if (bf16) return _mm256_loadu_si256((const __m256i *)((const uint16_t *)w + at));
    return (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps((const float *)w + at));
}

/* w [rank, size] as the columns of a product over `size`. */
LQ_TARGET_AMX static void pack_shrink(const void *w, int bf16, uint16_t *out, int64_t rank, int64_t rank16, int64_t size) {
    for (int64_t block = 0; block < rank16 / 16; block++)
        for (int64_t r = 0; r < 16; r++) {
            int64_t row = block * 16 + r;
            uint16_t *to = out + block * size * 16 + 2 * r;
            for (int64_t k = 0; k < size; k += 32) {
                uint16_t line[32] = {0};
                if (row < rank) _mm512_storeu_si512(line, line_of(w, row * size + k, bf16));
                for (int64_t pair = 0; pair < 16; pair++) memcpy(to + (k / 2 + pair) * 32, line + 2 * pair, 4);
            }
        }
}

static const uint16_t INTERLEAVE[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

/* w [rank, size] as the rows of a product over `rank`. */
LQ_TARGET_AMX static void pack_expand(const void *w, int bf16, uint16_t *out, int64_t rank, int64_t rank32, int64_t size) {
    __m512i order = _mm512_loadu_si512(INTERLEAVE);
    for (int64_t block = 0; block < size / 16; block++)
        for (int64_t pair = 0; pair < rank32 / 2; pair++) {
            int64_t at = 2 * pair * size + block * 16;
            __m256i even = half_line_of(w, at, 2 * pair < rank, bf16);
            __m256i odd = half_line_of(w, at + size, 2 * pair + 1 < rank, bf16);
            __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
            both = _mm512_permutexvar_epi16(order, both);
            _mm512_storeu_si512(out + (block * rank32 / 2 + pair) * 32, both);
        }
}

/* s [32, rank16] = x w^T for `rows` rows; tiles are configured for them. */
LQ_TARGET_AMX static void shrink(const uint16_t *x, int64_t stride, int64_t rows, const uint16_t *w, int64_t size,
                                 int64_t rank16, float *s) {
    for (int64_t block = 0; block < rank16 / 16; block++) {
        const uint16_t *packed = w + block * size * 16;
        _tile_zero(0);
        if (rows > 16) _tile_zero(2);
        for (int64_t k = 0; k < size; k += 32) {
            _tile_loadd(6, packed + k * 16, 64);
            _tile_loadd(4, x + k, stride * 2);
            _tile_dpbf16ps(0, 4, 6);
            if (rows > 16) {
                _tile_loadd(5, x + 16 * stride + k, stride * 2);
                _tile_dpbf16ps(2, 5, 6);
            }
        }
        _tile_stored(0, s + block * 16, rank16 * 4);
        if (rows > 16) _tile_stored(2, s + 16 * rank16 + block * 16, rank16 * 4);
    }
}

/* y [columns, columns + 16) of a row += sums. */
LQ_TARGET_AMX static inline void add_half(uint16_t *y, const float *sums) {
    __m512i before = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)y)), 16);
    __m512 after = _mm512_add_ps(_mm512_castsi512_ps(before), _mm512_load_ps(sums));
    _mm256_storeu_si256((__m256i *)y, (__m256i)_mm512_cvtneps_pbh(after));
}

LQ_TARGET_AMX static inline void add_line(uint16_t *y, const float *sums) {
    __m512i before = _mm512_loadu_si512(y);
    __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(before)), 16));
    __m512 high =
        _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(before, 1)), 16));
    low = _mm512_add_ps(low, _mm512_load_ps(sums));
    high = _mm512_add_ps(high, _mm512_load_ps(sums + 16));
    _mm512_storeu_si512(y, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

/* y += s w for `rows` rows and columns [from, to), multiples of 16; s [32, rank32] bfloat16. */
LQ_TARGET_AMX static void expand(const uint16_t *s, int64_t rows, const uint16_t *w, int64_t rank32, int64_t from,
                                 int64_t to, uint16_t *y, int64_t stride) {
    _Alignas(64) float sums[ROWS * COLUMNS];
    for (int64_t column = from; column < to; column += COLUMNS) {
        int whole = to - column >= COLUMNS;
        const uint16_t *w0 = w + column / 16 * rank32 * 16, *w1 = whole ? w0 + rank32 * 16 : w0;
        _tile_zero(0);
        _tile_zero(1);
        if (rows > 16) {
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t r = 0; r < rank32; r += 32) {
            _tile_loadd(4, s + r, rank32 * 2);
            _tile_loadd(6, w0 + r * 16, 64);
            _tile_loadd(7, w1 + r * 16, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (rows > 16) {
                _tile_loadd(5, s + 16 * rank32 + r, rank32 * 2);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, sums, COLUMNS * 4);
        _tile_stored(1, sums + 16, COLUMNS * 4);
        if (rows > 16) {
            _tile_stored(2, sums + 16 * COLUMNS, COLUMNS * 4);
            _tile_stored(3, sums + 16 * COLUMNS + 16, COLUMNS * 4);
        }
        for (int64_t i = 0; i < rows; i++)
            if (whole)
                add_line(y + i * stride + column, sums + i * COLUMNS);
            else
                add_half(y + i * stride + column, sums + i * COLUMNS);
    }
}

/* scale * s [rows, rank16] -> bfloat16 [32, rank32], zeros around. */
static void round_s(const float *s, float scale, int64_t rows, int64_t rank16, int64_t rank32, uint16_t *out) {
    memset(out, 0, (size_t)(ROWS * rank32) * sizeof *out);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t r = 0; r < rank16; r++) out[i * rank32 + r] = lq_to_bf16(scale * s[i * rank16 + r]);
}

/* The same transposed, where the gradients read it; columns of no row are zeros. */
static void keep_t(const uint16_t *s, int64_t row, int64_t rank16, int64_t rank32, uint16_t *out, int64_t padded_rows) {
    for (int64_t r = 0; r < rank16; r++)
        for (int64_t i = 0; i < ROWS; i++) out[r * padded_rows + row + i] = s[i * rank32 + r];
}

/* Rows [32 begin, 32 end). */
LQ_TARGET_AMX static void long_rows(int64_t begin, int64_t end, void *context) {
    const Long *g = context;
    size_t room = (size_t)ROWS * (size_t)(g->rank16 * 4 + g->rank32 * 2);
    char *memory = aligned_alloc(64, (room + 63) / 64 * 64);
    if (memory == NULL) abort(); /* a few KB */
    float *s = (float *)memory;
    uint16_t *half = (uint16_t *)(s + ROWS * g->rank16);
    int64_t configured = 0;
    for (int64_t task = begin; task < end; task++) {
        int64_t row = task * ROWS, rows = g->rows - row < ROWS ? g->rows - row : ROWS;
        if (configured != rows) configure(rows < 16 ? rows : 16, rows > 16 ? rows - 16 : 16);
        configured = rows;
        shrink(g->x + row * g->x_stride, g->x_stride, rows, g->shrink_a, g->in, g->rank16, s);
        round_s(s, g->scale, rows, g->rank16, g->rank32, half);
        if (g->dy == NULL) {
            expand(half, rows, g->expand, g->rank32, 0, g->out, g->y + row * g->y_stride, g->y_stride);
            continue;
        }
        keep_t(half, row, g->rank16, g->rank32, g->s_t, g->padded_rows);
        shrink(g->dy + row * g->dy_stride, g->dy_stride, rows, g->shrink_b, g->out, g->rank16, s);
        round_s(s, g->scale, rows, g->rank16, g->rank32, half);
        keep_t(half, row, g->rank16, g->rank32, g->ds_t, g->padded_rows);
        expand(half, rows, g->expand, g->rank32, 0, g->in, g->y + row * g->y_stride, g->y_stride);
    }
    _tile_release();
    free(memory);
}

/* grad [rank, size] columns [column, column + 32) += s^T x; s_t [rank16, padded_rows]. */
LQ_TARGET_AMX static void gradient_strip(const Long *g, const uint16_t *s_t, const uint16_t *x, int64_t stride,
                                         float *grad, int64_t size, int64_t column) {
    _Alignas(64) uint16_t pairs[2][16 * 32];
    _Alignas(64) float sums[16 * COLUMNS];
    __m512i first = _mm512_loadu_si512(INTERLEAVE), low, high;
    /* Interleave the first, and the second, sixteen columns of two rows. */
    low = _mm512_mask_add_epi16(first, 0xaaaaaaaa, first, _mm512_set1_epi16(16));
    high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t block = 0; block < g->rank16 / 16; block++) {
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t row = 0; row < g->padded_rows; row += ROWS) {
            for (int64_t pair = 0; pair < 16; pair++) {
                const uint16_t *from = x + (row + 2 * pair) * stride + column;
                int64_t left = g->rows - row - 2 * pair;
                __m512i even = left > 0 ? _mm512_loadu_si512(from) : _mm512_setzero_si512();
                __m512i odd = left > 1 ? _mm512_loadu_si512(from + stride) : _mm512_setzero_si512();
                _mm512_store_si512(pairs[0] + pair * 32, _mm512_permutex2var_epi16(even, low, odd));
                _mm512_store_si512(pairs[1] + pair * 32, _mm512_permutex2var_epi16(even, high, odd));
            }
            _tile_loadd(4, s_t + block * 16 * g->padded_rows + row, g->padded_rows * 2);
            _tile_loadd(6, pairs[0], 64);
            _tile_loadd(7, pairs[1], 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, sums, COLUMNS * 4);
        _tile_stored(1, sums + 16, COLUMNS * 4);
        for (int64_t r = 0; r < 16 && block * 16 + r < g->rank; r++) {
            float *to = grad + (block * 16 + r) * size + column;
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_load_ps(sums + r * COLUMNS)));
            _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_loadu_ps(to + 16), _mm512_load_ps(sums + r * COLUMNS + 16)));
        }
    }
}

LQ_TARGET_AMX static void long_gradients(int64_t begin, int64_t end, void *context) {
    const Long *g = context;
    configure(16, 16);
    for (int64_t strip = begin; strip < end; strip++) {
        int64_t column = strip * COLUMNS;
        if (column < g->in)
            gradient_strip(g, g->ds_t, g->x, g->x_stride, g->grad_a, g->in, column);
        else
            gradient_strip(g, g->s_t, g->dy, g->dy_stride, g->grad_b, g->out, column - g->in);
    }
    _tile_release();
}

static int32_t run_long(Long *g) {
    int backward = g->dy != NULL;
    g->rank16 = up(g->rank, 16), g->rank32 = up(g->rank, 32), g->padded_rows = up(g->rows, ROWS);
    int64_t columns = backward ? g->in : g->out, kept = backward ? 2 * g->rank16 * g->padded_rows : 0;
    int64_t size = g->rank16 * (g->in + g->out) + columns * g->rank32 + kept;
    uint16_t *memory = aligned_alloc(64, (size_t)up(size, 32) * sizeof *memory);
    if (memory == NULL) return 1;
    g->shrink_a = memory;
    g->shrink_b = g->shrink_a + g->rank16 * g->in;
    g->expand = g->shrink_b + g->rank16 * g->out;
    g->s_t = g->expand + columns * g->rank32;
    g->ds_t = g->s_t + kept / 2;
    pack_shrink(g->a, 0, g->shrink_a, g->rank, g->rank16, g->in);
    if (backward) pack_shrink(g->b, 0, g->shrink_b, g->rank, g->rank16, g->out);
    pack_expand(backward ? g->a : g->b, 0, g->expand, g->rank, g->rank32, columns);
    lq_parallel_for(g->padded_rows / ROWS, 1, long_rows, g);
    if (backward) lq_parallel_for((g->in + g->out) / COLUMNS, 1, long_gradients, g);
    free(memory);
    return 0;
}
#endif

/* y += scale (x a^T) b on `rows` rows; a [rank, in] and b [rank, out] float32, in and out multiples of 32. Needs level 2 of
 * lq_gemm_level. Returns 0, 1: memory ran out and nothing was changed, 2: no AMX here. */
LQ_EXPORT int32_t lq_smlm_long_forward(const uint16_t *x, int64_t x_stride, uint16_t *y, int64_t y_stride, int64_t rows,
                                       int64_t in, int64_t out, const float *a, const float *b, int64_t rank,
                                       double scale) {
#if LQ_X86
    Long g = {.x = x, .y = y, .x_stride = x_stride, .y_stride = y_stride, .in = in, .out = out, .rows = rows,
              .rank = rank, .scale = (float)scale, .a = a, .b = b};
    return run_long(&g);
#else
    (void)x, (void)x_stride, (void)y, (void)y_stride, (void)rows, (void)in, (void)out, (void)a, (void)b, (void)rank,
        (void)scale;
    return 2;
#endif
}

/* dx += scale (dy b^T) a, and the gradients of a and b on top of what they hold. Returns as the forward. */
LQ_EXPORT int32_t lq_smlm_long_backward(const uint16_t *x, int64_t x_stride, const uint16_t *dy, int64_t dy_stride,
                                        uint16_t *dx, int64_t dx_stride, int64_t rows, int64_t in, int64_t out,
                                        const float *a, const float *b, float *grad_a, float *grad_b, int64_t rank,
                                        double scale) {
#if LQ_X86
    Long g = {.x = x, .dy = dy, .y = dx, .x_stride = x_stride, .dy_stride = dy_stride, .y_stride = dx_stride, .in = in,
              .out = out, .rows = rows, .rank = rank, .scale = (float)scale, .a = a, .b = b, .grad_a = grad_a,
              .grad_b = grad_b};
    return run_long(&g);
#else
    (void)x, (void)x_stride, (void)dy, (void)dy_stride, (void)dx, (void)dx_stride, (void)rows, (void)in, (void)out,
        (void)a, (void)b, (void)grad_a, (void)grad_b, (void)rank, (void)scale;
    return 2;
#endif
}

/* ---- long segments of a stack: S before the GEMM, its expansion on the columns that a thread has just computed ---- */

/* Places of a segment's packed factors and S in the room of its GEMM, from `at` on; returns where the next one's begin. */
int64_t lq_long_size(LqLong *l, int64_t at) {
    l->a_at = at;
    l->b_at = l->a_at + up(l->rank, 16) * l->k;
    l->s_at = l->b_at + up(l->rank, 32) * l->width;
    return l->s_at + up(l->rows, ROWS) * up(l->rank, 32);
}

#if LQ_X86
static void pack_longs(int64_t begin, int64_t end, void *context) {
    const LqLongs *c = context;
    for (int64_t task = begin; task < end; task++) {
        const LqLong *l = c->longs + task / 2;
        if (task % 2)
            pack_expand(l->b, c->w_bf16, c->packed + l->b_at, l->rank, up(l->rank, 32), l->width);
        else
            pack_shrink(l->a, c->w_bf16, c->packed + l->a_at, l->rank, up(l->rank, 16), l->k);
    }
}

LQ_TARGET_AMX static void shrink_longs(int64_t begin, int64_t end, void *context) {
    const LqLongs *c = context;
    _Alignas(64) float s[ROWS * LQ_LONG_RANK];
    for (int64_t block = begin; block < end; block++) {
        const LqLong *l = c->longs;
        while (l + 1 < c->longs + c->count && l[1].first_block <= block) l++;
        int64_t at = (block - l->first_block) * ROWS, rows = l->rows - at < ROWS ? l->rows - at : ROWS;
        int64_t rank16 = up(l->rank, 16), rank32 = up(l->rank, 32);
        configure(rows < 16 ? rows : 16, rows > 16 ? rows - 16 : 16);
        shrink(c->x + (l->row + at) * c->x_stride, c->x_stride, rows, c->packed + l->a_at, l->k, rank16, s);
        round_s(s, (float)l->scale, rows, rank16, rank32, c->packed + l->s_at + at * rank32);
    }
    _tile_release();
}
#endif

/* Pack the factors and compute S. On machines with AMX only, as what follows. */
void lq_longs_shrink(const LqLongs *c) {
#if LQ_X86
    const LqLong *last = c->longs + c->count - 1;
    lq_parallel_tasks(2 * c->count, pack_longs, (void *)c);
    lq_parallel_tasks(last->first_block + (last->rows + ROWS - 1) / ROWS, shrink_longs, (void *)c);
#else
    (void)c;
#endif
}

/* Columns [from, to) of y, which are there, += S B. An `lq_columns`; leaves tiles configured. */
#if LQ_X86
LQ_TARGET_AMX
#endif
void lq_longs_expand(int64_t from, int64_t to, void *longs) {
#if LQ_X86
    const LqLongs *c = longs;
    for (const LqLong *l = c->longs; l < c->longs + c->count; l++) {
        int64_t first = from > l->first ? from - l->first : 0, last = to < l->first + l->width ? to - l->first : l->width;
        if (first >= last) continue;
        for (int64_t at = 0; at < l->rows; at += ROWS) {
            int64_t rows = l->rows - at < ROWS ? l->rows - at : ROWS, rank32 = up(l->rank, 32);
            configure(rows < 16 ? rows : 16, rows > 16 ? rows - 16 : 16);
            expand(c->packed + l->s_at + at * rank32, rows, c->packed + l->b_at, rank32, first, last,
                   c->y + (l->row + at) * c->y_stride + l->first, c->y_stride);
        }
    }
#else
    (void)from, (void)to, (void)longs;
#endif
}
