/* Vectors of LQ_WIDTH floats, written once for every ISA variant with the compiler's vector extensions.
 *
 * Included by a kernel template after LQ_SUFFIX, LQ_WIDTH and LQ_TARGET are defined; LQ_NAME(x) is x_<suffix>. No
 * include guard: each variant includes it again. Loads and stores need no alignment. */
#define LQ_JOIN2(a, b) a##_##b
#define LQ_JOIN(a, b) LQ_JOIN2(a, b)
#define LQ_NAME(name) LQ_JOIN(name, LQ_SUFFIX)
#define LQ_INLINE LQ_TARGET static inline __attribute__((always_inline, unused))
#define LQ_CALLED LQ_TARGET static __attribute__((noinline, unused)) /* rare: not worth a copy at every call */

#define vf LQ_NAME(lq_vf)
#define vu LQ_NAME(lq_vu)
#define vh LQ_NAME(lq_vh)

typedef float vf __attribute__((vector_size(LQ_WIDTH * 4)));
typedef uint32_t vu __attribute__((vector_size(LQ_WIDTH * 4)));
typedef uint16_t vh __attribute__((vector_size(LQ_WIDTH * 2)));

/* LQ_WIDTH values from element `at` of an array of float or bfloat16, as float. `bf16` is a constant where it matters. */
LQ_INLINE vf LQ_NAME(lq_load)(const void *array, int64_t at, int bf16) {
    vf value;
    if (bf16) {
        const uint16_t *from = (const uint16_t *)array + at;
#if LQ_WIDTH == 16 /* gcc 12 makes __builtin_convertvector two halves and a merge */
        vu wide = (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from)) << 16;
#elif LQ_WIDTH == 8
        vu wide = (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)from)) << 16;
#else
        vh half;
        memcpy(&half, from, sizeof half);
        vu wide = __builtin_convertvector(half, vu) << 16;
#endif
        memcpy(&value, &wide, sizeof value);
    } else {
        memcpy(&value, (const float *)array + at, sizeof value);
    }
    return value;
}

LQ_INLINE float LQ_NAME(lq_load_one)(const void *array, int64_t at, int bf16) {
    return bf16 ? lq_from_bf16(((const uint16_t *)array)[at]) : ((const float *)array)[at];
}

LQ_INLINE void LQ_NAME(lq_store)(void *array, int64_t at, vf value, int bf16) {
    if (bf16) {
        vu bits, is_nan = (vu)(value != value);
        memcpy(&bits, &value, sizeof bits);
        vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        vu wide = (is_nan & ((bits >> 16) | 0x40)) | (~is_nan & rounded);
        vh half = __builtin_convertvector(wide, vh);
        memcpy((uint16_t *)array + at, &half, sizeof half);
    } else {
        memcpy((float *)array + at, &value, sizeof value);
    }
}

LQ_INLINE void LQ_NAME(lq_store_one)(void *array, int64_t at, float value, int bf16) {
    if (bf16)
        ((uint16_t *)array)[at] = lq_to_bf16(value);
    else
        ((float *)array)[at] = value;
}

/* The first `count` < LQ_WIDTH values, zeros behind them. Never reads beyond. */
LQ_CALLED vf LQ_NAME(lq_load_part)(const void *array, int64_t at, int64_t count, int bf16) {
    float part[LQ_WIDTH] = {0};
    for (int64_t i = 0; i < count; i++) part[i] = LQ_NAME(lq_load_one)(array, at + i, bf16);
    vf value;
    memcpy(&value, part, sizeof value);
    return value;
}

LQ_CALLED void LQ_NAME(lq_store_part)(void *array, int64_t at, int64_t count, vf value, int bf16) {
    for (int64_t i = 0; i < count; i++) LQ_NAME(lq_store_one)(array, at + i, value[i], bf16);
}

LQ_INLINE float LQ_NAME(lq_sum)(vf value) {
#if LQ_WIDTH == 16
    return _mm512_reduce_add_ps((__m512)value); /* in the order of the loop below, without going through memory */
#else
    float part[LQ_WIDTH];
    memcpy(part, &value, sizeof part);
    for (int half = LQ_WIDTH / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
#endif
}
