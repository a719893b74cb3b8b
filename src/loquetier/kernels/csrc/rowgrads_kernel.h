/* Kernels of rowgrads.c, once per ISA variant. */
#include "rows_vec.h"

/* y = w x r (w: weight, or 1 + weight) with r = (mean(x^2) + epsilon)^-1/2, so dx = r w dy - x r^3 mean(w dy x). */
LQ_INLINE void LQ_NAME(norm_grad)(const NormGrad *n, int64_t x, int64_t dy, int64_t dx, int64_t y, int bf16) {
    vf squares = {0}, dots = {0}, one = squares + (n->one_plus ? 1.0f : 0.0f);
    for (int64_t i = 0; i < n->dim; i += LQ_WIDTH) {
        int64_t left = n->dim - i;
        vf value = LQ_NAME(take)(n->x, x + i, left, bf16);
        squares += value * value;
        dots += value * (one + LQ_NAME(take)(n->weight, i, left, bf16)) * LQ_NAME(take)(n->dy, dy + i, left, bf16);
    }
    float factor = LQ_NAME(norm_factor)(squares, n->dim, n->epsilon);
    float pull = LQ_NAME(lq_sum)(dots) / (float)n->dim * factor * factor * factor;
    for (int64_t i = 0; i < n->dim; i += LQ_WIDTH) {
        int64_t left = n->dim - i;
        vf value = LQ_NAME(take)(n->x, x + i, left, bf16), weight = LQ_NAME(take)(n->weight, i, left, bf16);
        vf grad = factor * (one + weight) * LQ_NAME(take)(n->dy, dy + i, left, bf16) - pull * value;
        if (n->more != NULL) grad += LQ_NAME(take)(n->more, dx + i, left, bf16);
        LQ_NAME(give)(n->dx, dx + i, left, grad, bf16);
        if (n->y != NULL)
            LQ_NAME(give)(n->y, y + i, left, LQ_NAME(normed)(value, factor, weight, n->one_plus, bf16), bf16);
    }
}

LQ_TARGET static void LQ_NAME(norm_grads)(int64_t begin, int64_t end, void *context) {
    const NormGrad *n = context;
    for (int64_t row = begin; row < end; row++)
        for (int64_t group = 0; group < n->groups; group++) {
            int64_t at = group * n->dim, x = row * n->x_stride + at, dy = row * n->dy_stride + at;
            int64_t dx = row * n->dx_stride + at, y = row * n->groups * n->dim + at;
            if (n->bf16)
                LQ_NAME(norm_grad)(n, x, dy, dx, y, 1);
            else
                LQ_NAME(norm_grad)(n, x, dy, dx, y, 0);
        }
}

LQ_INLINE void LQ_NAME(rotary_grad)(const RotaryGrad *r, int64_t x, int64_t angle, int bf16) {
    int64_t half = r->dim / 2;
    for (int64_t i = 0; i < half; i += LQ_WIDTH) {
        int64_t left = half - i;
        LQ_NAME(Halves) h = LQ_NAME(halves)(r->dx, x + i, r->cos, r->sin, angle + i, half, left, bf16);
        LQ_NAME(give)(r->dx, x + i, left, h.low * h.cos_low + h.high * h.sin_high, bf16);
        LQ_NAME(give)(r->dx, x + half + i, left, h.high * h.cos_high - h.low * h.sin_low, bf16);
    }
}

LQ_TARGET static void LQ_NAME(rotary_grads)(int64_t begin, int64_t end, void *context) {
    const RotaryGrad *r = context;
    for (int64_t row = begin; row < end; row++)
        for (int64_t head = 0; head < r->heads; head++)
            if (r->bf16)
                LQ_NAME(rotary_grad)(r, row * r->stride + head * r->dim, row * r->dim, 1);
            else
                LQ_NAME(rotary_grad)(r, row * r->stride + head * r->dim, row * r->dim, 0);
}

/* act(gate) and its derivative. silu = g s with s = sigmoid(g); gelu = g s with s = (1 + tanh(u)) / 2. */
LQ_INLINE vf LQ_NAME(activate)(vf gate, int32_t kind, vf *slope) {
    if (kind == LQ_GELU_TANH) {
        vf square, bent = LQ_NAME(gelu_bent)(gate, &square), share = 0.5f + 0.5f * bent;
        *slope = share + 0.5f * gate * (1.0f - bent * bent) * 0.797884561f * (1.0f + 0.134145f * square);
        return gate * share;
    }
    vf share = 1.0f / (1.0f + LQ_NAME(lq_exp)(-gate));
    *slope = share * (1.0f + gate * (1.0f - share));
    return gate * share;
}

LQ_INLINE void LQ_NAME(gated_grad)(const GatedGrad *g, int64_t row, int bf16) {
    for (int64_t i = 0; i < g->inner; i += LQ_WIDTH) {
        int64_t left = g->inner - i, from = row * g->stride + i, to = row * g->grad_stride + i;
        vf gate = LQ_NAME(take)(g->gate, from, left, bf16), up = LQ_NAME(take)(g->up, from, left, bf16);
        vf dy = LQ_NAME(take)(g->dy, row * g->dy_stride + i, left, bf16), slope;
        vf active = LQ_NAME(stored)(LQ_NAME(activate)(gate, g->kind, &slope), bf16);
        LQ_NAME(give)(g->dgate, to, left, dy * up * slope, bf16);
        LQ_NAME(give)(g->dup, to, left, dy * active, bf16);
        if (g->y != NULL) LQ_NAME(give)(g->y, row * g->inner + i, left, active * up, bf16);
    }
}

LQ_TARGET static void LQ_NAME(gated_grads)(int64_t begin, int64_t end, void *context) {
    const GatedGrad *g = context;
    for (int64_t row = begin; row < end; row++)
        if (g->bf16)
            LQ_NAME(gated_grad)(g, row, 1);
        else
            LQ_NAME(gated_grad)(g, row, 0);
}
