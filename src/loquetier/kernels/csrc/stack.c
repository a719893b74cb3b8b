/* A decoder stack on rows that are served, from the embedding's output to the last norm, as one call.
 *
 * At few rows the Python between the kernels takes longer than the kernels that are not GEMMs, and so does forking and
 * joining threads for each of them: a team runs the whole stack. This file computes nothing itself: it calls
 * the other kernels in the order of `FusedStack.run_layer`, which is its reference. Rows are [prefill | decode]. */
#include "loquetier.h"

typedef struct {
    const void *norm, *qkv, *qkv_bias, *q_norm, *k_norm, *o, *o_bias, *o_norm, *mlp_norm, *gate_up, *gate_up_bias,
        *down, *down_bias, *down_norm; /* NULL: no bias, no such norm */
    void *keys, *values;               /* [pages, page_size, kv_heads, head_dim] */
    int64_t window, angles;            /* which of the stack's angles; -1: nothing turns */
    double norm_epsilon, q_epsilon, k_epsilon, o_epsilon, mlp_epsilon, down_epsilon, scale, softcap;
} Layer;

typedef struct {
    int64_t num_layers, rows, hidden, heads, kv_heads, head_dim, inner, page_size, pages_width, level, num_spans,
        first_decode, num_s, num_packed;
    void *x;               /* [rows, hidden]: the embedding's output; overwritten */
    void *y;               /* [rows, hidden]: the result */
    const void *cosines, *sines;                      /* [kinds of angles, rows, head_dim] */
    const int64_t *cache_rows;                        /* [rows] */
    const LqSpan *spans;                              /* of the rows before first_decode */
    const int64_t *pages, *positions;                 /* of decode rows */
    void *work;            /* lq_stack_work bytes */
    const void *last_norm;
    double last_epsilon;
    const LqPiece *pieces;
    const LqLong *longs;
    const LqPieces *by_gemm; /* NULL: no adapters */
    int64_t w_dtype;       /* of the adapters */
    int64_t one_plus, activation; /* as in lq_rms_norm and lq_gated */
} Stack;

typedef struct {
    const Stack *stack;
    const Layer *layers;
    float *s;
    uint16_t *packed, *work;
    int32_t failed; /* of member 0; a kernel fails for all members or for none */
} Job;

typedef struct {
    const Stack *stack;
    float *s;
    uint16_t *packed;
    int64_t gemm;
    int32_t failed;
} Run;

static int64_t qkv_width(const Stack *s) { return (s->heads + 2 * s->kv_heads) * s->head_dim; }

/* Packed factors and S of tiles take whole cache lines, so that what follows begins at one. */
static int64_t packed_size(const Stack *s) { return (s->num_packed + 31) / 32 * 32; }

/* Bytes of `work`: packed factors and S of the adapters, then the rows between the GEMMs. */
LQ_EXPORT int64_t lq_stack_work(const Stack *s) {
    int64_t per_row = 2 * s->hidden + qkv_width(s) + s->heads * s->head_dim + 3 * s->inner;
    return s->num_s * (int64_t)sizeof(float) + (packed_size(s) + s->rows * per_row) * (int64_t)sizeof(uint16_t);
}

static void linear(Run *run, const uint16_t *x, const void *w, const void *bias, uint16_t *y, int64_t k, int64_t n) {
    const Stack *s = run->stack;
    const LqPieces none = {0, 0, 0, 0, 0}, *p = s->by_gemm == NULL ? &none : &s->by_gemm[run->gemm++];
    int64_t count = p->end_long - p->first_long;
    LqLongs longs = {count ? s->longs + p->first_long : NULL, count, x, y, k, n, run->packed, s->w_dtype == LQ_BF16};
    if (count) lq_longs_shrink(&longs);
    int has_pieces = p->end > p->first_shrink;
    if (has_pieces)
        lq_delta_shrink(s->pieces + p->first_shrink, p->first_expand - p->first_shrink, x, k, k, run->s,
                        (int32_t)s->w_dtype);
    lq_gemm_bf16_then(x, w, bias, y, s->rows, k, n, k, n, s->level, count ? lq_longs_expand : NULL, &longs);
    if (has_pieces)
        lq_delta_expand(s->pieces + p->first_expand, p->end - p->first_expand, run->s, y, n, (int32_t)s->w_dtype);
}

static void attend(Run *run, const Layer *layer, uint16_t *qkv, uint16_t *out) {
    const Stack *s = run->stack;
    int64_t width = qkv_width(s), q = s->heads * s->head_dim, decode = s->rows - s->first_decode;
    int32_t one_plus = (int32_t)s->one_plus;
    if (layer->q_norm != NULL)
        lq_rms_norm(qkv, NULL, NULL, layer->q_norm, qkv, s->rows, s->heads, s->head_dim, width, width, 0.0f,
                    (float)layer->q_epsilon, one_plus, LQ_BF16);
    if (layer->k_norm != NULL)
        lq_rms_norm(qkv + q, NULL, NULL, layer->k_norm, qkv + q, s->rows, s->kv_heads, s->head_dim, width, width, 0.0f,
                    (float)layer->k_epsilon, one_plus, LQ_BF16);
    LqHeads queries = {qkv, width, s->head_dim}, keys = {qkv + q, width, s->head_dim};
    LqHeads values = {qkv + q + s->kv_heads * s->head_dim, width, s->head_dim};
    int64_t angles = layer->angles * s->rows * s->head_dim;
    lq_rotary_write(&queries, &keys, &values, layer->angles < 0 ? NULL : (const uint16_t *)s->cosines + angles,
                    layer->angles < 0 ? NULL : (const uint16_t *)s->sines + angles, s->head_dim, s->rows, s->heads,
                    s->kv_heads, s->head_dim, s->head_dim, s->cache_rows, 0, layer->keys, layer->values, LQ_BF16);
    if (s->num_spans)
        run->failed |= lq_prefill_attention(qkv, width, s->head_dim, layer->keys, layer->values, out, s->spans,
                                            s->num_spans, s->heads, s->kv_heads, s->head_dim, s->page_size,
                                            layer->window, layer->scale, layer->softcap, LQ_BF16, s->level == 2);
    if (decode)
        run->failed |= lq_decode_attention(qkv + s->first_decode * width, width, s->head_dim, layer->keys,
                                           layer->values, out + s->first_decode * q, s->pages, s->pages_width,
                                           s->positions, decode, s->heads, s->kv_heads, s->head_dim, s->page_size,
                                           layer->window, layer->scale, layer->softcap, LQ_BF16);
}

/* x += delta, which goes through a norm of its own first where `post` is one; y = the norm of that. */
static void add_and_norm(const Stack *s, const void *delta, const void *post, double post_epsilon, const void *weight,
                         double epsilon, void *y) {
    lq_rms_norm(s->x, delta, post, weight, y, s->rows, 1, s->hidden, s->hidden, s->hidden, (float)post_epsilon,
                (float)epsilon, (int32_t)s->one_plus, LQ_BF16);
}

static void run_stack(void *context) {
    Job *job = context;
    const Stack *s = job->stack;
    Run run = {s, job->s, job->packed, 0, 0};
    uint16_t *normed = job->work, *delta = normed + s->rows * s->hidden, *qkv = delta + s->rows * s->hidden;
    uint16_t *attended = qkv + s->rows * qkv_width(s), *gate_up = attended + s->rows * s->heads * s->head_dim;
    uint16_t *inner = gate_up + 2 * s->rows * s->inner;
    const void *post = NULL; /* of the layer before */
    double post_epsilon = 0.0;
    for (int64_t i = 0; i < s->num_layers && !run.failed; i++) {
        const Layer *layer = job->layers + i;
        add_and_norm(s, i ? delta : NULL, post, post_epsilon, layer->norm, layer->norm_epsilon, normed);
        linear(&run, normed, layer->qkv, layer->qkv_bias, qkv, s->hidden, qkv_width(s));
        attend(&run, layer, qkv, attended);
        linear(&run, attended, layer->o, layer->o_bias, delta, s->heads * s->head_dim, s->hidden);
        add_and_norm(s, delta, layer->o_norm, layer->o_epsilon, layer->mlp_norm, layer->mlp_epsilon, normed);
        linear(&run, normed, layer->gate_up, layer->gate_up_bias, gate_up, s->hidden, 2 * s->inner);
        lq_gated(gate_up, gate_up + s->inner, inner, s->rows, s->inner, 2 * s->inner, (int32_t)s->activation, LQ_BF16);
        linear(&run, inner, layer->down, layer->down_bias, delta, s->inner, s->hidden);
        post = layer->down_norm;
        post_epsilon = layer->down_epsilon;
    }
    add_and_norm(s, s->num_layers ? delta : NULL, post, post_epsilon, s->last_norm, s->last_epsilon, s->y);
    if (lq_member() == 0) job->failed = run.failed;
}

/* Returns 0, or not 0 when a kernel found no memory; then y is undefined. */
LQ_EXPORT int32_t lq_decode_stack(const Stack *s, const Layer *layers) {
    uint16_t *packed = s->work;
    float *sums = (float *)(packed + packed_size(s));
    Job job = {s, layers, sums, packed, (uint16_t *)(sums + s->num_s), 0};
    lq_together(run_stack, &job);
    return job.failed;
}
