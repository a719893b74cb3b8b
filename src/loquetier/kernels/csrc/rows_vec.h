/* Vectors of a row of any length, for the templates that work row by row; included in the place of vec.h. */
#include "vec.h"
#include "vec_math.h"

/* What is left of a value once it has been stored in the tensor's dtype. */
LQ_INLINE vf LQ_NAME(stored)(vf value, int bf16) {
    if (!bf16) return value;
    uint16_t half[LQ_WIDTH];
    LQ_NAME(lq_store)(half, 0, value, 1);
    return LQ_NAME(lq_load)(half, 0, 1);
}

LQ_INLINE vf LQ_NAME(take)(const void *array, int64_t at, int64_t count, int bf16) {
    return count >= LQ_WIDTH ? LQ_NAME(lq_load)(array, at, bf16) : LQ_NAME(lq_load_part)(array, at, count, bf16);
}

LQ_INLINE void LQ_NAME(give)(void *array, int64_t at, int64_t count, vf value, int bf16) {
    if (count >= LQ_WIDTH)
        LQ_NAME(lq_store)(array, at, value, bf16);
    else
        LQ_NAME(lq_store_part)(array, at, count, value, bf16);
}
