/* Kernels that stack.c calls; included by every file, so that a definition that differs does not compile. */
#ifndef LOQUETIER_KERNELS_H
#define LOQUETIER_KERNELS_H

void lq_gemm_bf16(const uint16_t *x, const uint16_t *w, const uint16_t *bias, uint16_t *y, int64_t rows, int64_t k,
                  int64_t n, int64_t ldx, int64_t ldy, int64_t level);
typedef void (*lq_columns)(int64_t from, int64_t to, void *context);
void lq_gemm_bf16_then(const uint16_t *x, const uint16_t *w, const uint16_t *bias, uint16_t *y, int64_t rows, int64_t k,
                       int64_t n, int64_t ldx, int64_t ldy, int64_t level, lq_columns after, void *context);
/* Activations of gated linears. */
enum { LQ_SILU = 0, LQ_GELU_TANH = 1 };

/* Heads of rows: where the first lies, elements from row to row and from head to head. */
typedef struct {
    void *at;
    int64_t row, head;
} LqHeads;

void lq_rms_norm(void *x, const void *delta, const void *post, const void *weight, void *y, int64_t rows,
                 int64_t groups, int64_t dim, int64_t x_stride, int64_t y_stride, float post_epsilon, float epsilon,
                 int32_t one_plus, int32_t dtype);
void lq_rotary(void *x, const void *cosines, const void *sines, int64_t rows, int64_t heads, int64_t dim,
               int64_t stride, int32_t dtype);
void lq_rotary_write(const LqHeads *q, const LqHeads *k, const LqHeads *v, const void *cosines, const void *sines,
                     int64_t angles, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim, int64_t turned,
                     const int64_t *cache_rows, int64_t first, void *keys, void *values, int32_t dtype);
void lq_gated(const void *gate, const void *up, void *y, int64_t rows, int64_t inner, int64_t stride, int32_t kind,
              int32_t dtype);
int32_t lq_smlm_forward(const void *x, int64_t x_stride, void *y, int64_t y_stride, int64_t in, int64_t out,
                        const int64_t *table, const double *scales, int64_t num_segments, int32_t x_dtype,
                        int32_t w_dtype);

/* One adapter-bearing linear: columns [first, first + width) of GEMM number `gemm`; x has k columns. */
typedef struct {
    int64_t gemm;
    const int64_t *segments; /* the table of lq_smlm_forward */
    const double *scales;
    int64_t count, first, width, k;
} LqDelta;

/* A share of one half of a delta: some ranks of S, or some columns of y, of a block of rows of one segment. */
typedef struct {
    const void *w;
    int64_t rank, row, rows, s_at, s_stride;
    int64_t size, column, columns; /* of y: elements between rows of w; first column; number */
    double scale;
} LqPiece;

/* A segment long enough for tiles, on columns [first, first + width) of a GEMM's y. */
typedef struct {
    const void *a, *b; /* [rank, k] and [rank, width] */
    int64_t rank, row, rows, first, width, k;
    int64_t a_at, b_at, s_at; /* of the room for packed factors and S */
    int64_t first_block; /* among the blocks of rows of its GEMM */
    double scale;
} LqLong;

/* Pieces of one GEMM: shrinks at pieces[first_shrink..first_expand), expands up to `end`; longs[first_long..end_long). */
typedef struct {
    int64_t first_shrink, first_expand, end, first_long, end_long;
} LqPieces;

enum { LQ_LONG_BLOCK = 32 /* rows */, LQ_LONG_LINE = 32 /* widths are multiples: a tile reads whole lines */ };
enum { LQ_LONG_RANK = 512 /* at most: S of a block lies on a thread's stack */ };

void lq_delta_shrink(const LqPiece *pieces, int64_t count, const uint16_t *x, int64_t x_stride, int64_t k, float *s,
                     int32_t w_dtype);
void lq_delta_expand(const LqPiece *pieces, int64_t count, const float *s, uint16_t *y, int64_t y_stride,
                     int32_t w_dtype);

/* The long segments of one GEMM. */
typedef struct {
    const LqLong *longs;
    int64_t count;
    const uint16_t *x;
    uint16_t *y;
    int64_t x_stride, y_stride;
    uint16_t *packed; /* room for the factors and S of all of them */
    int w_bf16;
} LqLongs;

int64_t lq_long_size(LqLong *l, int64_t at);
void lq_longs_shrink(const LqLongs *c);
void lq_longs_expand(int64_t from, int64_t to, void *longs);

/* Rows [start, start + rows) of a step are tokens [past, past + rows) of the sequence with these pages. */
typedef struct {
    int64_t start, rows, past;
    const int64_t *pages;
} LqSpan;

int32_t lq_prefill_attention(const void *q, int64_t q_row, int64_t q_head, const void *k, const void *v, void *out,
                             const LqSpan *spans, int64_t num_spans, int64_t heads, int64_t kv_heads, int64_t dim,
                             int64_t page_size, int64_t window, double scale, double softcap, int32_t dtype,
                             int32_t amx);
int32_t lq_decode_attention(const void *q, int64_t q_row, int64_t q_head, const void *k, const void *v, void *out,
                            const int64_t *pages, int64_t pages_width, const int64_t *positions,
                            int64_t num_sequences, int64_t heads, int64_t kv_heads, int64_t dim, int64_t page_size,
                            int64_t window, double scale, double softcap, int32_t dtype);

#endif
