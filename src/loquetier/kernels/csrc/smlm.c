/* SMLM: y[s] += scale_s * (x[s] @ A_s^T) @ B_s for every segment s of rows, and its backward, in one call each.
 *
 * Forward: a task is a block of rows of one segment. It computes S = scale * x A^T in registers and expands it into y;
 * nothing but y is written. Backward, phase 1: the same per block for S, dS = scale * dy B^T and dx += dS A; phase 2:
 * dA += dS^T x and dB += S^T dy, a task being a strip of columns over all segments in order, so that two segments of
 * one adapter never race and sums do not depend on threads. Sums are float32. */
#include "loquetier.h"

#include <stdlib.h>

typedef struct {
    const void *a, *b; /* [rank, in] and [rank, out] */
    float *grad_a, *grad_b;
    int64_t rank, start, stop;
    float scale;
    int64_t block_rows, first_task;
    float *s, *ds; /* [stop - start, rank], scaled */
} Segment;

typedef struct {
    const void *x, *dy;
    void *y;
    int64_t x_stride, dy_stride, y_stride, in, out, num_segments;
    int x_bf16, w_bf16;
    Segment *segments;
} Call;

#define LQ_TEMPLATE "smlm_kernel.h"
#include "variants.h"

enum {
    BLOCK_ROWS = 16,      /* rows that share one reading of A and B from the second-level cache */
    MOST_S = 8192,        /* floats of S on a task's stack */
    STRIP_COLUMNS = 128,  /* columns of a wgrad task */
    SERIAL_BYTES = 65536, /* less weights than this are read faster than a second thread wakes up */
};

/* Python's table: a, b, grad_a, grad_b, rank, start, stop per segment; only what exists and has rows. */
enum { ROW_LENGTH = 7 };

static Segment *read_segments(const int64_t *table, const double *scales, int64_t num_segments, int64_t *num_tasks,
                              int64_t *s_size) {
    Segment *segments = malloc((size_t)num_segments * sizeof *segments);
    if (segments == NULL) return NULL;
    int64_t tasks = 0, size = 0;
    for (int64_t i = 0; i < num_segments; i++) {
        const int64_t *row = table + i * ROW_LENGTH;
        Segment *g = &segments[i];
        g->a = (const void *)(intptr_t)row[0];
        g->b = (const void *)(intptr_t)row[1];
        g->grad_a = (float *)(intptr_t)row[2];
        g->grad_b = (float *)(intptr_t)row[3];
        g->rank = row[4], g->start = row[5], g->stop = row[6];
        g->scale = (float)scales[i];
        g->block_rows = g->rank * BLOCK_ROWS <= MOST_S ? BLOCK_ROWS : MOST_S / g->rank;
        g->first_task = tasks;
        tasks += (g->stop - g->start + g->block_rows - 1) / g->block_rows;
        size += (g->stop - g->start) * g->rank;
    }
    *num_tasks = tasks, *s_size = size;
    return segments;
}

/* The segment of a block task. Binary search: there may be hundreds of segments. */
static const Segment *segment_of(const Call *call, int64_t task) {
    int64_t low = 0, high = call->num_segments - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (call->segments[middle].first_task <= task)
            low = middle;
        else
            high = middle - 1;
    }
    return &call->segments[low];
}

static void block_of(const Segment *g, int64_t task, int64_t *start, int64_t *rows) {
    *start = g->start + (task - g->first_task) * g->block_rows;
    *rows = g->stop - *start < g->block_rows ? g->stop - *start : g->block_rows;
}

static void forward_task(int64_t begin, int64_t end, void *context) {
    const Call *call = context;
    float s[MOST_S];
    for (int64_t task = begin; task < end; task++) {
        const Segment *g = segment_of(call, task);
        int64_t start, rows;
        block_of(g, task, &start, &rows);
        LQ_PICK(forward_block)(call, g, start, rows, s);
    }
}

static void backward_task(int64_t begin, int64_t end, void *context) {
    const Call *call = context;
    for (int64_t task = begin; task < end; task++) {
        const Segment *g = segment_of(call, task);
        int64_t start, rows;
        block_of(g, task, &start, &rows);
        int64_t at = (start - g->start) * g->rank;
        LQ_PICK(backward_block)(call, g, start, rows, g->s + at, g->ds + at);
    }
}

static int64_t strips(int64_t columns) { return (columns + STRIP_COLUMNS - 1) / STRIP_COLUMNS; }

static void wgrad_task(int64_t begin, int64_t end, void *context) {
    const Call *call = context;
    for (int64_t task = begin; task < end; task++) {
        int out = task >= strips(call->in);
        int64_t columns = out ? call->out : call->in;
        int64_t from = (out ? task - strips(call->in) : task) * STRIP_COLUMNS;
        int64_t to = from + STRIP_COLUMNS < columns ? from + STRIP_COLUMNS : columns;
        for (int64_t i = 0; i < call->num_segments; i++)
            LQ_PICK(wgrad_columns)(call, &call->segments[i], out, from, to);
    }
}

static int is_small(const Call *call) {
    int64_t elements = 0;
    for (int64_t i = 0; i < call->num_segments; i++)
        elements += call->segments[i].rank * (call->in + call->out) * (call->segments[i].stop - call->segments[i].start);
    return elements * 4 < SERIAL_BYTES;
}

/* Returns 0, or 1 when memory ran out and nothing was changed. */
LQ_EXPORT int32_t lq_smlm_forward(const void *x, int64_t x_stride, void *y, int64_t y_stride, int64_t in, int64_t out,
                                  const int64_t *table, const double *scales, int64_t num_segments, int32_t x_dtype,
                                  int32_t w_dtype) {
    int64_t num_tasks, s_size;
    Segment *segments = read_segments(table, scales, num_segments, &num_tasks, &s_size);
    if (segments == NULL) return 1;
    Call call = {x, NULL, y, x_stride, 0, y_stride, in, out, num_segments, x_dtype == LQ_BF16, w_dtype == LQ_BF16,
                 segments};
    if (is_small(&call))
        forward_task(0, num_tasks, &call);
    else
        lq_parallel_tasks(num_tasks, forward_task, &call);
    free(segments);
    return 0;
}

/* Returns 0, or 1 when memory ran out and nothing was changed. dx has x's dtype; gradients are float32. */
LQ_EXPORT int32_t lq_smlm_backward(const void *x, int64_t x_stride, const void *dy, int64_t dy_stride, void *dx,
                                   int64_t dx_stride, int64_t in, int64_t out, const int64_t *table,
                                   const double *scales, int64_t num_segments, int32_t x_dtype, int32_t w_dtype) {
    int64_t num_tasks, s_size;
    Segment *segments = read_segments(table, scales, num_segments, &num_tasks, &s_size);
    float *s = segments == NULL ? NULL : malloc((size_t)s_size * 2 * sizeof *s);
    if (s == NULL) {
        free(segments);
        return 1;
    }
    int64_t at = 0;
    for (int64_t i = 0; i < num_segments; i++) {
        segments[i].s = s + at;
        segments[i].ds = s + s_size + at;
        at += (segments[i].stop - segments[i].start) * segments[i].rank;
    }
    Call call = {x, dy, dx, x_stride, dy_stride, dx_stride, in, out, num_segments, x_dtype == LQ_BF16,
                 w_dtype == LQ_BF16, segments};
    lq_parallel_tasks(num_tasks, backward_task, &call);
    lq_parallel_tasks(strips(in) + strips(out), wgrad_task, &call);
    free(s);
    free(segments);
    return 0;
}

/* ---- deltas of a stack ----
 * The same sums in two halves over all adapters of a GEMM, cut finely enough for threads to end together: one row on one
 * adapter is work for all of them. The cutting depends on the layout of rows only and is kept from step to step. */

enum { PIECE_RANKS = 16, PIECE_COLUMNS = 256 };

typedef struct {
    const LqPiece *pieces;
    const uint16_t *x;
    uint16_t *y;
    int64_t stride, k;
    float *s;
    int w_bf16;
} Half;

static void shrink_pieces(int64_t begin, int64_t end, void *context) {
    const Half *h = context;
    for (int64_t i = begin; i < end; i++) LQ_PICK(shrink_piece)(h->x, h->stride, h->k, h->pieces + i, h->s, h->w_bf16);
}

static void expand_pieces(int64_t begin, int64_t end, void *context) {
    const Half *h = context;
    for (int64_t i = begin; i < end; i++) LQ_PICK(expand_piece)(h->s, h->pieces + i, h->y, h->stride, h->w_bf16);
}

/* In a team the barrier of the GEMM that must follow ends this too. */
void lq_delta_shrink(const LqPiece *pieces, int64_t count, const uint16_t *x, int64_t x_stride, int64_t k, float *s,
                     int32_t w_dtype) {
    Half half = {pieces, x, NULL, x_stride, k, s, w_dtype == LQ_BF16};
    lq_open_tasks(count, shrink_pieces, &half);
}

void lq_delta_expand(const LqPiece *pieces, int64_t count, const float *s, uint16_t *y, int64_t y_stride,
                     int32_t w_dtype) {
    Half half = {pieces, NULL, y, y_stride, 0, (float *)s, w_dtype == LQ_BF16};
    lq_parallel_tasks(count, expand_pieces, &half);
}

static int is_long(const LqDelta *delta, const int64_t *row, int tiles) {
    return tiles && row[6] - row[5] >= LQ_LONG_BLOCK && row[4] <= LQ_LONG_RANK && delta->k % LQ_LONG_LINE == 0 &&
           delta->width % LQ_LONG_LINE == 0 && delta->first % LQ_LONG_LINE == 0;
}

typedef struct {
    LqPiece *pieces; /* NULL: to count only; then longs too */
    LqLong *longs;
    int64_t num_pieces, num_longs;
    int64_t s_at;       /* of this half */
    int64_t packed_at, blocks; /* of this GEMM */
    int tiles;
} Cut;

static void cut_segment(Cut *cut, const LqDelta *delta, int64_t i, int half, int64_t w_size) {
    const int64_t *row = delta->segments + i * ROW_LENGTH;
    int64_t rank = row[4], start = row[5], stop = row[6];
    int64_t step = half ? PIECE_COLUMNS : PIECE_RANKS, size = half ? delta->width : rank;
    for (int64_t t = start; t < stop; t += BLOCK_ROWS)
        for (int64_t c = 0; c < size; c += step) {
            int64_t left = size - c < step ? size - c : step;
            int64_t rows = stop - t < BLOCK_ROWS ? stop - t : BLOCK_ROWS, s = cut->s_at + (t - start) * rank;
            const char *w = (const char *)(intptr_t)row[half] + c * (half ? 1 : delta->k) * w_size;
            LqPiece piece = {w, half ? rank : left, t, rows, half ? s : s + c, rank,
                             delta->width, delta->first + c, left, delta->scales[i]};
            if (cut->pieces != NULL) cut->pieces[cut->num_pieces] = piece;
            cut->num_pieces++;
        }
    cut->s_at += (stop - start) * rank;
}

static void keep_long(Cut *cut, const LqDelta *delta, int64_t i) {
    const int64_t *row = delta->segments + i * ROW_LENGTH;
    LqLong l = {(const void *)(intptr_t)row[0], (const void *)(intptr_t)row[1], row[4], row[5], row[6] - row[5],
                delta->first, delta->width, delta->k, 0, 0, 0, cut->blocks, delta->scales[i]};
    cut->packed_at = lq_long_size(&l, cut->packed_at);
    cut->blocks += (l.rows + LQ_LONG_BLOCK - 1) / LQ_LONG_BLOCK;
    if (cut->longs != NULL) cut->longs[cut->num_longs] = l;
    cut->num_longs++;
}

/* Cut the deltas (ascending by gemm) of `num_gemms` GEMMs into pieces, and find those for tiles if there are tiles.
 *   pieces, longs, by_gemm  filled; pieces and longs may be NULL to count them only
 *   sizes  [0] pieces, [1] floats of S that one GEMM needs at most, [2] longs, [3] bfloat16 numbers that a
 *          GEMM's longs need at most */
LQ_EXPORT void lq_delta_pieces(const LqDelta *deltas, int64_t num_deltas, int64_t num_gemms, int64_t w_size,
                               int64_t tiles, LqPiece *pieces, LqLong *longs, LqPieces *by_gemm, int64_t *sizes) {
    const LqDelta *end = deltas + num_deltas;
    Cut cut = {.pieces = pieces, .longs = longs, .tiles = tiles != 0};
    sizes[1] = sizes[3] = 0;
    for (int64_t gemm = 0; gemm < num_gemms; gemm++) {
        const LqDelta *first = deltas;
        LqPieces *of = by_gemm + gemm;
        of->first_shrink = cut.num_pieces, of->first_long = cut.num_longs;
        cut.packed_at = cut.blocks = 0;
        for (int half = 0; half < 2; half++) {
            cut.s_at = 0;
            if (half == 1) of->first_expand = cut.num_pieces;
            for (deltas = first; deltas < end && deltas->gemm == gemm; deltas++)
                for (int64_t i = 0; i < deltas->count; i++)
                    if (!is_long(deltas, deltas->segments + i * ROW_LENGTH, cut.tiles))
                        cut_segment(&cut, deltas, i, half, w_size);
                    else if (half == 0)
                        keep_long(&cut, deltas, i);
            if (cut.s_at > sizes[1]) sizes[1] = cut.s_at;
        }
        of->end = cut.num_pieces, of->end_long = cut.num_longs;
        if (cut.packed_at > sizes[3]) sizes[3] = cut.packed_at;
    }
    sizes[0] = cut.num_pieces, sizes[2] = cut.num_longs;
}
