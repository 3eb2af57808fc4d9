/* Owns: CRC-32C by table (slice by 8) and by CPU instruction (three interleaved streams, because
 * the instruction has a latency of 3 and a throughput of 1; their results are joined by multiplying
 * with a power of x modulo the polynomial). Idea of the interleave: Mark Adler's crc32c. */
#include "base/crc32c.h"

#include <pthread.h>
#include <stdbool.h>
#include <string.h>

#include "base/crc32c_impl.h"

#define POLY UINT32_C(0x82F63B78)
enum { LONG_BYTES = 8192, SHORT_BYTES = 256 };

typedef uint32_t shift_table[4][256];

static uint32_t slices[8][256];
static shift_table shift_long, shift_short;
static bool use_hw;
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* a * b modulo the polynomial; reflected, so the highest bit is x^0. */
static uint32_t gf_mul(uint32_t a, uint32_t b)
{
    uint32_t r = 0;
    for (uint32_t bit = UINT32_C(1) << 31; bit != 0; bit >>= 1) {
        if ((a & bit) != 0)
            r ^= b;
        b = (b & 1) != 0 ? (b >> 1) ^ POLY : b >> 1;
    }
    return r;
}

/* x^(8 n_bytes): multiplying a CRC by it is the effect of n_bytes zero bytes. */
static uint32_t zeros_power(size_t n_bytes)
{
    uint32_t power = UINT32_C(1) << 31, square = UINT32_C(1) << 23; /* x^0, x^8 */
    for (; n_bytes != 0; n_bytes >>= 1) {
        if ((n_bytes & 1) != 0)
            power = gf_mul(power, square);
        square = gf_mul(square, square);
    }
    return power;
}

uint32_t fm_crc32c_combine(uint32_t crc_a, uint32_t crc_b, size_t bytes_b)
{
    return gf_mul(crc_a, zeros_power(bytes_b)) ^ crc_b;
}

/* The effect of n_bytes zero bytes, one table per byte of the CRC. */
static void shift_init(shift_table t, uint32_t n_bytes)
{
    const uint32_t power = zeros_power(n_bytes);
    for (int k = 0; k < 4; k++)
        for (uint32_t i = 0; i < 256; i++)
            t[k][i] = gf_mul(i << 8 * k, power);
}

static uint32_t shift(shift_table t, uint32_t crc)
{
    return t[0][crc & 255] ^ t[1][crc >> 8 & 255] ^ t[2][crc >> 16 & 255] ^ t[3][crc >> 24];
}

/* What the CPU has: one 8-byte and one 1-byte step. Inline assembly needs no compiler flags. */
#if defined(__x86_64__)
static bool has_hw(void)
{
    return __builtin_cpu_supports("sse4.2");
}
static inline uint64_t step8(uint64_t crc, uint64_t v)
{
    __asm__("crc32q %1, %0" : "+r"(crc) : "rm"(v));
    return crc;
}
static inline uint64_t step1(uint64_t crc, uint8_t v)
{
    __asm__("crc32b %1, %k0" : "+r"(crc) : "qm"(v));
    return crc;
}
#elif defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
static bool has_hw(void)
{
    return (getauxval(AT_HWCAP) & 1 << 7) != 0;
} /* HWCAP_CRC32 */
#else
static bool has_hw(void)
{
    return true;
} /* every Apple CPU */
#endif
static inline uint64_t step8(uint64_t crc, uint64_t v)
{
    __asm__(".arch_extension crc\n\tcrc32cx %w0, %w0, %x1" : "+r"(crc) : "r"(v));
    return crc;
}
static inline uint64_t step1(uint64_t crc, uint8_t v)
{
    __asm__(".arch_extension crc\n\tcrc32cb %w0, %w0, %w1" : "+r"(crc) : "r"((uint32_t)v));
    return crc;
}
#else
static bool has_hw(void)
{
    return false;
}
static inline uint64_t step8(uint64_t crc, uint64_t v)
{
    return crc + v;
}
static inline uint64_t step1(uint64_t crc, uint8_t v)
{
    return crc + v;
}
#endif

static void init(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; bit++)
            crc = (crc & 1) != 0 ? (crc >> 1) ^ POLY : crc >> 1;
        slices[0][i] = crc;
    }
    for (int k = 1; k < 8; k++)
        for (uint32_t i = 0; i < 256; i++)
            slices[k][i] = (slices[k - 1][i] >> 8) ^ slices[0][slices[k - 1][i] & 255];
    shift_init(shift_long, LONG_BYTES);
    shift_init(shift_short, SHORT_BYTES);
    use_hw = has_hw();
}

static inline uint64_t load8(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof(v));
    return v;
}

uint32_t fm_crc32c_table(uint32_t crc, const void *data, size_t bytes)
{
    const uint8_t *p = data;
    pthread_once(&once, init);
    crc = ~crc;
    /* Assembled from bytes, so that it is right on either byte order. */
    for (; bytes >= 8; bytes -= 8, p += 8) {
        crc ^= (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
        crc = slices[7][crc & 255] ^ slices[6][crc >> 8 & 255] ^ slices[5][crc >> 16 & 255] ^
              slices[4][crc >> 24] ^ slices[3][p[4]] ^ slices[2][p[5]] ^ slices[1][p[6]] ^
              slices[0][p[7]];
    }
    for (; bytes > 0; bytes--, p++)
        crc = (crc >> 8) ^ slices[0][(crc ^ *p) & 255];
    return ~crc;
}

/* Three blocks of block bytes at a time, for as long as they last. */
static inline uint64_t interleave(uint64_t crc, const uint8_t **data, size_t *bytes, size_t block,
                                  shift_table t)
{
    const uint8_t *p = *data;
    size_t left = *bytes;
    for (; left >= 3 * block; left -= 3 * block, p += 3 * block) {
        uint64_t crc1 = 0, crc2 = 0;
        for (size_t i = 0; i < block; i += 8) {
            crc = step8(crc, load8(p + i));
            crc1 = step8(crc1, load8(p + block + i));
            crc2 = step8(crc2, load8(p + 2 * block + i));
        }
        crc = shift(t, (uint32_t)crc) ^ crc1;
        crc = shift(t, (uint32_t)crc) ^ crc2;
    }
    *data = p;
    *bytes = left;
    return crc;
}

bool fm_crc32c_hw(uint32_t crc, const void *data, size_t bytes, uint32_t *out)
{
    const uint8_t *p = data;
    pthread_once(&once, init);
    if (!use_hw)
        return false;
    uint64_t c = (uint32_t)~crc;
    for (; bytes > 0 && ((uintptr_t)p & 7) != 0; bytes--, p++)
        c = step1(c, *p);
    c = interleave(c, &p, &bytes, LONG_BYTES, shift_long);
    c = interleave(c, &p, &bytes, SHORT_BYTES, shift_short);
    for (; bytes >= 8; bytes -= 8, p += 8)
        c = step8(c, load8(p));
    for (; bytes > 0; bytes--, p++)
        c = step1(c, *p);
    *out = ~(uint32_t)c;
    return true;
}

uint32_t fm_crc32c(uint32_t crc, const void *data, size_t bytes)
{
    uint32_t out;
    return fm_crc32c_hw(crc, data, bytes, &out) ? out : fm_crc32c_table(crc, data, bytes);
}
