/* exp and tanh of vectors, and W sums of W vectors at once. Included after vec.h, once per variant. */

#if defined(__clang__)
#define LQ_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LQ_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vu){__VA_ARGS__})
#endif
#if LQ_WIDTH == 16
#define LQ_LANES(f, h)                                                                                            \
    f(0, h), f(1, h), f(2, h), f(3, h), f(4, h), f(5, h), f(6, h), f(7, h), f(8, h), f(9, h), f(10, h), f(11, h), \
        f(12, h), f(13, h), f(14, h), f(15, h)
#elif LQ_WIDTH == 8
#define LQ_LANES(f, h) f(0, h), f(1, h), f(2, h), f(3, h), f(4, h), f(5, h), f(6, h), f(7, h)
#else
#define LQ_LANES(f, h) f(0, h), f(1, h), f(2, h), f(3, h)
#endif
/* Lanes with bit h come from b, the others from a; "across" takes the lane on the other side of bit h. */
#define LQ_STRAIGHT(lane, h) ((lane) & (h) ? LQ_WIDTH + (lane) : (lane))
#define LQ_ACROSS(lane, h) ((lane) & (h) ? LQ_WIDTH + ((lane) ^ (h)) : ((lane) ^ (h)))
#define LQ_HALVE(h)                                                                                               \
    for (int i = 0; i < (h); i++)                                                                                 \
        parts[i] = LQ_SHUFFLE(parts[i], parts[i + (h)], LQ_LANES(LQ_STRAIGHT, h)) +                               \
                   LQ_SHUFFLE(parts[i], parts[i + (h)], LQ_LANES(LQ_ACROSS, h))

/* Lane i of the result is the sum of parts[i]'s lanes. Overwrites parts[LQ_WIDTH]. */
LQ_INLINE vf LQ_NAME(lq_sums)(vf *parts) {
#if LQ_WIDTH >= 16
    LQ_HALVE(8);
#endif
#if LQ_WIDTH >= 8
    LQ_HALVE(4);
#endif
    LQ_HALVE(2);
    LQ_HALVE(1);
    return parts[0];
}

/* Lane by lane, where `mask` has all bits set: a, else b. */
LQ_INLINE vf LQ_NAME(lq_select)(vu mask, vf a, vf b) {
    vu a_bits, b_bits;
    memcpy(&a_bits, &a, sizeof a);
    memcpy(&b_bits, &b, sizeof b);
    vu bits = (a_bits & mask) | (b_bits & ~mask);
    vf value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* e^x to 2 units in the last place; 0 below -87.3 (where it would be subnormal), inf above 88.7; NaN stays NaN.
 * x = n ln 2 + r, |r| <= ln 2 / 2; ln 2 in two parts so that r is exact; Taylor to r^7 / 5040. */
LQ_INLINE vf LQ_NAME(lq_exp)(vf x) {
    vu too_small = (vu)(x < -87.3f), too_big = (vu)(x > 88.7f);
    vf zero = {0}, magic = zero + 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
    vf bounded = LQ_NAME(lq_select)(too_small | too_big, zero, x);
    vf shifted = bounded * 1.44269504f + magic;
    vf n = shifted - magic;
    vf r = (bounded - n * 0.693145752f) - n * 1.42860677e-6f;
    vf p = zero + 1.98412698e-4f;
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    vu power;
    memcpy(&power, &shifted, sizeof power);
    power = (power << 23) + 0x3f800000u; /* the low bits of `shifted` are n, its own exponent is shifted out */
    vf scale;
    memcpy(&scale, &power, sizeof scale);
    vf value = p * scale;
    value = LQ_NAME(lq_select)(too_small, zero, value);
    return LQ_NAME(lq_select)(too_big, zero + __builtin_inff(), value);
}

/* 1 - 2 / (e^2x + 1), odd by construction; absolute error below 1e-7. */
LQ_INLINE vf LQ_NAME(lq_tanh)(vf x) {
    vu bits;
    memcpy(&bits, &x, sizeof bits);
    vu sign = bits & 0x80000000u;
    bits ^= sign;
    vf magnitude;
    memcpy(&magnitude, &bits, sizeof magnitude);
    vf value = 1.0f - 2.0f / (LQ_NAME(lq_exp)(magnitude * 2.0f) + 1.0f);
    memcpy(&bits, &value, sizeof bits);
    bits |= sign;
    memcpy(&value, &bits, sizeof value);
    return value;
}

#undef LQ_SHUFFLE
#undef LQ_LANES
#undef LQ_STRAIGHT
#undef LQ_ACROSS
#undef LQ_HALVE
