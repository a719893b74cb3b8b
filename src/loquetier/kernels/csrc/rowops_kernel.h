/* Kernels of rowops.c, once per ISA variant. */
#include "rows_vec.h"

LQ_INLINE void LQ_NAME(norm_group)(const Norm *n, int64_t x, int64_t delta, int64_t y, int bf16) {
    vf squares = {0};
    for (int64_t i = 0; i < n->dim; i += LQ_WIDTH) {
        vf value = LQ_NAME(take)(n->x, x + i, n->dim - i, bf16);
        if (n->delta != NULL) {
            value = LQ_NAME(stored)(value + LQ_NAME(take)(n->delta, delta + i, n->dim - i, bf16), bf16);
            LQ_NAME(give)(n->x, x + i, n->dim - i, value, bf16);
        }
        squares += value * value;
    }
    float factor = 1.0f / sqrtf(LQ_NAME(lq_sum)(squares) / (float)n->dim + n->epsilon);
    for (int64_t i = 0; i < n->dim; i += LQ_WIDTH) {
        vf value = LQ_NAME(take)(n->x, x + i, n->dim - i, bf16);
        vf weight = LQ_NAME(take)(n->weight, i, n->dim - i, bf16);
        LQ_NAME(give)(n->y, y + i, n->dim - i, weight * LQ_NAME(stored)(value * factor, bf16), bf16);
    }
}

LQ_TARGET static void LQ_NAME(norm_rows)(int64_t begin, int64_t end, void *context) {
    const Norm *n = context;
    for (int64_t row = begin; row < end; row++)
        for (int64_t group = 0; group < n->groups; group++) {
            int64_t at = group * n->dim, delta = row * n->groups * n->dim + at;
            if (n->bf16)
                LQ_NAME(norm_group)(n, row * n->x_stride + at, delta, row * n->y_stride + at, 1);
            else
                LQ_NAME(norm_group)(n, row * n->x_stride + at, delta, row * n->y_stride + at, 0);
        }
}

LQ_INLINE void LQ_NAME(rotary_head)(const Rotary *r, int64_t x, int64_t angle, int bf16) {
    int64_t half = r->dim / 2;
    for (int64_t i = 0; i < half; i += LQ_WIDTH) {
        int64_t left = half - i, low_at = x + i, high_at = x + half + i;
        vf low = LQ_NAME(take)(r->x, low_at, left, bf16), high = LQ_NAME(take)(r->x, high_at, left, bf16);
        vf cos_low = LQ_NAME(take)(r->cos, angle + i, left, bf16), sin_low = LQ_NAME(take)(r->sin, angle + i, left, bf16);
        vf cos_high = LQ_NAME(take)(r->cos, angle + half + i, left, bf16);
        vf sin_high = LQ_NAME(take)(r->sin, angle + half + i, left, bf16);
        vf new_low = LQ_NAME(stored)(low * cos_low, bf16) - LQ_NAME(stored)(high * sin_low, bf16);
        vf new_high = LQ_NAME(stored)(high * cos_high, bf16) + LQ_NAME(stored)(low * sin_high, bf16);
        LQ_NAME(give)(r->x, low_at, left, new_low, bf16);
        LQ_NAME(give)(r->x, high_at, left, new_high, bf16);
    }
}

LQ_TARGET static void LQ_NAME(rotary_rows)(int64_t begin, int64_t end, void *context) {
    const Rotary *r = context;
    for (int64_t row = begin; row < end; row++)
        for (int64_t head = 0; head < r->heads; head++)
            if (r->bf16)
                LQ_NAME(rotary_head)(r, row * r->stride + head * r->dim, row * r->dim, 1);
            else
                LQ_NAME(rotary_head)(r, row * r->stride + head * r->dim, row * r->dim, 0);
}

LQ_INLINE void LQ_NAME(swiglu_row)(const Swiglu *s, int64_t row, int bf16) {
    for (int64_t i = 0; i < s->inner; i += LQ_WIDTH) {
        int64_t left = s->inner - i;
        vf gate = LQ_NAME(take)(s->gate, row * s->stride + i, left, bf16);
        vf up = LQ_NAME(take)(s->up, row * s->stride + i, left, bf16);
        vf active = LQ_NAME(stored)(gate / (1.0f + LQ_NAME(lq_exp)(-gate)), bf16);
        LQ_NAME(give)(s->y, row * s->inner + i, left, active * up, bf16);
    }
}

LQ_TARGET static void LQ_NAME(swiglu_rows)(int64_t begin, int64_t end, void *context) {
    const Swiglu *s = context;
    for (int64_t row = begin; row < end; row++)
        if (s->bf16)
            LQ_NAME(swiglu_row)(s, row, 1);
        else
            LQ_NAME(swiglu_row)(s, row, 0);
}
