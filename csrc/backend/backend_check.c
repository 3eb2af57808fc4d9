/* Cases are made once as a list; a case's function lays out its inputs in device memory and makes one call. It is run
 * to measure the memory, to fill it and compare, and, if timed, again and again on the device alone. */
#include "backend/backend_check.h"

#include <stdio.h>
#include <string.h>

#include "backend/backend_compare.h"
#include "backend/check_list.h"
#include "base/clock.h"
#include "base/mem.h"

struct fm_check {
    fm_backend *both;
    fm_pool *pool;
    bool small;
    fm_case cases[FM_CHECK_MAX_CASES];
    int n_cases;
};

fm_status fm_check_open(const char *backend, fm_pool *pool, bool small, fm_check **out)
{
    *out = NULL;
    const fm_backend_opts device = {backend, pool, FM_NUMERIC_EXACT}, cpu = {NULL, pool, FM_NUMERIC_EXACT};
    fm_backend *d = NULL, *j = NULL, *both = NULL;
    void *p = NULL;
    fm_status s = fm_backend_open(&device, &d);
    if (s == FM_OK)
        s = fm_backend_open(&cpu, &j);
    if (s == FM_OK && strcmp(d->v->name, j->v->name) == 0)
        s = fm_fail(FM_ERR_ARG, "backend '%s' judges the others: there is nothing to check it by", j->v->name);
    if (s == FM_OK)
        s = fm_backend_compare_open(d, j, pool, &both);
    if (s != FM_OK) {
        fm_backend_close(d);
        fm_backend_close(j);
        return s;
    }
    s = fm_alloc(sizeof(fm_check), &p);
    if (s != FM_OK) {
        fm_backend_close(both);
        return s;
    }
    fm_check *c = p;
    c->both = both;
    c->pool = pool;
    c->small = small;
    c->n_cases = fm_check_list(c->cases, small);
    *out = c;
    return FM_OK;
}

void fm_check_close(fm_check *c)
{
    if (!c)
        return;
    fm_backend_close(c->both);
    fm_free(c);
}

fm_caps fm_check_caps(const fm_check *c) { return c->both->v->caps(c->both); }

int fm_check_n_cases(const fm_check *c) { return c->n_cases; }

/* ---- inputs ------------------------------------------------------------------------------------------ */

static uint64_t next(fm_maker *m) /* splitmix64 */
{
    uint64_t z = m->seed += UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    return z ^ z >> 31;
}

void *fm_make_bytes(fm_maker *m, int64_t bytes)
{
    enum { ALIGN = 256 };
    uint8_t *p = m->base ? m->base + m->used : NULL;
    m->used += fm_round_up((size_t)bytes, ALIGN);
    return p;
}

float *fm_make_floats(fm_maker *m, int64_t n, float low, float high)
{
    float *p = fm_make_bytes(m, n * (int64_t)sizeof(float));
    for (int64_t i = 0; p && m->fill && i < n; i++)
        p[i] = low + (high - low) * (float)((double)(next(m) >> 40) * 0x1p-24);
    return p;
}

/* One area of numbers in a plain format, between low and high. */
static void fill_numbers(fm_maker *m, fm_quant format, uint8_t *to, int64_t n, float low, float high)
{
    const int64_t bytes = fm_quant_get(format)->bits / 8;
    for (int64_t i = 0; i < n; i++) {
        const float v = low + (high - low) * (float)((double)(next(m) >> 40) * 0x1p-24);
        fm_quant_get(format)->encode_ref(&v, 1, 0, FM_QUANT_F32, to + i * bytes, NULL, NULL);
    }
}

static uint8_t *area(fm_maker *m, int64_t bytes, int odd)
{
    uint8_t *p = fm_make_bytes(m, bytes + odd);
    return p ? p + odd : NULL;
}

/* Codes are random bits: every value of a code occurs. Scales lie around 2^-5, biases take the middle away. */
fm_mat fm_make_mat(fm_maker *m, const fm_case *k, int64_t n_rows, int64_t n_cols)
{
    const fm_quant_traits *t = fm_quant_get(k->format);
    const int64_t cb = n_rows * fm_quant_codes_bytes(k->format, n_cols);
    const int64_t sb = t->affine ? n_rows * fm_quant_scales_bytes(k->format, n_cols, k->group, k->scale_format) : 0;
    uint8_t *codes = area(m, cb, k->odd), *scales = NULL, *biases = NULL;
    m->bytes_moved += cb + 2 * sb;
    if (t->affine) {
        scales = area(m, sb, k->odd);
        biases = area(m, sb, k->odd);
    }
    if (m->base && m->fill && t->affine) {
        const int64_t n = n_rows * n_cols / k->group;
        const float middle = 0.5f * (float)(1 << t->bits) / 32;
        for (int64_t i = 0; i < cb; i += 8) {
            const uint64_t bits = next(m);
            memcpy(codes + i, &bits, (size_t)(cb - i < 8 ? cb - i : 8));
        }
        fill_numbers(m, k->scale_format, scales, n, 0.5f / 32, 1.0f / 32);
        fill_numbers(m, k->scale_format, biases, n, -1.2f * middle, -0.2f * middle);
    } else if (m->base && m->fill)
        fill_numbers(m, k->format, codes, n_rows * n_cols, -1, 1);
    return fm_mat_make(k->format, t->affine ? k->group : 0, t->affine ? k->scale_format : FM_QUANT_F32, n_rows, n_cols,
                       codes, scales, biases);
}

/* ---- running ------------------------------------------------------------------------------------------- */

enum { MIN_NS = 20000000, MAX_REPS = 256, BEST_OF = 3 };

/* Seconds of one call on the device alone, the best of three runs of at least 20 ms. */
static fm_status time_case(fm_check *c, const fm_case *k, fm_maker *m, double *seconds)
{
    fm_backend *dev = fm_backend_compare_device(c->both);
    int64_t best = INT64_MAX, reps = 1;
    for (int run = 0; run < BEST_OF;) {
        const int64_t t0 = fm_clock_ns();
        for (m->rep = 0; m->rep < reps; m->rep++) {
            m->used = 0;
            m->bytes_moved = 0;
            FM_TRY(k->call(m, k, dev));
        }
        FM_TRY(dev->v->sync(dev));
        const int64_t ns = fm_clock_ns() - t0;
        if (ns < MIN_NS && reps < MAX_REPS && !c->small) {
            reps *= 2;
            continue;
        }
        best = ns / reps < best ? ns / reps : best;
        run++;
    }
    *seconds = (double)(best > 0 ? best : 1) * 1e-9;
    return FM_OK;
}

static fm_status run_case(fm_check *c, const fm_case *k, fm_maker *m, fm_check_result *r)
{
    m->fill = true;
    m->used = 0;
    FM_TRY(c->both->v->begin(c->both));
    const fm_status s = k->call(m, k, c->both);
    r->worst = fm_backend_compare_worst(c->both);
    FM_TRY(s);
    FM_TRY(c->both->v->sync(c->both));
    if (k->copies == 0)
        return FM_OK;
    double seconds;
    m->fill = false;
    FM_TRY(time_case(c, k, m, &seconds));
    r->us = seconds * 1e6;
    r->gb_per_s = (double)m->bytes_moved / seconds * 1e-9;
    return FM_OK;
}

fm_status fm_check_run(fm_check *c, int i, fm_check_result *out)
{
    if (i < 0 || i >= c->n_cases)
        return fm_fail(FM_ERR_ARG, "case %d: there are %d", i, c->n_cases);
    const fm_case *k = &c->cases[i];
    fm_maker m = {.seed = (uint64_t)i};
    void *p;
    memset(out, 0, sizeof *out);
    out->op = k->op;
    memcpy(out->sizes, k->sizes, sizeof out->sizes);
    FM_TRY(k->call(&m, k, NULL)); /* measures */
    const size_t bytes = m.used;
    FM_TRY(c->both->v->alloc(c->both, bytes, FM_USAGE_SCRATCH, &p));
    m.base = p;
    out->status = run_case(c, k, &m, out);
    if (out->status != FM_OK)
        snprintf(out->message, sizeof out->message, "%s", fm_last_error()->message);
    c->both->v->free(c->both, p, bytes, FM_USAGE_SCRATCH);
    return FM_OK;
}
