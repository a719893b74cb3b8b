/* Attention of a run of rows of one sequence over its cached tokens, pages read in place: prefill with or without a past.
 *
 * A task is one kv head of at most COLUMNS query columns of one run (a column is one row of one query head that shares the kv
 * head), so a tile of K and V is prepared once for all of them. Vector lanes are columns: scores of a tile lie
 * [token][column], so the softmax needs no sum across lanes, and masks are two comparisons per lane. Online softmax in
 * float32 (Milakov and Gimelshein, 2018) with one rescaling per tile.
 *
 * With AMX, scores of bfloat16 rows are K (rows of tokens, as they lie) times Q^T (pairs of elements beside each other), the
 * sums are V^T (transposed once per tile and task) times the weights rounded to bfloat16, as torch's SDPA rounds them. */
#include "loquetier.h"

#include <stdlib.h>
#if LQ_X86
#include <immintrin.h>
#endif

enum {
    LANES = 16,     /* columns of a block */
    BLOCKS = 8,     /* blocks of a task */
    COLUMNS = LANES * BLOCKS,
    TOKENS = 64,    /* of a tile */
    MOST_DIM = 256, /* padded head size */
    UNIT = 32,      /* head sizes are padded to a multiple of an AMX tile's row */
};

typedef struct {
    const void *q, *k, *v;
    void *out;
    int64_t q_row, q_head;
    const LqSpan *spans;
    int64_t num_spans, heads, kv_heads, dim, padded, page_size, window;
    float scale, softcap;
    int bf16, amx;
} Prefill;

/* What a block's columns have seen so far. Positions as floats: exact up to 2^24 tokens. */
typedef struct {
    float largest[LANES], total[LANES], low[LANES], high[LANES];
    int64_t all_low, all_high, last, first; /* tokens that all columns see; first and last that any does */
} Columns;

/* One task's memory; the AMX half uses the same bytes for bfloat16. */
typedef struct {
    _Alignas(64) float q[BLOCKS][MOST_DIM * LANES];
    _Alignas(64) float sums[BLOCKS][MOST_DIM * LANES];
    _Alignas(64) float k[TOKENS * MOST_DIM];
    _Alignas(64) float v[TOKENS * MOST_DIM];
    _Alignas(64) float scores[TOKENS * LANES];
    _Alignas(64) uint16_t weights[TOKENS * LANES];
    _Alignas(64) float factor[LANES];
    Columns columns[BLOCKS];
    int64_t at[TOKENS];
} Work;

#define LQ_TEMPLATE "prefill_kernel.h"
#include "variants.h"

typedef struct {
    const LqSpan *span;
    int64_t kv_head, first_column, count; /* columns */
} Task;

static int64_t groups_of(const Prefill *p) { return p->heads / p->kv_heads; }

static int64_t tasks_of(const Prefill *p, const LqSpan *span) {
    return (span->rows * groups_of(p) + COLUMNS - 1) / COLUMNS * p->kv_heads;
}

/* Last columns first: they see the most tokens, and the longest task should not begin last. */
static Task task_of(const Prefill *p, int64_t number) {
    const LqSpan *span = p->spans;
    for (int64_t n; number >= (n = tasks_of(p, span)); span++) number -= n;
    Task task = {.span = span, .kv_head = number % p->kv_heads};
    int64_t columns = span->rows * groups_of(p), parts = (columns + COLUMNS - 1) / COLUMNS;
    task.first_column = (parts - 1 - number / p->kv_heads) * COLUMNS;
    task.count = columns - task.first_column < COLUMNS ? columns - task.first_column : COLUMNS;
    return task;
}

static float element(const void *array, int64_t at, int bf16) {
    return bf16 ? lq_from_bf16(((const uint16_t *)array)[at]) : ((const float *)array)[at];
}

/* Row and query head of a column; columns behind the last repeat it. */
static int64_t column_row(const Prefill *p, const Task *t, int64_t column) {
    if (column >= t->count) column = t->count - 1;
    return (t->first_column + column) / groups_of(p);
}

static int64_t column_head(const Prefill *p, const Task *t, int64_t column) {
    if (column >= t->count) column = t->count - 1;
    return t->kv_head * groups_of(p) + (t->first_column + column) % groups_of(p);
}

static void start_block(const Prefill *p, const Task *t, int64_t block, Columns *c) {
    for (int64_t i = 0; i < LANES; i++) {
        int64_t position = t->span->past + column_row(p, t, block * LANES + i);
        int64_t low = p->window > 0 && position + 1 > p->window ? position + 1 - p->window : 0;
        c->largest[i] = -__builtin_inff();
        c->total[i] = 0;
        c->low[i] = (float)low, c->high[i] = (float)position;
        if (i == 0) c->first = low, c->all_high = position;
        c->all_low = low, c->last = position; /* positions rise with the columns */
    }
}

static void find_tokens(const Prefill *p, const Task *t, int64_t first, int64_t count, int64_t *at) {
    for (int64_t i = 0; i < count; i++) {
        int64_t token = first + i, page = t->span->pages[token / p->page_size];
        at[i] = ((page * p->page_size + token % p->page_size) * p->kv_heads + t->kv_head) * p->dim;
    }
}

static void finish_block(const Prefill *p, const Task *t, int64_t block, const Columns *c, const float *sums) {
    for (int64_t i = 0; i < LANES && block * LANES + i < t->count; i++) {
        int64_t row = t->span->start + column_row(p, t, block * LANES + i);
        int64_t at = (row * p->heads + column_head(p, t, block * LANES + i)) * p->dim;
        float inverse = 1.0f / c->total[i];
        for (int64_t d = 0; d < p->dim; d++) {
            float value = sums[d * LANES + i] * inverse;
            if (p->bf16)
                ((uint16_t *)p->out)[at + d] = lq_to_bf16(value);
            else
                ((float *)p->out)[at + d] = value;
        }
    }
}

/* ---- vectors ---- */

static void plain_queries(const Prefill *p, const Task *t, int64_t block, float *q) {
    for (int64_t i = 0; i < LANES; i++) {
        int64_t row = t->span->start + column_row(p, t, block * LANES + i);
        int64_t at = row * p->q_row + column_head(p, t, block * LANES + i) * p->q_head;
        for (int64_t d = 0; d < p->padded; d++) q[d * LANES + i] = d < p->dim ? element(p->q, at + d, p->bf16) : 0;
    }
}

static void plain_tile(const Prefill *p, Work *w, int64_t block, int64_t first, int64_t count) {
    LQ_PICK(dots_tile)(w->k, w->q[block], p->padded, w->scores, count);
    if (LQ_PICK(soften_tile)(p, &w->columns[block], w->scores, first, count, w->factor))
        LQ_PICK(rescale)(w->sums[block], p->padded, w->factor);
    LQ_PICK(values_tile)(w->v, w->scores, p->padded, w->sums[block], count);
}

/* ---- AMX ---- */

#if LQ_X86
#define LQ_TARGET_AMX __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
} TileConfig;

LQ_TARGET_AMX static void amx_begin(void) {
    TileConfig config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) config.bytes_per_row[tile] = 64, config.rows[tile] = 16;
    __asm__ volatile("" : : "r"(&config) : "memory"); /* gcc's intrinsic says that it reads the first 8 bytes only */
    _tile_loadconfig(&config);
}

LQ_TARGET_AMX static void amx_end(void) { _tile_release(); }

/* [padded / 2][LANES][2] */
static void amx_queries(const Prefill *p, const Task *t, int64_t block, uint16_t *q) {
    for (int64_t i = 0; i < LANES; i++) {
        int64_t row = t->span->start + column_row(p, t, block * LANES + i);
        const uint16_t *from = (const uint16_t *)p->q + row * p->q_row + column_head(p, t, block * LANES + i) * p->q_head;
        for (int64_t d = 0; d < p->padded; d++) q[d / 2 * 2 * LANES + 2 * i + (d & 1)] = d < p->dim ? from[d] : 0;
    }
}

/* K as it lies, [TOKENS][padded]; tokens behind `count` are zeros. */
LQ_TARGET_AMX static void amx_keys(const Prefill *p, const int64_t *at, int64_t count, uint16_t *out) {
    for (int64_t t = 0; t < TOKENS; t++)
        for (int64_t d = 0; d < p->padded; d += 32) {
            int64_t left = p->dim - d;
            __mmask32 mask = left >= 32 ? 0xffffffffu : left > 0 ? (1u << left) - 1 : 0;
            const uint16_t *from = (const uint16_t *)p->k + (t < count ? at[t] + d : 0);
            __m512i value = t < count ? _mm512_maskz_loadu_epi16(mask, from) : _mm512_setzero_si512();
            _mm512_store_si512(out + t * p->padded + d, value);
        }
}

/* 16 x 16 of 32 bits. */
LQ_TARGET_AMX static inline void transpose(__m512i *r) {
    __m512i a[16];
    for (int i = 0; i < 8; i++) {
        a[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        a[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        a[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        a[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
        r[i + 12] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xdd);
    }
}

/* V transposed: [padded][TOKENS]; tokens behind `count` are zeros. */
LQ_TARGET_AMX static void amx_values(const Prefill *p, const int64_t *at, int64_t count, uint16_t *out) {
    for (int64_t t = 0; t < TOKENS; t += 32)
        for (int64_t d = 0; d < p->padded; d += 16) {
            int64_t left = p->dim - d;
            __mmask16 mask = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
            __m512i pairs[16];
            for (int64_t i = 0; i < 16; i++) {
                __m512i two[2];
                for (int64_t j = 0; j < 2; j++) {
                    int64_t token = t + 2 * i + j;
                    const uint16_t *from = (const uint16_t *)p->v + (token < count ? at[token] + d : 0);
                    two[j] = token < count ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from))
                                           : _mm512_setzero_si512();
                }
                pairs[i] = _mm512_or_si512(two[0], _mm512_slli_epi32(two[1], 16));
            }
            transpose(pairs);
            for (int64_t i = 0; i < 16; i++) _mm512_store_si512(out + (d + i) * TOKENS + t, pairs[i]);
        }
}

/* Weights of `count` tokens in pairs of tokens: [TOKENS / 2][LANES][2]; behind them zeros. */
LQ_TARGET_AMX static void amx_weights(const float *weights, int64_t count, uint16_t *out) {
    for (int64_t t = 0; t < TOKENS; t += 2) {
        __m512 low = t < count ? _mm512_load_ps(weights + t * LANES) : _mm512_setzero_ps();
        __m512 high = t + 1 < count ? _mm512_load_ps(weights + (t + 1) * LANES) : _mm512_setzero_ps();
        __m512i a = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low));
        __m512i b = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high));
        _mm512_store_si512(out + t * LANES, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
    }
}

/* Four tiles of sums, so that one product need not wait for the one before: to[4][16][LANES] (+)= a (rows 16 i.. of
 * a_row elements) times b (pairs). */
LQ_TARGET_AMX static inline void amx_multiply(const uint16_t *a, int64_t a_row, const uint16_t *b, int64_t depth,
                                              float *to, int add) {
    if (add) {
        _tile_loadd(0, to, 64);
        _tile_loadd(1, to + 16 * LANES, 64);
        _tile_loadd(2, to + 32 * LANES, 64);
        _tile_loadd(3, to + 48 * LANES, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += 32) {
        _tile_loadd(7, b + k * LANES, 64);
        _tile_loadd(4, a + k, a_row * 2);
        _tile_dpbf16ps(0, 4, 7);
        _tile_loadd(5, a + 16 * a_row + k, a_row * 2);
        _tile_dpbf16ps(1, 5, 7);
        _tile_loadd(6, a + 32 * a_row + k, a_row * 2);
        _tile_dpbf16ps(2, 6, 7);
        _tile_loadd(4, a + 48 * a_row + k, a_row * 2);
        _tile_dpbf16ps(3, 4, 7);
    }
    _tile_stored(0, to, 64);
    _tile_stored(1, to + 16 * LANES, 64);
    _tile_stored(2, to + 32 * LANES, 64);
    _tile_stored(3, to + 48 * LANES, 64);
}

/* The same for 16 rows. */
LQ_TARGET_AMX static inline void amx_multiply_16(const uint16_t *a, int64_t a_row, const uint16_t *b, int64_t depth,
                                                 float *to) {
    _tile_loadd(0, to, 64);
    for (int64_t k = 0; k < depth; k += 32) {
        _tile_loadd(7, b + k * LANES, 64);
        _tile_loadd(4, a + k, a_row * 2);
        _tile_dpbf16ps(0, 4, 7);
    }
    _tile_stored(0, to, 64);
}

LQ_TARGET_AMX static void amx_tile(const Prefill *p, Work *w, int64_t block, int64_t first, int64_t count) {
    const uint16_t *v = (const uint16_t *)w->v;
    float *sums = w->sums[block];
    amx_multiply((const uint16_t *)w->k, p->padded, (const uint16_t *)w->q[block], p->padded, w->scores, 0);
    if (soften_tile_avx512(p, &w->columns[block], w->scores, first, count, w->factor))
        rescale_avx512(sums, p->padded, w->factor);
    amx_weights(w->scores, count, w->weights);
    int64_t d = 0, depth = count > 32 ? 64 : 32;
    for (; d + 64 <= p->padded; d += 64) amx_multiply(v + d * TOKENS, TOKENS, w->weights, depth, sums + d * LANES, 1);
    for (; d < p->padded; d += 16) amx_multiply_16(v + d * TOKENS, TOKENS, w->weights, depth, sums + d * LANES);
}
#endif

/* ---- tasks ---- */

static void prepare_tile(const Prefill *p, Work *w, int64_t count) {
#if LQ_X86
    if (p->amx) {
        amx_keys(p, w->at, count, (uint16_t *)w->k);
        amx_values(p, w->at, count, (uint16_t *)w->v);
        return;
    }
#endif
    LQ_PICK(widen_tile)(p, p->k, w->at, count, w->k);
    LQ_PICK(widen_tile)(p, p->v, w->at, count, w->v);
}

static void run_task(const Prefill *p, const Task *t, Work *w) {
    int64_t blocks = (t->count + LANES - 1) / LANES;
    for (int64_t block = 0; block < blocks; block++) {
        start_block(p, t, block, &w->columns[block]);
        memset(w->sums[block], 0, (size_t)(p->padded * LANES) * sizeof(float));
#if LQ_X86
        if (p->amx)
            amx_queries(p, t, block, (uint16_t *)w->q[block]);
        else
#endif
            plain_queries(p, t, block, w->q[block]);
    }
    int64_t last = w->columns[blocks - 1].last;
    for (int64_t first = w->columns[0].first; first <= last; first += TOKENS) {
        int64_t count = last + 1 - first < TOKENS ? last + 1 - first : TOKENS;
        find_tokens(p, t, first, count, w->at);
        prepare_tile(p, w, count);
        for (int64_t block = 0; block < blocks; block++) {
            const Columns *c = &w->columns[block];
            if (first > c->last || first + count <= c->first) continue;
            int64_t seen = c->last + 1 - first < count ? c->last + 1 - first : count;
#if LQ_X86
            if (p->amx)
                amx_tile(p, w, block, first, seen);
            else
#endif
                plain_tile(p, w, block, first, seen);
        }
    }
    for (int64_t block = 0; block < blocks; block++) finish_block(p, t, block, &w->columns[block], w->sums[block]);
}

static void attend_tasks(int64_t begin, int64_t end, void *context) {
    const Prefill *p = context;
    Work work;
#if LQ_X86
    if (p->amx) amx_begin();
#endif
    for (int64_t i = begin; i < end; i++) {
        Task task = task_of(p, i);
        run_task(p, &task, &work);
    }
#if LQ_X86
    if (p->amx) amx_end();
#endif
}

/* Causal attention of the rows of each span over the cached tokens up to and including their own positions.
 *   q        [.., heads, dim], strides q_row and q_head in elements; span->start counts its rows
 *   k, v     [pages, page_size, kv_heads, dim], contiguous; q, k, v and out have one dtype
 *   out      [.., heads, dim], contiguous
 *   window   keys with position <= own position - window are hidden; 0: none
 *   amx      AMX is there and q is bfloat16: use it
 * Returns 0; 2: heads are larger than the work space. Nothing is written then. */
LQ_EXPORT int32_t lq_prefill_attention(const void *q, int64_t q_row, int64_t q_head, const void *k, const void *v,
                                       void *out, const LqSpan *spans, int64_t num_spans, int64_t heads,
                                       int64_t kv_heads, int64_t dim, int64_t page_size, int64_t window, double scale,
                                       double softcap, int32_t dtype, int32_t amx) {
    int64_t padded = (dim + UNIT - 1) / UNIT * UNIT, num_tasks = 0;
    if (padded > MOST_DIM) return 2;
    Prefill p = {q, k, v, out, q_row, q_head, spans, num_spans, heads, kv_heads, dim, padded, page_size, window,
                 (float)scale, (float)softcap, dtype == LQ_BF16, amx && dtype == LQ_BF16 && LQ_X86};
    for (int64_t i = 0; i < num_spans; i++) num_tasks += tasks_of(&p, &spans[i]);
    lq_parallel_tasks(num_tasks, attend_tasks, &p);
    return 0;
}
