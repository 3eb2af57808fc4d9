/* Half floats against exhaustive definitions; affine formats against a bit-by-bit reading. */
#include "harness.h"

#include <math.h>

#include "base/platform.h"
#include "quant/half.h"
#include "quant/quant_affine.h"
#include "quant/quant_plain.h"

static const fm_quant plain_formats[] = {FM_QUANT_F32, FM_QUANT_F16, FM_QUANT_BF16};
static const int groups[] = {16, 32, 64, 128};

static float random_normal(uint64_t *seed)
{
    float sum = 0;
    for (int i = 0; i < 4; i++)
        sum += (float)(test_rand(seed) >> 40) * 0x1p-24f - 0.5f;
    return sum;
}

/* The value of a half by its definition, in double. */
static double half_value(uint16_t h)
{
    const int exp = h >> 10 & 31, frac = h & 0x3ff;
    const double v = exp == 0 ? ldexp(frac, -24) : ldexp(1024 + frac, exp - 25);
    return h & 0x8000 ? -v : v;
}

static void halves_exhaustive(void)
{
    int n_bad = 0;
    for (uint32_t h = 0; h < 0x10000; h++) {
        const float f = fm_f16_to_f32((uint16_t)h), b = fm_bf16_to_f32((uint16_t)h);
        const int is_nan = (h & 0x7fff) > 0x7c00, is_inf = (h & 0x7fff) == 0x7c00;
        n_bad += is_nan ? !isnan(f) : is_inf ? !isinf(f) : (double)f != half_value((uint16_t)h);
        n_bad += (signbit(f) != 0) != (h >> 15);
        n_bad += is_nan ? !isnan(fm_f16_to_f32(fm_f32_to_f16(f))) : fm_f32_to_f16(f) != h;
        n_bad += (h & 0x7fff) > 0x7f80 ? !isnan(b) || !isnan(fm_bf16_to_f32(fm_f32_to_bf16(b)))
                                       : fm_f32_to_bf16(b) != h;
    }
    CHECK_INT(n_bad, 0);
}

/* Between two neighbours: just below, at and just above the middle; the middle goes to the even
 * one. */
static void halves_round_to_even(void)
{
    int n_bad = 0;
    for (uint32_t h = 0; h < 0x7c00; h++) {
        const double lo = half_value((uint16_t)h);
        const double hi = h + 1 < 0x7c00 ? half_value((uint16_t)(h + 1)) : 65536.0;
        const float mid = (float)((lo + hi) / 2); /* exact: 12 bits */
        const uint32_t even = h & 1 ? h + 1 : h;
        n_bad += fm_f32_to_f16(mid) != even;
        n_bad += fm_f32_to_f16(nextafterf(mid, 0)) != h;
        n_bad += fm_f32_to_f16(nextafterf(mid, INFINITY)) != h + 1;
        n_bad += fm_f32_to_f16(-mid) != (0x8000 | even);
    }
    for (uint32_t h = 0; h < 0x7f80; h++) {
        const float mid = fm_f32_from_bits(h << 16 | 0x8000);
        n_bad += fm_f32_to_bf16(mid) != (h & 1 ? h + 1 : h);
        n_bad += fm_f32_to_bf16(fm_f32_from_bits(h << 16 | 0x7fff)) != h;
        n_bad += fm_f32_to_bf16(fm_f32_from_bits(h << 16 | 0x8001)) != h + 1;
    }
    CHECK_INT(n_bad, 0);
    CHECK_INT(fm_f32_to_f16(1e30f), 0x7c00);
    CHECK_INT(fm_f32_to_f16(-INFINITY), 0xfc00);
    CHECK_INT(fm_f32_to_f16(1e-30f), 0);
    CHECK(isnan(fm_f16_to_f32(fm_f32_to_f16(NAN))));
    CHECK(isnan(
        fm_bf16_to_f32(fm_f32_to_bf16(fm_f32_from_bits(0x7f800001))))); /* payload in low bits */
    CHECK(isnan(fm_f16_to_f32(fm_f32_to_f16(fm_f32_from_bits(0xff800001)))));
}

static void table_and_search(void)
{
    fm_quant q = FM_QUANT_F32;
    for (int i = 0; i < FM_QUANT_COUNT; i++) {
        const fm_quant_traits *const t = fm_quant_get((fm_quant)i);
        CHECK(fm_quant_find_name(t->name, &q) && (int)q == i);
        CHECK(fm_quant_find_disk(t->disk_id, &q) && (int)q == i);
        CHECK(t->decode_ref != NULL && t->encode_ref != NULL);
        CHECK(t->affine == (strncmp(t->name, "affine", 6) == 0));
    }
    CHECK(!fm_quant_find_name("affine7", &q) && !fm_quant_find_disk(0, &q));
    CHECK_INT(fm_quant_get(FM_QUANT_AFFINE4)->disk_id, 14);
}

static void checks(void)
{
    CHECK(fm_quant_check(FM_QUANT_F16, 1, 0, FM_QUANT_F32) == FM_OK);
    CHECK(fm_quant_check(FM_QUANT_F16, 0, 0, FM_QUANT_F32) == FM_ERR_ARG);
    CHECK(fm_quant_check(FM_QUANT_F16, INT64_MAX, 0, FM_QUANT_F32) == FM_ERR_ARG);
    CHECK(fm_quant_check((fm_quant)99, 64, 64, FM_QUANT_F32) == FM_ERR_ARG);
    CHECK(fm_quant_check((fm_quant)-1, 64, 64, FM_QUANT_F32) == FM_ERR_ARG);
    CHECK(fm_quant_check(FM_QUANT_AFFINE3, 128, 64, FM_QUANT_BF16) == FM_OK);
    CHECK(fm_quant_check(FM_QUANT_AFFINE3, 128, 0, FM_QUANT_BF16) == FM_ERR_UNSUPPORTED);
    CHECK_CONTAINS(fm_last_error()->message, "group size 0");
    CHECK(fm_quant_check(FM_QUANT_AFFINE3, 96, 64, FM_QUANT_BF16) == FM_ERR_ARG);
    CHECK_CONTAINS(fm_last_error()->message, "96");
    CHECK(fm_quant_check(FM_QUANT_AFFINE3, 128, 64, FM_QUANT_AFFINE4) == FM_ERR_ARG);
    CHECK_INT(fm_quant_codes_bytes(FM_QUANT_AFFINE3, 128), 48);
    CHECK_INT(fm_quant_scales_bytes(FM_QUANT_AFFINE3, 128, 64, FM_QUANT_BF16), 4);
    CHECK_INT(fm_quant_codes_bytes(FM_QUANT_F32, 7), 28);
    CHECK_INT(fm_quant_scales_bytes(FM_QUANT_F32, 7, 0, FM_QUANT_F32), 0);
}

/* Any size, any address, exact to the byte (ASan watches the ends). */
static void plain_round_trip(void)
{
    const int sizes[] = {1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 65, 127, 1023};
    uint64_t seed = 3;
    for (int f = 0; f < FM_COUNT(plain_formats); f++)
        for (int s = 0; s < FM_COUNT(sizes); s++)
            for (size_t shift = 0; shift < 4; shift++) {
                const fm_quant_traits *const t = fm_quant_get(plain_formats[f]);
                const int n = sizes[s];
                const size_t bytes = (size_t)fm_quant_codes_bytes(plain_formats[f], n);
                uint8_t *const area = malloc(shift + bytes);
                float x[1023], y[1023];
                for (int i = 0; i < n; i++)
                    x[i] = random_normal(&seed);
                t->encode_ref(x, n, 0, FM_QUANT_F32, area + shift, NULL, NULL);
                const fm_quant_row row = {area + shift, NULL, NULL, 0, FM_QUANT_F32};
                t->decode_ref(&row, n, y);
                const float error = plain_formats[f] == FM_QUANT_F32   ? 0
                                    : plain_formats[f] == FM_QUANT_F16 ? 0x1p-11f
                                                                       : 0x1p-8f;
                for (int i = 0; i < n; i++)
                    CHECK(fabsf(x[i] - y[i]) <= error * fabsf(x[i]) + 0x1p-24f);
                free(area);
            }
}

typedef struct affine_case {
    fm_quant q, scale_format;
    int bits, group, n_cols;
    uint8_t *memory, *codes, *scales, *biases; /* exact sizes, odd addresses */
    float x[512], y[512];
} affine_case;

static void case_open(affine_case *c, fm_quant q, fm_quant scale_format, int group, int n_groups)
{
    c->q = q;
    c->scale_format = scale_format;
    c->bits = fm_quant_get(q)->bits;
    c->group = group;
    c->n_cols = group * n_groups;
    const size_t codes = (size_t)fm_quant_codes_bytes(q, c->n_cols);
    const size_t scales = (size_t)fm_quant_scales_bytes(q, c->n_cols, group, scale_format);
    c->memory = malloc(1 + codes + 2 * scales);
    c->scales = c->memory + 1;
    c->biases = c->scales + scales;
    c->codes = c->biases + scales;
}

static void case_run(affine_case *c)
{
    const fm_quant_traits *const t = fm_quant_get(c->q);
    const fm_quant_row row = {c->codes, c->scales, c->biases, c->group, c->scale_format};
    t->encode_ref(c->x, c->n_cols, c->group, c->scale_format, c->codes, c->scales, c->biases);
    t->decode_ref(&row, c->n_cols, c->y);
}

/* Reads code j one bit at a time, straight from the definition. */
static unsigned code_by_bits(const uint8_t *codes, int j, int bits)
{
    unsigned v = 0;
    for (int b = 0; b < bits; b++) {
        const int bit = j * bits + b;
        v |= (unsigned)(codes[bit / 8] >> bit % 8 & 1) << b;
    }
    return v;
}

static void check_affine(affine_case *c)
{
    for (int j = 0; j < c->n_cols; j++) {
        const int g = j / c->group;
        const float scale = fm_plain_load(c->scale_format, c->scales, g);
        const float bias = fm_plain_load(c->scale_format, c->biases, g);
        const unsigned code = code_by_bits(c->codes, j, c->bits);
        CHECK_INT(fm_affine_code(c->codes, j, c->bits), code);
        const float product = scale * (float)code;
        CHECK(c->y[j] == product + bias);
        /* No other code is nearer; the edge may have moved the far end by a step and rounding. */
        const double error = fabs((double)c->y[j] - c->x[j]), slack = 1e-6 * fabs((double)bias);
        double best = INFINITY;
        for (int k = 0; k < 1 << c->bits; k++)
            best = fmin(best, fabs((double)scale * k + bias - c->x[j]));
        CHECK(error <= best * (1 + 1e-6) + slack + 1e-6);
        CHECK(error <= fabs((double)scale) * (1.6 + 0x1p-7 * (1 << c->bits)));
    }
}

static void affine_round_trip(void)
{
    uint64_t seed = 5;
    affine_case c;
    for (int q = 0; q < FM_QUANT_COUNT; q++) {
        if (!fm_quant_get((fm_quant)q)->affine)
            continue;
        for (int f = 0; f < FM_COUNT(plain_formats); f++)
            for (int g = 0; g < FM_COUNT(groups); g++)
                for (int n_groups = 1; n_groups <= 4; n_groups++) {
                    case_open(&c, (fm_quant)q, plain_formats[f], groups[g], n_groups);
                    const float offset = (float)(n_groups - 2) * 0.5f;
                    for (int i = 0; i < c.n_cols; i++)
                        c.x[i] = random_normal(&seed) + offset;
                    case_run(&c);
                    check_affine(&c);
                    free(c.memory);
                }
    }
}

/* Zero groups decode to exact zero, constant ones to their value, one-sided keep their edge. */
static void affine_special_groups(void)
{
    affine_case c;
    for (int q = 0; q < FM_QUANT_COUNT; q++) {
        if (!fm_quant_get((fm_quant)q)->affine)
            continue;
        for (int f = 0; f < FM_COUNT(plain_formats); f++) {
            case_open(&c, (fm_quant)q, plain_formats[f], 32, 5);
            for (int i = 0; i < c.n_cols; i++)
                c.x[i] = i < 32    ? 0.0f
                         : i < 64  ? 0.25f
                         : i < 96  ? -0.25f
                         : i < 128 ? (i % 2 == 0 ? 0.0f : -3.0f)
                                   : (i % 2 == 0 ? 1e-30f : -1e-30f);
            case_run(&c);
            for (int i = 0; i < c.n_cols; i++)
                if (i < 96 || (i < 128 && i % 2 != 0))
                    CHECK(c.y[i] == c.x[i]);
                else if (i < 128)
                    CHECK(fabsf(c.y[i]) <= 3 * 0x1p-8f);
                else
                    CHECK(fabsf(c.y[i]) < 1e-6f);
            free(c.memory);
        }
    }
}

/* Scales from a hostile file: no trap, no undefined behaviour; NaN and infinity stay such. */
static void affine_bad_scales(void)
{
    const float bad[] = {NAN, INFINITY, -INFINITY, 1e30f, -0.0f};
    affine_case c;
    for (int i = 0; i < FM_COUNT(bad); i++) {
        case_open(&c, FM_QUANT_AFFINE5, FM_QUANT_BF16, 16, 1);
        memset(c.codes, 0xff, (size_t)fm_quant_codes_bytes(c.q, c.n_cols));
        fm_plain_store(c.scale_format, c.scales, 0, bad[i]);
        fm_plain_store(c.scale_format, c.biases, 0, 0.0f);
        const fm_quant_row row = {c.codes, c.scales, c.biases, c.group, c.scale_format};
        fm_quant_get(c.q)->decode_ref(&row, c.n_cols, c.y);
        CHECK(isfinite(bad[i]) == isfinite(c.y[0]));
        free(c.memory);
    }
    case_open(&c, FM_QUANT_AFFINE8, FM_QUANT_F16, 16, 1); /* beyond the range of f16 */
    for (int j = 0; j < c.n_cols; j++)
        c.x[j] = j % 2 == 0 ? 3e38f : -3e38f;
    case_run(&c);
    for (int j = 0; j < c.n_cols; j++)
        CHECK(isfinite(c.y[j]));
    c.x[3] = NAN;
    case_run(&c);
    free(c.memory);
}

/* What MLX itself makes of a group: mx.quantize(x, group_size=32, bits=b), mlx 0.32.4 on CPU, f32,
 * x[i] = ((37 i) mod 64 - 29) / 16. */
static const struct {
    fm_quant q;
    float scale, bias;
    const char *codes;
} mlx_golden[] = {
    {FM_QUANT_AFFINE2, -0x1.1p+0f, 0x1.1p+1f, "7be39d7827de7827"},
    {FM_QUANT_AFFINE3, -0x1.1p-1f, 0x1.1p+1f, "9fd5f0b30a5e0e31abe16715"},
    {FM_QUANT_AFFINE4, -0x1.1p-2f, 0x1.1p+1f, "6f4c1ae8c593715d2b09d6a4826e3c1a"},
    {FM_QUANT_AFFINE5, -0x1p-3f, 0x1.1p+1f, "bf696407f42c1b2a1e57b848e036b2247aa60f15"},
    {FM_QUANT_AFFINE6, -0x1p-4f, 0x1.1p+1f, "bf5643ab11f297dca0839753af52029b1db187d863b39312"},
    {FM_QUANT_AFFINE8, -0x1.f89468p-7f, 0x1.1p+1f,
     "ff6ad741af1886f45dcb35a20c7ae751bf2996006edb45b31c8af861cf39a610"},
};

static void affine_same_as_mlx(void)
{
    affine_case c;
    for (int k = 0; k < FM_COUNT(mlx_golden); k++) {
        case_open(&c, mlx_golden[k].q, FM_QUANT_F32, 32, 1);
        for (int i = 0; i < 32; i++)
            c.x[i] = (float)(i * 37 % 64 - 29) / 16;
        case_run(&c);
        CHECK(fm_plain_load(FM_QUANT_F32, c.scales, 0) == mlx_golden[k].scale);
        CHECK(fm_plain_load(FM_QUANT_F32, c.biases, 0) == mlx_golden[k].bias);
        char hex[65] = "";
        for (int i = 0; i < fm_quant_codes_bytes(c.q, 32); i++)
            snprintf(hex + (size_t)2 * i, 3, "%02x", c.codes[i]);
        CHECK(strcmp(hex, mlx_golden[k].codes) == 0);
        free(c.memory);
    }
}

/* Values worked out by hand from the formula: 4 bits, range [-0.75, 1.5]. */
static void affine_known_answer(void)
{
    affine_case c;
    case_open(&c, FM_QUANT_AFFINE4, FM_QUANT_F32, 16, 1);
    for (int j = 0; j < 16; j++)
        c.x[j] = 1.5f - 0.15f * (float)j;
    case_run(&c);
    CHECK(fabsf(fm_plain_load(FM_QUANT_F32, c.scales, 0) + 0.15f) < 1e-6f);
    CHECK(fm_plain_load(FM_QUANT_F32, c.biases, 0) == 1.5f);
    for (int j = 0; j < 16; j++)
        CHECK_INT(fm_affine_code(c.codes, j, 4), j);
    CHECK_INT(c.codes[0], 0x10); /* code 0 in the low nibble */
    CHECK_INT(c.codes[7], 0xfe);
    free(c.memory);
}

int main(void)
{
    RUN(halves_exhaustive);
    RUN(halves_round_to_even);
    RUN(table_and_search);
    RUN(checks);
    RUN(plain_round_trip);
    RUN(affine_round_trip);
    RUN(affine_special_groups);
    RUN(affine_bad_scales);
    RUN(affine_same_as_mlx);
    RUN(affine_known_answer);
    TEST_EXIT();
}
