/* AMX tiles for the kernel files that use them: the target, the configuration, products of packed matrices. */
#ifndef LOQUETIER_AMX_H
#define LOQUETIER_AMX_H

#include "loquetier.h"

#if LQ_X86
#define LQ_TARGET_AMX \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
} TileConfig;

/* Tiles 0-3 hold sums, 4 and 5 rows of x (first and second sixteen), 6 and 7 weights. Returns nothing to undo. */
LQ_TARGET_AMX static inline void configure(int64_t first_rows, int64_t second_rows) {
    TileConfig config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        int second = tile == 2 || tile == 3 || tile == 5;
        config.bytes_per_row[tile] = 64;
        config.rows[tile] = (uint8_t)(tile >= 6 ? 16 : second ? second_rows : first_rows);
    }
    __asm__ volatile("" : : "r"(&config) : "memory"); /* gcc's intrinsic says that it reads the first 8 bytes only */
    _tile_loadconfig(&config);
}
#endif

#endif
