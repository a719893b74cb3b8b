/* Kernels of rowops.c, once per ISA variant. */
#include "rows_vec.h"

LQ_INLINE void LQ_NAME(norm_group)(const Norm *n, int64_t x, int64_t delta, int64_t y, int one_plus, int bf16) {
    vf squares = {0};
    float factor = 0.0f;
    if (n->post != NULL) {
        for (int64_t i = 0; i < n->dim; i += LQ_WIDTH) {
            vf value = LQ_NAME(take)(n->delta, delta + i, n->dim - i, bf16);
            squares += value * value;
        }
        factor = LQ_NAME(norm_factor)(squares, n->dim, n->post_epsilon);
        squares = (vf){0};
    }
    for (int64_t i = 0; i < n->dim; i += LQ_WIDTH) {
        int64_t left = n->dim - i;
        vf value = LQ_NAME(take)(n->x, x + i, left, bf16);
        if (n->delta != NULL) {
            vf more = LQ_NAME(take)(n->delta, delta + i, left, bf16);
            if (n->post != NULL)
                more = LQ_NAME(stored)(
                    LQ_NAME(normed)(more, factor, LQ_NAME(take)(n->post, i, left, bf16), one_plus, bf16), bf16);
            value = LQ_NAME(stored)(value + more, bf16);
            LQ_NAME(give)(n->x, x + i, left, value, bf16);
        }
        squares += value * value;
    }
    factor = LQ_NAME(norm_factor)(squares, n->dim, n->epsilon);
    for (int64_t i = 0; i < n->dim; i += LQ_WIDTH) {
        int64_t left = n->dim - i;
        vf value = LQ_NAME(take)(n->x, x + i, left, bf16), weight = LQ_NAME(take)(n->weight, i, left, bf16);
        LQ_NAME(give)(n->y, y + i, left, LQ_NAME(normed)(value, factor, weight, one_plus, bf16), bf16);
    }
}

LQ_TARGET static void LQ_NAME(norm_rows)(int64_t begin, int64_t end, void *context) {
    const Norm *n = context;
    for (int64_t row = begin; row < end; row++)
        for (int64_t group = 0; group < n->groups; group++) {
            int64_t at = group * n->dim, delta = row * n->groups * n->dim + at;
            int64_t x = row * n->x_stride + at, y = row * n->y_stride + at;
            if (n->bf16 && n->one_plus)
                LQ_NAME(norm_group)(n, x, delta, y, 1, 1);
            else if (n->bf16)
                LQ_NAME(norm_group)(n, x, delta, y, 0, 1);
            else
                LQ_NAME(norm_group)(n, x, delta, y, n->one_plus, 0);
        }
}

/* Rounded before it is added to, in float32 too: the compiler must not make one operation of both. So a row's angles turn
 * it to the same bits here and in the model's own code. */
LQ_INLINE vf LQ_NAME(product)(vf a, vf b, int bf16) {
    vf value = a * b;
    if (bf16) return LQ_NAME(stored)(value, 1);
#if LQ_X86
    __asm__("" : "+x"(value));
#elif defined(__aarch64__)
    __asm__("" : "+w"(value));
#endif
    return value;
}

LQ_INLINE void LQ_NAME(rotary_head)(const Rotary *r, int64_t x, int64_t angle, int bf16) {
    int64_t half = r->dim / 2;
    for (int64_t i = 0; i < half; i += LQ_WIDTH) {
        int64_t left = half - i;
        LQ_NAME(Halves) h = LQ_NAME(halves)(r->x, x + i, r->cos, r->sin, angle + i, half, left, bf16);
        vf low = LQ_NAME(product)(h.low, h.cos_low, bf16) - LQ_NAME(product)(h.high, h.sin_low, bf16);
        vf high = LQ_NAME(product)(h.high, h.cos_high, bf16) + LQ_NAME(product)(h.low, h.sin_high, bf16);
        LQ_NAME(give)(r->x, x + i, left, low, bf16);
        LQ_NAME(give)(r->x, x + half + i, left, high, bf16);
    }
}

LQ_TARGET static void LQ_NAME(rotary_rows)(int64_t begin, int64_t end, void *context) {
    const Rotary *r = context;
    for (int64_t row = begin; row < end; row++)
        for (int64_t head = 0; head < r->heads; head++)
            if (r->bf16)
                LQ_NAME(rotary_head)(r, row * r->row + head * r->head, row * r->angles, 1);
            else
                LQ_NAME(rotary_head)(r, row * r->row + head * r->head, row * r->angles, 0);
}

LQ_INLINE void LQ_NAME(gated_row)(const Gated *g, int64_t row, int32_t kind, int bf16) {
    for (int64_t i = 0; i < g->inner; i += LQ_WIDTH) {
        int64_t left = g->inner - i;
        vf gate = LQ_NAME(take)(g->gate, row * g->stride + i, left, bf16);
        vf up = LQ_NAME(take)(g->up, row * g->stride + i, left, bf16);
        vf active = LQ_NAME(stored)(LQ_NAME(active)(gate, kind), bf16);
        LQ_NAME(give)(g->y, row * g->inner + i, left, active * up, bf16);
    }
}

LQ_TARGET static void LQ_NAME(gated_rows)(int64_t begin, int64_t end, void *context) {
    const Gated *g = context;
    for (int64_t row = begin; row < end; row++)
        if (g->kind == LQ_GELU_TANH)
            LQ_NAME(gated_row)(g, row, LQ_GELU_TANH, g->bf16);
        else if (g->bf16)
            LQ_NAME(gated_row)(g, row, LQ_SILU, 1);
        else
            LQ_NAME(gated_row)(g, row, LQ_SILU, 0);
}
