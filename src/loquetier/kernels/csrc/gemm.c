/* The base's GEMM: y[M,N] = x[M,K] w[N,K]^T (+ bias[N]), bfloat16 in and out, float32 sums.
 *
 * A decode step reads every weight once and does little with it, so the kernel is a stream through memory. The weights are
 * packed once as [N/16][K/2][16][2]: sixteen columns, pairs of k beside each other. That is at the same time one zmm
 * register per pair for VDPBF16PS and sixteen rows of an AMX tile for TDPBF16PS, and one block of sixteen columns is
 * one sequential read. K is padded with zeros to a multiple of 32 (an AMX tile), N to one of 16.
 *
 * Many rows (AMX) are bound by arithmetic instead: columns are taken in chunks whose weights stay in the second-level cache, inside
 * a chunk 32 rows at a time over all its columns, so that rows of x stay in the first level and rows of y are written side
 * by side; a long K in pieces, with the sums kept between them.
 */
#if defined(__linux__)
#define _GNU_SOURCE
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <stdlib.h>

#include "amx.h"
#if LQ_X86
#include <cpuid.h>
#include <immintrin.h>
#endif

enum {
    COLUMNS = 16,
    TILE_K = 32,
    TILE_ROWS = 16,
    AHEAD = 1024,      /* bytes prefetched ahead of use: measured */
    MANY_ROWS = 96,    /* from here on arithmetic counts, not the reading of the weights */
    CHUNK_BLOCKS = 20, /* blocks of columns whose weights are to stay in the second-level cache, */
    DEPTH = 2048,      /* at most so many of K at a time: 1.3 MB */
};

typedef struct {
    const uint16_t *x, *w, *bias;
    uint16_t *y;
    int64_t rows, padded_k, n, ldx, ldy;
    lq_columns after;
    void *context; /* of `after` */
} Gemm;

static int64_t padded(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

/* bfloat16 elements of a packed [N,K] weight. */
LQ_EXPORT int64_t lq_gemm_packed_size(int64_t n, int64_t k) { return padded(n, COLUMNS) * padded(k, TILE_K); }

typedef struct {
    const uint16_t *w;
    uint16_t *out;
    int64_t n, k, n_stride, k_stride;
} Pack;

static void pack_blocks(int64_t begin, int64_t end, void *context) {
    const Pack *p = context;
    int64_t padded_k = padded(p->k, TILE_K);
    for (int64_t block = begin; block < end; block++) {
        uint16_t *out = p->out + block * COLUMNS * padded_k;
        for (int64_t k = 0; k < padded_k; k++)
            for (int64_t c = 0; c < COLUMNS; c++) {
                int64_t column = block * COLUMNS + c;
                int inside = column < p->n && k < p->k;
                out[(k / 2) * 2 * COLUMNS + 2 * c + (k & 1)] = inside ? p->w[column * p->n_stride + k * p->k_stride] : 0;
            }
    }
}

/* w: [n, k], strides in elements (so also the transpose of a matrix); out: lq_gemm_packed_size elements, 64-byte aligned. */
LQ_EXPORT void lq_gemm_pack(const uint16_t *w, uint16_t *out, int64_t n, int64_t k, int64_t n_stride, int64_t k_stride) {
    Pack pack = {w, out, n, k, n_stride, k_stride};
    lq_parallel_for(padded(n, COLUMNS) / COLUMNS, 1, pack_blocks, &pack);
}

/* Ask for huge pages before the memory is touched; a stream through 4 KiB pages is a third slower. Advice only. */
LQ_EXPORT void lq_advise_huge(void *start, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    (void)madvise(start, (size_t)bytes, MADV_HUGEPAGE);
#else
    (void)start;
    (void)bytes;
#endif
}

#if LQ_X86

/* ---- AVX512_BF16 ---- */

LQ_TARGET_AVX512 static inline void store_row(const Gemm *g, int64_t row, int64_t block, __m512 sum) {
    int64_t column = block * COLUMNS, left = g->n - column;
    __mmask16 mask = left >= COLUMNS ? 0xffff : (__mmask16)((1u << left) - 1);
    if (g->bias != NULL) {
        __m256i raw = _mm256_maskz_loadu_epi16(mask, g->bias + column);
        sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16)));
    }
    _mm256_mask_storeu_epi16(g->y + row * g->ldy + column, mask, (__m256i)_mm512_cvtneps_pbh(sum));
}

/* `count` rows (a constant, so that the sums stay in registers) of one block of columns. */
LQ_TARGET_AVX512 static inline __attribute__((always_inline)) void few_rows(const Gemm *g, int64_t row, int64_t block,
                                                                            const int count, const int unroll) {
    const uint16_t *w = g->w + block * COLUMNS * g->padded_k, *x = g->x + row * g->ldx;
    __m512 sum[16];
    for (int i = 0; i < count * unroll; i++) sum[i] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < g->padded_k / 2; pair += unroll) {
        _mm_prefetch((const char *)(w + pair * 2 * COLUMNS) + AHEAD, _MM_HINT_T0);
        if (unroll > 1) _mm_prefetch((const char *)(w + pair * 2 * COLUMNS) + AHEAD + 64, _MM_HINT_T0);
        if (unroll > 2) _mm_prefetch((const char *)(w + pair * 2 * COLUMNS) + AHEAD + 128, _MM_HINT_T0);
        if (unroll > 3) _mm_prefetch((const char *)(w + pair * 2 * COLUMNS) + AHEAD + 192, _MM_HINT_T0);
        for (int u = 0; u < unroll; u++) {
            __m512bh weights = (__m512bh)_mm512_loadu_si512(w + (pair + u) * 2 * COLUMNS);
            for (int i = 0; i < count; i++) {
                int32_t two;
                memcpy(&two, x + i * g->ldx + 2 * (pair + u), sizeof two);
                sum[i * unroll + u] = _mm512_dpbf16_ps(sum[i * unroll + u], weights, (__m512bh)_mm512_set1_epi32(two));
            }
        }
    }
    for (int i = 0; i < count; i++) {
        __m512 total = sum[i * unroll];
        for (int u = 1; u < unroll; u++) total = _mm512_add_ps(total, sum[i * unroll + u]);
        store_row(g, row + i, block, total);
    }
}

LQ_TARGET_AVX512 static void blocks_avx512(int64_t begin, int64_t end, void *context) {
    const Gemm *g = context;
    for (int64_t block = begin; block < end; block++) {
        int64_t row = 0;
        for (; g->rows - row >= 16; row += 16) few_rows(g, row, block, 16, 1);
        for (; g->rows - row >= 8; row += 8) few_rows(g, row, block, 8, 2);
        for (; g->rows - row >= 4; row += 4) few_rows(g, row, block, 4, 4);
        for (; g->rows - row >= 2; row += 2) few_rows(g, row, block, 2, 4);
        for (; g->rows - row >= 1; row += 1) few_rows(g, row, block, 1, 4);
    }
}

/* ---- AMX ---- */

LQ_TARGET_AMX static inline void store_tile(const Gemm *g, int64_t row, int64_t rows, int64_t block,
                                            const float *sums) {
    for (int64_t i = 0; i < rows; i++) store_row(g, row + i, block, _mm512_load_ps(sums + i * COLUMNS));
}

LQ_TARGET_AMX static inline void prefetch_lines(const uint16_t *tile, int first) {
    for (int line = first; line < first + 8; line++)
        _mm_prefetch((const char *)tile + AHEAD + 64 * line, _MM_HINT_T0);
}

/* Up to 16 rows, one block of columns: bound by memory, one sequential stream. */
LQ_TARGET_AMX static void tile_1x1(const Gemm *g, int64_t row, int64_t rows, int64_t block) {
    const uint16_t *w = g->w + block * COLUMNS * g->padded_k, *x = g->x + row * g->ldx;
    _Alignas(64) float sums[TILE_ROWS * COLUMNS];
    _tile_zero(0);
    for (int64_t k = 0; k < g->padded_k; k += TILE_K) {
        /* Half before the loads, half behind them: sixteen at once would fill every line fill buffer. */
        prefetch_lines(w + k * COLUMNS, 0);
        _tile_loadd(4, x + k, g->ldx * 2);
        _tile_loadd(6, w + k * COLUMNS, 64);
        prefetch_lines(w + k * COLUMNS, 8);
        _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, sums, 64);
    store_tile(g, row, rows, block, sums);
}

/* 17 to 32 rows, two blocks of columns: every tile that is loaded is used twice. */
LQ_TARGET_AMX static void tile_2x2(const Gemm *g, int64_t row, int64_t rows, int64_t block) {
    const uint16_t *w = g->w + block * COLUMNS * g->padded_k, *w2 = w + COLUMNS * g->padded_k;
    const uint16_t *x = g->x + row * g->ldx, *x2 = x + TILE_ROWS * g->ldx;
    _Alignas(64) float sums[4][TILE_ROWS * COLUMNS];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < g->padded_k; k += TILE_K) {
        if (row == 0) {
            prefetch_lines(w + k * COLUMNS, 0);
            prefetch_lines(w2 + k * COLUMNS, 0);
        }
        _tile_loadd(4, x + k, g->ldx * 2);
        _tile_loadd(6, w + k * COLUMNS, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w2 + k * COLUMNS, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, x2 + k, g->ldx * 2);
        if (row == 0) {
            prefetch_lines(w + k * COLUMNS, 8);
            prefetch_lines(w2 + k * COLUMNS, 8);
        }
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    store_tile(g, row, TILE_ROWS, block, sums[0]);
    store_tile(g, row, TILE_ROWS, block + 1, sums[1]);
    store_tile(g, row + TILE_ROWS, rows - TILE_ROWS, block, sums[2]);
    store_tile(g, row + TILE_ROWS, rows - TILE_ROWS, block + 1, sums[3]);
}

/* 32 rows, two blocks of columns, depth [from, to) of K. Sums of the depth before come from `kept` [32, ld], and go there
 * (to a bfloat16 row of y when this is the last of K). Nothing of the weights is prefetched: they are in the cache. */
LQ_TARGET_AMX static inline void tile_piece(const Gemm *g, int64_t row, int64_t block, int64_t from, int64_t to,
                                            float *kept, int64_t ld) {
    const uint16_t *w = g->w + block * COLUMNS * g->padded_k, *w2 = w + COLUMNS * g->padded_k;
    const uint16_t *x = g->x + row * g->ldx, *x2 = x + TILE_ROWS * g->ldx;
    _Alignas(64) float sums[2 * TILE_ROWS * 2 * COLUMNS];
    int last = to == g->padded_k;
    if (from == 0) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, kept, ld * 4);
        _tile_loadd(1, kept + COLUMNS, ld * 4);
        _tile_loadd(2, kept + TILE_ROWS * ld, ld * 4);
        _tile_loadd(3, kept + TILE_ROWS * ld + COLUMNS, ld * 4);
    }
    for (int64_t k = from; k < to; k += TILE_K) {
        _tile_loadd(4, x + k, g->ldx * 2);
        _tile_loadd(6, w + k * COLUMNS, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w2 + k * COLUMNS, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, x2 + k, g->ldx * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    if (last) kept = sums, ld = 2 * COLUMNS;
    _tile_stored(0, kept, ld * 4);
    _tile_stored(1, kept + COLUMNS, ld * 4);
    _tile_stored(2, kept + TILE_ROWS * ld, ld * 4);
    _tile_stored(3, kept + TILE_ROWS * ld + COLUMNS, ld * 4);
    if (!last) return;
    int whole = (block + 2) * COLUMNS <= g->n && g->bias == NULL;
    for (int64_t i = 0; i < 2 * TILE_ROWS; i++) {
        __m512 low = _mm512_load_ps(sums + i * 2 * COLUMNS), high = _mm512_load_ps(sums + i * 2 * COLUMNS + COLUMNS);
        if (whole) {
            uint16_t *y = g->y + (row + i) * g->ldy + block * COLUMNS;
            _mm512_storeu_si512(y, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        } else {
            store_row(g, row + i, block, low);
            store_row(g, row + i, block + 1, high);
        }
    }
}

static int64_t whole_rows(const Gemm *g) { return g->rows / (2 * TILE_ROWS) * (2 * TILE_ROWS); }

/* All whole 32s of many rows, an even number of blocks. Returns the rows done. `kept`: sums of the depths before. */
LQ_TARGET_AMX static int64_t many_rows(const Gemm *g, int64_t begin, int64_t end, float *kept) {
    int64_t rows = whole_rows(g), ld = CHUNK_BLOCKS * COLUMNS;
    configure(TILE_ROWS, TILE_ROWS);
    for (int64_t from = 0; from < g->padded_k; from += DEPTH) {
        int64_t to = from + DEPTH < g->padded_k ? from + DEPTH : g->padded_k;
        for (int64_t row = 0; row < rows; row += 2 * TILE_ROWS)
            for (int64_t block = begin; block < end; block += 2)
                tile_piece(g, row, block, from, to, kept == NULL ? NULL : kept + row * ld + (block - begin) * COLUMNS,
                           ld);
    }
    return rows;
}

/* A chunk of columns, `done` of whose rows are there: what is left by 32 rows, then by 16 at most. */
LQ_TARGET_AMX static void other_rows(const Gemm *g, int64_t begin, int64_t end, int64_t done) {
    int64_t configured = 0; /* rows of the last loadconfig */
    for (int64_t block = begin; block < end; block += 2) {
        int64_t pair = end - block > 1;
        for (int64_t row = pair ? done : 0, rows; row < g->rows; row += rows) {
            rows = g->rows - row;
            if (rows > TILE_ROWS && pair) {
                rows = rows > 2 * TILE_ROWS ? 2 * TILE_ROWS : rows;
                if (configured != rows) configure(TILE_ROWS, rows - TILE_ROWS);
                tile_2x2(g, row, rows, block);
            } else {
                rows = rows > TILE_ROWS ? TILE_ROWS : rows;
                if (configured != rows) configure(rows, rows);
                tile_1x1(g, row, rows, block);
                if (pair) tile_1x1(g, row, rows, block + 1);
            }
            configured = rows;
        }
    }
}

LQ_TARGET_AMX static void blocks_amx(int64_t begin, int64_t end, void *context) {
    const Gemm *g = context;
    int many = g->rows >= MANY_ROWS;
    float *kept = NULL;
    if (many && g->padded_k > DEPTH) {
        kept = aligned_alloc(64, (size_t)(whole_rows(g) * CHUNK_BLOCKS * COLUMNS) * sizeof *kept);
        many = kept != NULL;
    }
    for (int64_t chunk = begin; chunk < end; chunk += CHUNK_BLOCKS) {
        int64_t stop = chunk + CHUNK_BLOCKS < end ? chunk + CHUNK_BLOCKS : end;
        int64_t done = many ? many_rows(g, chunk, chunk + (stop - chunk) / 2 * 2, kept) : 0;
        other_rows(g, chunk, stop, done);
        if (g->after != NULL)
            g->after(chunk * COLUMNS, stop * COLUMNS < g->n ? stop * COLUMNS : g->n, g->context);
    }
    free(kept);
    _tile_release();
}

/* The processor has AMX-BF16, and the kernel grants this process the tiles' state (Linux asks for that once). */
static int amx_ready(void) {
#if defined(__linux__)
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA */
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if (!(d & (1u << 22)) || !(d & (1u << 24))) return 0; /* AMX-BF16, AMX-TILE */
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return 0;
#endif
}
#endif

/* 0: no kernel here. 1: VDPBF16PS. 2: AMX as well. */
LQ_EXPORT void lq_gemm_level(int64_t *level) {
    *level = 0;
#if LQ_X86
    if (lq_isa() == LQ_AVX512) *level = amx_ready() ? 2 : 1;
#endif
}

/* y = x w^T + bias.
 *   x [rows, k] with ldx elements between rows; w packed; bias [n] or NULL; y [rows, n] with ldy between rows
 *   level as lq_gemm_level found it (2 or 1); with 0 this does nothing */
LQ_EXPORT void lq_gemm_bf16(const uint16_t *x, const uint16_t *w, const uint16_t *bias, uint16_t *y, int64_t rows,
                            int64_t k, int64_t n, int64_t ldx, int64_t ldy, int64_t level) {
    lq_gemm_bf16_then(x, w, bias, y, rows, k, n, ldx, ldy, level, NULL, NULL);
}

/* The same; with level 2 `after` is called on every chunk of y's columns as soon as it is there, by the thread that has
 * it in its cache. Chunks begin at multiples of 16. */
void lq_gemm_bf16_then(const uint16_t *x, const uint16_t *w, const uint16_t *bias, uint16_t *y, int64_t rows, int64_t k,
                       int64_t n, int64_t ldx, int64_t ldy, int64_t level, lq_columns after, void *context) {
#if LQ_X86
    int64_t padded_k = padded(k, TILE_K), blocks = padded(n, COLUMNS) / COLUMNS;
    uint16_t *copy = NULL;
    if (rows <= 0 || level == 0) return;
    if (padded_k != k) { /* a tile would read past the rows: zeros in their place */
        copy = calloc((size_t)(rows * padded_k), sizeof *copy);
        if (copy == NULL) abort();
        for (int64_t row = 0; row < rows; row++) memcpy(copy + row * padded_k, x + row * ldx, (size_t)k * sizeof *x);
        x = copy;
        ldx = padded_k;
    }
    Gemm gemm = {x, w, bias, y, rows, padded_k, n, ldx, ldy, after, context};
    lq_parallel_for(blocks, 2, level == 2 ? blocks_amx : blocks_avx512, &gemm);
    free(copy);
#else
    (void)x, (void)w, (void)bias, (void)y, (void)rows, (void)k, (void)n, (void)ldx, (void)ldy, (void)level, (void)after,
        (void)context;
#endif
}
