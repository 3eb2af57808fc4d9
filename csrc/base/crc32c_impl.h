/* The two implementations behind fm_crc32c, for tests that compare them. */
#ifndef FM_BASE_CRC32C_IMPL_H
#define FM_BASE_CRC32C_IMPL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

uint32_t fm_crc32c_table(uint32_t crc, const void *data, size_t bytes);
/* false where the CPU has no instruction for it. */
bool fm_crc32c_hw(uint32_t crc, const void *data, size_t bytes, uint32_t *out);

#endif
