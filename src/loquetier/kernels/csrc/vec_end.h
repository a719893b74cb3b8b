/* Ends what vec.h and a variant's definitions began. */
#undef vf
#undef vu
#undef vh
#undef LQ_JOIN2
#undef LQ_JOIN
#undef LQ_NAME
#undef LQ_INLINE
#undef LQ_CALLED
#undef LQ_SUFFIX
#undef LQ_WIDTH
#undef LQ_TARGET
