/* Backward of what a decoder layer does between its GEMMs: RMSNorm with the residual's gradient, rotary, gated activation.
 *
 * Computed in float32 from the tensors that the forward kept, rounded once when stored. */
#include "loquetier.h"

#include <math.h>

typedef struct {
    const void *x, *weight, *dy, *more;
    void *dx, *y;
    int64_t groups, dim, x_stride, dy_stride, dx_stride;
    float epsilon;
    int one_plus, bf16;
} NormGrad;

typedef struct {
    void *dx;
    const void *cos, *sin;
    int64_t heads, dim, stride;
    int bf16;
} RotaryGrad;

typedef struct {
    const void *gate, *up, *dy;
    void *dgate, *dup, *y;
    int64_t inner, stride, dy_stride, grad_stride;
    int32_t kind;
    int bf16;
} GatedGrad;

#define LQ_TEMPLATE "rowgrads_kernel.h"
#include "variants.h"

enum { GRAIN = 16384 }; /* elements below which a second thread costs more than it saves */

static int64_t grain(int64_t row) { return row >= GRAIN ? 1 : (GRAIN + row - 1) / row; }

/* dx = more + d/dx of (w * x / sqrt(mean(x^2) + epsilon)) . dy, per group of `dim` elements, w as in lq_rms_norm.
 * `more` (NULL: none) has dx's strides and may be dx: the gradient that reaches x past the norm. dx may be dy.
 * y (NULL: not wanted) [rows, groups * dim] without gaps gets the forward's output again. */
LQ_EXPORT void lq_rms_norm_backward(const void *x, const void *weight, const void *dy, const void *more, void *dx,
                                    void *y, int64_t rows, int64_t groups, int64_t dim, int64_t x_stride,
                                    int64_t dy_stride, int64_t dx_stride, float epsilon, int32_t one_plus,
                                    int32_t dtype) {
    NormGrad norm = {x,        weight,    dy,        more,    dx,       y,              groups, dim,
                     x_stride, dy_stride, dx_stride, epsilon, one_plus, dtype == LQ_BF16};
    lq_parallel_for(rows, grain(groups * dim), LQ_PICK(norm_grads), &norm);
}

/* The gradient of lq_rotary, in place on that of its output. */
LQ_EXPORT void lq_rotary_backward(void *dx, const void *cosines, const void *sines, int64_t rows, int64_t heads,
                                  int64_t dim, int64_t stride, int32_t dtype) {
    RotaryGrad rotary = {dx, cosines, sines, heads, dim, stride, dtype == LQ_BF16};
    lq_parallel_for(rows, grain(heads * dim), LQ_PICK(rotary_grads), &rotary);
}

/* Gradients of gate and up where y = act(gate) * up; kind as in lq_gated. gate and up have `stride` between
 * their rows, dgate and dup `grad_stride`, dy `dy_stride`. y (NULL: not wanted) [rows, inner] gets the output again. */
LQ_EXPORT void lq_gated_backward(const void *gate, const void *up, const void *dy, void *dgate, void *dup, void *y,
                                 int64_t rows, int64_t inner, int64_t stride, int64_t dy_stride, int64_t grad_stride,
                                 int32_t kind, int32_t dtype) {
    GatedGrad gated = {gate, up, dy, dgate, dup, y, inner, stride, dy_stride, grad_stride, kind, dtype == LQ_BF16};
    lq_parallel_for(rows, grain(inner), LQ_PICK(gated_grads), &gated);
}
