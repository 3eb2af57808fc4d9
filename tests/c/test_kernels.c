/* Every CPU variant and numeric mode against float64: matrix products of all formats at edge sizes, odd addresses,
 * gathered rows, and the rule that a row's result depends neither on n nor on the other rows. */
#include "kernels_fixture.h"

/* Bound of kernels.h for one output element, from the decoded weights and the x that was read. */
static double bound(const double *w, const float *x, int64_t n, bool fast, double *exact)
{
    double sum = 0, s = 0, quant = 0;
    for (int64_t c = 0; c < n; c += 64) {
        double top = 0, weights = 0;
        for (int64_t i = c; i < n && i < c + 64; i++) {
            sum += w[i] * x[i];
            s += fabs(w[i] * x[i]);
            top = fmax(top, fabs(x[i]));
            weights += fabs(w[i]);
        }
        quant += top / 16256 / 2 * weights;
    }
    *exact = sum;
    const double u = ldexp(1, -24);
    return fast ? quant * 1.001 + ldexp(s + quant, -18) + 1e-30 : ((double)n / 128 + 8) * u * s + 1e-37;
}

typedef struct product {
    test_mat W;
    float *x, *y;
    int32_t *rows;
    void *prepared;
    fm_act act;
    int64_t n, n_x, ldy;
} product;

static product product_make(const fm_kernels *k, test_mat W, int64_t n, bool gather, uint64_t *s)
{
    const int64_t cols = W.m.n_cols, n_x = gather ? n + 3 : n, ldx = cols + (gather ? 5 : 0);
    product p = {.W = W, .n = n, .n_x = n_x, .ldy = W.m.n_rows + 3};
    p.x = test_rows(n_x, cols, ldx, s);
    p.y = malloc((size_t)(n * p.ldy) * sizeof *p.y);
    for (int64_t i = 0; i < n * p.ldy; i++)
        p.y[i] = -777;
    if (gather) {
        p.rows = malloc((size_t)n * sizeof *p.rows);
        for (int64_t i = 0; i < n; i++)
            p.rows[i] = (int32_t)(test_rand(s) % (uint64_t)n_x);
    }
    const size_t bytes = k->act_bytes(n_x, cols);
    void *mem = NULL;
    if (posix_memalign(&mem, 64, bytes + 64) != 0)
        abort();
    memset(mem, 0xff, bytes + 64);
    p.prepared = mem;
    p.act = (fm_act){.x = p.x, .ldx = ldx, .n_cols = cols, .rows = p.rows, .prepared = mem};
    k->act_prepare(&p.act, n_x, 0, n_x / 2);
    k->act_prepare(&p.act, n_x, n_x / 2, n_x);
    return p;
}

static void product_free(product *p)
{
    free(p->x);
    free(p->y);
    free(p->rows);
    free(p->prepared);
}

static void product_check(const fm_kernels *k, product *p, int64_t r0, int64_t r1, bool fast, const double *w)
{
    const fm_mat *W = &p->W.m;
    k->matmul[W->format](W, &p->act, p->n, p->y, p->ldy, r0, r1);
    int bad = 0;
    for (int64_t i = 0; i < p->n; i++)
        for (int64_t r = 0; r < p->ldy; r++) {
            const float got = p->y[i * p->ldy + r];
            if (r < r0 || r >= r1) {
                bad += got != -777;
                continue;
            }
            double exact;
            const float *x = p->x + (p->rows ? p->rows[i] : i) * p->act.ldx;
            const double limit = bound(w + r * W->n_cols, x, W->n_cols, fast, &exact);
            if (!(fabs(got - exact) <= limit) && bad++ < 3)
                fprintf(stderr, "%s %s g%d %" PRId64 "x%" PRId64 " n %" PRId64 " row %" PRId64 " out %" PRId64
                                ": %.9g, exact %.9g, bound %.3g\n",
                        k->name, fm_quant_get(W->format)->name, W->group, W->n_rows, W->n_cols, p->n, i, r, got,
                        exact, limit);
        }
    CHECK_INT(bad, 0);
}

static double *decode_all(const fm_mat *W)
{
    double *w = malloc((size_t)(W->n_rows * W->n_cols) * sizeof *w);
    float *row = malloc((size_t)W->n_cols * sizeof *row);
    fm_kernels ref;
    fm_kernels_variant("ref", &ref);
    for (int64_t r = 0; r < W->n_rows; r++) {
        ref.decode_row[W->format](W, r, row);
        for (int64_t c = 0; c < W->n_cols; c++)
            w[r * W->n_cols + c] = row[c];
    }
    free(row);
    return w;
}

static void check_shape(const fm_kernels *k, bool fast, fm_quant q, int64_t rows, int64_t cols, int32_t group,
                        fm_quant scale, int64_t n, bool gather, uint64_t *s)
{
    test_mat W = test_mat_make(q, rows, cols, group, scale, (int)(test_rand(s) % 4), s);
    double *w = decode_all(&W.m);
    product p = product_make(k, W, n, gather, s);
    const int64_t r0 = rows > 2 ? (int64_t)(test_rand(s) % 2) : 0;
    product_check(k, &p, r0, rows > 40 ? rows - 1 : rows, fast, w);

    float *row = malloc((size_t)cols * sizeof *row);
    for (int64_t r = 0; r < rows; r++) {
        k->decode_row[q](&W.m, r, row);
        int bad = 0;
        for (int64_t c = 0; c < cols; c++)
            bad += scale == FM_QUANT_F32 && group != 0 ? !(fabs(row[c] - w[r * cols + c]) < 1e-6)
                                                       : (double)row[c] != w[r * cols + c];
        CHECK_INT(bad, 0);
    }
    free(row);
    product_free(&p);
    free(w);
    free(W.memory);
}

static const int64_t edges[] = {1, 2, 3, 5, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127};

static void plain_formats(const fm_kernels *k, bool fast)
{
    (void)fast;
    uint64_t s = 1;
    const fm_quant plain[] = {FM_QUANT_F32, FM_QUANT_F16, FM_QUANT_BF16};
    for (int f = 0; f < 3; f++) {
        for (int i = 0; i < FM_COUNT(edges); i++)
            check_shape(k, false, plain[f], 1 + i * 3, edges[i], 0, FM_QUANT_F32, 1 + i % 7, i % 2, &s);
        check_shape(k, false, plain[f], 5, 1023, 0, FM_QUANT_F32, 2, false, &s);
        check_shape(k, false, plain[f], 9, 520, 0, FM_QUANT_F32, 67, true, &s);
    }
}

static void affine_formats(const fm_kernels *k, bool fast)
{
    uint64_t s = 2;
    const int32_t groups[] = {16, 32, 64, 128};
    const fm_quant scales[] = {FM_QUANT_BF16, FM_QUANT_F32, FM_QUANT_F16};
    for (int q = 0; q < FM_QUANT_COUNT; q++) {
        if (!fm_quant_get((fm_quant)q)->affine)
            continue;
        for (int g = 0; g < 4; g++) {
            for (int i = 0; i < FM_COUNT(edges); i++)
                check_shape(k, fast, (fm_quant)q, edges[i], groups[g] * (1 + i % 5), groups[g], scales[i % 3],
                            1 + (i * 5 + g) % 9, i % 2, &s);
            check_shape(k, fast, (fm_quant)q, 3, 1024 + groups[g], groups[g], scales[g % 3], 1, false, &s);
            check_shape(k, fast, (fm_quant)q, 33, 512 + 3 * groups[g], groups[g], scales[g % 3], 19, true, &s);
        }
        check_shape(k, fast, (fm_quant)q, 70, 64, 64, FM_QUANT_BF16, 127, false, &s);
        check_shape(k, fast, (fm_quant)q, 16, 2048, 64, FM_QUANT_BF16, 1, false, &s);
        /* around the panels of the tiled paths: pieces of one block, a second pass over columns, many rows of x */
        check_shape(k, fast, (fm_quant)q, 70, 64, 64, FM_QUANT_BF16, 5, false, &s);
        check_shape(k, fast, (fm_quant)q, 49, 576, 64, FM_QUANT_BF16, 17, true, &s);
        check_shape(k, fast, (fm_quant)q, 35, 4096 + 64, 32, FM_QUANT_F16, 4, false, &s);
        check_shape(k, fast, (fm_quant)q, 18, 64, 16, FM_QUANT_BF16, 277, false, &s);
    }
}

/* Row i of n rows = the same row alone, bit for bit; and a range of outputs = the same outputs in a larger range. */
static void rows_are_independent(const fm_kernels *k, bool fast)
{
    (void)fast;
    uint64_t s = 3;
    for (int q = 0; q < FM_QUANT_COUNT; q++) {
        const bool affine = fm_quant_get((fm_quant)q)->affine;
        for (int32_t group = 32; group <= 64; group *= 2) {
            const int64_t rows = 71, cols = 1024 + 3 * group, n = 43;
            test_mat W = test_mat_make((fm_quant)q, rows, cols, affine ? group : 0, FM_QUANT_BF16, 1, &s);
            product p = product_make(k, W, n, false, &s);
            k->matmul[q](&W.m, &p.act, n, p.y, p.ldy, 0, rows);
            float *y = malloc((size_t)(n * rows) * sizeof *y);
            for (int64_t nb = 1; nb <= 9; nb += nb < 4 ? 1 : 5) /* 1, 2, 3, 4, 9 rows at a time */
                for (int64_t i = 0; i + nb <= n || i == 0; i += nb) {
                    int32_t ids[9];
                    for (int64_t j = 0; j < nb; j++)
                        ids[j] = (int32_t)(i + j < n ? i + j : 0);
                    fm_act a = p.act;
                    a.rows = nb == 3 ? NULL : ids; /* by id, or a run of rows */
                    a.row0 = i;
                    const int64_t at = i % 3;
                    k->matmul[q](&W.m, &a, nb, y, rows, at, rows - i % 17);
                    int bad = 0;
                    for (int64_t j = 0; j < nb; j++)
                        bad += memcmp(y + j * rows + at, p.y + ids[j] * p.ldy + at,
                                      (size_t)(rows - i % 17 - at) * sizeof *y) != 0;
                    CHECK_INT(bad, 0);
                }
            free(y);
            product_free(&p);
            free(W.memory);
        }
    }
}

static void odd_numbers(const fm_kernels *k, bool fast)
{
    (void)fast;
    uint64_t s = 4;
    for (int q = 0; q < FM_QUANT_COUNT; q++) {
        const bool affine = fm_quant_get((fm_quant)q)->affine;
        test_mat W = test_mat_make((fm_quant)q, 17, 256, affine ? 64 : 0, FM_QUANT_BF16, 1, &s);
        for (int64_t n = 1; n <= 8; n += 7) {
            product p = product_make(k, W, n, false, &s);
            const float odd[] = {NAN, INFINITY, -INFINITY};
            for (int j = 0; j < 3; j++) { /* one bad element spoils its row, and only that */
                p.x[(n - 1) * p.act.ldx + 77] = odd[j];
                k->act_prepare(&p.act, n, 0, n);
                k->matmul[q](&W.m, &p.act, n, p.y, p.ldy, 0, 17);
                int spoilt = 0, other = 0;
                for (int64_t r = 0; r < 17; r++) {
                    spoilt += !isfinite(p.y[(n - 1) * p.ldy + r]);
                    other += n > 1 && !isfinite(p.y[r]);
                }
                CHECK(spoilt >= 16); /* a weight that is 0 times inf is NaN too; 0 codes with 0 bias may hide in ref */
                CHECK_INT(other, 0);
            }
            for (int64_t c = 0; c < 256; c++) /* zeros, denormals and the smallest normals: tiny, and finite */
                for (int64_t i = 0; i < n; i++)
                    p.x[i * p.act.ldx + c] = c < 64 ? 0 : c < 128 ? 1e-42f : c < 192 ? -0.0f : 2e-38f;
            k->act_prepare(&p.act, n, 0, n);
            k->matmul[q](&W.m, &p.act, n, p.y, p.ldy, 0, 17);
            int bad = 0;
            for (int64_t r = 0; r < 17; r++)
                bad += !(fabsf(p.y[(n - 1) * p.ldy + r]) < 1e-30f);
            CHECK_INT(bad, 0);
            product_free(&p);
        }
        free(W.memory);
    }
}

static void plain_all(void) { test_variants(plain_formats); }
static void affine_all(void) { test_variants(affine_formats); }
static void independence_all(void) { test_variants(rows_are_independent); }
static void odd_all(void) { test_variants(odd_numbers); }

int main(int argc, char **argv)
{
    test_n_names = argc - 1;
    test_names = argv + 1;
    RUN(plain_all);
    RUN(affine_all);
    RUN(independence_all);
    RUN(odd_all);
    TEST_EXIT();
}
