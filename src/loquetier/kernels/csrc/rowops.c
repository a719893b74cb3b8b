/* What a decoder layer does between its GEMMs, a row at a time: residual add and RMSNorm, rotary, SwiGLU.
 *
 * Each rounds where Hugging Face's eager code rounds (after every elementwise operation, to the tensor's dtype), so that results
 * differ from it by the order of one float32 sum and the last bit of one exponential, and by nothing else. */
#include "loquetier.h"

#include <math.h>

typedef struct {
    void *x;
    const void *delta, *weight;
    void *y;
    int64_t groups, dim, x_stride, y_stride;
    float epsilon;
    int bf16;
} Norm;

typedef struct {
    void *x;
    const void *cos, *sin;
    int64_t heads, dim, stride;
    int bf16;
} Rotary;

typedef struct {
    const void *gate, *up;
    void *y;
    int64_t inner, stride;
    int bf16;
} Swiglu;

#define LQ_TEMPLATE "rowops_kernel.h"
#include "variants.h"

/* Elements below which a second thread costs more than it saves. */
enum { GRAIN = 32768 };

static int64_t grain(int64_t row) { return row >= GRAIN ? 1 : (GRAIN + row - 1) / row; }

/* x += delta (unless NULL), then y = weight * x / sqrt(mean(x^2) + epsilon) over each group of `dim` elements.
 * A row is `groups` groups side by side; strides are between rows, in elements. y may be x; delta is [rows, dim * groups]
 * without gaps. */
LQ_EXPORT void lq_rms_norm(void *x, const void *delta, const void *weight, void *y, int64_t rows, int64_t groups,
                           int64_t dim, int64_t x_stride, int64_t y_stride, float epsilon, int32_t dtype) {
    Norm norm = {x, delta, weight, y, groups, dim, x_stride, y_stride, epsilon, dtype == LQ_BF16};
    lq_parallel_for(rows, grain(groups * dim), LQ_PICK(norm_rows), &norm);
}

/* In place on `heads` heads of `dim` elements side by side in each row: x = x * cos + rotate_half(x) * sin.
 * cos and sin are [rows, dim] without gaps. */
LQ_EXPORT void lq_rotary(void *x, const void *cosines, const void *sines, int64_t rows, int64_t heads, int64_t dim,
                         int64_t stride, int32_t dtype) {
    Rotary rotary = {x, cosines, sines, heads, dim, stride, dtype == LQ_BF16};
    lq_parallel_for(rows, grain(heads * dim), LQ_PICK(rotary_rows), &rotary);
}

/* y = silu(gate) * up; gate and up are columns of one matrix, `stride` between its rows; y is [rows, inner]. */
LQ_EXPORT void lq_swiglu(const void *gate, const void *up, void *y, int64_t rows, int64_t inner, int64_t stride,
                         int32_t dtype) {
    Swiglu swiglu = {gate, up, y, inner, stride, dtype == LQ_BF16};
    lq_parallel_for(rows, grain(inner), LQ_PICK(swiglu_rows), &swiglu);
}

typedef struct {
    Rotary rotary;
    int64_t q, kv; /* elements of the queries and of K in a row */
    const int64_t *cache_rows;
    char *keys, *values;
} RotaryCache;

static void rotary_cache_rows(int64_t begin, int64_t end, void *context) {
    RotaryCache *c = context;
    size_t size = c->rotary.bf16 ? 2 : 4, bytes = (size_t)c->kv * size;
    LQ_PICK(rotary_rows)(begin, end, &c->rotary);
    for (int64_t row = begin; row < end; row++) {
        const char *k = (const char *)c->rotary.x + (size_t)(row * c->rotary.stride + c->q) * size;
        memcpy(c->keys + (size_t)c->cache_rows[row] * bytes, k, bytes);
        memcpy(c->values + (size_t)c->cache_rows[row] * bytes, k + bytes, bytes);
    }
}

/* lq_rotary on the query and key heads of rows [queries | keys | values], and K and V to their places in the cache.
 *   cache_rows   [rows], page * page_size + offset; no two the same
 *   keys, values [.., kv_heads, dim], contiguous */
LQ_EXPORT void lq_rotary_cache(void *x, const void *cosines, const void *sines, int64_t rows, int64_t heads,
                               int64_t kv_heads, int64_t dim, int64_t stride, const int64_t *cache_rows, void *keys,
                               void *values, int32_t dtype) {
    RotaryCache c = {{x, cosines, sines, heads + kv_heads, dim, stride, dtype == LQ_BF16},
                     heads * dim, kv_heads * dim, cache_rows, keys, values};
    lq_parallel_for(rows, grain((heads + 2 * kv_heads) * dim), rotary_cache_rows, &c);
}
