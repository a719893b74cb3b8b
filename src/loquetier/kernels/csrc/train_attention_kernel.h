/* Attention of fresh rows for one ISA variant; see train_attention.c. An operand is float (vectors) or bfloat16 (AMX). */
#include "vec.h"
#include "vec_math.h"

#define load LQ_NAME(lq_load)
#define store LQ_NAME(lq_store)

/* ---- operands ----
 * A is [rows, lda]. B of [depth, columns] is the same for vectors; for tiles it is [columns/16][depth/2][16][2]. */

/* One element of a task's source rows. */
LQ_INLINE OPERAND LQ_NAME(operand)(const void *array, int64_t at, int bf16) {
#if LQ_AMX
    (void)bf16;
    return ((const uint16_t *)array)[at];
#else
    return LQ_NAME(lq_load_one)(array, at, bf16);
#endif
}

/* rows [count, dim] of one head -> to [padded_rows, padded_dim] with zeros around. */
LQ_INLINE void LQ_NAME(copy_rows)(const void *from, int64_t at, int64_t stride, int64_t count, int64_t dim,
                                  OPERAND *to, int64_t padded_rows, int64_t padded_dim, int bf16) {
    memset(to, 0, (size_t)(padded_rows * padded_dim) * sizeof *to);
    for (int64_t i = 0; i < count; i++) {
#if LQ_AMX
        memcpy(to + i * padded_dim, (const uint16_t *)from + at + i * stride, (size_t)dim * 2);
#else
        int64_t d = 0;
        for (; d + LQ_WIDTH <= dim; d += LQ_WIDTH)
            store(to, i * padded_dim + d, load(from, at + i * stride + d, bf16), 0);
        for (; d < dim; d++) to[i * padded_dim + d] = LQ_NAME(lq_load_one)(from, at + i * stride + d, bf16);
#endif
    }
    (void)bf16;
}

/* The transposed copy: to [padded_dim, padded_rows] of rows made by copy_rows. */
LQ_INLINE void LQ_NAME(transpose_rows)(const OPERAND *from, OPERAND *to, int64_t padded_rows, int64_t padded_dim) {
    for (int64_t i = 0; i < padded_rows; i += 16)
        for (int64_t d = 0; d < padded_dim; d++)
            for (int64_t l = 0; l < 16; l++) to[d * padded_rows + i + l] = from[(i + l) * padded_dim + d];
}

/* 32 queries [QUERIES, padded_dim] as the columns of B [padded_dim, QUERIES]. */
LQ_INLINE void LQ_NAME(as_columns)(const OPERAND *rows, OPERAND *to, int64_t padded_dim) {
#if LQ_AMX
    for (int64_t block = 0; block < 2; block++)
        for (int64_t pair = 0; pair < padded_dim / 2; pair++)
            for (int64_t c = 0; c < 16; c++)
                memcpy(to + (block * padded_dim / 2 + pair) * 32 + 2 * c, rows + (block * 16 + c) * padded_dim + 2 * pair, 4);
#else
    for (int64_t d = 0; d < padded_dim; d++)
        for (int64_t c = 0; c < QUERIES; c++) to[d * QUERIES + c] = rows[c * padded_dim + d];
#endif
}

/* The same queries as the rows of B [QUERIES, padded_dim]. */
LQ_INLINE void LQ_NAME(as_rows)(const OPERAND *rows, OPERAND *to, int64_t padded_dim) {
#if LQ_AMX
    for (int64_t block = 0; block < padded_dim / 16; block++)
        for (int64_t pair = 0; pair < QUERIES / 2; pair++)
            for (int64_t c = 0; c < 16; c++) {
                uint16_t *two = to + (block * (QUERIES / 2) + pair) * 32 + 2 * c;
                two[0] = rows[2 * pair * padded_dim + block * 16 + c];
                two[1] = rows[(2 * pair + 1) * padded_dim + block * 16 + c];
            }
#else
    memcpy(to, rows, (size_t)(QUERIES * padded_dim) * sizeof *to);
#endif
}

/* ---- the product: c [m, n] (+)= a [m, depth] b [depth, n]; m, n and depth are multiples of 32 ----
 * `first`: B has `b_depth` rows of which the product takes those from `first` on. */
#if LQ_AMX
LQ_TARGET static void LQ_NAME(multiply)(float *c, int64_t ldc, const uint16_t *a, int64_t lda, const uint16_t *b,
                                        int64_t b_depth, int64_t first, int64_t m, int64_t n, int64_t depth, int add) {
    for (int64_t j = 0; j < n; j += 32) {
        const uint16_t *b0 = b + (j / 16) * b_depth * 16 + first * 16, *b1 = b0 + b_depth * 16;
        for (int64_t i = 0; i < m; i += 32) {
            float *to = c + i * ldc + j;
            const uint16_t *a0 = a + i * lda, *a1 = a0 + 16 * lda;
            if (add) {
                _tile_loadd(0, to, ldc * 4);
                _tile_loadd(1, to + 16, ldc * 4);
                _tile_loadd(2, to + 16 * ldc, ldc * 4);
                _tile_loadd(3, to + 16 * ldc + 16, ldc * 4);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int64_t k = 0; k < depth; k += 32) {
                _tile_loadd(4, a0 + k, lda * 2);
                _tile_loadd(6, b0 + k * 16, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, b1 + k * 16, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, a1 + k, lda * 2);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, to, ldc * 4);
            _tile_stored(1, to + 16, ldc * 4);
            _tile_stored(2, to + 16 * ldc, ldc * 4);
            _tile_stored(3, to + 16 * ldc + 16, ldc * 4);
        }
    }
}
#else
enum { LQ_NAME(TILE_ROWS) = LQ_WIDTH == 4 ? 2 : 4 };

LQ_TARGET static void LQ_NAME(multiply)(float *c, int64_t ldc, const float *a, int64_t lda, const float *b,
                                        int64_t b_depth, int64_t first, int64_t m, int64_t n, int64_t depth, int add) {
    const int rows = LQ_NAME(TILE_ROWS);
    (void)b_depth;
    for (int64_t j = 0; j < n; j += 2 * LQ_WIDTH)
        for (int64_t i = 0; i < m; i += rows) {
            vf sum[4][2];
            for (int r = 0; r < rows; r++)
                for (int h = 0; h < 2; h++)
                    sum[r][h] = add ? load(c, (i + r) * ldc + j + h * LQ_WIDTH, 0) : (vf){0};
            for (int64_t k = 0; k < depth; k++) {
                vf low = load(b, (first + k) * n + j, 0), high = load(b, (first + k) * n + j + LQ_WIDTH, 0);
                for (int r = 0; r < rows; r++) {
                    float value = a[(i + r) * lda + k];
                    sum[r][0] += value * low;
                    sum[r][1] += value * high;
                }
            }
            for (int r = 0; r < rows; r++)
                for (int h = 0; h < 2; h++) store(c, (i + r) * ldc + j + h * LQ_WIDTH, sum[r][h], 0);
        }
}
#endif

/* ---- softmax ---- */

/* All bits set in the lanes whose query sees key j; lane 0 is query `query` of the block that begins at `position`. */
LQ_INLINE vu LQ_NAME(visible)(int64_t key, int64_t position, int64_t left, int64_t window) {
    vu seen;
    uint32_t lanes[LQ_WIDTH];
    for (int64_t l = 0; l < LQ_WIDTH; l++) {
        int64_t own = position + l;
        lanes[l] = key <= own && l < left && (window == 0 || own - key < window) ? 0xffffffffu : 0;
    }
    memcpy(&seen, lanes, sizeof seen);
    return seen;
}

/* Whether some lane of a vector of queries from `position` on does not see `key`. */
LQ_INLINE int LQ_NAME(is_edge)(int64_t key, int64_t position, int64_t left, int64_t window) {
    return key > position || left < LQ_WIDTH || (window && position + LQ_WIDTH - 1 - key >= window);
}

LQ_INLINE vf LQ_NAME(capped)(vf score, float scale, float softcap) {
    score *= scale;
    return softcap > 0 ? softcap * LQ_NAME(lq_tanh)(score / softcap) : score;
}

/* Scores of keys [low, high) to weights e^(score - largest), in place, `lse` and 1 / sum of each of 32 columns. */
LQ_TARGET static void LQ_NAME(soften)(const TrainAttention *a, const Work *w, int64_t query, int64_t low, int64_t high,
                                      int64_t count, float *lse, float *factor) {
    for (int64_t c = 0; c < QUERIES; c += LQ_WIDTH) {
        int64_t position = w->past + query + c, left = count - c;
        vf largest = (vf){0} - __builtin_inff(), total = {0};
        for (int64_t key = low; key < high; key++) {
            int64_t at = (key - low) * QUERIES + c;
            vf score = LQ_NAME(capped)(load(w->scores, at, 0), a->scale, a->softcap);
            if (LQ_NAME(is_edge)(key, position, left, w->window))
                score = LQ_NAME(lq_select)(LQ_NAME(visible)(key, position, left, w->window), score,
                                           (vf){0} - __builtin_inff());
            store(w->scores, at, score, 0);
            largest = LQ_NAME(lq_select)((vu)(score > largest) | (vu)(score != score), score, largest);
        }
        /* A column of padding sees nothing: its largest score is -inf, its weights must be zeros all the same. */
        vf offset = LQ_NAME(lq_select)((vu)(largest == (vf){0} - __builtin_inff()), (vf){0}, largest);
        for (int64_t key = low; key < high; key++) {
            int64_t at = (key - low) * QUERIES + c;
            vf weight = LQ_NAME(lq_exp)(load(w->scores, at, 0) - offset);
            total += weight;
            store(w->scores, at, weight, 0);
        }
        float sums[LQ_WIDTH], tops[LQ_WIDTH];
        memcpy(sums, &total, sizeof sums);
        memcpy(tops, &offset, sizeof tops);
        for (int64_t l = 0; l < LQ_WIDTH; l++) {
            lse[c + l] = tops[l] + logf(sums[l]);
            factor[c + l] = sums[l] != 0 ? 1.0f / sums[l] : 0.0f;
        }
    }
}

/* keys x 32 floats as operand B [keys, 32]; for vectors that is what they are. */
LQ_INLINE const OPERAND *LQ_NAME(keys_as_rows)(const float *values, void *to, int64_t keys) {
#if LQ_AMX
    static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i interleave = _mm512_loadu_si512(order);
    for (int64_t block = 0; block < 2; block++)
        for (int64_t key = 0; key < keys; key += 2) {
            __m512 even = _mm512_loadu_ps(values + key * QUERIES + block * 16);
            __m512 odd = _mm512_loadu_ps(values + (key + 1) * QUERIES + block * 16);
            __m512i both = _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
            _mm512_storeu_si512((uint16_t *)to + (block * keys + key) * 16, both);
        }
    return to;
#else
    (void)to, (void)keys;
    return values;
#endif
}

/* keys x 32 floats as operand A [keys, 32]. */
LQ_INLINE const OPERAND *LQ_NAME(keys_as_lines)(const float *values, void *to, int64_t keys) {
#if LQ_AMX
    for (int64_t at = 0; at < keys * QUERIES; at += 32) {
        __m512bh line = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(values + at + 16), _mm512_loadu_ps(values + at));
        _mm512_storeu_si512((uint16_t *)to + at, (__m512i)line);
    }
    return to;
#else
    (void)to, (void)keys;
    return values;
#endif
}

/* values [dim, 32] with queries as columns -> rows of the output, each times its column's factor. */
LQ_INLINE void LQ_NAME(write_columns)(const float *values, const float *factor, void *to, int64_t at, int64_t stride,
                                      int64_t count, int64_t dim, int bf16) {
    float line[LQ_WIDTH];
    for (int64_t i = 0; i < count; i++)
        for (int64_t d = 0; d < dim; d += LQ_WIDTH) {
            int64_t left = dim - d < LQ_WIDTH ? dim - d : LQ_WIDTH;
            for (int64_t l = 0; l < left; l++) line[l] = values[(d + l) * QUERIES + i] * factor[i];
            if (left == LQ_WIDTH)
                store(to, at + i * stride + d, load(line, 0, 0), bf16);
            else
                for (int64_t l = 0; l < left; l++) LQ_NAME(lq_store_one)(to, at + i * stride + d + l, line[l], bf16);
        }
}

/* ---- tasks ---- */

LQ_INLINE int LQ_NAME(open_work)(Work *w, const TrainAttention *a, int64_t task, int backward) {
    const int64_t *span = a->spans + task / a->kv_heads * SPAN_LENGTH;
    *w = (Work){.kv_head = task % a->kv_heads, .groups = a->heads / a->kv_heads, .dim = a->dim, .q_start = span[0],
                .nq = span[1] - span[0], .k_start = span[2], .nk = span[3] - span[2], .window = a->window};
    w->past = w->nk - w->nq;
    w->padded_keys = round_up(w->nk, UNIT), w->padded_dim = round_up(w->dim, UNIT);
    int64_t rows = w->padded_keys * w->padded_dim, block = QUERIES * w->padded_dim, scores = w->padded_keys * QUERIES;
    /* Every piece is a multiple of 64 bytes: sizes are multiples of 32 x 32 elements. */
    int64_t operands = 2 * rows + 2 * block + scores + (backward ? rows + 3 * block + 2 * scores : 0);
    int64_t floats = scores + block + (backward ? scores + 2 * rows : 0);
    size_t bytes = (size_t)operands * sizeof(OPERAND) + (size_t)floats * sizeof(float);
    char *memory = aligned_alloc(64, bytes);
    if (memory == NULL) return 0;
    OPERAND *next = (OPERAND *)memory;
    w->k = next, next += rows;
    w->v = next, next += rows; /* the forward keeps V only as its transpose, made by way of this */
    w->q_rows = next, next += block;
    w->q_cols = next, next += block;
    w->p_cols = next, next += scores;
    if (backward) {
        w->k_t = next, next += rows;
        w->do_rows = next, next += block;
        w->do_cols = next, next += block;
        w->out = NULL;
        w->v_t = next, next += block; /* room for 32 rows before they are turned */
        w->p = next, next += scores;
        w->ds = next, next += scores;
    }
    float *numbers = (float *)next;
    w->scores = numbers, numbers += scores;
    w->out = numbers, numbers += block;
    if (backward) {
        w->dscores = numbers, numbers += scores;
        w->dk = numbers, numbers += rows;
        w->dv = numbers, numbers += rows;
    }
    return 1;
}

/* First and last + 1 key of a block of queries, whole units. */
LQ_INLINE void LQ_NAME(key_range)(const Work *w, int64_t query, int64_t count, int64_t *low, int64_t *high) {
    int64_t first = w->window ? w->past + query - w->window + 1 : 0;
    *low = first > 0 ? first / UNIT * UNIT : 0;
    *high = round_up(w->past + query + count, UNIT);
}

LQ_TARGET static void LQ_NAME(attend_forward)(int64_t begin, int64_t end, void *context) {
    TrainAttention *a = context;
#if LQ_AMX
    configure(16, 16);
#endif
    for (int64_t task = begin; task < end; task++) {
        Work w;
        if (!LQ_NAME(open_work)(&w, a, task, 0)) {
            __atomic_store_n(&a->failed, 1, __ATOMIC_RELAXED);
            continue;
        }
        int64_t keys = w.padded_keys, dim = w.padded_dim;
        /* w.k serves for V until it is turned. */
        LQ_NAME(copy_rows)(a->v.at, w.k_start * a->v.row + w.kv_head * a->v.head, a->v.row, w.nk, w.dim, w.k, keys, dim,
                           a->bf16);
        LQ_NAME(transpose_rows)(w.k, w.v, keys, dim);
        LQ_NAME(copy_rows)(a->k.at, w.k_start * a->k.row + w.kv_head * a->k.head, a->k.row, w.nk, w.dim, w.k, keys, dim,
                           a->bf16);
        for (int64_t g = 0; g < w.groups; g++)
            for (int64_t query = 0; query < w.nq; query += QUERIES) {
                int64_t head = w.kv_head * w.groups + g, row = w.q_start + query, low, high;
                int64_t count = w.nq - query < QUERIES ? w.nq - query : QUERIES;
                float lse[QUERIES], factor[QUERIES];
                LQ_NAME(key_range)(&w, query, count, &low, &high);
                LQ_NAME(copy_rows)(a->q.at, row * a->q.row + head * a->q.head, a->q.row, count, w.dim, w.q_rows,
                                   QUERIES, dim, a->bf16);
                LQ_NAME(as_columns)(w.q_rows, w.q_cols, dim);
                LQ_NAME(multiply)(w.scores, QUERIES, (OPERAND *)w.k + low * dim, dim, w.q_cols, dim, 0, high - low,
                                  QUERIES, dim, 0);
                LQ_NAME(soften)(a, &w, query, low, high, count, lse, factor);
                const OPERAND *p = LQ_NAME(keys_as_rows)(w.scores, w.p_cols, high - low);
                LQ_NAME(multiply)(w.out, QUERIES, (OPERAND *)w.v + low, keys, p, high - low, 0, dim, QUERIES,
                                  high - low, 0);
                LQ_NAME(write_columns)(w.out, factor, a->y.at, row * a->y.row + head * a->y.head, a->y.row, count,
                                       w.dim, a->bf16);
                memcpy(a->lse + head * a->q_rows + row, lse, (size_t)count * sizeof *lse);
            }
        free(w.k);
    }
#if LQ_AMX
    _tile_release();
#endif
}

/* Scores and their gradients to P (in place of the scores) and dS (in place of theirs). */
LQ_TARGET static void LQ_NAME(differentiate)(const TrainAttention *a, const Work *w, int64_t query, int64_t low,
                                             int64_t high, int64_t count, const float *lse, const float *delta) {
    for (int64_t c = 0; c < QUERIES; c += LQ_WIDTH) {
        int64_t position = w->past + query + c, left = count - c;
        vf offset = load(lse, c, 0), less = load(delta, c, 0);
        for (int64_t key = low; key < high; key++) {
            int64_t at = (key - low) * QUERIES + c;
            vf score = LQ_NAME(capped)(load(w->scores, at, 0), a->scale, a->softcap);
            vf p = LQ_NAME(lq_exp)(score - offset);
            vf ds = p * (load(w->dscores, at, 0) - less) * a->scale;
            if (a->softcap > 0) {
                vf part = score / a->softcap;
                ds *= 1.0f - part * part;
            }
            if (LQ_NAME(is_edge)(key, position, left, w->window)) {
                vu seen = LQ_NAME(visible)(key, position, left, w->window);
                p = LQ_NAME(lq_select)(seen, p, (vf){0});
                ds = LQ_NAME(lq_select)(seen, ds, (vf){0});
            }
            store(w->scores, at, p, 0);
            store(w->dscores, at, ds, 0);
        }
    }
}

/* Per query: out . dout, which softmax's gradient takes off. */
LQ_INLINE void LQ_NAME(deltas)(const TrainAttention *a, int64_t row, int64_t head, int64_t count, float *delta) {
    for (int64_t i = 0; i < QUERIES; i++) {
        vf sum = {0};
        float rest = 0;
        if (i < count) {
            int64_t out = (row + i) * a->out.row + head * a->out.head, grad = (row + i) * a->dout.row + head * a->dout.head;
            int64_t d = 0;
            for (; d + LQ_WIDTH <= a->dim; d += LQ_WIDTH)
                sum += load(a->out.at, out + d, a->bf16) * load(a->dout.at, grad + d, a->bf16);
            for (; d < a->dim; d++)
                rest += LQ_NAME(lq_load_one)(a->out.at, out + d, a->bf16) *
                        LQ_NAME(lq_load_one)(a->dout.at, grad + d, a->bf16);
        }
        delta[i] = LQ_NAME(lq_sum)(sum) + rest;
    }
}

LQ_TARGET static void LQ_NAME(backward_block)(const TrainAttention *a, const Work *w, int64_t head, int64_t query) {
    int64_t keys = w->padded_keys, dim = w->padded_dim, row = w->q_start + query, low, high;
    int64_t count = w->nq - query < QUERIES ? w->nq - query : QUERIES;
    float lse[QUERIES] = {0}, delta[QUERIES], ones[QUERIES];
    for (int64_t i = 0; i < QUERIES; i++) ones[i] = 1.0f;
    memcpy(lse, a->lse + head * a->q_rows + row, (size_t)count * sizeof *lse);
    LQ_NAME(deltas)(a, row, head, count, delta);
    LQ_NAME(key_range)(w, query, count, &low, &high);
    LQ_NAME(copy_rows)(a->q.at, row * a->q.row + head * a->q.head, a->q.row, count, w->dim, w->v_t, QUERIES, dim,
                       a->bf16);
    LQ_NAME(as_columns)(w->v_t, w->q_cols, dim);
    LQ_NAME(as_rows)(w->v_t, w->q_rows, dim);
    LQ_NAME(copy_rows)(a->dout.at, row * a->dout.row + head * a->dout.head, a->dout.row, count, w->dim, w->v_t,
                       QUERIES, dim, a->bf16);
    LQ_NAME(as_columns)(w->v_t, w->do_cols, dim);
    LQ_NAME(as_rows)(w->v_t, w->do_rows, dim);
    int64_t span = high - low;
    LQ_NAME(multiply)(w->scores, QUERIES, (OPERAND *)w->k + low * dim, dim, w->q_cols, dim, 0, span, QUERIES, dim, 0);
    LQ_NAME(multiply)(w->dscores, QUERIES, (OPERAND *)w->v + low * dim, dim, w->do_cols, dim, 0, span, QUERIES, dim, 0);
    LQ_NAME(differentiate)(a, w, query, low, high, count, lse, delta);
    const OPERAND *p = LQ_NAME(keys_as_lines)(w->scores, w->p, span), *ds = LQ_NAME(keys_as_lines)(w->dscores, w->ds, span);
    LQ_NAME(multiply)(w->dv + low * dim, dim, p, QUERIES, w->do_rows, QUERIES, 0, span, dim, QUERIES, 1);
    LQ_NAME(multiply)(w->dk + low * dim, dim, ds, QUERIES, w->q_rows, QUERIES, 0, span, dim, QUERIES, 1);
    const OPERAND *ds_rows = LQ_NAME(keys_as_rows)(w->dscores, w->p_cols, span);
    LQ_NAME(multiply)(w->out, QUERIES, (OPERAND *)w->k_t + low, keys, ds_rows, span, 0, dim, QUERIES, span, 0);
    LQ_NAME(write_columns)(w->out, ones, a->dq.at, row * a->dq.row + head * a->dq.head, a->dq.row, count, w->dim,
                           a->bf16);
}

LQ_INLINE void LQ_NAME(write_rows)(const float *rows, int64_t padded_dim, void *to, int64_t at, int64_t stride,
                                   int64_t count, int64_t dim, int bf16) {
    for (int64_t i = 0; i < count; i++) {
        int64_t d = 0;
        for (; d + LQ_WIDTH <= dim; d += LQ_WIDTH)
            store(to, at + i * stride + d, load(rows, i * padded_dim + d, 0), bf16);
        for (; d < dim; d++) LQ_NAME(lq_store_one)(to, at + i * stride + d, rows[i * padded_dim + d], bf16);
    }
}

LQ_TARGET static void LQ_NAME(attend_backward)(int64_t begin, int64_t end, void *context) {
    TrainAttention *a = context;
#if LQ_AMX
    configure(16, 16);
#endif
    for (int64_t task = begin; task < end; task++) {
        Work w;
        if (!LQ_NAME(open_work)(&w, a, task, 1)) {
            __atomic_store_n(&a->failed, 1, __ATOMIC_RELAXED);
            continue;
        }
        int64_t keys = w.padded_keys, dim = w.padded_dim;
        LQ_NAME(copy_rows)(a->k.at, w.k_start * a->k.row + w.kv_head * a->k.head, a->k.row, w.nk, w.dim, w.k, keys, dim,
                           a->bf16);
        LQ_NAME(copy_rows)(a->v.at, w.k_start * a->v.row + w.kv_head * a->v.head, a->v.row, w.nk, w.dim, w.v, keys, dim,
                           a->bf16);
        LQ_NAME(transpose_rows)(w.k, w.k_t, keys, dim);
        memset(w.dk, 0, (size_t)(2 * keys * dim) * sizeof(float)); /* dv lies behind it */
        for (int64_t g = 0; g < w.groups; g++)
            for (int64_t query = 0; query < w.nq; query += QUERIES)
                LQ_NAME(backward_block)(a, &w, w.kv_head * w.groups + g, query);
        LQ_NAME(write_rows)(w.dk, dim, a->dk.at, w.k_start * a->dk.row + w.kv_head * a->dk.head, a->dk.row, w.nk, w.dim,
                            a->bf16);
        LQ_NAME(write_rows)(w.dv, dim, a->dv.at, w.k_start * a->dv.row + w.kv_head * a->dv.head, a->dv.row, w.nk, w.dim,
                            a->bf16);
        free(w.k);
    }
#if LQ_AMX
    _tile_release();
#endif
}

#undef load
#undef store
