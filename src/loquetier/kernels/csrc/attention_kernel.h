/* Attention of one query row over a run of cached tokens, for one ISA variant; see attention.c. */
#include "vec.h"
#include "vec_math.h"

#define LQ_ACROSS_VECTORS (LQ_WIDTH == 16 ? 4 : 2)
#define load LQ_NAME(lq_load)
#define store LQ_NAME(lq_store)

/* values[.., chunk] of one cached token; the last chunk may be short. */
LQ_INLINE vf LQ_NAME(load_chunk)(const void *array, int64_t at, int64_t d, int64_t dim, int bf16) {
    return d + LQ_WIDTH <= dim ? load(array, at + d, bf16) : LQ_NAME(lq_load_part)(array, at + d, dim - d, bf16);
}

/* One token's K or V into the caches before it is needed: rows of other heads lie between, and pages are scattered. */
LQ_INLINE void LQ_NAME(fetch)(const void *array, int64_t at, int64_t dim, int bf16) {
    const char *from = (const char *)array + at * (bf16 ? 2 : 4);
    for (int64_t byte = 0; byte < dim * (bf16 ? 2 : 4); byte += 64) __builtin_prefetch(from + byte);
}

/* scores[g][token] = q_g . k_token of LQ_WIDTH tokens for `groups` query heads of one kv head. */
LQ_INLINE void LQ_NAME(score_tile)(const float *q, int64_t padded, int64_t dim, const void *k, int bf16,
                                   const int64_t *at, int64_t count, float *scores, int64_t stride, int groups) {
    vf parts[4][LQ_WIDTH];
    for (int64_t j = 0; j < LQ_WIDTH; j++) {
        vf sum[4];
        for (int g = 0; g < groups; g++) sum[g] = (vf){0};
        if (j < count)
            for (int64_t d = 0; d < dim; d += LQ_WIDTH) {
                vf key = LQ_NAME(load_chunk)(k, at[j], d, dim, bf16);
                for (int g = 0; g < groups; g++) sum[g] += load(q, g * padded + d, 0) * key;
            }
        for (int g = 0; g < groups; g++) parts[g][j] = sum[g];
    }
    for (int g = 0; g < groups; g++) store(scores, g * stride, LQ_NAME(lq_sums)(parts[g]), 0);
}

/* sum[g] = factor[g] * sum[g] + sum_t p[g][t] * v_t for `groups` heads and `vectors` vectors of the head from d on. */
LQ_INLINE void LQ_NAME(value_tile)(float *sum, int64_t padded, int64_t d, int64_t dim, const void *v, int bf16,
                                   const int64_t *at, int64_t count, const float *p, int64_t stride,
                                   const float *factor, int groups, int vectors) {
    vf total[4][4];
    for (int g = 0; g < groups; g++)
        for (int c = 0; c < vectors; c++) total[g][c] = load(sum, g * padded + d + c * LQ_WIDTH, 0) * factor[g];
    for (int64_t t = 0; t < count; t++)
        for (int c = 0; c < vectors; c++) {
            vf value = LQ_NAME(load_chunk)(v, at[t], d + c * LQ_WIDTH, dim, bf16);
            for (int g = 0; g < groups; g++) total[g][c] += p[g * stride + t] * value;
        }
    for (int g = 0; g < groups; g++)
        for (int c = 0; c < vectors; c++) store(sum, g * padded + d + c * LQ_WIDTH, total[g][c], 0);
}

/* Scores of one tile to weights; updates the running largest score and sum of weights, returns the old sums' factor. */
LQ_INLINE float LQ_NAME(soften)(float *scores, int64_t count, float softcap, float *largest, float *total) {
    vf top = (vf){0} - __builtin_inff(), weights = {0};
    for (int64_t t = count; t % LQ_WIDTH; t++) scores[t] = -__builtin_inff();
    for (int64_t t = 0; t < count; t += LQ_WIDTH) {
        vf score = load(scores, t, 0);
        if (softcap > 0) {
            vu real = (vu)(score > -__builtin_inff()) | (vu)(score != score);
            vf capped = softcap * LQ_NAME(lq_tanh)(score / softcap);
            score = LQ_NAME(lq_select)(real, capped, score); /* -inf is the padding */
            store(scores, t, score, 0);
        }
        top = LQ_NAME(lq_select)((vu)(score > top), score, top);
    }
    float most = *largest;
    for (int i = 0; i < LQ_WIDTH; i++)
        if (top[i] > most) most = top[i];
    for (int64_t t = 0; t < count; t += LQ_WIDTH) {
        vf weight = LQ_NAME(lq_exp)(load(scores, t, 0) - most);
        store(scores, t, weight, 0);
        weights += weight;
    }
    vf change = LQ_NAME(lq_exp)((vf){0} + (*largest - most));
    float factor = *largest == most ? 1.0f : change[0];
    *largest = most;
    *total = *total * factor + LQ_NAME(lq_sum)(weights);
    return factor;
}

#define GROUPS(call)                                                                                              \
    switch (left) {                                                                                               \
    case 1: call(1); break;                                                                                       \
    case 2: call(2); break;                                                                                       \
    case 3: call(3); break;                                                                                       \
    default: call(4); break;                                                                                      \
    }

LQ_INLINE void LQ_NAME(attend)(const Attention *a, const Run *run, Work *w, int bf16, int64_t dim) {
    const int64_t groups = a->heads / a->kv_heads, padded = (dim + 15) / 16 * 16;
    const int64_t *pages = a->pages + run->sequence * a->pages_width;
    const int64_t tokens = run->to - run->from;
    for (int64_t t = 0, page = run->from / a->page_size, in_page = run->from % a->page_size; t < tokens; t++) {
        w->at[t] = ((pages[page] * a->page_size + in_page) * a->kv_heads + run->kv_head) * dim;
        if (++in_page == a->page_size) page++, in_page = 0;
    }
    for (int64_t first = 0; first < tokens; first += TILE) {
        const int64_t *at = w->at + first;
        int64_t count = tokens - first < TILE ? tokens - first : TILE;
        int64_t next = tokens - first - count < TILE ? tokens - first - count : TILE;
        for (int64_t g = 0; g < groups; g += 4) {
            int64_t left = groups - g;
            for (int64_t t = 0; t < count; t += LQ_WIDTH) {
                for (int64_t i = t; g == 0 && i < t + LQ_WIDTH && i < count; i++)
                    LQ_NAME(fetch)(a->v, at[i], dim, bf16);
#define SCORES(n)                                                                                                 \
    LQ_NAME(score_tile)(w->q + g * padded, padded, dim, a->k, bf16, at + t, count - t,                            \
                        w->scores + g * TILE + t, TILE, n)
                GROUPS(SCORES)
#undef SCORES
            }
        }
        for (int64_t i = 0; i < next; i++) LQ_NAME(fetch)(a->k, at[TILE + i], dim, bf16);
        for (int64_t g = 0; g < groups; g++)
            w->factor[g] =
                LQ_NAME(soften)(w->scores + g * TILE, count, a->softcap, &w->largest[g], &w->total[g]);
        for (int64_t g = 0; g < groups; g += 4) {
            int64_t left = groups - g, d = 0;
            for (; d < padded; d += LQ_ACROSS_VECTORS * LQ_WIDTH) {
                int narrow = padded - d < LQ_ACROSS_VECTORS * LQ_WIDTH;
                for (int64_t c = d; c < (narrow ? padded : d + LQ_WIDTH); c += LQ_WIDTH) {
#define VALUES(n)                                                                                                 \
    if (narrow)                                                                                                   \
        LQ_NAME(value_tile)(w->sum + g * padded, padded, c, dim, a->v, bf16, at, count, w->scores + g * TILE,  \
                            TILE, w->factor + g, n, 1);                                                           \
    else                                                                                                          \
        LQ_NAME(value_tile)(w->sum + g * padded, padded, c, dim, a->v, bf16, at, count, w->scores + g * TILE,  \
                            TILE, w->factor + g, n, LQ_ACROSS_VECTORS)
                    GROUPS(VALUES)
#undef VALUES
                }
            }
        }
    }
}

/* With the usual head sizes as constants, so that loops over them unroll. */
#define SPECIALISED(dtype, bf16)                                                                                  \
    LQ_TARGET static void LQ_NAME(attend_##dtype##_64)(const Attention *a, const Run *run, Work *w) {             \
        LQ_NAME(attend)(a, run, w, bf16, 64);                                                                     \
    }                                                                                                             \
    LQ_TARGET static void LQ_NAME(attend_##dtype##_any)(const Attention *a, const Run *run, Work *w) {            \
        LQ_NAME(attend)(a, run, w, bf16, a->dim);                                                                 \
    }                                                                                                             \
    static void LQ_NAME(attend_##dtype)(const Attention *a, const Run *run, Work *w) {                            \
        (a->dim == 64 ? LQ_NAME(attend_##dtype##_64) : LQ_NAME(attend_##dtype##_any))(a, run, w);                 \
    }
SPECIALISED(f32, 0)
SPECIALISED(bf16, 1)
#undef SPECIALISED

#undef GROUPS
#undef load
#undef store
#undef LQ_ACROSS_VECTORS
