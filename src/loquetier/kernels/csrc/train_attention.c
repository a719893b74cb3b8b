/* Causal attention of whole sequences of fresh rows (training, evaluation) and its backward; nothing is paged.
 *
 * A task is one kv head of one span of rows, for all query heads of that kv head; query rows are taken 32 at a time.
 * Everything is computed transposed, S^T = K Q^T with keys as rows and the 32 queries as columns, so that maximum, sum, mask and
 * log-sum-exp are operations between vectors and never across one. With it every product has the form C = A B with A as it
 * lies in memory (or transposed once per task), and the template has one product: on AMX tiles in bfloat16, or on vectors in
 * float32. The backward computes S^T again from the log-sum-exp (Dao et al., arXiv 2205.14135) and, like
 * the forward, never holds more scores than 32 columns. Sums of a task do not depend on threads or other spans. */
#include "amx.h"

#include <math.h>
#include <stdlib.h>

enum { QUERIES = 32, UNIT = 32 /* keys and head sizes are padded to it */, SPAN_LENGTH = 4 };

typedef struct {
    const void *at;
    int64_t row, head; /* strides in elements; a head's own elements lie side by side */
} Rows;

typedef struct {
    void *at;
    int64_t row, head;
} OutRows;

typedef struct {
    Rows q, k, v, out, dout;
    OutRows y, dq, dk, dv; /* y: the forward's output */
    float *lse;            /* [heads, q rows] */
    const int64_t *spans;  /* SPAN_LENGTH each: q start and stop, k start and stop; queries are the last of the keys */
    int64_t num_spans, q_rows, heads, kv_heads, dim, window;
    float scale, softcap; /* softcap 0: off */
    int bf16;
    int32_t failed;
} TrainAttention;

/* One task's numbers and work space. */
typedef struct {
    int64_t kv_head, groups, dim, q_start, nq, k_start, nk, padded_keys, padded_dim, window, past;
    void *k, *v, *k_t, *v_t;            /* operands A: rows as they are, and transposed */
    void *q_cols, *do_cols;             /* operands B: 32 queries as columns */
    void *q_rows, *do_rows;             /* operands B: 32 queries as rows */
    void *p, *ds, *p_cols, *ds_cols;    /* operands A and B of keys x 32 */
    float *scores, *dscores, *out, *dk, *dv;
} Work;

static int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

#define LQ_AMX 0
#define OPERAND float
#define LQ_TEMPLATE "train_attention_kernel.h"
#include "variants.h"
#undef LQ_AMX
#undef OPERAND

#if LQ_X86
#define LQ_AMX 1
#define OPERAND uint16_t
#define LQ_SUFFIX amx
#define LQ_WIDTH 16
#define LQ_TARGET LQ_TARGET_AMX
#include "train_attention_kernel.h"
#include "vec_end.h"
#endif

static void run(TrainAttention *a, int backward, int64_t level) {
    int64_t tasks = a->num_spans * a->kv_heads;
    lq_body body = backward ? LQ_PICK(attend_backward) : LQ_PICK(attend_forward);
#if LQ_X86
    if (a->bf16 && level == 2) body = backward ? attend_backward_amx : attend_forward_amx;
#else
    (void)level;
#endif
    lq_parallel_tasks(tasks, body, a);
}

/* out = softmax(scale q k^T, causal) v for each span, and the log of each row's sum of exponentials.
 *   q [rows, heads, dim], k and v [keys, kv_heads, dim], out like q: two strides each (row, head), in elements
 *   lse      [heads, q_rows] float
 *   spans    q start, q stop, k start, k stop of each; the queries are the last of the span's keys
 *   window   keys with position <= own position - window are hidden; 0: none
 *   level    2: AMX may be used (lq_gemm_level)
 * Rows of q in no span are not touched. Returns 0, or 1 when memory ran out. */
LQ_EXPORT int32_t lq_train_attention(const void *q, int64_t q_row, int64_t q_head, const void *k, int64_t k_row,
                                     int64_t k_head, const void *v, int64_t v_row, int64_t v_head, void *out,
                                     int64_t out_row, int64_t out_head, float *lse, const int64_t *spans,
                                     int64_t num_spans, int64_t q_rows, int64_t heads, int64_t kv_heads, int64_t dim,
                                     int64_t window, double scale, double softcap, int32_t dtype, int64_t level) {
    TrainAttention a = {.q = {q, q_row, q_head}, .k = {k, k_row, k_head}, .v = {v, v_row, v_head},
                        .y = {out, out_row, out_head}, .lse = lse, .spans = spans, .num_spans = num_spans,
                        .q_rows = q_rows, .heads = heads, .kv_heads = kv_heads, .dim = dim, .window = window,
                        .scale = (float)scale, .softcap = (float)softcap, .bf16 = dtype == LQ_BF16};
    run(&a, 0, level);
    return a.failed;
}

/* Gradients of q, k and v from that of out. `out` and `lse` are what the forward gave; dq has the strides of q's
 * arguments here, dk and dv theirs. Every row of a span is written, not added to. Keys of no span are not touched. */
LQ_EXPORT int32_t lq_train_attention_backward(
    const void *q, int64_t q_row, int64_t q_head, const void *k, int64_t k_row, int64_t k_head, const void *v,
    int64_t v_row, int64_t v_head, const void *out, int64_t out_row, int64_t out_head, const void *dout,
    int64_t dout_row, int64_t dout_head, const float *lse, void *dq, int64_t dq_row, int64_t dq_head, void *dk,
    int64_t dk_row, int64_t dk_head, void *dv, int64_t dv_row, int64_t dv_head, const int64_t *spans,
    int64_t num_spans, int64_t q_rows, int64_t heads, int64_t kv_heads, int64_t dim, int64_t window, double scale,
    double softcap, int32_t dtype, int64_t level) {
    TrainAttention a = {.q = {q, q_row, q_head}, .k = {k, k_row, k_head}, .v = {v, v_row, v_head},
                        .out = {out, out_row, out_head}, .dout = {dout, dout_row, dout_head},
                        .dq = {dq, dq_row, dq_head}, .dk = {dk, dk_row, dk_head}, .dv = {dv, dv_row, dv_head},
                        .lse = (float *)(uintptr_t)lse, .spans = spans, .num_spans = num_spans, .q_rows = q_rows,
                        .heads = heads, .kv_heads = kv_heads, .dim = dim, .window = window, .scale = (float)scale,
                        .softcap = (float)softcap, .bf16 = dtype == LQ_BF16};
    run(&a, 1, level);
    return a.failed;
}
