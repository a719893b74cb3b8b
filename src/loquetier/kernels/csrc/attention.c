/* Attention of decode rows over the paged KV cache, read in place: nothing is gathered, nothing is masked.
 *
 * A task is one kv head of one sequence and at most CHUNK of its tokens, for all query heads of that kv head, so K and
 * V are read once. Softmax is online in float32 (Milakov and Gimelshein, 2018) over tiles of tokens. A sequence longer
 * than CHUNK leaves one partial result per chunk, merged by their largest scores. CHUNK is fixed: a row's bits depend
 * neither on its neighbours nor on the number of threads. */
#include "loquetier.h"

#include <stdlib.h>

enum {
    TILE = 64,          /* tokens between two rescalings; a multiple of every LQ_WIDTH */
    CHUNK = 256,        /* tokens of one task */
    MOST_FLOATS = 8192, /* heads per kv head times padded head size */
    MOST_GROUPS = 64,   /* query heads per kv head */
    FEW_SEQUENCES = 256, /* whose tables lie on the stack */
    SERIAL_TOKENS = 64, /* tokens times kv heads that are read faster than a second thread wakes up */
};

typedef struct {
    const void *q, *k, *v;
    void *out;
    int64_t q_row, q_head; /* strides in elements; the head's own elements lie side by side */
    const int64_t *pages, *positions;
    int64_t pages_width, num_sequences, heads, kv_heads, dim, page_size, window;
    float scale, softcap; /* softcap 0: off */
    int bf16;
    const int64_t *first_task; /* [num_sequences + 1] */
    float *partial;            /* per task: groups x (largest, total, sum[dim]); used by sequences of several chunks */
} Attention;

typedef struct {
    int64_t sequence, kv_head, chunk, chunks, from, to, padded;
} Run;

typedef struct {
    float q[MOST_FLOATS], sum[MOST_FLOATS];
    float scores[MOST_GROUPS * TILE];
    float factor[MOST_GROUPS], largest[MOST_GROUPS], total[MOST_GROUPS];
    int64_t at[CHUNK]; /* where each token's K and V begin, in elements */
} Work;

#define LQ_TEMPLATE "attention_kernel.h"
#include "variants.h"

static int64_t first_visible(const Attention *a, int64_t sequence) {
    int64_t first = a->positions[sequence] + 1 - a->window;
    return a->window > 0 && first > 0 ? first : 0;
}

static int64_t chunks_of(const Attention *a, int64_t sequence) {
    return (a->positions[sequence] + 1 - first_visible(a, sequence) + CHUNK - 1) / CHUNK;
}

static Run run_of(const Attention *a, int64_t task) {
    int64_t low = 0, high = a->num_sequences - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (a->first_task[middle] <= task)
            low = middle;
        else
            high = middle - 1;
    }
    Run run = {.sequence = low, .chunks = chunks_of(a, low), .padded = (a->dim + 15) / 16 * 16};
    run.kv_head = (task - a->first_task[low]) / run.chunks;
    run.chunk = (task - a->first_task[low]) % run.chunks;
    run.from = first_visible(a, low) + run.chunk * CHUNK;
    run.to = a->positions[low] + 1;
    if (run.to > run.from + CHUNK) run.to = run.from + CHUNK;
    return run;
}

static float element(const void *array, int64_t at, int bf16) {
    return bf16 ? lq_from_bf16(((const uint16_t *)array)[at]) : ((const float *)array)[at];
}

static void start(const Attention *a, const Run *run, Work *w) {
    int64_t groups = a->heads / a->kv_heads;
    memset(w->sum, 0, (size_t)(groups * run->padded) * sizeof(float));
    for (int64_t g = 0; g < groups; g++) {
        int64_t at = run->sequence * a->q_row + (run->kv_head * groups + g) * a->q_head;
        float *q = w->q + g * run->padded;
        for (int64_t d = 0; d < run->padded; d++) q[d] = d < a->dim ? a->scale * element(a->q, at + d, a->bf16) : 0;
        w->largest[g] = -__builtin_inff();
        w->total[g] = 0;
    }
}

/* out[head] = sum / total, contiguous [sequences, heads, dim] */
static void write(const Attention *a, int64_t sequence, int64_t head, const float *sum, float total) {
    int64_t at = (sequence * a->heads + head) * a->dim;
    for (int64_t d = 0; d < a->dim; d++) {
        float value = sum[d] / total;
        if (a->bf16)
            ((uint16_t *)a->out)[at + d] = lq_to_bf16(value);
        else
            ((float *)a->out)[at + d] = value;
    }
}

static void attend_tasks(int64_t begin, int64_t end, void *context) {
    const Attention *a = context;
    int64_t groups = a->heads / a->kv_heads;
    Work work;
    for (int64_t task = begin; task < end; task++) {
        Run run = run_of(a, task);
        start(a, &run, &work);
        if (a->bf16)
            LQ_PICK(attend_bf16)(a, &run, &work);
        else
            LQ_PICK(attend_f32)(a, &run, &work);
        for (int64_t g = 0; g < groups; g++) {
            if (run.chunks == 1) {
                write(a, run.sequence, run.kv_head * groups + g, work.sum + g * run.padded, work.total[g]);
            } else {
                float *partial = a->partial + (task * groups + g) * (a->dim + 2);
                partial[0] = work.largest[g], partial[1] = work.total[g];
                memcpy(partial + 2, work.sum + g * run.padded, (size_t)a->dim * sizeof(float));
            }
        }
    }
}

/* Chunks of one kv head of one sequence into one result: weights e^(largest - largest of all). */
static void merge_task(int64_t begin, int64_t end, void *context) {
    const Attention *a = context;
    int64_t groups = a->heads / a->kv_heads;
    float sum[MOST_FLOATS];
    for (int64_t i = begin; i < end; i++) {
        int64_t sequence = i / a->kv_heads, kv_head = i % a->kv_heads, chunks = chunks_of(a, sequence);
        if (chunks == 1) continue;
        int64_t first = a->first_task[sequence] + kv_head * chunks, step = groups * (a->dim + 2);
        for (int64_t g = 0; g < groups; g++) {
            const float *partial = a->partial + (first * groups + g) * (a->dim + 2);
            float largest = partial[0], total = 0;
            for (int64_t c = 1; c < chunks; c++)
                if (partial[c * step] > largest) largest = partial[c * step];
            memset(sum, 0, (size_t)a->dim * sizeof(float));
            for (int64_t c = 0; c < chunks; c++) {
                float weight = __builtin_expf(partial[c * step] - largest);
                total += weight * partial[c * step + 1];
                for (int64_t d = 0; d < a->dim; d++) sum[d] += weight * partial[c * step + 2 + d];
            }
            write(a, sequence, kv_head * groups + g, sum, total);
        }
    }
}

/* Attention of one row of each sequence over its cached tokens up to and including its own position.
 *   q        [sequences, heads, dim], strides q_row and q_head in elements
 *   k, v     [pages, page_size, kv_heads, dim], contiguous; q, k, v and out have one dtype
 *   pages    [sequences, pages_width] page numbers; only those of visible tokens are looked at
 *   window   keys with position <= own position - window are hidden; 0: none
 * Returns 0; 1: memory ran out; 2: heads are larger than the work space (see lq_decode_fits). Nothing is written then. */
LQ_EXPORT int32_t lq_decode_attention(const void *q, int64_t q_row, int64_t q_head, const void *k, const void *v,
                                      void *out, const int64_t *pages, int64_t pages_width, const int64_t *positions,
                                      int64_t num_sequences, int64_t heads, int64_t kv_heads, int64_t dim,
                                      int64_t page_size, int64_t window, double scale, double softcap, int32_t dtype) {
    int64_t groups = heads / kv_heads;
    if (groups > MOST_GROUPS || groups * ((dim + 15) / 16 * 16) > MOST_FLOATS) return 2;
    Attention a = {q, k, v, out, q_row, q_head, pages, positions, pages_width, num_sequences, heads, kv_heads, dim,
                   page_size, window, (float)scale, (float)softcap, dtype == LQ_BF16, NULL, NULL};
    int64_t few[FEW_SEQUENCES + 1], *first_task = few;
    if (num_sequences > FEW_SEQUENCES) first_task = lq_team_alloc((size_t)(num_sequences + 1) * sizeof *first_task);
    if (first_task == NULL) return 1;
    int64_t num_tasks = 0, tokens = 0, several = 0;
    int writes = first_task == few || lq_member() == 0;
    for (int64_t n = 0; n < num_sequences; n++) {
        int64_t chunks = chunks_of(&a, n);
        if (writes) first_task[n] = num_tasks;
        num_tasks += chunks * kv_heads;
        tokens += (positions[n] + 1 - first_visible(&a, n)) * kv_heads;
        several |= chunks > 1;
    }
    if (writes) first_task[num_sequences] = num_tasks;
    lq_barrier();
    a.first_task = first_task;
    if (several) a.partial = lq_team_alloc((size_t)(num_tasks * groups * (dim + 2)) * sizeof *a.partial);
    int32_t failed = several && a.partial == NULL;
    if (!failed) {
        if (tokens <= SERIAL_TOKENS)
            lq_parallel_for(num_tasks, num_tasks, attend_tasks, &a);
        else
            lq_parallel_tasks(num_tasks, attend_tasks, &a);
        if (several) lq_parallel_for(num_sequences * kv_heads, 4, merge_task, &a);
    }
    if (several) lq_team_free(a.partial);
    if (first_task != few) lq_team_free(first_task);
    return failed;
}
