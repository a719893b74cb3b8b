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

LQ_INLINE float LQ_NAME(norm_factor)(vf squares, int64_t dim, float epsilon) {
    return 1.0f / sqrtf(LQ_NAME(lq_sum)(squares) / (float)dim + epsilon);
}

/* x * factor * weight, or Gemma's form, which adds 1 to the weight and rounds once. */
LQ_INLINE vf LQ_NAME(normed)(vf value, float factor, vf weight, int one_plus, int bf16) {
    if (one_plus) return value * factor * (1.0f + weight);
    return weight * LQ_NAME(stored)(value * factor, bf16);
}

/* Elements of both halves of a head, and their angles. */
typedef struct {
    vf low, high, cos_low, cos_high, sin_low, sin_high;
} LQ_NAME(Halves);

/* `left` of them from the head's first element on `x` and its first angle on `angle`, `half` apart. */
LQ_INLINE LQ_NAME(Halves) LQ_NAME(halves)(const void *heads, int64_t x, const void *cos, const void *sin, int64_t angle,
                                          int64_t half, int64_t left, int bf16) {
    return (LQ_NAME(Halves)){
        LQ_NAME(take)(heads, x, left, bf16),   LQ_NAME(take)(heads, x + half, left, bf16),
        LQ_NAME(take)(cos, angle, left, bf16), LQ_NAME(take)(cos, angle + half, left, bf16),
        LQ_NAME(take)(sin, angle, left, bf16), LQ_NAME(take)(sin, angle + half, left, bf16),
    };
}

/* tanh(u) of the tanh form of gelu; *square is x * x. */
LQ_INLINE vf LQ_NAME(gelu_bent)(vf x, vf *square) {
    *square = x * x;
    return LQ_NAME(lq_tanh)(0.797884561f * x * (1.0f + 0.044715f * *square));
}

/* silu(x) = x / (1 + e^-x); gelu(x) = x (1 + tanh(u)) / 2. */
LQ_INLINE vf LQ_NAME(active)(vf x, int32_t kind) {
    vf square;
    if (kind == LQ_GELU_TANH) return x * (0.5f + 0.5f * LQ_NAME(gelu_bent)(x, &square));
    return x / (1.0f + LQ_NAME(lq_exp)(-x));
}
