/* What every kernel file shares: threads from the caller's pool, ISA variants picked at run time, bfloat16.
 *
 * Plain C ABI, no headers of torch or Python: one shared library serves every version of both. Threads come through
 * one function pointer (torch's `torch_parallel_for`), never from OpenMP, so that there is one pool in the process.
 */
#ifndef LOQUETIER_H
#define LOQUETIER_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LQ_EXPORT __attribute__((visibility("default")))

/* ---- ISA variants ----
 * A kernel is written once per variant it needs, each function carrying its LQ_TARGET_* attribute, and picked with
 * LQ_PICK(name) from name_generic, name_avx2 and name_avx512. Other machines (aarch64) have the generic one only. */
enum { LQ_GENERIC = 0, LQ_AVX2 = 1, LQ_AVX512 = 2 };
int32_t lq_isa(void);

#if defined(__x86_64__)
#include <immintrin.h>
#define LQ_X86 1
#define LQ_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define LQ_TARGET_AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define LQ_PICK(name) (lq_isa() == LQ_AVX512 ? name##_avx512 : lq_isa() == LQ_AVX2 ? name##_avx2 : name##_generic)
#else
#define LQ_X86 0
#define LQ_PICK(name) (name##_generic)
#endif

/* ---- threads ---- */
typedef void (*lq_body)(int64_t begin, int64_t end, void *context);

/* body(b, e, context) over pieces of [0, size), each at least `grain` long; on the calling thread without a pool. */
void lq_parallel_for(int64_t size, int64_t grain, lq_body body, void *context);

/* The same with tasks handed out one by one as threads become free: for tasks of unequal length.
 * body is called with [i, i + 1). */
void lq_parallel_tasks(int64_t size, lq_body body, void *context);

/* The same without the barrier of a team: an lq_parallel_for that does not read what the tasks write must follow, and its
 * barrier ends both. */
void lq_open_tasks(int64_t size, lq_body body, void *context);

/* run(context) once on every thread of the pool, as a team: in it the two functions above share their work among the
 * members, who must all call them in the same order, and end with a barrier. Without a pool that can do this, run is
 * called once. Whatever a member computes outside of those calls, each computes for itself. */
void lq_together(void (*run)(void *), void *context);
int64_t lq_member(void); /* 0 outside of a team */
void lq_barrier(void);

/* Memory that all members see; NULL for all of them when there is none. Freed after the last member has come. */
void *lq_team_alloc(size_t bytes);
void lq_team_free(void *memory);

/* ---- dtypes: the codes that Python passes ---- */
enum { LQ_F32 = 0, LQ_BF16 = 1 };

static inline float lq_from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* Round to nearest even, as torch does; a NaN stays a NaN. */
static inline uint16_t lq_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#include "kernels.h"

#endif
