/* Sums of magnitudes. A kernel may take scale and bias of a quantised group out of its sum and then adds up
 * scale * code * x and bias * x, each at most (|w| + |bias|) * |x|: so a weight counts as |w| + 2 |bias|. */
#include "backend/compare_bound.h"

#include <math.h>

#include "base/mem.h"

static const double u = 0x1p-24;

/* One side's bound of a product with f32 accumulation, as a share of the magnitudes (cpu/kernels.h). */
static double product_share(int64_t n_cols) { return ((double)n_cols / 128 + 8) * u; }

/* size[c] = |W[r,c]| + 2 |bias of c's group|; W gets the row itself. Both hold n_cols floats. */
static void row_sizes(const fm_kernels *k, const fm_mat *W, int64_t r, float *w, float *size)
{
    const bool affine = fm_quant_get(W->format)->affine;
    if (affine) {
        const fm_quant_row biases = {.codes = W->biases + r * W->scales_stride};
        fm_quant_get(W->scale_format)->decode_ref(&biases, W->n_cols / W->group, w);
    }
    for (int64_t c = 0; c < W->n_cols; c++)
        size[c] = affine ? 2 * fabsf(w[c / W->group]) : 0;
    k->decode_row[W->format](W, r, w);
    for (int64_t c = 0; c < W->n_cols; c++)
        size[c] += fabsf(w[c]);
}

static fm_status open_rows(int n, int64_t n_cols, float **out)
{
    void *p;
    FM_TRY(fm_alloc((size_t)(2 * n * n_cols) * sizeof(float), &p));
    *out = p;
    return FM_OK;
}

fm_status fm_bound_row(const fm_mat *W, int64_t r, float *bound)
{
    const fm_kernels *k;
    float *w;
    FM_TRY(fm_kernels_get(&k));
    FM_TRY(open_rows(1, W->n_cols, &w));
    row_sizes(k, W, r, w, bound);
    for (int64_t c = 0; c < W->n_cols; c++)
        bound[c] *= (float)(4 * u); /* one rounding, or with f32 scales two, on either side */
    fm_free(w);
    return FM_OK;
}

enum { ROWS_PER_TASK = 16 };

typedef struct product_ctx {
    const fm_kernels *k;
    const fm_mat *W;
    const float *x;
    const int32_t *rows;
    int64_t ldx, n;
    float *bound, *scratch;
} product_ctx;

static void product_task(void *p, int64_t task, int worker)
{
    const product_ctx *a = p;
    const int64_t n_cols = a->W->n_cols, r0 = task * ROWS_PER_TASK;
    const int64_t r1 = r0 + ROWS_PER_TASK < a->W->n_rows ? r0 + ROWS_PER_TASK : a->W->n_rows;
    float *w = a->scratch + 2 * worker * n_cols, *size = w + n_cols;
    for (int64_t r = r0; r < r1; r++) {
        row_sizes(a->k, a->W, r, w, size);
        for (int64_t i = 0; i < a->n; i++) {
            const float *x = a->x + (a->rows ? a->rows[i] : i) * a->ldx;
            float *to = &a->bound[i * a->W->n_rows + r];
            double sum = *to;
            for (int64_t c = 0; c < n_cols; c++)
                sum += (double)(size[c] * fabsf(x[c]));
            *to = (float)(2 * product_share(n_cols) * sum);
        }
    }
}

fm_status fm_bound_matmul(fm_pool *pool, const fm_mat *W, const float *x, int64_t ldx, const int32_t *rows, int64_t n,
                          float *bound)
{
    product_ctx a = {.W = W, .x = x, .rows = rows, .ldx = ldx, .n = n, .bound = bound};
    FM_TRY(fm_kernels_get(&a.k));
    FM_TRY(open_rows(fm_pool_threads(pool), W->n_cols, &a.scratch));
    fm_parallel_for(pool, (W->n_rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK, product_task, &a);
    fm_free(a.scratch);
    return FM_OK;
}

/* ---- experts ---------------------------------------------------------------------------------------- */

typedef struct hidden_ctx {
    const fm_kernels *k;
    const fm_expert_job *job;
    const float *x;
    float *error, *scratch; /* error [n, width] */
} hidden_ctx;

static double silu(double x) { return x >= 0 ? x / (1 + exp(-x)) : x * exp(x) / (1 + exp(x)); }

/* error[i][r]: what one side's h = silu(gate) * up may be off, in units that the product with W_down multiplies by its
 * own share: its input's error and its own rounding come to  sum_r |W_down| * (share * |h| + error of h). */
static void hidden_task(void *p, int64_t r, int worker)
{
    const hidden_ctx *a = p;
    const fm_mat *gate = &a->job->gate, *up = &a->job->up;
    const int64_t H = gate->n_cols, width = gate->n_rows;
    float *w = a->scratch + 4 * worker * H, *g_size = w + H, *v = w + 2 * H, *u_size = w + 3 * H;
    row_sizes(a->k, gate, r, w, g_size);
    row_sizes(a->k, up, r, v, u_size);
    const double share = product_share(H);
    for (int64_t i = 0; i < a->job->n; i++) {
        const float *x = a->x + a->job->rows[i] * H;
        double g = 0, y = 0, dg = 0, dy = 0;
        for (int64_t c = 0; c < H; c++) {
            g += (double)w[c] * x[c];
            y += (double)v[c] * x[c];
            dg += (double)(g_size[c] * fabsf(x[c]));
            dy += (double)(u_size[c] * fabsf(x[c]));
        }
        dg *= 1.1 * share; /* silu's slope is at most 1.1 */
        dy *= share;
        const double h = fabs(silu(g) * y);
        a->error[i * width + r] =
            (float)((product_share(width) + 16 * u) * h + dg * (fabs(y) + dy) + fabs(silu(g)) * dy);
    }
}

typedef struct down_ctx {
    const fm_kernels *k;
    const fm_expert_job *job;
    const float *error;
    float *bound, *scratch;
} down_ctx;

static void down_task(void *p, int64_t r, int worker)
{
    const down_ctx *a = p;
    const fm_mat *down = &a->job->down;
    const int64_t width = down->n_cols;
    float *w = a->scratch + 2 * worker * width, *size = w + width;
    row_sizes(a->k, down, r, w, size);
    for (int64_t i = 0; i < a->job->n; i++) {
        double sum = 0;
        for (int64_t c = 0; c < width; c++)
            sum += (double)(size[c] * a->error[i * width + c]);
        a->bound[(a->job->out0 + i) * down->n_rows + r] = (float)(2 * sum);
    }
}

fm_status fm_bound_expert(fm_pool *pool, const fm_expert_job *job, const float *x, float *bound)
{
    const int64_t H = job->gate.n_cols, width = job->gate.n_rows;
    const int n = fm_pool_threads(pool);
    const fm_kernels *k;
    void *error;
    float *scratch;
    FM_TRY(fm_kernels_get(&k));
    FM_TRY(fm_alloc((size_t)(job->n * width) * sizeof(float), &error));
    const fm_status s = open_rows(2 * n, H > width ? H : width, &scratch);
    if (s == FM_OK) {
        hidden_ctx h = {k, job, x, error, scratch};
        fm_parallel_for(pool, width, hidden_task, &h);
        down_ctx d = {k, job, error, bound, scratch};
        fm_parallel_for(pool, job->down.n_rows, down_task, &d);
        fm_free(scratch);
    }
    fm_free(error);
    return s;
}
