/* Softmax cross-entropy of rows of logits: loss, hit, and the gradient over the logits themselves. */
#include "loquetier.h"

#include <math.h>

typedef struct {
    void *logits;
    const int64_t *targets;
    const float *weights;
    float *nll, *correct;
    int64_t vocab;
    int bf16;
} Loss;

#define LQ_SUFFIX generic
#define LQ_WIDTH 4
#define LQ_TARGET
#include "cross_entropy_kernel.h"
#undef LQ_SUFFIX
#undef LQ_WIDTH
#undef LQ_TARGET

#if LQ_X86
#define LQ_SUFFIX avx2
#define LQ_WIDTH 8
#define LQ_TARGET LQ_TARGET_AVX2
#include "cross_entropy_kernel.h"
#undef LQ_SUFFIX
#undef LQ_WIDTH
#undef LQ_TARGET

#define LQ_SUFFIX avx512
#define LQ_WIDTH 16
#define LQ_TARGET LQ_TARGET_AVX512
#include "cross_entropy_kernel.h"
#undef LQ_SUFFIX
#undef LQ_WIDTH
#undef LQ_TARGET
#endif

/* Per row: nll = log(sum(e^logits)) - logits[target]; correct = 1 where the target is the first largest logit, else 0.
 * With weights (NULL: losses only) the logits become weight * (softmax - onehot). logits [rows, vocab] without gaps. */
LQ_EXPORT void lq_cross_entropy(void *logits, const int64_t *targets, const float *weights, float *nll, float *correct,
                                int64_t rows, int64_t vocab, int32_t dtype) {
    Loss loss = {logits, targets, weights, nll, correct, vocab, dtype == LQ_BF16};
    lq_parallel_for(rows, 1, LQ_PICK(loss_rows), &loss);
}
