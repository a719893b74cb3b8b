/* A decoder stack on decode rows, from the embedding's output to the last norm, as one call.
 *
 * At one row the Python between the kernels takes longer than the kernels that are not GEMMs. This file computes nothing
 * itself: it calls the other kernels in the order of `FusedStack.run_layer`, which is its reference. */
#include "loquetier.h"

typedef struct {
    const void *norm, *qkv, *qkv_bias, *q_norm, *k_norm, *o, *o_bias, *mlp_norm, *gate_up, *gate_up_bias, *down,
        *down_bias;
    void *keys, *values; /* [pages, page_size, kv_heads, head_dim] */
    int64_t window;
    double norm_epsilon, q_epsilon, k_epsilon, mlp_epsilon, scale, softcap;
} Layer;

/* One adapter-bearing linear: columns [first, first + width) of GEMM number `gemm`, four to a layer. */
typedef struct {
    int64_t gemm;
    const int64_t *segments;
    const double *scales;
    int64_t count, first, width;
} Delta;

typedef struct {
    int64_t num_layers, rows, hidden, heads, kv_heads, head_dim, inner, page_size, pages_width, level, num_deltas;
    void *x;               /* [rows, hidden]: the embedding's output; overwritten */
    void *y;               /* [rows, hidden]: the result */
    const void *cosines, *sines;                      /* [rows, head_dim] */
    const int64_t *cache_rows, *pages, *positions;
    void *work;            /* lq_stack_work elements */
    const void *last_norm;
    double last_epsilon;
    const Delta *deltas;   /* ascending by gemm */
} Stack;

typedef struct {
    const Stack *stack;
    const Delta *next, *end;
    int64_t gemm;
    int32_t failed;
} Run;

static int64_t qkv_width(const Stack *s) { return (s->heads + 2 * s->kv_heads) * s->head_dim; }

/* bfloat16 elements of `work`. */
LQ_EXPORT int64_t lq_stack_work(const Stack *s) {
    return s->rows * (2 * s->hidden + qkv_width(s) + s->heads * s->head_dim + 3 * s->inner);
}

static void linear(Run *run, const uint16_t *x, const void *w, const void *bias, uint16_t *y, int64_t k, int64_t n) {
    lq_gemm_bf16(x, w, bias, y, run->stack->rows, k, n, k, n, run->stack->level);
    for (; run->next < run->end && run->next->gemm == run->gemm; run->next++) {
        const Delta *d = run->next;
        run->failed |= lq_smlm_forward(x, k, y + d->first, n, k, d->width, d->segments, d->scales, d->count, LQ_BF16,
                                       LQ_F32);
    }
    run->gemm++;
}

/* K and V, side by side behind the queries, to their places in the cache. */
static void write_cache(const Stack *s, const Layer *layer, const uint16_t *qkv) {
    int64_t kv = s->kv_heads * s->head_dim, q = s->heads * s->head_dim;
    for (int64_t row = 0; row < s->rows; row++) {
        const uint16_t *from = qkv + row * (q + 2 * kv) + q;
        memcpy((uint16_t *)layer->keys + s->cache_rows[row] * kv, from, (size_t)kv * sizeof *from);
        memcpy((uint16_t *)layer->values + s->cache_rows[row] * kv, from + kv, (size_t)kv * sizeof *from);
    }
}

static void attend(Run *run, const Layer *layer, uint16_t *qkv, uint16_t *out) {
    const Stack *s = run->stack;
    int64_t width = qkv_width(s), q = s->heads * s->head_dim;
    if (layer->q_norm != NULL)
        lq_rms_norm(qkv, NULL, layer->q_norm, qkv, s->rows, s->heads, s->head_dim, width, width,
                    (float)layer->q_epsilon, LQ_BF16);
    if (layer->k_norm != NULL)
        lq_rms_norm(qkv + q, NULL, layer->k_norm, qkv + q, s->rows, s->kv_heads, s->head_dim, width, width,
                    (float)layer->k_epsilon, LQ_BF16);
    lq_rotary(qkv, s->cosines, s->sines, s->rows, s->heads + s->kv_heads, s->head_dim, width, LQ_BF16);
    write_cache(s, layer, qkv);
    run->failed |= lq_decode_attention(qkv, width, s->head_dim, layer->keys, layer->values, out, s->pages,
                                       s->pages_width, s->positions, s->rows, s->heads, s->kv_heads, s->head_dim,
                                       s->page_size, layer->window, layer->scale, layer->softcap, LQ_BF16);
}

/* Returns 0, or not 0 when a kernel found no memory; then y is undefined. */
LQ_EXPORT int32_t lq_decode_stack(const Stack *s, const Layer *layers) {
    Run run = {s, s->deltas, s->deltas + s->num_deltas, 0, 0};
    uint16_t *normed = s->work, *delta = normed + s->rows * s->hidden, *qkv = delta + s->rows * s->hidden;
    uint16_t *attended = qkv + s->rows * qkv_width(s), *gate_up = attended + s->rows * s->heads * s->head_dim;
    uint16_t *inner = gate_up + 2 * s->rows * s->inner;
    for (int64_t i = 0; i < s->num_layers && !run.failed; i++) {
        const Layer *layer = layers + i;
        lq_rms_norm(s->x, i ? delta : NULL, layer->norm, normed, s->rows, 1, s->hidden, s->hidden, s->hidden,
                    (float)layer->norm_epsilon, LQ_BF16);
        linear(&run, normed, layer->qkv, layer->qkv_bias, qkv, s->hidden, qkv_width(s));
        attend(&run, layer, qkv, attended);
        linear(&run, attended, layer->o, layer->o_bias, delta, s->heads * s->head_dim, s->hidden);
        lq_rms_norm(s->x, delta, layer->mlp_norm, normed, s->rows, 1, s->hidden, s->hidden, s->hidden,
                    (float)layer->mlp_epsilon, LQ_BF16);
        linear(&run, normed, layer->gate_up, layer->gate_up_bias, gate_up, s->hidden, 2 * s->inner);
        lq_swiglu(gate_up, gate_up + s->inner, inner, s->rows, s->inner, 2 * s->inner, LQ_BF16);
        linear(&run, inner, layer->down, layer->down_bias, delta, s->inner, s->hidden);
    }
    lq_rms_norm(s->x, s->num_layers ? delta : NULL, s->last_norm, s->y, s->rows, 1, s->hidden, s->hidden, s->hidden,
                (float)s->last_epsilon, LQ_BF16);
    return run.failed;
}
