/* Both implementations agree with the definition, at every size, alignment and cut. */
#include "harness.h"

#include "base/crc32c.h"
#include "base/crc32c_impl.h"
#include "base/platform.h"

static uint32_t bit_by_bit(uint32_t crc, const uint8_t *p, size_t n)
{
    crc = ~crc;
    for (size_t i = 0; i < n; i++) {
        crc ^= p[i];
        for (int b = 0; b < 8; b++)
            crc = crc & 1 ? crc >> 1 ^ UINT32_C(0x82F63B78) : crc >> 1;
    }
    return ~crc;
}

static void check_all(const uint8_t *p, size_t n, uint32_t want)
{
    uint32_t hw = want;
    CHECK_INT(fm_crc32c(0, p, n), want);
    CHECK_INT(fm_crc32c_table(0, p, n), want);
    (void)fm_crc32c_hw(0, p, n, &hw);
    CHECK_INT(hw, want);
}

/* RFC 3720, B.4 */
static void known_vectors(void)
{
    uint8_t v[32];
    check_all((const uint8_t *)"123456789", 9, 0xE3069283);
    check_all((const uint8_t *)"", 0, 0);
    memset(v, 0, 32);
    check_all(v, 32, 0x8A9136AA);
    memset(v, 0xff, 32);
    check_all(v, 32, 0x62A8AB43);
    for (int i = 0; i < 32; i++)
        v[i] = (uint8_t)i;
    check_all(v, 32, 0x46DD794E);
    for (int i = 0; i < 32; i++)
        v[i] = (uint8_t)(31 - i);
    check_all(v, 32, 0x113FDB5C);
}

static void sizes_and_cuts(void)
{
    static uint8_t data[60000];
    const size_t sizes[] = {1,   2,   3,   5,    7,    8,    15,    16,    17,    31,    63,   65,
                            127, 767, 768, 1023, 1535, 4096, 24575, 24576, 24577, 49160, 59900};
    uint64_t seed = 1;
    for (size_t i = 0; i < sizeof(data); i++)
        data[i] = (uint8_t)test_rand(&seed);
    for (int i = 0; i < FM_COUNT(sizes); i++)
        for (size_t start = 0; start < 9; start++) {
            const uint8_t *const p = data + start;
            const size_t n = sizes[i], cut = (size_t)(test_rand(&seed) % (n + 1));
            const uint32_t want = bit_by_bit(0, p, n);
            check_all(p, n, want);
            CHECK_INT(fm_crc32c(fm_crc32c(0, p, cut), p + cut, n - cut), want);
            CHECK_INT(fm_crc32c_table(fm_crc32c_table(0, p, cut), p + cut, n - cut), want);
        }
}

int main(void)
{
    RUN(known_vectors);
    RUN(sizes_and_cuts);
    TEST_EXIT();
}
