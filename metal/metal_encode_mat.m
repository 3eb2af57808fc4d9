/* Matrices: items that share a format go out in one dispatch, addressed through a table, so that cached experts are
 * used where they lie. Few rows: mat_vec, whose simdgroups keep x, or mat_vec_units; many: mat_mul over tiles
 * (fm_metal_tune). */
#include <string.h>

#include "metal_mat.h"

static fm_u32 format_of(fm_quant q)
{
    static const fm_u32 formats[FM_QUANT_COUNT] = {
        [FM_QUANT_F32] = FM_FMT_F32,         [FM_QUANT_F16] = FM_FMT_F16,         [FM_QUANT_BF16] = FM_FMT_BF16,
        [FM_QUANT_AFFINE2] = FM_FMT_AFFINE2, [FM_QUANT_AFFINE3] = FM_FMT_AFFINE3, [FM_QUANT_AFFINE4] = FM_FMT_AFFINE4,
        [FM_QUANT_AFFINE5] = FM_FMT_AFFINE5, [FM_QUANT_AFFINE6] = FM_FMT_AFFINE6, [FM_QUANT_AFFINE8] = FM_FMT_AFFINE8,
    };
    return formats[q];
}

bool fm_metal_same_kind(const fm_metal_kind *a, const fm_metal_kind *b)
{
    return memcmp(&a->c, &b->c, sizeof a->c) == 0 && a->n_cols == b->n_cols && a->codes_stride == b->codes_stride &&
           a->scales_stride == b->scales_stride;
}

fm_status fm_metal_kind_of(const fm_mat *W, fm_metal_kind *out)
{
    const fm_u32 format = format_of(W->format);
    const bool affine = fm_quant_get(W->format)->affine;
    const uintptr_t unit = format == FM_FMT_F16 || format == FM_FMT_BF16 ? 2 : 4;
    const uintptr_t scale_unit = W->scale_format == FM_QUANT_F32 ? 4 : 2;
    const uintptr_t codes = (uintptr_t)W->codes | (uintptr_t)W->codes_stride;
    const uintptr_t scales = (uintptr_t)W->scales | (uintptr_t)W->biases | (uintptr_t)W->scales_stride;
    if (format == 0)
        return fm_fail(FM_ERR_UNSUPPORTED, "metal: weights of format %s", fm_quant_get(W->format)->name);
    if (affine && W->n_cols % 32 != 0)
        return fm_fail(FM_ERR_UNSUPPORTED, "metal: %lld columns of %s: must be a multiple of 32",
                       (long long)W->n_cols, fm_quant_get(W->format)->name);
    memset(out, 0, sizeof *out);
    out->c.v[FM_FC_FORMAT] = format;
    if (affine) {
        out->c.v[FM_FC_GROUP] = (fm_u32)W->group;
        out->c.v[FM_FC_SCALE] = format_of(W->scale_format);
    }
    if (codes % 16 == 0) /* 2: words of scales can be loaded too, which only mat_vec_units asks for */
        out->c.v[FM_FC_VEC] = fm_metal_tune.units && affine && scales % 4 == 0 ? 2 : 1;
    out->c.v[FM_FC_BYTES] = codes % unit != 0 || (affine && scales % scale_unit != 0);
    out->n_cols = W->n_cols;
    out->codes_stride = W->codes_stride;
    out->scales_stride = affine ? W->scales_stride : 0;
    return FM_OK;
}

fm_status fm_metal_mat_address(fm_metal *m, const fm_mat *W, fm_metal_addresser address, uint64_t *codes, fm_u32 *at,
                               uint64_t *scales, uint64_t *biases)
{
    uint64_t p;
    FM_TRY(address(m, W->codes, (size_t)(W->n_rows * W->codes_stride), "a weight's codes", &p));
    *at = (fm_u32)(p % 4);
    *codes = *scales = *biases = p - *at;
    if (!fm_quant_get(W->format)->affine)
        return FM_OK;
    const size_t bytes = (size_t)(W->n_rows * W->scales_stride);
    FM_TRY(address(m, W->scales, bytes, "a weight's scales", scales));
    return address(m, W->biases, bytes, "a weight's biases", biases);
}

/* How mat_vec is cut up. The order of a row's additions follows from the slices, hence these from the columns alone.
 * Many pairs of rows for a simdgroup spare loads of x, as long as WANTED threadgroups are left to fill a GPU. */
typedef struct vec_plan {
    int64_t slices, teams, pairs;
} vec_plan;

enum { WANTED = 640 };

static vec_plan plan_vec(fm_u32 format, int64_t n_cols, int64_t n_pairs)
{
    vec_plan p = {1, FM_MV_SIMDGROUPS, 2};
    const int64_t blocks = (n_cols + 32 * FM_WIDTH - 1) / (32 * FM_WIDTH);
    if (format < FM_FMT_F16)
        p.slices = blocks < FM_MV_SLICES ? blocks : FM_MV_SLICES;
    p.teams = FM_MV_SIMDGROUPS / p.slices;
    p.pairs = n_pairs / (WANTED * p.teams) / 2 * 2;
    p.pairs = p.pairs < 2 ? 2 : p.pairs > FM_MV_PAIRS ? FM_MV_PAIRS : p.pairs;
    return p;
}

/* The same for mat_vec_units: slices of 1024 bits of a row's codes, at most 8 of them at once; the order of additions
 * follows from the columns alone here too. Two threadgroups for each processor of an H200, as each splits x for itself;
 * few simdgroups in them, so that those of the next dispatch find room. */
typedef struct units_plan {
    int64_t side, slices, teams, tiles, of_tile;
} units_plan;

enum { UNITS_WANTED = 264, UNITS_TEAM_TILES = 5 };

static bool fits_units(const fm_metal_kind *kind, const fm_metal_items *a)
{
    const fm_u32 format = kind->c.v[FM_FC_FORMAT];
    if (!fm_metal_tune.units || !a->vec || (format != FM_FMT_AFFINE2 && format != FM_FMT_AFFINE4))
        return false;
    const fm_u32 of_lane = 256 / format, shared = kind->c.v[FM_FC_GROUP] < of_lane; /* two scales a load */
    return kind->c.v[FM_FC_VEC] > shared && !kind->c.v[FM_FC_BYTES] && kind->n_cols % of_lane == 0 &&
           kind->n_cols <= FM_MU_COLUMNS;
}

static units_plan plan_units(const fm_metal_kind *kind, const fm_metal_items *a)
{
    const int64_t slices = (kind->n_cols * kind->c.v[FM_FC_FORMAT] + 1023) / 1024, passes = (slices + 7) / 8;
    units_plan p = {.side = (slices + passes - 1) / passes, .of_tile = a->gated ? 8 : 16};
    p.slices = p.side * passes;
    const int64_t tiles = (a->most_out + p.of_tile - 1) / p.of_tile * a->n * a->most_rows;
    const int64_t most = FM_MU_PARTS / p.slices;
    p.tiles = (tiles + UNITS_WANTED - 1) / UNITS_WANTED;
    p.tiles = p.tiles < 1 ? 1 : p.tiles > most ? most : p.tiles;
    p.teams = (p.tiles + UNITS_TEAM_TILES - 1) / UNITS_TEAM_TILES;
    p.teams = p.teams > 8 / p.side ? 8 / p.side : p.teams;
    return p;
}

fm_status fm_metal_run_items(fm_metal *m, fm_metal_kind kind, const fm_metal_items *a)
{
    kind.c.v[FM_FC_GATED] = a->gated;
    if (!a->vec || a->x.offset % 16 != 0 || a->ldx % 4 != 0)
        kind.c.v[FM_FC_VEC] = 0; /* the tiled kernel does not look: one pipeline */
    kind.c.v[FM_FC_LONG] = a->vec && kind.n_cols > FM_MV_SLICES * FM_WIDTH * 32;
    const bool units = fits_units(&kind, a);
    kind.c.v[FM_FC_VEC] = kind.c.v[FM_FC_VEC] != 0; /* one pipeline however scales are aligned */
    fm_metal_call c;
    FM_TRY(fm_metal_call_begin(m, units ? "mat_vec_units" : a->vec ? "mat_vec" : "mat_mul", kind.c, &c));
    fm_metal_bind_place(&c, 0, a->table);
    const int64_t of_pair = a->gated ? 1 : 2; /* outputs */
    const vec_plan p =
        plan_vec(kind.c.v[FM_FC_FORMAT], kind.n_cols, (a->most_out + of_pair - 1) / of_pair * a->n * a->most_rows);
    const units_plan u = units ? plan_units(&kind, a) : (units_plan){0};
    const fm_mat_args args = {(fm_u32)kind.n_cols,
                              (fm_u32)a->ldx,
                              (fm_u32)kind.codes_stride,
                              (fm_u32)kind.scales_stride,
                              a->rows != NULL,
                              (fm_u32)(units ? u.slices : p.slices),
                              (fm_u32)(units ? u.tiles : p.pairs)};
    fm_metal_bind_bytes(&c, 1, &args, sizeof args);
    fm_metal_bind_place(&c, 2, a->x);
    fm_metal_bind_place(&c, 3, a->rows ? *a->rows : a->table);
    if (units) {
        const int64_t per = u.tiles * u.of_tile;
        fm_metal_run(&c, (a->most_out + per - 1) / per, a->n, a->most_rows, (int)(FM_WIDTH * u.side), (int)u.teams);
    } else if (a->vec) {
        const int64_t per = p.teams * p.pairs * of_pair;
        fm_metal_run(&c, (a->most_out + per - 1) / per, a->n, a->most_rows, (int)(FM_WIDTH * p.slices * p.teams), 1);
    } else {
        fm_metal_run(&c, (a->most_out + FM_MM_TILE - 1) / FM_MM_TILE, (a->most_rows + FM_MM_TILE - 1) / FM_MM_TILE,
                     a->n, FM_MM_THREADS, 1);
    }
    /* y is named by address, which no binding tells the encoder: say that what follows may read it */
    [c.encoder memoryBarrierWithScope:MTLBarrierScopeBuffers];
    return FM_OK;
}

/* One dispatch of `n` table entries of one kind. rows: place of the row list, or NULL. */
static fm_status run_items(fm_metal *m, fm_metal_kind kind, bool gated, fm_metal_place x, int64_t ldx,
                           const fm_metal_place *rows, fm_metal_place table, const fm_metal_item *items, int n)
{
    fm_metal_items a = {.gated = gated, .x = x, .ldx = ldx, .rows = rows, .table = table, .n = n};
    for (int i = 0; i < n; i++) {
        a.most_out = items[i].n_out > a.most_out ? items[i].n_out : a.most_out;
        a.most_rows = items[i].n > a.most_rows ? items[i].n : a.most_rows;
    }
    a.vec = gated || a.most_rows <= fm_metal_tune.vec_rows;
    return fm_metal_run_items(m, kind, &a);
}

fm_status fm_metal_embed(fm_backend *b, const fm_mat *W, const int32_t *ids, int64_t n, float *y, int64_t ldy)
{
    fm_metal *m = (fm_metal *)b;
    fm_metal_kind kind;
    FM_TRY(fm_metal_kind_of(W, &kind));
    kind.c.v[FM_FC_VEC] = 0;
    fm_metal_call c;
    FM_TRY(fm_metal_call_begin(m, "embed_rows", kind.c, &c));
    const bool affine = fm_quant_get(W->format)->affine;
    const int64_t scale_bytes = W->n_rows * kind.scales_stride;
    const int64_t at = (int64_t)((uintptr_t)W->codes % 4);
    FM_TRY(fm_metal_bind(&c, 0, W->codes - at, W->n_rows * W->codes_stride + at, "embedding codes"));
    FM_TRY(fm_metal_bind(&c, 1, affine ? W->scales : W->codes, scale_bytes, "embedding scales"));
    FM_TRY(fm_metal_bind(&c, 2, affine ? W->biases : W->codes, scale_bytes, "embedding biases"));
    fm_metal_place place;
    void *host; /* always a copy: the caller may reuse its ids */
    FM_TRY(fm_metal_upload(m, (size_t)n * 4, &host, &place));
    memcpy(host, ids, (size_t)n * 4);
    fm_metal_bind_place(&c, 3, place);
    FM_TRY(fm_metal_bind(&c, 4, y, ((n - 1) * ldy + W->n_cols) * 4, "embed y"));
    const fm_embed_args args = {(fm_u32)n, (fm_u32)W->n_cols, (fm_u32)ldy, (fm_u32)W->codes_stride,
                                (fm_u32)kind.scales_stride, (fm_u32)at};
    fm_metal_bind_bytes(&c, 5, &args, sizeof args);
    fm_metal_run(&c, (W->n_cols + 255) / 256, n, 1, 256, 1);
    return FM_OK;
}

enum { MAX_ITEMS = 64 };

fm_status fm_metal_matmul(fm_backend *b, const float *x, int64_t ldx, int64_t n, const fm_matmul_item *items,
                          int n_items)
{
    fm_metal *m = (fm_metal *)b;
    if (n_items > MAX_ITEMS)
        return fm_fail(FM_ERR_ARG, "metal matmul: %d matrices in one call, at most %d", n_items, MAX_ITEMS);
    bool done[MAX_ITEMS] = {false};
    fm_metal_place x_place;
    FM_TRY(fm_metal_find(m, x, (size_t)((n - 1) * ldx + items[0].W->n_cols) * 4, "matmul x", &x_place));
    for (int first = 0; first < n_items; first++) {
        if (done[first])
            continue;
        fm_metal_kind kind;
        FM_TRY(fm_metal_kind_of(items[first].W, &kind));
        void *host;
        fm_metal_place table;
        FM_TRY(fm_metal_upload(m, sizeof(fm_metal_item) * (size_t)(n_items - first), &host, &table));
        fm_metal_item *to = host;
        int count = 0;
        for (int i = first; i < n_items; i++) {
            const fm_matmul_item *it = &items[i];
            fm_metal_kind own;
            FM_TRY(fm_metal_kind_of(it->W, &own));
            if (done[i] || !fm_metal_same_kind(&kind, &own))
                continue;
            done[i] = true;
            fm_metal_item t = {.n_out = (fm_u32)it->W->n_rows, .ldy = (fm_u32)it->ldy, .n = (fm_u32)n};
            FM_TRY(fm_metal_mat_address(m, it->W, fm_metal_address, &t.codes, &t.codes_at, &t.scales, &t.biases));
            const size_t y_bytes = (size_t)((n - 1) * it->ldy + it->W->n_rows) * 4;
            FM_TRY(fm_metal_address(m, it->y, y_bytes, "matmul y", &t.y));
            if (it->bias)
                FM_TRY(fm_metal_address(m, it->bias, (size_t)it->W->n_rows * 4, "matmul bias", &t.bias));
            t.has_bias = it->bias != NULL;
            t.add = it->add;
            to[count++] = t;
        }
        FM_TRY(run_items(m, kind, false, x_place, ldx, NULL, table, to, count));
    }
    return FM_OK;
}

/* ---- experts -------------------------------------------------------------------------------------- */

typedef struct expert_run {
    fm_metal *m;
    const fm_expert_args *a;
    const int *jobs; /* indices of jobs that share kinds and a size class */
    const fm_u32 *row0;
    int n;
    int64_t width, hidden;
    fm_metal_place x, gate, rows;
} expert_run;

typedef enum phase { PHASE_GATE_UP, PHASE_GATE, PHASE_UP, PHASE_DOWN } phase;

static fm_status expert_item(const expert_run *r, int j, phase p, fm_metal_item *t)
{
    const fm_expert_job *job = &r->a->jobs[j];
    const fm_mat *W = p == PHASE_DOWN ? &job->down : p == PHASE_UP ? &job->up : &job->gate;
    float *y = p == PHASE_DOWN ? r->a->out : p == PHASE_UP ? r->a->up : r->a->gate;
    const int64_t ldy = p == PHASE_DOWN ? r->hidden : r->width;
    memset(t, 0, sizeof *t);
    FM_TRY(fm_metal_mat_address(r->m, W, fm_metal_address, &t->codes, &t->codes_at, &t->scales, &t->biases));
    if (p == PHASE_GATE_UP)
        FM_TRY(fm_metal_mat_address(r->m, &job->up, fm_metal_address, &t->up_codes, &t->up_at, &t->up_scales,
                                    &t->up_biases));
    FM_TRY(fm_metal_address(r->m, y + job->out0 * ldy, (size_t)(job->n * ldy) * 4, "experts' output", &t->y));
    t->n_out = (fm_u32)W->n_rows;
    t->ldy = (fm_u32)ldy;
    t->n = (fm_u32)job->n;
    t->row0 = p == PHASE_DOWN ? (fm_u32)job->out0 : r->row0[j];
    return FM_OK;
}

static fm_status expert_phase(const expert_run *r, phase p)
{
    const fm_expert_job *first = &r->a->jobs[r->jobs[0]];
    void *host;
    fm_metal_place table;
    FM_TRY(fm_metal_upload(r->m, sizeof(fm_metal_item) * (size_t)r->n, &host, &table));
    fm_metal_item *items = host;
    for (int i = 0; i < r->n; i++)
        FM_TRY(expert_item(r, r->jobs[i], p, &items[i]));
    fm_metal_kind kind;
    FM_TRY(fm_metal_kind_of(p == PHASE_DOWN ? &first->down : p == PHASE_UP ? &first->up : &first->gate, &kind));
    const bool down = p == PHASE_DOWN;
    return run_items(r->m, kind, p == PHASE_GATE_UP, down ? r->gate : r->x, down ? r->width : r->hidden,
                     down ? NULL : &r->rows, table, items, r->n);
}

/* Jobs with few rows: gate, up and SwiGLU in one pass. Jobs with many: tiles, then SwiGLU per job. */
static fm_status run_experts(const expert_run *r, bool many)
{
    if (!many) {
        FM_TRY(expert_phase(r, PHASE_GATE_UP));
        return expert_phase(r, PHASE_DOWN);
    }
    FM_TRY(expert_phase(r, PHASE_GATE));
    FM_TRY(expert_phase(r, PHASE_UP));
    for (int i = 0; i < r->n; i++) {
        const fm_expert_job *job = &r->a->jobs[r->jobs[i]];
        float *g = r->a->gate + job->out0 * r->width, *u = r->a->up + job->out0 * r->width;
        FM_TRY(fm_metal_swiglu(&r->m->base, g, u, g, job->n * r->width));
    }
    return expert_phase(r, PHASE_DOWN);
}

enum { MAX_JOBS = 1024 };

static fm_status same_run(const fm_expert_job *a, const fm_expert_job *b, bool *same)
{
    *same = (a->n <= fm_metal_tune.vec_rows) == (b->n <= fm_metal_tune.vec_rows);
    const fm_mat *pa[] = {&a->gate, &a->up, &a->down}, *pb[] = {&b->gate, &b->up, &b->down};
    for (int i = 0; i < 3; i++) {
        fm_metal_kind ka, kb;
        FM_TRY(fm_metal_kind_of(pa[i], &ka));
        FM_TRY(fm_metal_kind_of(pb[i], &kb));
        *same = *same && fm_metal_same_kind(&ka, &kb);
    }
    return FM_OK;
}

fm_status fm_metal_experts(fm_backend *b, const fm_expert_args *a)
{
    fm_metal *m = (fm_metal *)b;
    if (a->n_jobs == 0)
        return FM_OK;
    if (a->n_jobs > MAX_JOBS)
        return fm_fail(FM_ERR_ARG, "metal experts: %d jobs in one call, at most %d", a->n_jobs, MAX_JOBS);
    int jobs[MAX_JOBS];
    fm_u32 row0[MAX_JOBS];
    bool done[MAX_JOBS] = {false};
    expert_run r = {.m = m, .a = a, .jobs = jobs, .row0 = row0};
    r.hidden = a->jobs[0].gate.n_cols;
    r.width = a->jobs[0].gate.n_rows;
    int64_t n_rows = 0, end = 0;
    for (int j = 0; j < a->n_jobs; j++) {
        row0[j] = (fm_u32)n_rows;
        n_rows += a->jobs[j].n;
        end = a->jobs[j].out0 + a->jobs[j].n > end ? a->jobs[j].out0 + a->jobs[j].n : end;
    }
    void *host;
    FM_TRY(fm_metal_upload(m, (size_t)n_rows * 4, &host, &r.rows));
    for (int j = 0; j < a->n_jobs; j++)
        memcpy((int32_t *)host + row0[j], a->jobs[j].rows, (size_t)a->jobs[j].n * 4);
    FM_TRY(fm_metal_find(m, a->x, (size_t)(a->n_x * r.hidden) * 4, "experts x", &r.x));
    FM_TRY(fm_metal_find(m, a->gate, (size_t)(end * r.width) * 4, "experts gate", &r.gate));
    for (int first = 0; first < a->n_jobs; first++) {
        if (done[first])
            continue;
        r.n = 0;
        for (int j = first; j < a->n_jobs; j++) {
            bool same;
            FM_TRY(same_run(&a->jobs[first], &a->jobs[j], &same));
            if (done[j] || !same)
                continue;
            done[j] = true;
            jobs[r.n++] = j;
        }
        const fm_expert_job *job = &a->jobs[first];
        fm_metal_kind gate, up;
        FM_TRY(fm_metal_kind_of(&job->gate, &gate));
        FM_TRY(fm_metal_kind_of(&job->up, &up));
        /* gate and up of different formats cannot share a pass */
        FM_TRY(run_experts(&r, job->n > fm_metal_tune.vec_rows || !fm_metal_same_kind(&gate, &up)));
    }
    return FM_OK;
}
