/* Passes over a row of logits, for one ISA variant; see sample.c. */
#include "vec.h"
#include "vec_math.h"

/* The largest value and its first place; NaN when there is one. */
LQ_INLINE void LQ_NAME(argmax_row)(const void *x, int64_t at, int64_t size, int bf16, float *best, int64_t *id) {
    vf most = (vf){0} - __builtin_inff();
    vu where = {0}, broken = {0}, block = {0};
    int64_t i = 0;
    for (; i + LQ_WIDTH <= size; i += LQ_WIDTH) {
        vf value = LQ_NAME(lq_load)(x, at + i, bf16);
        vu more = (vu)(value > most);
        most = LQ_NAME(lq_select)(more, value, most);
        where = (more & block) | (~more & where);
        broken |= (vu)(value != value);
        block += 1;
    }
    float largest = -__builtin_inff();
    int64_t first = 0;
    int is_nan = 0;
    for (int lane = 0; lane < LQ_WIDTH; lane++) {
        int64_t here = (int64_t)where[lane] * LQ_WIDTH + lane;
        if (most[lane] > largest || (most[lane] == largest && here < first)) largest = most[lane], first = here;
        is_nan |= broken[lane] != 0;
    }
    for (; i < size; i++) {
        float value = LQ_NAME(lq_load_one)(x, at + i, bf16);
        if (value > largest) largest = value, first = i;
        is_nan |= value != value;
    }
    *best = is_nan ? __builtin_nanf("") : largest;
    *id = first;
}

LQ_TARGET static void LQ_NAME(argmax_rows)(int64_t begin, int64_t end, void *context) {
    const Argmax *a = context;
    for (int64_t row = begin; row < end; row++)
        if (a->bf16)
            LQ_NAME(argmax_row)(a->logits, row * a->stride, a->vocab, 1, &a->best[row], &a->ids[row]);
        else
            LQ_NAME(argmax_row)(a->logits, row * a->stride, a->vocab, 0, &a->best[row], &a->ids[row]);
}

/* below[i] = (best - x[i]) / temperature >= 0, e[i] = e^-below; returns their sum, 0 for -inf. */
LQ_INLINE float LQ_NAME(exp_row)(const void *x, int64_t at, int64_t size, int bf16, float best, float temperature,
                                 float *below, float *e) {
    vf sums = {0};
    for (int64_t i = 0; i < size; i += LQ_WIDTH) {
        int64_t left = size - i;
        vf value = left >= LQ_WIDTH ? LQ_NAME(lq_load)(x, at + i, bf16) : LQ_NAME(lq_load_part)(x, at + i, left, bf16);
        value = (best - value) / temperature;
        vf power = LQ_NAME(lq_exp)(-value);
        if (left >= LQ_WIDTH) {
            LQ_NAME(lq_store)(below, i, value, 0);
            LQ_NAME(lq_store)(e, i, power, 0);
            sums += power;
        } else {
            LQ_NAME(lq_store_part)(below, i, left, value, 0);
            LQ_NAME(lq_store_part)(e, i, left, power, 0);
            for (int64_t j = 0; j < left; j++) sums[j] += power[j];
        }
    }
    return LQ_NAME(lq_sum)(sums);
}

/* mass[i] = the probability e[i] / sum in fixed point, 0 below the floor. */
LQ_TARGET static void LQ_NAME(mass_row)(const float *e, int64_t size, float sum, float floor, int64_t *mass) {
    for (int64_t i = 0; i < size; i++) {
        float probability = e[i] / sum;
        mass[i] = probability < floor ? 0 : (int64_t)((double)probability * MASS_ONE);
    }
}

LQ_TARGET static float LQ_NAME(exp_any)(const void *x, int64_t at, int64_t size, int bf16, float best,
                                        float temperature, float *below, float *e) {
    return bf16 ? LQ_NAME(exp_row)(x, at, size, 1, best, temperature, below, e)
                : LQ_NAME(exp_row)(x, at, size, 0, best, temperature, below, e);
}
