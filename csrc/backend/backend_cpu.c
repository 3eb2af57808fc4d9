/* Owns: the backend vtable over cpu/kernels and base/threads. Every op runs at once and returns when done.
 * Splits work into row ranges or heads; which thread does which never changes a result. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "backend/backend_impl.h"
#include "base/mem.h"

typedef struct cpu_backend {
    fm_backend base;
    const fm_kernels *k, *exact; /* of the chosen numeric mode; of mode exact */
    fm_pool *pool;
    void *act; /* grows to the largest input seen; sized by the planning pass, see reserve() */
    size_t act_bytes;
    float *temp;
    size_t temp_bytes;
} cpu_backend;

enum {
    TASK_BYTES = 320 << 10, /* of rows per task: coarse enough to hand out, fine enough to share */
    WALK_BYTES = 640 << 10, /* of weights that a thread walks at a time: each start costs it some microseconds */
};

static fm_status reserve(void **p, size_t *have, size_t want)
{
    if (want <= *have)
        return FM_OK;
    void *bigger;
    FM_TRY(fm_alloc(want, &bigger));
    fm_free(*p);
    *p = bigger;
    *have = want;
    return FM_OK;
}

static void cpu_close(fm_backend *b)
{
    cpu_backend *c = (cpu_backend *)b;
    fm_free(c->act);
    fm_free(c->temp);
    fm_free(c);
}

static fm_caps cpu_caps(const fm_backend *b)
{
    (void)b;
    const fm_caps caps = {.unified_memory = true, .any_memory = true, .kv_formats = 1u << FM_QUANT_F16 | 1u << FM_QUANT_BF16};
    return caps;
}

static fm_status cpu_alloc(fm_backend *b, size_t bytes, fm_usage usage, void **out)
{
    (void)b; /* not state: see fm_state_open */
    return fm_region_alloc(bytes, usage == FM_USAGE_WEIGHTS || usage == FM_USAGE_SLOTS, out);
}

static void cpu_free(fm_backend *b, void *p, size_t bytes, fm_usage usage)
{
    (void)b;
    (void)usage;
    fm_region_free(p, bytes);
}

static fm_status cpu_begin(fm_backend *b)
{
    (void)b;
    return FM_OK;
}

static void cpu_flush(fm_backend *b) { (void)b; }

static fm_status cpu_sync(fm_backend *b)
{
    (void)b;
    return FM_OK;
}

/* ---- embed, norms, element-wise ---------------------------------------------------------------- */

static fm_status cpu_embed(fm_backend *b, const fm_mat *W, const int32_t *ids, int64_t n, float *y, int64_t ldy)
{
    const cpu_backend *c = (const cpu_backend *)b;
    for (int64_t i = 0; i < n; i++)
        c->k->decode_row[W->format](W, ids[i], y + i * ldy);
    return FM_OK;
}

typedef struct norm_ctx {
    const fm_kernels *k;
    const float *x, *w;
    float *y, eps;
    int64_t ldx, ldy, n, n_cols, rows_per_task;
} norm_ctx;

static void norm_task(void *p, int64_t task, int worker)
{
    (void)worker;
    const norm_ctx *a = p;
    const int64_t r0 = task * a->rows_per_task, r1 = r0 + a->rows_per_task < a->n ? r0 + a->rows_per_task : a->n;
    for (int64_t r = r0; r < r1; r++)
        a->k->rmsnorm(a->x + r * a->ldx, a->w, a->eps, a->y + r * a->ldy, a->n_cols);
}

static int64_t rows_per_task(int64_t row_bytes)
{
    const int64_t rows = TASK_BYTES / (row_bytes > 0 ? row_bytes : 1);
    return rows < 1 ? 1 : rows;
}

static fm_status cpu_rmsnorm(fm_backend *b, const float *x, int64_t ldx, const float *w, float eps, float *y,
                             int64_t ldy, int64_t n, int64_t n_cols)
{
    const cpu_backend *c = (const cpu_backend *)b;
    norm_ctx a = {c->k, x, w, y, eps, ldx, ldy, n, n_cols, rows_per_task(n_cols * 4)};
    fm_parallel_for(c->pool, (n + a.rows_per_task - 1) / a.rows_per_task, norm_task, &a);
    return FM_OK;
}

static fm_status cpu_clip(fm_backend *b, float *x, int64_t n, float limit)
{
    (void)b;
    for (int64_t i = 0; i < n; i++)
        x[i] = fminf(fmaxf(x[i], -limit), limit);
    return FM_OK;
}

enum { ELEMENTS_PER_TASK = 16 << 10 };

typedef struct swiglu_ctx {
    const fm_kernels *k;
    const float *gate, *up;
    float *y;
    int64_t n;
} swiglu_ctx;

static void swiglu_task(void *p, int64_t task, int worker)
{
    (void)worker;
    const swiglu_ctx *a = p;
    const int64_t i0 = task * ELEMENTS_PER_TASK;
    const int64_t n = a->n - i0 < ELEMENTS_PER_TASK ? a->n - i0 : ELEMENTS_PER_TASK;
    a->k->swiglu(a->gate + i0, a->up + i0, a->y + i0, n);
}

static fm_status cpu_swiglu(fm_backend *b, const float *gate, const float *up, float *y, int64_t n)
{
    const cpu_backend *c = (const cpu_backend *)b;
    swiglu_ctx a = {c->k, gate, up, y, n};
    fm_parallel_for(c->pool, (n + ELEMENTS_PER_TASK - 1) / ELEMENTS_PER_TASK, swiglu_task, &a);
    return FM_OK;
}

static fm_status cpu_add_gated(fm_backend *b, const float *x, const float *gate, float *y, int64_t n, int64_t n_cols)
{
    const cpu_backend *c = (const cpu_backend *)b;
    for (int64_t r = 0; r < n; r++) {
        const float f = gate ? 1 / (1 + expf(-gate[r])) : 1;
        c->k->axpy(f, x + r * n_cols, y + r * n_cols, n_cols);
    }
    return FM_OK;
}

/* Exponent bits all ones <=> NaN or infinity; one more then carries into the sign bit. (Comparing vectors is left to
 * scalar code by gcc where these are wider than the processor's.) */
static bool has_nonfinite(const float *x, int64_t n)
{
    typedef uint32_t v4 __attribute__((vector_size(16)));
    const uint32_t ones = 0x7f800000u, one = 0x00800000u;
    v4 bad[4] = {{0}};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 4; j++) {
            v4 v;
            memcpy(&v, x + i + 4 * j, sizeof v);
            bad[j] |= (v & ones) + one;
        }
    uint32_t any = 0;
    for (int j = 0; j < 16; j++)
        any |= bad[j / 4][j % 4];
    for (; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        any |= (bits & ones) + one;
    }
    return any >> 31 != 0;
}

typedef struct finite_ctx {
    const float *x;
    int64_t n;
    atomic_bool bad;
} finite_ctx;

static void finite_task(void *p, int64_t task, int worker)
{
    (void)worker;
    finite_ctx *a = p;
    const int64_t i0 = task * ELEMENTS_PER_TASK, left = a->n - i0;
    if (has_nonfinite(a->x + i0, left < ELEMENTS_PER_TASK ? left : ELEMENTS_PER_TASK))
        atomic_store_explicit(&a->bad, true, memory_order_relaxed);
}

static fm_status cpu_find_nonfinite(fm_backend *b, const float *x, int64_t n, int64_t n_cols, int64_t *row)
{
    const cpu_backend *c = (const cpu_backend *)b;
    finite_ctx a = {x, n * n_cols, false};
    fm_parallel_for(c->pool, (a.n + ELEMENTS_PER_TASK - 1) / ELEMENTS_PER_TASK, finite_task, &a);
    *row = -1;
    for (int64_t r = 0; r < n && a.bad && *row < 0; r++)
        if (has_nonfinite(x + r * n_cols, n_cols))
            *row = r;
    return FM_OK;
}

/* ---- matmul ------------------------------------------------------------------------------------- */

typedef struct prepare_ctx {
    const fm_kernels *k;
    const fm_act *act;
    int64_t n, rows_per_task;
} prepare_ctx;

static void prepare_task(void *p, int64_t task, int worker)
{
    (void)worker;
    const prepare_ctx *a = p;
    const int64_t r0 = task * a->rows_per_task, r1 = r0 + a->rows_per_task < a->n ? r0 + a->rows_per_task : a->n;
    a->k->act_prepare(a->act, a->n, r0, r1);
}

static fm_status prepare(cpu_backend *c, fm_act *act, int64_t n)
{
    const size_t bytes = c->k->act_bytes(n, act->n_cols);
    if (bytes == 0)
        return FM_OK;
    FM_TRY(reserve(&c->act, &c->act_bytes, bytes));
    act->prepared = c->act;
    prepare_ctx a = {c->k, act, n, rows_per_task(act->n_cols * 4)};
    fm_parallel_for(c->pool, (n + a.rows_per_task - 1) / a.rows_per_task, prepare_task, &a);
    return FM_OK;
}

static int64_t mat_row_bytes(const fm_mat *W) { return W->codes_stride + 2 * W->scales_stride; }

enum {
    MANY_ROWS = 8, /* from here on a task's cost is arithmetic, and its set-up is per row of x */
    TILE_ROWS = 32, /* of W: what kernels work on at once */
};

/* How the rows of matrices are handed out: tasks of `rows`, up to `most` in a row. */
typedef struct row_tasks {
    int64_t rows, most;
} row_tasks;

/* Whole kernel tiles; of n_mats like W, whose rows each read row_bytes. Few rows of x: by bytes. Many: big tasks, but
 * never so few that threads idle. */
static row_tasks share_rows(const fm_mat *W, int64_t row_bytes, int64_t n_mats, int64_t n, int n_threads)
{
    if (n < MANY_ROWS) {
        const int64_t most = WALK_BYTES / (row_bytes * TILE_ROWS);
        const row_tasks few = {TILE_ROWS, most < 1 ? 1 : most};
        return few;
    }
    const int64_t fair = (n_mats * W->n_rows + 4 * n_threads - 1) / (4 * n_threads);
    int64_t rows = W->n_rows < fair ? W->n_rows : fair;
    rows = rows < TILE_ROWS ? TILE_ROWS : rows;
    const int64_t n_tasks = (W->n_rows + rows - 1) / rows; /* of equal size */
    const row_tasks many = {((W->n_rows + n_tasks - 1) / n_tasks + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS, 1};
    return many;
}

typedef struct matmul_ctx {
    const fm_kernels *k, *exact;
    const fm_act *act;
    const fm_matmul_item *items;
    const int64_t *first_task; /* [n_items + 1] */
    const int64_t *block;
    int n_items;
    int64_t n;
    float *temp; /* [n, widest adding item] for y += */
} matmul_ctx;

static void matmul_rows(const matmul_ctx *a, const fm_matmul_item *it, int64_t r0, int64_t r1)
{
    float *y = it->add ? a->temp : it->y;
    const int64_t ldy = it->add ? it->W->n_rows : it->ldy;
    const fm_kernels *k = it->exact ? a->exact : a->k;
    k->matmul[it->W->format](it->W, a->act, a->n, y, ldy, r0, r1);
    for (int64_t t = 0; t < a->n && (it->add || it->bias); t++)
        for (int64_t r = r0; r < r1; r++) {
            const float v = y[t * ldy + r] + (it->bias ? it->bias[r] : 0);
            it->y[t * it->ldy + r] = it->add ? it->y[t * it->ldy + r] + v : v;
        }
}

static void matmul_tasks(void *p, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const matmul_ctx *a = p;
    for (int i = 0; i < a->n_items && begin < end; i++) {
        if (begin >= a->first_task[i + 1])
            continue;
        const int64_t stop = end < a->first_task[i + 1] ? end : a->first_task[i + 1], n_rows = a->items[i].W->n_rows;
        const int64_t r1 = (stop - a->first_task[i]) * a->block[i];
        matmul_rows(a, &a->items[i], (begin - a->first_task[i]) * a->block[i], r1 < n_rows ? r1 : n_rows);
        begin = stop;
    }
}

enum { MAX_ITEMS = 16 };

static fm_status cpu_matmul(fm_backend *b, const float *x, int64_t ldx, int64_t n, const fm_matmul_item *items,
                            int n_items)
{
    cpu_backend *c = (cpu_backend *)b;
    if (n_items > MAX_ITEMS)
        return fm_fail(FM_ERR_ARG, "matmul: %d matrices in one call, at most %d", n_items, MAX_ITEMS);
    fm_act act = {.x = x, .ldx = ldx, .n_cols = items[0].W->n_cols};
    bool all_exact = true;
    for (int i = 0; i < n_items; i++)
        all_exact &= items[i].exact;
    if (!all_exact)
        FM_TRY(prepare(c, &act, n));
    int64_t first[MAX_ITEMS + 1] = {0}, block[MAX_ITEMS], most = INT64_MAX;
    for (int i = 0; i < n_items; i++) {
        const row_tasks r = share_rows(items[i].W, mat_row_bytes(items[i].W), 1, n, fm_pool_threads(c->pool));
        block[i] = r.rows;
        most = r.most < most ? r.most : most;
        first[i + 1] = first[i] + (items[i].W->n_rows + block[i] - 1) / block[i];
        if (items[i].add && n_items > 1)
            return fm_fail(FM_ERR_ARG, "matmul: an adding matrix must be alone in its call");
        if (items[i].add)
            FM_TRY(reserve((void **)&c->temp, &c->temp_bytes, (size_t)(n * items[i].W->n_rows) * sizeof(float)));
    }
    matmul_ctx a = {c->k, c->exact, &act, items, first, block, n_items, n, c->temp};
    fm_parallel_ranges(c->pool, first[n_items], most, matmul_tasks, &a);
    return FM_OK;
}

/* ---- attention and delta net --------------------------------------------------------------------- */

static void rope_row(const fm_kernels *k, const fm_rope_args *a, int64_t row, int64_t pos)
{
    enum { MAX_HALF = 4096 };
    float cs_cos[MAX_HALF], cs_sin[MAX_HALF];
    for (int64_t i = 0; i < a->rot / 2; i++) {
        const double angle = (double)pos * a->inv_freq[i];
        cs_cos[i] = (float)cos(angle);
        cs_sin[i] = (float)sin(angle);
    }
    for (int64_t h = 0; h < a->n_heads; h++)
        k->rope(a->x + row * a->ld + h * a->ld_head, cs_cos, cs_sin, a->rot);
}

static fm_status cpu_rope(fm_backend *b, const fm_rope_args *a)
{
    const cpu_backend *c = (const cpu_backend *)b;
    if (a->rot / 2 > 4096)
        return fm_fail(FM_ERR_UNSUPPORTED, "rope: rotary_dim %lld, at most 8192", (long long)a->rot);
    for (int s = 0; s < a->n_spans; s++)
        for (int64_t t = 0; t < a->spans[s].n; t++)
            rope_row(c->k, a, a->spans[s].row0 + t, a->spans[s].pos0 + t);
    return FM_OK;
}

typedef struct attend_ctx {
    const fm_kernels *k;
    const fm_attention_args *a;
    float *floats; /* each worker's scratch, or the parts */
    int64_t n_floats /* of a worker, or of a part of all KV heads */, rows_per_task;
    int span;
} attend_ctx;

static int64_t kv_bytes(const fm_attention_args *a, int span, int64_t n_pos)
{
    return n_pos * a->a.head_dim * fm_quant_get(a->kv[span].format)->bits / 8;
}

static fm_kv_head kv_head_at(const fm_attention_args *a, int span, int64_t g)
{
    const fm_kv *kv = &a->kv[span];
    const int64_t skip = kv_bytes(a, span, g * kv->capacity);
    const fm_kv_head head = {(const uint8_t *)kv->k + skip, (const uint8_t *)kv->v + skip, kv->format};
    return head;
}

static void store_kv(const cpu_backend *c, const fm_attention_args *a, int span)
{
    const fm_span *sp = &a->spans[span];
    const fm_kv *kv = &a->kv[span];
    const int64_t hd = a->a.head_dim;
    for (int64_t g = 0; g < a->a.n_kv_heads; g++)
        for (int64_t t = 0; t < sp->n; t++) {
            const int64_t from = (sp->row0 + t) * a->ld_kv + g * hd;
            const int64_t to = kv_bytes(a, span, g * kv->capacity + sp->pos0 + t);
            c->k->kv_store(kv->format, a->k + from, hd, (uint8_t *)kv->k + to);
            c->k->kv_store(kv->format, a->v + from, hd, (uint8_t *)kv->v + to);
        }
}

static void attend_task(void *p, int64_t task, int worker)
{
    const attend_ctx *c = p;
    const fm_attn_args *a = &c->a->a;
    const fm_span *s = &c->a->spans[c->span];
    const int64_t blocks = (s->n + c->rows_per_task - 1) / c->rows_per_task, g = task % a->n_kv_heads;
    const int64_t t0 = (blocks - 1 - task / a->n_kv_heads) * c->rows_per_task; /* the longest first */
    const int64_t t1 = t0 + c->rows_per_task < s->n ? t0 + c->rows_per_task : s->n;
    const fm_kv_head kv = kv_head_at(c->a, c->span, g);
    c->k->attend_rows(a, s->row0 + t0, s->row0 + t1, g, &kv, s->pos0 - s->row0, c->floats + worker * c->n_floats);
}

static void attend_part_task(void *p, int64_t task, int worker)
{
    (void)worker;
    const attend_ctx *c = p;
    const fm_attn_args *a = &c->a->a;
    const fm_span *s = &c->a->spans[c->span];
    const int64_t parts = (s->pos0 + s->n + FM_ATTN_PART - 1) / FM_ATTN_PART;
    const int64_t g = task / parts, part = task % parts; /* a part reads ahead into the next of its head */
    const fm_kv_head kv = kv_head_at(c->a, c->span, g);
    c->k->attend_part(a, s->row0, s->row0 + s->n, g, &kv, s->pos0 - s->row0, part,
                      c->floats + part * c->n_floats + g * (c->n_floats / a->n_kv_heads));
}

static void attend_merge_task(void *p, int64_t g, int worker)
{
    (void)worker;
    const attend_ctx *c = p;
    const fm_attn_args *a = &c->a->a;
    const fm_span *s = &c->a->spans[c->span];
    c->k->attend_merge(a, s->row0, s->row0 + s->n, g, s->pos0 - s->row0,
                       c->floats + g * (c->n_floats / a->n_kv_heads), c->n_floats);
}

/* Few rows and KV heads do not keep the threads busy: then the positions are divided too, in parts whose size is fixed,
 * so that the bits stay. Their room is taken for the whole capacity at once: decode allocates nothing later. */
static fm_status attend_span(cpu_backend *c, const fm_attention_args *a, int span)
{
    const fm_span *sp = &a->spans[span];
    const int64_t nkv = a->a.n_kv_heads, per = a->a.n_heads / nkv, query = fm_attn_part_floats(a->a.head_dim);
    const int64_t fit = FM_ATTN_PASS / per, n_threads = fm_pool_threads(c->pool);
    const bool few = sp->n <= FM_ATTN_FEW_ROWS && n_threads > 1 && nkv < 4 * n_threads;
    const int64_t parts = (sp->pos0 + sp->n + FM_ATTN_PART - 1) / FM_ATTN_PART;
    const int64_t most = (a->kv[span].capacity + FM_ATTN_PART - 1) / FM_ATTN_PART;
    const int64_t of_rows = n_threads * FM_ATTN_PASS, of_parts = few ? most * sp->n * a->a.n_heads : 0;
    const int64_t room = query * (of_rows > of_parts ? of_rows : of_parts);
    FM_TRY(reserve((void **)&c->temp, &c->temp_bytes, (size_t)room * sizeof(float)));
    attend_ctx x = {c->k, a, c->temp, query * FM_ATTN_PASS, fit < 1 ? 1 : fit, span};
    if (few && parts > 1) {
        x.n_floats = query * sp->n * a->a.n_heads;
        fm_parallel_for(c->pool, parts * nkv, attend_part_task, &x);
        fm_parallel_for(c->pool, nkv, attend_merge_task, &x);
    } else {
        fm_parallel_for(c->pool, (sp->n + x.rows_per_task - 1) / x.rows_per_task * nkv, attend_task, &x);
    }
    return FM_OK;
}

static fm_status cpu_attention(fm_backend *b, const fm_attention_args *a)
{
    cpu_backend *c = (cpu_backend *)b;
    for (int s = 0; s < a->n_spans; s++) {
        store_kv(c, a, s);
        FM_TRY(attend_span(c, a, s));
    }
    return FM_OK;
}

enum { CONV_CHANNELS = 256 };

typedef struct conv_ctx {
    const fm_kernels *k;
    const fm_conv_args *a;
    int span;
} conv_ctx;

static void conv_task(void *p, int64_t task, int worker)
{
    (void)worker;
    const conv_ctx *c = p;
    const fm_conv_args *a = c->a;
    const fm_span *s = &a->spans[c->span];
    const int64_t c0 = task * CONV_CHANNELS, c1 = c0 + CONV_CHANNELS < a->n_ch ? c0 + CONV_CHANNELS : a->n_ch;
    c->k->conv_silu(a->m + s->row0 * a->ldm, a->ldm, a->w, a->kern, a->hist_in[c->span], a->hist_out[c->span],
                    a->y + s->row0 * a->ldy, a->ldy, s->n, a->n_ch, c0, c1);
}

static fm_status cpu_conv(fm_backend *b, const fm_conv_args *a)
{
    const cpu_backend *c = (const cpu_backend *)b;
    for (int s = 0; s < a->n_spans; s++) {
        conv_ctx x = {c->k, a, s};
        fm_parallel_for(c->pool, (a->n_ch + CONV_CHANNELS - 1) / CONV_CHANNELS, conv_task, &x);
    }
    return FM_OK;
}

typedef struct delta_ctx {
    const fm_kernels *k;
    const fm_delta_batch *a;
    float *scratch;
    int64_t per_worker;
    int span;
} delta_ctx;

static void delta_task(void *p, int64_t h, int worker)
{
    const delta_ctx *c = p;
    const fm_span *s = &c->a->spans[c->span];
    fm_delta_args a = c->a->a;
    a.qkv += s->row0 * a.ld_qkv;
    a.z += s->row0 * a.ld_z;
    a.a += s->row0 * a.ld_ab;
    a.b += s->row0 * a.ld_ab;
    a.y += s->row0 * a.ld_y;
    const int64_t head = a.dk * a.dv;
    c->k->delta(&a, h, s->n, c->a->S_in[c->span] + h * head, c->a->S_out[c->span] + h * head,
                c->scratch + worker * c->per_worker);
}

static fm_status cpu_delta(fm_backend *b, const fm_delta_batch *a)
{
    cpu_backend *c = (cpu_backend *)b;
    for (int s = 0; s < a->n_spans; s++) {
        const int64_t need = c->k->delta_scratch(&a->a, a->spans[s].n);
        const int64_t per = (need + 15) / 16 * 16;
        FM_TRY(reserve((void **)&c->temp, &c->temp_bytes,
                       (size_t)(per * fm_pool_threads(c->pool)) * sizeof(float)));
        delta_ctx x = {c->k, a, c->temp, per, s};
        fm_parallel_for(c->pool, a->a.n_v_heads, delta_task, &x);
    }
    return FM_OK;
}

/* ---- mixture of experts --------------------------------------------------------------------------- */

static fm_status cpu_route(fm_backend *b, const fm_route_args *a, const float *logits, int64_t n, int32_t *ids,
                           float *weights)
{
    cpu_backend *c = (cpu_backend *)b;
    FM_TRY(reserve((void **)&c->temp, &c->temp_bytes, (size_t)a->n_experts * sizeof(float)));
    for (int64_t r = 0; r < n; r++)
        c->k->route(a, logits + r * a->n_experts, ids + r * a->k, weights + r * a->k, c->temp);
    return FM_OK;
}

typedef struct experts_ctx {
    const fm_kernels *k;
    const fm_expert_args *a;
    const fm_act *act;   /* of x, then of the hidden rows */
    int64_t block, tasks_per_job;
    int64_t first_row; /* of the hidden rows in act */
    bool down;
} experts_ctx;

static void experts_rows(const experts_ctx *c, const fm_expert_job *job, int64_t r0, int64_t r1)
{
    fm_act act = *c->act;
    if (c->down) { /* hidden rows lie in job order: no gather */
        const fm_mat *W = &job->down;
        act.row0 = job->out0 - c->first_row;
        c->k->matmul[W->format](W, &act, job->n, c->a->out + job->out0 * W->n_rows, W->n_rows, r0, r1);
        return;
    }
    const int64_t width = job->gate.n_rows;
    act.rows = job->rows;
    float *g = c->a->gate + job->out0 * width, *u = c->a->up + job->out0 * width;
    c->k->matmul[job->gate.format](&job->gate, &act, job->n, g, width, r0, r1);
    c->k->matmul[job->up.format](&job->up, &act, job->n, u, width, r0, r1);
    for (int64_t i = 0; i < job->n; i++)
        c->k->swiglu(g + i * width + r0, u + i * width + r0, g + i * width + r0, r1 - r0);
}

static void experts_tasks(void *p, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const experts_ctx *c = p;
    while (begin < end) {
        const fm_expert_job *job = &c->a->jobs[begin / c->tasks_per_job];
        const int64_t at = begin % c->tasks_per_job, left = c->tasks_per_job - at;
        const int64_t n = end - begin < left ? end - begin : left;
        const int64_t r1 = (at + n) * c->block, n_rows = c->down ? job->down.n_rows : job->gate.n_rows;
        experts_rows(c, job, at * c->block, r1 < n_rows ? r1 : n_rows);
        begin += n;
    }
}

static void experts_phase(cpu_backend *c, const fm_expert_args *a, const fm_act *act, int64_t first_row, bool down)
{
    const fm_mat *W = down ? &a->jobs[0].down : &a->jobs[0].gate;
    const int n_threads = fm_pool_threads(c->pool);
    const int64_t row_bytes = mat_row_bytes(W) * (down ? 1 : 2); /* gate and up */
    /* Many experts at work: one task each. */
    const row_tasks one = {W->n_rows, 1};
    const row_tasks r = a->n_jobs >= 16 * n_threads ? one : share_rows(W, row_bytes, a->n_jobs, a->n_x, n_threads);
    experts_ctx x = {c->k, a, act, r.rows, (W->n_rows + r.rows - 1) / r.rows, first_row, down};
    fm_parallel_ranges(c->pool, a->n_jobs * x.tasks_per_job, r.most, experts_tasks, &x);
}

static fm_status cpu_experts(fm_backend *b, const fm_expert_args *a)
{
    cpu_backend *c = (cpu_backend *)b;
    if (a->n_jobs == 0)
        return FM_OK;
    const int64_t hidden = a->jobs[0].gate.n_cols, width = a->jobs[0].gate.n_rows;
    fm_act act = {.x = a->x, .ldx = hidden, .n_cols = hidden};
    FM_TRY(prepare(c, &act, a->n_x));
    experts_phase(c, a, &act, 0, false);
    int64_t first = a->jobs[0].out0, last = first;
    for (int j = 0; j < a->n_jobs; j++) {
        first = a->jobs[j].out0 < first ? a->jobs[j].out0 : first;
        last = a->jobs[j].out0 + a->jobs[j].n > last ? a->jobs[j].out0 + a->jobs[j].n : last;
    }
    fm_act hidden_act = {.x = a->gate + first * width, .ldx = width, .n_cols = width};
    FM_TRY(prepare(c, &hidden_act, last - first));
    experts_phase(c, a, &hidden_act, first, true);
    return FM_OK;
}

typedef struct combine_ctx {
    const fm_kernels *k;
    const fm_combine_args *a;
} combine_ctx;

static void combine_task(void *p, int64_t r, int worker)
{
    (void)worker;
    const combine_ctx *c = p;
    const fm_combine_args *a = c->a;
    for (int32_t e = a->start[r]; e < a->start[r + 1]; e++)
        c->k->axpy(a->weight[e], a->part + a->index[e] * a->hidden, a->y + r * a->hidden, a->hidden);
}

static fm_status cpu_combine(fm_backend *b, const fm_combine_args *a)
{
    const cpu_backend *c = (const cpu_backend *)b;
    combine_ctx x = {c->k, a};
    fm_parallel_for(c->pool, a->n, combine_task, &x);
    return FM_OK;
}

static const fm_backend_vtable cpu_vtable = {
    .version = FM_BACKEND_VERSION,
    .name = "cpu",
    .close = cpu_close,
    .caps = cpu_caps,
    .alloc = cpu_alloc,
    .free = cpu_free,
    .begin = cpu_begin,
    .flush = cpu_flush,
    .sync = cpu_sync,
    .embed = cpu_embed,
    .rmsnorm = cpu_rmsnorm,
    .matmul = cpu_matmul,
    .clip = cpu_clip,
    .rope = cpu_rope,
    .attention = cpu_attention,
    .conv = cpu_conv,
    .delta = cpu_delta,
    .swiglu = cpu_swiglu,
    .route = cpu_route,
    .experts = cpu_experts,
    .combine = cpu_combine,
    .add_gated = cpu_add_gated,
    .find_nonfinite = cpu_find_nonfinite,
};

fm_status fm_backend_open_cpu(const fm_backend_opts *opts, fm_backend **out)
{
    *out = NULL;
    const fm_kernels *k;
    const fm_kernels *exact;
    FM_TRY(fm_kernels_get_numeric(opts->numeric, &k));
    FM_TRY(fm_kernels_get(&exact));
    void *p;
    FM_TRY(fm_alloc(sizeof(cpu_backend), &p));
    cpu_backend *c = p;
    c->base.v = &cpu_vtable;
    c->k = k;
    c->exact = exact;
    c->pool = opts->pool;
    *out = &c->base;
    return FM_OK;
}
