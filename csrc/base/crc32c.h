/* CRC-32C (Castagnoli, reflected polynomial 0x82F63B78), the checksum of packed expert records.
 * fm_crc32c(0, p, n) is the standard value: "123456789" gives 0xE3069283. Feed pieces by passing
 * the previous result as crc. Hardware instructions are used where the CPU has them. */
#ifndef FM_BASE_CRC32C_H
#define FM_BASE_CRC32C_H

#include <stddef.h>
#include <stdint.h>

uint32_t fm_crc32c(uint32_t crc, const void *data, size_t bytes);
/* The value of A followed by B, from the values of each and B's length. */
uint32_t fm_crc32c_combine(uint32_t crc_a, uint32_t crc_b, size_t bytes_b);

#endif
