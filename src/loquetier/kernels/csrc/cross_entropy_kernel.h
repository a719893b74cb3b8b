/* The rows of cross_entropy.c, once per ISA variant: three passes over a row, which stays in the cache. */
#include "vec.h"
#include "vec_math.h"

/* Largest value; a NaN anywhere makes it NaN. */
LQ_INLINE float LQ_NAME(largest)(const void *logits, int64_t at, int64_t vocab, int bf16) {
    vf top = (vf){0} - __builtin_inff();
    int64_t i = 0;
    for (; i + LQ_WIDTH <= vocab; i += LQ_WIDTH) {
        vf value = LQ_NAME(lq_load)(logits, at + i, bf16);
        top = LQ_NAME(lq_select)((vu)(value > top) | (vu)(value != value), value, top);
    }
    float found = -__builtin_inff(), lanes[LQ_WIDTH];
    memcpy(lanes, &top, sizeof lanes);
    for (int64_t l = 0; l < LQ_WIDTH; l++)
        if (lanes[l] > found || lanes[l] != lanes[l]) found = lanes[l];
    for (; i < vocab; i++) {
        float value = LQ_NAME(lq_load_one)(logits, at + i, bf16);
        if (value > found || value != value) found = value;
    }
    return found;
}

LQ_INLINE float LQ_NAME(sum_of_exponentials)(const void *logits, int64_t at, int64_t vocab, float top, int bf16) {
    vf sum = {0};
    float rest = 0;
    int64_t i = 0;
    for (; i + LQ_WIDTH <= vocab; i += LQ_WIDTH) sum += LQ_NAME(lq_exp)(LQ_NAME(lq_load)(logits, at + i, bf16) - top);
    for (; i < vocab; i++) rest += __builtin_expf(LQ_NAME(lq_load_one)(logits, at + i, bf16) - top);
    return LQ_NAME(lq_sum)(sum) + rest;
}

LQ_INLINE void LQ_NAME(write_gradient)(void *logits, int64_t at, int64_t vocab, float top, float factor, int bf16) {
    int64_t i = 0;
    for (; i + LQ_WIDTH <= vocab; i += LQ_WIDTH)
        LQ_NAME(lq_store)(logits, at + i, LQ_NAME(lq_exp)(LQ_NAME(lq_load)(logits, at + i, bf16) - top) * factor, bf16);
    for (; i < vocab; i++)
        LQ_NAME(lq_store_one)(logits, at + i, __builtin_expf(LQ_NAME(lq_load_one)(logits, at + i, bf16) - top) * factor,
                              bf16);
}

LQ_INLINE void LQ_NAME(loss_row)(const Loss *c, int64_t row, int bf16) {
    int64_t at = row * c->vocab, target = c->targets[row], before = 0;
    float top = LQ_NAME(largest)(c->logits, at, c->vocab, bf16);
    float wanted = LQ_NAME(lq_load_one)(c->logits, at + target, bf16);
    float sum = LQ_NAME(sum_of_exponentials)(c->logits, at, c->vocab, top, bf16);
    if (wanted == top) /* rare enough: is an earlier one as large? */
        while (LQ_NAME(lq_load_one)(c->logits, at + before, bf16) != top) before++;
    c->correct[row] = wanted == top && before == target ? 1.0f : 0.0f;
    c->nll[row] = logf(sum) + top - wanted;
    if (c->weights == NULL) return;
    float weight = c->weights[row];
    LQ_NAME(write_gradient)(c->logits, at, c->vocab, top, weight / sum, bf16);
    LQ_NAME(lq_store_one)(c->logits, at + target, weight * (expf(wanted - top) / sum - 1.0f), bf16);
}

LQ_TARGET static void LQ_NAME(loss_rows)(int64_t begin, int64_t end, void *context) {
    const Loss *c = context;
    for (int64_t row = begin; row < end; row++)
        if (c->bf16)
            LQ_NAME(loss_row)(c, row, 1);
        else
            LQ_NAME(loss_row)(c, row, 0);
}
