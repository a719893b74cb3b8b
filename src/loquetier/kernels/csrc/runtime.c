/* The library's only state: which thread pool, which ISA variant. Set once by lq_init, before any kernel runs. */
#include "loquetier.h"

#ifndef LQ_SOURCE_HASH
#define LQ_SOURCE_HASH "unknown"
#endif

typedef int32_t (*lq_pool)(int64_t begin, int64_t end, int64_t grain, lq_body body, void *context);

static lq_pool pool = NULL;
static int32_t isa = LQ_GENERIC;

static int32_t best_isa(void) {
#if LQ_X86
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bf16"))
        return LQ_AVX512;
    if (avx2) return LQ_AVX2;
#endif
    return LQ_GENERIC;
}

/* Returns the variant that will run, or -1 (and changes nothing) when this machine lacks the one asked for.
 *   parallel_for  torch's `torch_parallel_for`, or NULL: everything on the calling thread
 *   wanted        LQ_GENERIC, LQ_AVX2, LQ_AVX512, or -1 for the best there is */
LQ_EXPORT int32_t lq_init(void *parallel_for, int32_t wanted) {
    int32_t best = best_isa();
    if (wanted > best) return -1;
    memcpy(&pool, &parallel_for, sizeof pool);
    isa = wanted < 0 ? best : wanted;
    return isa;
}

LQ_EXPORT const char *lq_source_hash(void) { return LQ_SOURCE_HASH; }

int32_t lq_isa(void) { return isa; }

void lq_parallel_for(int64_t size, int64_t grain, lq_body body, void *context) {
    if (size <= 0) return;
    if (pool != NULL && size > grain)
        (void)pool(0, size, grain, body, context);
    else
        body(0, size, context);
}

typedef struct {
    lq_body body;
    void *context;
    int64_t size;
    int64_t next;
} Tasks;

/* Each thread of the pool calls this once; whichever piece of the range it got, it takes tasks until none is left. */
static void drain(int64_t begin, int64_t end, void *context) {
    Tasks *tasks = context;
    (void)begin;
    (void)end;
    for (;;) {
        int64_t i = __atomic_fetch_add(&tasks->next, 1, __ATOMIC_RELAXED);
        if (i >= tasks->size) return;
        tasks->body(i, i + 1, tasks->context);
    }
}

void lq_parallel_tasks(int64_t size, lq_body body, void *context) {
    Tasks tasks = {body, context, size, 0};
    lq_parallel_for(size, 1, drain, &tasks);
}
