/* A template, LQ_TEMPLATE, once per ISA variant. It is written with vec.h: LQ_SUFFIX, LQ_WIDTH and LQ_TARGET differ. */
#define LQ_SUFFIX generic
#define LQ_WIDTH 4
#define LQ_TARGET
#include LQ_TEMPLATE
#include "vec_end.h"

#if LQ_X86
#define LQ_SUFFIX avx2
#define LQ_WIDTH 8
#define LQ_TARGET LQ_TARGET_AVX2
#include LQ_TEMPLATE
#include "vec_end.h"

#define LQ_SUFFIX avx512
#define LQ_WIDTH 16
#define LQ_TARGET LQ_TARGET_AVX512
#include LQ_TEMPLATE
#include "vec_end.h"
#endif

#undef LQ_TEMPLATE
