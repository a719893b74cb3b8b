/* Attention of a block of query columns over tiles of cached tokens, for one ISA variant; see prefill.c. */
#include "vec.h"
#include "vec_math.h"

#define load LQ_NAME(lq_load)
#define store LQ_NAME(lq_store)

/* One token's K or V as floats, zeros up to the padded head size. */
LQ_INLINE void LQ_NAME(widen)(const void *array, int64_t at, int64_t dim, int64_t padded, float *out, int bf16) {
    for (int64_t d = 0; d < padded; d += LQ_WIDTH) {
        int64_t left = dim - d;
        vf value = {0};
        if (left >= LQ_WIDTH)
            value = load(array, at + d, bf16);
        else if (left > 0)
            value = LQ_NAME(lq_load_part)(array, at + d, left, bf16);
        store(out, d, value, 0);
    }
}

LQ_TARGET static void LQ_NAME(widen_tile)(const Prefill *p, const void *array, const int64_t *at, int64_t count,
                                          float *out) {
    for (int64_t t = 0; t < count; t++)
        if (p->bf16)
            LQ_NAME(widen)(array, at[t], p->dim, p->padded, out + t * p->padded, 1);
        else
            LQ_NAME(widen)(array, at[t], p->dim, p->padded, out + t * p->padded, 0);
}

/* scores[t][c] = k_t . q_c for `tokens` tokens and LANES columns; q lies [padded][LANES]. */
LQ_INLINE void LQ_NAME(dots)(const float *k, const float *q, int64_t padded, float *scores, int tokens) {
    vf sum[4][LANES / LQ_WIDTH];
    for (int t = 0; t < tokens; t++)
        for (int c = 0; c < LANES / LQ_WIDTH; c++) sum[t][c] = (vf){0};
    for (int64_t d = 0; d < padded; d++)
        for (int t = 0; t < tokens; t++) {
            float key = k[t * padded + d];
            for (int c = 0; c < LANES / LQ_WIDTH; c++) sum[t][c] += load(q, d * LANES + c * LQ_WIDTH, 0) * key;
        }
    for (int t = 0; t < tokens; t++)
        for (int c = 0; c < LANES / LQ_WIDTH; c++) store(scores, t * LANES + c * LQ_WIDTH, sum[t][c], 0);
}

LQ_TARGET static void LQ_NAME(dots_tile)(const float *k, const float *q, int64_t padded, float *scores, int64_t count) {
    int64_t t = 0;
    for (; t + 4 <= count; t += 4) LQ_NAME(dots)(k + t * padded, q, padded, scores + t * LANES, 4);
    for (; t < count; t++) LQ_NAME(dots)(k + t * padded, q, padded, scores + t * LANES, 1);
}

/* sum[d][c] += v_t[d] * weight[t][c] for four elements d of the head. */
LQ_TARGET static void LQ_NAME(values_tile)(const float *v, const float *weights, int64_t padded, float *sums,
                                           int64_t count) {
    for (int64_t d = 0; d < padded; d += 4) {
        vf sum[4][LANES / LQ_WIDTH];
        for (int i = 0; i < 4; i++)
            for (int c = 0; c < LANES / LQ_WIDTH; c++) sum[i][c] = load(sums, (d + i) * LANES + c * LQ_WIDTH, 0);
        for (int64_t t = 0; t < count; t++)
            for (int i = 0; i < 4; i++) {
                float value = v[t * padded + d + i];
                for (int c = 0; c < LANES / LQ_WIDTH; c++)
                    sum[i][c] += load(weights, t * LANES + c * LQ_WIDTH, 0) * value;
            }
        for (int i = 0; i < 4; i++)
            for (int c = 0; c < LANES / LQ_WIDTH; c++) store(sums, (d + i) * LANES + c * LQ_WIDTH, sum[i][c], 0);
    }
}

/* Scores of `count` tokens from `first` on become weights, in place; largest and total follow; returns whether old sums
 * must be multiplied by factor[LANES]. A column sees tokens [low, high]. */
LQ_TARGET static int LQ_NAME(soften_tile)(const Prefill *p, Columns *c, float *scores, int64_t first, int64_t count,
                                          float *factor) {
    const float softcap = p->softcap, nothing = -__builtin_inff();
    const int everywhere = first + count - 1 <= c->all_high && first >= c->all_low;
    int moved = 0;
    for (int at = 0; at < LANES; at += LQ_WIDTH) {
        vf most = load(c->largest, at, 0), low = load(c->low, at, 0), high = load(c->high, at, 0);
        const vf old = most;
        for (int64_t t = 0; t < count; t++) {
            vf score = load(scores, t * LANES + at, 0) * p->scale;
            if (softcap > 0) score = softcap * LQ_NAME(lq_tanh)(score / softcap);
            if (!everywhere) {
                vf token = (vf){0} + (float)(first + t);
                score = LQ_NAME(lq_select)((vu)(token >= low) & (vu)(token <= high), score, (vf){0} + nothing);
            }
            /* A NaN must reach the sums, so it is not dropped here: it makes the weights NaN below. */
            most = LQ_NAME(lq_select)((vu)(score > most), score, most);
            store(scores, t * LANES + at, score, 0);
        }
        /* A column that has seen nothing yet: weights of 0, not e^(-inf + inf). */
        vf base = LQ_NAME(lq_select)((vu)(most > nothing), most, (vf){0});
        vf sum = {0};
        for (int64_t t = 0; t < count; t++) {
            vf weight = LQ_NAME(lq_exp)(load(scores, t * LANES + at, 0) - base);
            sum += weight;
            store(scores, t * LANES + at, weight, 0);
        }
        vf change = LQ_NAME(lq_select)((vu)(most > old), LQ_NAME(lq_exp)(old - base), (vf){0} + 1.0f);
        store(factor, at, change, 0);
        store(c->largest, at, most, 0);
        store(c->total, at, load(c->total, at, 0) * change + sum, 0);
        for (int i = 0; i < LQ_WIDTH; i++) moved |= change[i] != 1.0f;
    }
    return moved;
}

LQ_TARGET static void LQ_NAME(rescale)(float *sums, int64_t padded, const float *factor) {
    for (int64_t d = 0; d < padded; d++)
        for (int at = 0; at < LANES; at += LQ_WIDTH)
            store(sums, d * LANES + at, load(sums, d * LANES + at, 0) * load(factor, at, 0), 0);
}

#undef load
#undef store
