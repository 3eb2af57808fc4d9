/* Configuration of the matrix tiles, for the files of variant amx; include within their target region. */
#ifndef FM_CPU_AMX_H
#define FM_CPU_AMX_H

#include <immintrin.h>
#include <stdint.h>

typedef struct fm_amx_config {
    _Alignas(64) uint8_t palette;
    uint8_t start, reserved[14];
    uint16_t bytes[16]; /* of a row of each tile */
    uint8_t rows[16];
} fm_amx_config;

static inline void fm_amx_configure(const fm_amx_config *c)
{
    __asm__ volatile("" ::"r"(c) : "memory"); /* GCC's intrinsic admits to reading 8 bytes only */
    _tile_loadconfig(c);
}

#endif
