/* What a decoder layer does between its GEMMs, a row at a time: residual add and RMSNorm, rotary and KV write, gated activation.
 *
 * Each rounds where Hugging Face's eager code rounds (after every elementwise operation, to the tensor's dtype), so that results
 * differ from it by the order of one float32 sum and the last bit of one exponential, and by nothing else. */
#include "loquetier.h"

#include <math.h>

typedef struct {
    void *x;
    const void *delta, *post, *weight;
    void *y;
    int64_t groups, dim, x_stride, y_stride;
    float post_epsilon, epsilon;
    int one_plus, bf16;
} Norm;

typedef struct {
    void *x;
    const void *cos, *sin;
    int64_t heads, dim, row, head; /* dim: elements that turn; row, head: elements from one to the next */
    int64_t angles;                /* the same of cos and sin */
    int bf16;
} Rotary;

typedef struct {
    const void *gate, *up;
    void *y;
    int64_t inner, stride;
    int32_t kind;
    int bf16;
} Gated;

#define LQ_TEMPLATE "rowops_kernel.h"
#include "variants.h"

/* Elements below which a second thread costs more than it saves. */
enum { GRAIN = 32768 };

static int64_t grain(int64_t row) { return row >= GRAIN ? 1 : (GRAIN + row - 1) / row; }

/* x += delta (unless NULL), then y = w * x / sqrt(mean(x^2) + epsilon) over each group of `dim` elements.
 * A row is `groups` groups side by side; strides are between rows, in elements. y may be x; delta is [rows, dim * groups]
 * without gaps. w is `weight`, or 1 + `weight` with one_plus (Gemma's norms, which multiply before they round).
 * post (NULL: none) is the weight of a norm of the same form with post_epsilon that delta goes through before it is added. */
LQ_EXPORT void lq_rms_norm(void *x, const void *delta, const void *post, const void *weight, void *y, int64_t rows,
                           int64_t groups, int64_t dim, int64_t x_stride, int64_t y_stride, float post_epsilon,
                           float epsilon, int32_t one_plus, int32_t dtype) {
    Norm norm = {x,        delta,    post,         weight,  y,        groups,          dim,
                 x_stride, y_stride, post_epsilon, epsilon, one_plus, dtype == LQ_BF16};
    lq_parallel_for(rows, grain(groups * dim), LQ_PICK(norm_rows), &norm);
}

/* In place on `heads` heads of `dim` elements side by side in each row: x = x * cos + rotate_half(x) * sin.
 * cos and sin are [rows, dim] without gaps. */
LQ_EXPORT void lq_rotary(void *x, const void *cosines, const void *sines, int64_t rows, int64_t heads, int64_t dim,
                         int64_t stride, int32_t dtype) {
    Rotary rotary = {x, cosines, sines, heads, dim, stride, dim, dim, dtype == LQ_BF16};
    lq_parallel_for(rows, grain(heads * dim), LQ_PICK(rotary_rows), &rotary);
}

/* y = act(gate) * up; gate and up are columns of matrices with `stride` between rows; y is [rows, inner].
 * kind: LQ_SILU or LQ_GELU_TANH. */
LQ_EXPORT void lq_gated(const void *gate, const void *up, void *y, int64_t rows, int64_t inner, int64_t stride,
                        int32_t kind, int32_t dtype) {
    Gated gated = {gate, up, y, inner, stride, kind, dtype == LQ_BF16};
    lq_parallel_for(rows, grain(inner), LQ_PICK(gated_rows), &gated);
}

typedef struct {
    Rotary q, k;
    LqHeads value;
    int64_t dim, first;
    const int64_t *cache_rows;
    char *keys, *values;
} RotaryWrite;

/* The heads of one row, side by side to `to`. */
static void copy_heads(char *to, const char *from, int64_t heads, int64_t head, int64_t dim, int64_t size) {
    size_t bytes = (size_t)(dim * size);
    if (head == dim) {
        memcpy(to, from, bytes * (size_t)heads);
        return;
    }
    for (int64_t i = 0; i < heads; i++) memcpy(to + (size_t)i * bytes, from + i * head * size, bytes);
}

static void rotary_write_rows(int64_t begin, int64_t end, void *context) {
    RotaryWrite *w = context;
    const Rotary *k = &w->k;
    int64_t size = k->bf16 ? 2 : 4, heads = k->heads;
    if (k->cos != NULL) {
        LQ_PICK(rotary_rows)(begin, end, &w->q);
        LQ_PICK(rotary_rows)(begin, end, &w->k);
    }
    for (int64_t row = begin > w->first ? begin : w->first; row < end; row++) {
        int64_t at = w->cache_rows[row - w->first] * heads * w->dim * size;
        copy_heads(w->keys + at, (const char *)k->x + row * k->row * size, heads, k->head, w->dim, size);
        copy_heads(w->values + at, (const char *)w->value.at + row * w->value.row * size, heads, w->value.head, w->dim,
                   size);
    }
}

/* Rotates q and k in place as lq_rotary does, then writes K and V of rows [first, rows) to the cache.
 *   q, k, v        heads of `dim` elements side by side; rows and heads lie where LqHeads says
 *   cosines, sines [rows, turned], `angles` elements from row to row: the first `turned` elements of a head turn, the
 *                  others stay; NULL: nothing turns, and q is not looked at
 *   cache_rows     [rows - first], page * page_size + offset; no two the same
 *   keys, values   [.., kv_heads, dim], contiguous */
LQ_EXPORT void lq_rotary_write(const LqHeads *q, const LqHeads *k, const LqHeads *v, const void *cosines,
                               const void *sines, int64_t angles, int64_t rows, int64_t heads, int64_t kv_heads,
                               int64_t dim, int64_t turned, const int64_t *cache_rows, int64_t first, void *keys,
                               void *values, int32_t dtype) {
    int bf16 = dtype == LQ_BF16;
    RotaryWrite w = {{q->at, cosines, sines, heads, turned, q->row, q->head, angles, bf16},
                     {k->at, cosines, sines, kv_heads, turned, k->row, k->head, angles, bf16},
                     *v, dim, first, cache_rows, keys, values};
    lq_parallel_for(rows, grain((heads + 2 * kv_heads) * dim), rotary_write_rows, &w);
}
