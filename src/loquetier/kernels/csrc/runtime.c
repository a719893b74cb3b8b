/* The library's only state: which thread pool, which ISA variant. Set once by lq_init, before any kernel runs. */
#if defined(__linux__)
#define _GNU_SOURCE /* sched_getcpu; before any header, or it has no effect */
#endif
#include "loquetier.h"

#ifndef LQ_SOURCE_HASH
#define LQ_SOURCE_HASH "unknown"
#endif

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#endif
#include <stdlib.h>
#include <time.h>

typedef int32_t (*lq_pool)(int64_t begin, int64_t end, int64_t grain, lq_body body, void *context);

static lq_pool pool = NULL;
static int32_t pool_forms_teams = 0;
static int32_t isa = LQ_GENERIC;

/* ---- teams ----
 * Forking and joining costs as much as a small kernel. A team forks once: all its threads run the same function, and
 * each lq_parallel_for in it is a share of the work and a barrier. */
enum { MOST_MEMBERS = 256 };

typedef struct {
    uint32_t size, round, sleepers; /* size: threads; 0 until the first has come */
    int64_t chunk, arrived, next;
    void *shared;
    int16_t core[MOST_MEMBERS]; /* where each member last came to a barrier, plus 1; 0: unknown */
} Team;

static _Thread_local Team *team = NULL;
static _Thread_local int64_t member = 0;

/* How long a thread spins before it sleeps. Alone on the machine waits are short, and waking a sleeper costs more than they
 * take; beside another program a wait lasts until the other thread has its core back, and spinning takes from both. So
 * each thread learns from how long it slept: a sleep that a longer spin would have saved doubles the spin, one that lasted
 * as a core lost to somebody else does halves it. */
enum { LEAST_SPINS = 128, MOST_SPINS = 8192 /* some 0.5 ms where a pause takes 140 cycles */ };
static const int64_t SHORT_SLEEP = 300000; /* ns: a wake-up included; a scheduler's slice is 1 to 4 million */
static _Thread_local int spins = 2048;

static int64_t now(void) {
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void learn(int64_t slept) {
    if (slept < SHORT_SLEEP)
        spins = spins * 2 < MOST_SPINS ? spins * 2 : MOST_SPINS;
    else
        spins = spins / 2 > LEAST_SPINS ? spins / 2 : LEAST_SPINS;
}

/* Beside another program the scheduler puts two members on one core for a while, and then who spins keeps the one it
 * waits for from running. So each says where it is when it comes to a barrier, and spins only if it is alone there. */
static void say_core(Team *t) {
#if defined(__linux__)
    __atomic_store_n(&t->core[member], (int16_t)(sched_getcpu() + 1), __ATOMIC_RELAXED);
#else
    (void)t;
#endif
}

static int shares_core(Team *t) {
    int16_t here = __atomic_load_n(&t->core[member], __ATOMIC_RELAXED);
    for (uint32_t i = 0; i < t->size && here; i++)
        if (i != member && __atomic_load_n(&t->core[i], __ATOMIC_RELAXED) == here) return 1;
    return 0;
}

static void wait_while(Team *t, uint32_t *value, uint32_t old) {
    int is_alone = !shares_core(t);
    for (int spin = 0; is_alone && spin < spins; spin++) {
        if (__atomic_load_n(value, __ATOMIC_ACQUIRE) != old) return;
#if LQ_X86
        _mm_pause();
#endif
    }
    int64_t began = now();
    __atomic_add_fetch(&t->sleepers, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(value, __ATOMIC_SEQ_CST) == old) {
#if defined(__linux__)
        (void)syscall(SYS_futex, value, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
#elif defined(__unix__) || defined(__APPLE__)
        (void)sched_yield();
#endif
    }
    __atomic_sub_fetch(&t->sleepers, 1, __ATOMIC_SEQ_CST);
    if (is_alone) learn(now() - began);
}

/* The new value is seen by who looks later, and by who looks already: either it sees a sleeper, or the sleeper it. */
static void tell(Team *t, uint32_t *value, uint32_t new) {
    __atomic_store_n(value, new, __ATOMIC_SEQ_CST);
#if defined(__linux__)
    if (__atomic_load_n(&t->sleepers, __ATOMIC_SEQ_CST))
        (void)syscall(SYS_futex, value, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
#else
    (void)t;
#endif
}

static void barrier(void) {
    Team *t = team;
    uint32_t round = __atomic_load_n(&t->round, __ATOMIC_RELAXED);
    say_core(t);
    if (__atomic_add_fetch(&t->arrived, 1, __ATOMIC_ACQ_REL) == (int64_t)t->size) {
        t->arrived = t->next = 0; /* nobody looks at them before the round changes */
        tell(t, &t->round, round + 1);
    } else {
        wait_while(t, &t->round, round);
    }
}

typedef struct {
    Team team;
    void (*run)(void *);
    void *context;
} Gathering;

enum { CHEAPER = 16 /* a share in a team costs so much less than a fork: grains shrink by it */ };

/* One call per thread of the pool. The pool cuts [0, MOST_MEMBERS) into equal pieces, the last perhaps shorter, so the
 * first piece tells how many there are. */
static void join(int64_t begin, int64_t end, void *context) {
    Gathering *g = context;
    if (begin == 0) {
        g->team.chunk = end;
        tell(&g->team, &g->team.size, (uint32_t)((MOST_MEMBERS + end - 1) / end));
    } else {
        wait_while(&g->team, &g->team.size, 0);
    }
    member = begin / g->team.chunk;
    team = g->team.size > 1 ? &g->team : NULL;
    g->run(g->context);
    team = NULL;
    member = 0;
}

void lq_together(void (*run)(void *), void *context) {
    Gathering g = {{0}, run, context};
    if (pool != NULL && pool_forms_teams && team == NULL)
        (void)pool(0, MOST_MEMBERS, 1, join, &g);
    else
        run(context);
}

int64_t lq_member(void) { return member; }

void lq_barrier(void) {
    if (team != NULL) barrier();
}

void *lq_team_alloc(size_t bytes) {
    if (team == NULL) return malloc(bytes);
    if (member == 0) team->shared = malloc(bytes);
    barrier();
    void *shared = team->shared;
    barrier(); /* before the next one is shared */
    return shared;
}

void lq_team_free(void *memory) {
    if (team != NULL) barrier();
    if (member == 0) free(memory);
}

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
 *   wanted        LQ_GENERIC, LQ_AVX2, LQ_AVX512, or -1 for the best there is
 *   forms_teams   the pool runs all pieces of one call at the same time (OpenMP does), so they may wait for each other */
LQ_EXPORT int32_t lq_init(void *parallel_for, int32_t wanted, int32_t forms_teams) {
    int32_t best = best_isa();
    if (wanted > best) return -1;
    memcpy(&pool, &parallel_for, sizeof pool);
    pool_forms_teams = forms_teams;
    isa = wanted < 0 ? best : wanted;
    return isa;
}

LQ_EXPORT const char *lq_source_hash(void) { return LQ_SOURCE_HASH; }

int32_t lq_isa(void) { return isa; }

void lq_parallel_for(int64_t size, int64_t grain, lq_body body, void *context) {
    if (size <= 0) return;
    if (team != NULL) {
        int64_t least = grain / CHEAPER > 0 ? grain / CHEAPER : 1, pieces = (size + least - 1) / least;
        if (pieces > (int64_t)team->size) pieces = (int64_t)team->size;
        int64_t piece = (size + pieces - 1) / pieces, begin = member * piece;
        int64_t end = begin + piece < size ? begin + piece : size;
        if (begin < end) body(begin, end, context);
        barrier();
    } else if (pool != NULL && size > grain)
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

void lq_open_tasks(int64_t size, lq_body body, void *context) {
    if (team != NULL) {
        for (int64_t i; (i = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED)) < size;) body(i, i + 1, context);
        return;
    }
    Tasks tasks = {body, context, size, 0};
    lq_parallel_for(size, 1, drain, &tasks);
}

void lq_parallel_tasks(int64_t size, lq_body body, void *context) {
    lq_open_tasks(size, body, context);
    lq_barrier();
}
