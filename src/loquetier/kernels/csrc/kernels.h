/* Kernels that stack.c calls; included by every file, so that a definition that differs does not compile. */
#ifndef LOQUETIER_KERNELS_H
#define LOQUETIER_KERNELS_H

void lq_gemm_bf16(const uint16_t *x, const uint16_t *w, const uint16_t *bias, uint16_t *y, int64_t rows, int64_t k,
                  int64_t n, int64_t ldx, int64_t ldy, int64_t level);
void lq_rms_norm(void *x, const void *delta, const void *weight, void *y, int64_t rows, int64_t groups, int64_t dim,
                 int64_t x_stride, int64_t y_stride, float epsilon, int32_t dtype);
void lq_rotary(void *x, const void *cosines, const void *sines, int64_t rows, int64_t heads, int64_t dim,
               int64_t stride, int32_t dtype);
void lq_swiglu(const void *gate, const void *up, void *y, int64_t rows, int64_t inner, int64_t stride, int32_t dtype);
int32_t lq_smlm_forward(const void *x, int64_t x_stride, void *y, int64_t y_stride, int64_t in, int64_t out,
                        const int64_t *table, const double *scales, int64_t num_segments, int32_t x_dtype,
                        int32_t w_dtype);
int32_t lq_decode_attention(const void *q, int64_t q_row, int64_t q_head, const void *k, const void *v, void *out,
                            const int64_t *pages, int64_t pages_width, const int64_t *positions,
                            int64_t num_sequences, int64_t heads, int64_t kv_heads, int64_t dim, int64_t page_size,
                            int64_t window, double scale, double softcap, int32_t dtype);

#endif
