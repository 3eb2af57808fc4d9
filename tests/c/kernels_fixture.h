/* Random matrices in every format, at deliberately odd addresses, and the variants to test. */
#ifndef FM_TESTS_KERNELS_FIXTURE_H
#define FM_TESTS_KERNELS_FIXTURE_H

#include <math.h>

#include "cpu/kernels.h"
#include "harness.h"

static inline float rand_unit(uint64_t *s) { return (float)((double)(test_rand(s) >> 11) / 4503599627370496.0 - 1); }

static inline float rand_wide(uint64_t *s) { return rand_unit(s) * exp2f(rand_unit(s) * 4); }

typedef struct test_mat {
    fm_mat m;
    uint8_t *memory;
} test_mat;

/* Areas end at the very end of their allocation, so that a read past them is caught by ASan. */
static inline test_mat test_mat_make(fm_quant q, int64_t rows, int64_t cols, int32_t group, fm_quant scale_format,
                                     int odd, uint64_t *s)
{
    const int64_t cb = fm_quant_codes_bytes(q, cols);
    const bool affine = fm_quant_get(q)->affine;
    const int64_t sb = affine ? fm_quant_scales_bytes(q, cols, group, scale_format) : 0;
    uint8_t *mem = malloc((size_t)(odd + rows * (cb + 2 * sb)));
    uint8_t *codes = mem + odd, *scales = codes + rows * cb, *biases = scales + rows * sb;
    float *x = malloc((size_t)cols * sizeof *x);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < cols; c++)
            x[c] = rand_unit(s) * (r % 5 == 3 && c < 32 ? 0 : 1); /* groups of zeros too */
        fm_quant_get(q)->encode_ref(x, cols, group, scale_format, codes + r * cb, scales + r * sb, biases + r * sb);
    }
    free(x);
    test_mat t = {fm_mat_make(q, affine ? group : 0, scale_format, rows, cols, codes, affine ? scales : NULL,
                              affine ? biases : NULL),
                  mem};
    return t;
}

/* f32 rows at a stride of their own, poisoned between rows. */
static inline float *test_rows(int64_t n, int64_t cols, int64_t ld, uint64_t *s)
{
    float *x = malloc((size_t)(n * ld) * sizeof *x);
    for (int64_t i = 0; i < n * ld; i++)
        x[i] = i % ld < cols ? rand_wide(s) : NAN;
    return x;
}

static int test_n_names; /* variants named on the command line; none: all */
static char **test_names;

static inline bool test_wanted(const char *name)
{
    for (int i = 0; i < test_n_names; i++)
        if (strcmp(test_names[i], name) == 0)
            return true;
    return test_n_names == 0;
}

/* Calls fn for every supported variant in both numeric modes; fast tells whether FAST's bound applies. */
static inline void test_variants(void (*fn)(const fm_kernels *k, bool fast))
{
    int n = 0;
    for (int i = 0; fm_kernels_name(i) != NULL; i++)
        if (fm_kernels_supported(i) && test_wanted(fm_kernels_name(i)))
            for (int m = 0; m < FM_NUMERIC_COUNT; m++) {
                fm_kernels k;
                const int before = harness_n_failed;
                CHECK_INT(fm_kernels_variant_numeric(fm_kernels_name(i), (fm_numeric)m, &k), FM_OK);
                fn(&k, m == FM_NUMERIC_FAST && i > 0);
                if (harness_n_failed != before)
                    fprintf(stderr, "... in variant %s, mode %d\n", k.name, m);
                n++;
            }
    CHECK(n >= 2 + 2 * (test_n_names > 0 ? test_n_names - 1 : 0)); /* what is asked for must run */
}

#endif
