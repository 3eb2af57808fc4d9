/* Any bytes as a quantised row: the checks refuse or the codecs run clean, inside exactly their
 * bytes. With -DFUZZ_LIBFUZZER a libFuzzer target; otherwise a driver: files given, or 20,000
 * seeded inputs. */
#include <assert.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "quant/quant.h"
#include "quant/quant_plain.h"

typedef struct input {
    const uint8_t *data;
    size_t left;
} input;

static uint32_t take(input *in, size_t bytes)
{
    uint32_t v = 0;
    for (size_t i = 0; i < bytes && in->left > 0; i++, in->data++, in->left--)
        v |= (uint32_t)*in->data << 8 * i;
    return v;
}

/* A heap copy of exactly bytes, so that the sanitizer sees one byte too far; then zeros. */
static uint8_t *take_area(input *in, int64_t bytes)
{
    uint8_t *const area = calloc(1, (size_t)bytes + (bytes == 0));
    const size_t n = in->left < (size_t)bytes ? in->left : (size_t)bytes;
    assert(area != NULL);
    memcpy(area, in->data, n);
    in->data += n;
    in->left -= n;
    return area;
}

static void check_round_trip(const fm_quant_traits *t, fm_quant_row row, int64_t n_cols, float *y,
                             int64_t codes_bytes, int64_t scales_bytes)
{
    uint8_t *const codes = malloc((size_t)codes_bytes + 1);
    uint8_t *const scales = malloc((size_t)scales_bytes + 1);
    uint8_t *const biases = malloc((size_t)scales_bytes + 1);
    assert(codes != NULL && scales != NULL && biases != NULL);
    t->encode_ref(y, n_cols, row.group, row.scale_format, codes, scales, biases);
    if (!t->affine) /* a plain number decodes and encodes to itself, NaN aside */
        for (int64_t i = 0; i < n_cols; i++)
            assert(isnan(y[i]) || memcmp(codes + i * t->bits / 8, row.codes + i * t->bits / 8,
                                         (size_t)t->bits / 8) == 0);
    row.codes = codes;
    row.scales = scales;
    row.biases = biases;
    t->decode_ref(&row, n_cols, y);
    free(biases);
    free(scales);
    free(codes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const int32_t usual_groups[] = {16, 32, 64, 128};
    input in = {data, size};
    const fm_quant q = (fm_quant)(take(&in, 1) % (FM_QUANT_COUNT + 1));
    const fm_quant scale_format = (fm_quant)(take(&in, 1) % 4);
    const uint32_t group_byte = take(&in, 1);
    const int32_t group = group_byte < 16 ? (int32_t)group_byte - 1 : usual_groups[group_byte % 4];
    const uint32_t cols = take(&in, 2);
    const int64_t n_cols =
        cols & 0x8000 ? (int64_t)((uint64_t)take(&in, 4) << 32) : (int64_t)(cols % 1152);
    if (fm_quant_check(q, n_cols, group, scale_format) != FM_OK || n_cols > 2048)
        return 0;
    const fm_quant_traits *const t = fm_quant_get(q);
    const int64_t codes_bytes = fm_quant_codes_bytes(q, n_cols);
    const int64_t scales_bytes = fm_quant_scales_bytes(q, n_cols, group, scale_format);
    uint8_t *const codes = take_area(&in, codes_bytes), *const scales =
                                                            take_area(&in, scales_bytes);
    uint8_t *const biases = take_area(&in, scales_bytes);
    float *const y = malloc((size_t)n_cols * sizeof(float));
    assert(y != NULL);
    const fm_quant_row row = {codes, scales, biases, group, scale_format};
    t->decode_ref(&row, n_cols, y);
    check_round_trip(t, row, n_cols, y, codes_bytes, scales_bytes);
    free(y);
    free(biases);
    free(scales);
    free(codes);
    return 0;
}

#if !defined(FUZZ_LIBFUZZER)
static int run_file(const char *path)
{
    static uint8_t data[1 << 20];
    FILE *const f = fopen(path, "rb");
    if (f == NULL) {
        perror(path);
        return 1;
    }
    const size_t n = fread(data, 1, sizeof(data), f);
    fclose(f);
    return LLVMFuzzerTestOneInput(data, n);
}

int main(int argc, char **argv)
{
    static uint8_t data[8192];
    uint64_t state = 1;
    for (int i = 1; i < argc; i++)
        if (run_file(argv[i]) != 0)
            return 1;
    for (int round = 0; argc == 1 && round < 20000; round++) {
        for (size_t i = 0; i < sizeof(data); i += 8) { /* splitmix64 */
            uint64_t z = state += UINT64_C(0x9E3779B97F4A7C15);
            z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
            z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB) >> 3;
            memcpy(data + i, &z, 8);
        }
        data[4] &= 0x7f;                                     /* seldom absurd sizes */
        data[3] = round % 8 != 0 ? data[3] & 0x80 : data[3]; /* often a multiple of 128 columns */
        LLVMFuzzerTestOneInput(data, (size_t)(5 + state % (sizeof(data) - 5)));
    }
    return 0;
}
#endif
