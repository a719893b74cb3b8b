/* Choosing tokens: the largest logit of each row, and a draw after temperature, min_p, top_k and top_p.
 *
 * The arithmetic is `engine.sampler`'s, row by row: probabilities as fixed point, whose sums have no rounding; tokens
 * ordered by value, ties by smaller id. Where torch sorts, this counts: a histogram over the leading bits of the distance to
 * the largest logit finds the bucket in which the cut lies, and only that bucket is sorted. */
#include "loquetier.h"

#include <stdlib.h>

enum { SHIFT = 19, BUCKETS = 1 << 12 /* all of a positive float's 31 bits, shifted */ };
static const double MASS_ONE = 1152921504606846976.0; /* 2^60, as in engine.sampler */

typedef struct {
    const void *logits;
    int64_t vocab, stride;
    float *best;
    int64_t *ids;
    int bf16;
} Argmax;

/* One row's options; the same layout in Python. */
typedef struct {
    int64_t row, top_k;
    double temperature, min_p, top_p, uniform;
} Draw;

typedef struct {
    const void *logits;
    int64_t vocab, stride;
    const float *best;
    const Draw *draws;
    int64_t *ids; /* -1: no memory */
    int bf16;
} Drawing;

#define LQ_TEMPLATE "sample_kernel.h"
#include "variants.h"

/* ids [rows]: the first of the largest logits; best [rows]: its value, NaN when the row has one. */
LQ_EXPORT void lq_argmax(const void *logits, int64_t rows, int64_t vocab, int64_t stride, float *best, int64_t *ids,
                         int32_t dtype) {
    Argmax a = {logits, vocab, stride, best, ids, dtype == LQ_BF16};
    lq_parallel_for(rows, 1, LQ_PICK(argmax_rows), &a);
}

static uint32_t distance(const float *below, int64_t i) {
    uint32_t bits;
    float value = below[i] + 0.0f; /* -0 becomes 0: positive floats order as integers */
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static uint64_t key(const float *below, int64_t i) { return (uint64_t)distance(below, i) << 32 | (uint64_t)i; }

static int by_key(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

typedef struct {
    int64_t count, mass;
} Bucket;

/* The last key that stays, a key being (distance, id): what is farther or later goes. `keys` has room for a row. */
static uint64_t last_key(const Draw *d, const float *below, const int64_t *mass, int64_t vocab, Bucket *buckets,
                         uint64_t *keys) {
    int64_t total = 0, limit = d->top_k > 0 && d->top_k < vocab ? d->top_k : vocab, seen = 0, before = 0;
    memset(buckets, 0, BUCKETS * sizeof *buckets);
    for (int64_t i = 0; i < vocab; i++) {
        Bucket *b = &buckets[distance(below, i) >> SHIFT];
        b->count++, b->mass += mass[i];
        total += mass[i];
    }
    if (limit < vocab && d->top_p < 1) { /* top_p is a share of what top_k leaves: its mass must be known first */
        Draw only_k = *d;
        only_k.top_p = 1;
        uint64_t last = last_key(&only_k, below, mass, vocab, buckets, keys);
        total = 0;
        for (int64_t i = 0; i < vocab; i++)
            if (key(below, i) <= last) total += mass[i];
    }
    double share = d->top_p * (double)total;
    int64_t bucket = 0;
    for (; bucket < BUCKETS - 1; bucket++) {
        const Bucket *b = &buckets[bucket];
        int ends = seen + b->count >= limit || (d->top_p < 1 && (double)(before + b->mass) >= share);
        if (ends) break;
        seen += b->count, before += b->mass;
    }
    int64_t count = 0;
    for (int64_t i = 0; i < vocab; i++)
        if (distance(below, i) >> SHIFT == (uint32_t)bucket) keys[count++] = key(below, i);
    qsort(keys, (size_t)count, sizeof *keys, by_key);
    uint64_t last = 0;
    for (int64_t i = 0; i < count && seen < limit && (d->top_p >= 1 || seen == 0 || (double)before < share); i++) {
        last = keys[i];
        seen++, before += mass[keys[i] & 0xffffffffu];
    }
    return last; /* at least one of this bucket stays: the walk over the buckets ended before the cut */
}

static int64_t draw(const Drawing *g, const Draw *d, float *below, int64_t *mass, uint64_t *keys, Bucket *buckets) {
    float *e = (float *)keys; /* not needed any more when keys are */
    float best = g->best[d->row], sum, floor = 0;
    sum = LQ_PICK(exp_any)(g->logits, d->row * g->stride, g->vocab, g->bf16, best, (float)d->temperature, below, e);
    if (d->min_p > 0) floor = (float)d->min_p * (1.0f / sum);
    LQ_PICK(mass_row)(e, g->vocab, sum, floor, mass);
    uint64_t last = ~(uint64_t)0;
    if ((d->top_k > 0 && d->top_k < g->vocab) || d->top_p < 1) last = last_key(d, below, mass, g->vocab, buckets, keys);
    int64_t total = 0, cumulative = 0;
    for (int64_t i = 0; i < g->vocab; i++) {
        if (key(below, i) > last) mass[i] = 0;
        total += mass[i];
    }
    int64_t target = (int64_t)(d->uniform * (double)total);
    if (target > total - 1) target = total - 1;
    for (int64_t i = 0; i < g->vocab; i++) {
        cumulative += mass[i];
        if (cumulative > target) return i;
    }
    return 0; /* a row without mass has no finite largest logit; the caller reports it */
}

static void draw_rows(int64_t begin, int64_t end, void *context) {
    const Drawing *g = context;
    size_t vocab = (size_t)g->vocab;
    float *below = malloc(vocab * sizeof *below);
    int64_t *mass = malloc(vocab * sizeof *mass);
    uint64_t *keys = malloc(vocab * sizeof *keys);
    Bucket *buckets = malloc(BUCKETS * sizeof *buckets);
    int ready = below != NULL && mass != NULL && keys != NULL && buckets != NULL;
    for (int64_t i = begin; i < end; i++) {
        float best = g->best[g->draws[i].row];
        int finite = best - best == 0;
        g->ids[i] = !ready ? -1 : finite ? draw(g, &g->draws[i], below, mass, keys, buckets) : 0;
    }
    free(below);
    free(mass);
    free(keys);
    free(buckets);
}

/* ids [num_draws]: a token of row draws[i].row for each draw; `best` as lq_argmax gives it for the same logits, of
 * all rows. Returns 0, or 1 when there was no memory. */
LQ_EXPORT int32_t lq_draw(const void *logits, int64_t vocab, int64_t stride, const float *best, const Draw *draws,
                          int64_t num_draws, int64_t *ids, int32_t dtype) {
    Drawing g = {logits, vocab, stride, best, draws, ids, dtype == LQ_BF16};
    lq_parallel_for(num_draws, 1, draw_rows, &g);
    for (int64_t i = 0; i < num_draws; i++)
        if (ids[i] < 0) return 1;
    return 0;
}
