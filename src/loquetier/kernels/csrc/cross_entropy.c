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

#define LQ_TEMPLATE "cross_entropy_kernel.h"
#include "variants.h"

/* Per row: nll = log(sum(e^logits)) - logits[target]; correct = 1 where the target is the first largest logit, else 0.
 * With weights (NULL: losses only) the logits become weight * (softmax - onehot). logits [rows, vocab] without gaps. */
LQ_EXPORT void lq_cross_entropy(void *logits, const int64_t *targets, const float *weights, float *nll, float *correct,
                                int64_t rows, int64_t vocab, int32_t dtype) {
    Loss loss = {logits, targets, weights, nll, correct, vocab, dtype == LQ_BF16};
    lq_parallel_for(rows, 1, LQ_PICK(loss_rows), &loss);
}
