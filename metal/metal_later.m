/* Experts recorded before the router has chosen them: the dispatches cover as many jobs as there can be, and the host
 * fills in the table that they follow, between the tell and the hold around it. An entry without rows does nothing.
 *
 * Jobs of few rows go through mat_vec, those of many through mat_mul, as when they are known (metal_encode_mat.m), so
 * that both ways give the same bits. The tiled pass and SwiGLU come first and cover rows that are not theirs: mat_vec
 * writes these rows afterwards. */
#include <string.h>

#include "metal_mat.h"

/* The table: these lists of n_parts entries, then the row list. */
typedef enum list { FEW_GATE, FEW_UP, FEW_DOWN, MANY_GATE, MANY_UP, MANY_DOWN, N_LISTS } list;
_Static_assert(N_LISTS * sizeof(fm_metal_item) + sizeof(int32_t) <= FM_LATER_PART_BYTES, "the table does not fit");

static fm_metal_item *items_of(const fm_expert_later *a, list l) { return (fm_metal_item *)a->table + l * a->n_parts; }

static int32_t *rows_of(const fm_expert_later *a) { return (int32_t *)(items_of(a, N_LISTS)); }

/* What one table can address: gate and up in one pass if only their alignment differs. */
static fm_status gate_kinds(const fm_expert_later *a, fm_metal_kind *gate, fm_metal_kind *up, bool *fused)
{
    FM_TRY(fm_metal_kind_of(&a->gate, gate));
    FM_TRY(fm_metal_kind_of(&a->up, up));
    const fm_u32 g = gate->c.v[FM_FC_VEC], u = up->c.v[FM_FC_VEC], vec = g < u ? g : u;
    const bool bytes = gate->c.v[FM_FC_BYTES] || up->c.v[FM_FC_BYTES];
    gate->c.v[FM_FC_VEC] = up->c.v[FM_FC_VEC] = vec;
    gate->c.v[FM_FC_BYTES] = up->c.v[FM_FC_BYTES] = bytes;
    *fused = fm_metal_same_kind(gate, up);
    return FM_OK;
}

/* ---- recording -------------------------------------------------------------------------------------- */

typedef struct later_run {
    fm_metal *m;
    const fm_expert_later *a;
    fm_metal_kind gate, up, down;
    bool fused;
    fm_metal_place table, rows, x, gate_y;
} later_run;

static int64_t most_many(const fm_expert_later *a)
{
    const int64_t few = fm_metal_tune.vec_rows, n = a->n_x > few ? a->n_parts / (few + 1) : 0;
    return n < a->n_jobs ? n : a->n_jobs;
}

static fm_status run_list(const later_run *r, list l, fm_metal_kind kind)
{
    const fm_expert_later *a = r->a;
    const bool down = l == FEW_DOWN || l == MANY_DOWN, vec = l <= FEW_DOWN;
    const int64_t few = a->n_x < fm_metal_tune.vec_rows ? a->n_x : fm_metal_tune.vec_rows;
    fm_metal_items q = {
        .gated = l == FEW_GATE && r->fused,
        .vec = vec,
        .x = down ? r->gate_y : r->x,
        .table = r->table,
        .ldx = kind.n_cols,
        .rows = down ? NULL : &r->rows,
        .n = vec ? a->n_jobs : most_many(a),
        .most_out = down ? a->down.n_rows : a->gate.n_rows,
        .most_rows = vec ? few : a->n_x,
    };
    q.table.offset += (NSUInteger)((char *)items_of(a, l) - (char *)a->table);
    return q.n > 0 ? fm_metal_run_items(r->m, kind, &q) : FM_OK;
}

fm_status fm_metal_experts_later(fm_backend *b, const fm_expert_later *a)
{
    later_run r = {.m = (fm_metal *)b, .a = a};
    const int64_t width = a->gate.n_rows, hidden = a->gate.n_cols;
    const size_t mid_bytes = (size_t)(a->n_parts * width) * 4, bytes = (size_t)a->n_parts * FM_LATER_PART_BYTES;
    uint64_t address; /* only to declare what the table will name */
    if (a->n_jobs > a->n_parts)
        return fm_fail(FM_ERR_ARG, "metal experts_later: %lld jobs with %lld rows together", (long long)a->n_jobs,
                       (long long)a->n_parts);
    FM_TRY(gate_kinds(a, &r.gate, &r.up, &r.fused));
    FM_TRY(fm_metal_kind_of(&a->down, &r.down));
    FM_TRY(fm_metal_find(r.m, a->table, bytes, "experts_later table", &r.table));
    FM_TRY(fm_metal_find(r.m, a->x, (size_t)(a->n_x * hidden) * 4, "experts_later x", &r.x));
    FM_TRY(fm_metal_find(r.m, a->gate_y, mid_bytes, "experts_later gate", &r.gate_y));
    r.rows = r.table;
    r.rows.offset += (NSUInteger)((char *)rows_of(a) - (char *)a->table);
    memset(a->table, 0, bytes);
    FM_TRY(fm_metal_address(r.m, a->gate_y, mid_bytes, "experts_later gate", &address));
    FM_TRY(fm_metal_address(r.m, a->up_y, mid_bytes, "experts_later up", &address));
    FM_TRY(fm_metal_address(r.m, a->out, (size_t)(a->n_parts * hidden) * 4, "experts_later output", &address));
    FM_TRY(fm_metal_declare_slots(r.m));
    const bool many = most_many(a) > 0;
    if (!r.fused) {
        FM_TRY(run_list(&r, FEW_GATE, r.gate));
        FM_TRY(run_list(&r, FEW_UP, r.up));
    }
    FM_TRY(run_list(&r, MANY_GATE, r.gate));
    FM_TRY(run_list(&r, MANY_UP, r.up));
    if (!r.fused || many)
        FM_TRY(fm_metal_swiglu(b, a->gate_y, a->up_y, a->gate_y, a->n_parts * width));
    if (r.fused)
        FM_TRY(run_list(&r, FEW_GATE, r.gate));
    FM_TRY(run_list(&r, FEW_DOWN, r.down));
    return run_list(&r, MANY_DOWN, r.down);
}

/* ---- the host's turn ---------------------------------------------------------------------------------- */

/* A matrix that the recorded kernel would misread must not reach it. */
static fm_status check_like(const fm_mat *W, const fm_mat *like, const fm_metal_kind *recorded)
{
    fm_metal_kind own;
    FM_TRY(fm_metal_kind_of(W, &own));
    const bool vec = own.c.v[FM_FC_VEC] >= recorded->c.v[FM_FC_VEC];
    const bool bytes = !own.c.v[FM_FC_BYTES] || recorded->c.v[FM_FC_BYTES];
    own.c.v[FM_FC_VEC] = recorded->c.v[FM_FC_VEC];
    own.c.v[FM_FC_BYTES] = recorded->c.v[FM_FC_BYTES];
    if (vec && bytes && W->n_rows == like->n_rows && fm_metal_same_kind(&own, recorded))
        return FM_OK;
    return fm_fail(FM_ERR_ARG, "metal set_jobs: a matrix of %s [%lld, %lld] is unlike the recorded %s [%lld, %lld]",
                   fm_quant_get(W->format)->name, (long long)W->n_rows, (long long)W->n_cols,
                   fm_quant_get(like->format)->name, (long long)like->n_rows, (long long)like->n_cols);
}

static fm_status fill_item(fm_metal *m, const fm_expert_job *job, const fm_mat *W, const fm_mat *up, float *y,
                           fm_metal_item *to)
{
    fm_metal_item t = {.n_out = (fm_u32)W->n_rows, .ldy = (fm_u32)W->n_rows, .n = (fm_u32)job->n,
                       .row0 = (fm_u32)job->out0};
    const size_t y_bytes = (size_t)(job->n * W->n_rows) * 4;
    FM_TRY(fm_metal_mat_address(m, W, fm_metal_gpu_address, &t.codes, &t.codes_at, &t.scales, &t.biases));
    if (up)
        FM_TRY(fm_metal_mat_address(m, up, fm_metal_gpu_address, &t.up_codes, &t.up_at, &t.up_scales, &t.up_biases));
    FM_TRY(fm_metal_gpu_address(m, y + job->out0 * W->n_rows, y_bytes, "experts' output", &t.y));
    *to = t;
    return FM_OK;
}

static fm_status fill_job(fm_metal *m, const fm_expert_later *a, const fm_expert_job *job, int n[N_LISTS])
{
    fm_metal_kind gate, up, down;
    bool fused;
    FM_TRY(gate_kinds(a, &gate, &up, &fused));
    FM_TRY(fm_metal_kind_of(&a->down, &down));
    FM_TRY(check_like(&job->gate, &a->gate, &gate));
    FM_TRY(check_like(&job->up, &a->up, &up));
    FM_TRY(check_like(&job->down, &a->down, &down));
    if (job->n < 1 || job->n > a->n_x || job->out0 < 0 || job->out0 + job->n > a->n_parts)
        return fm_fail(FM_ERR_ARG, "metal set_jobs: %lld rows of %lld, to parts from %lld on of %lld", (long long)job->n,
                       (long long)a->n_x, (long long)job->out0, (long long)a->n_parts);
    const int first = job->n > fm_metal_tune.vec_rows ? MANY_GATE : FEW_GATE;
    const bool together = fused && first == FEW_GATE;
    fm_metal_item *to[3];
    for (int i = 0; i < 3; i++)
        to[i] = items_of(a, (list)(first + i)) + n[first + i];
    FM_TRY(fill_item(m, job, &job->gate, together ? &job->up : NULL, a->gate_y, to[0]));
    n[first]++;
    if (!together) {
        FM_TRY(fill_item(m, job, &job->up, NULL, a->up_y, to[1]));
        n[first + 1]++;
    }
    FM_TRY(fill_item(m, job, &job->down, NULL, a->out, to[2]));
    n[first + 2]++;
    memcpy(rows_of(a) + job->out0, job->rows, (size_t)job->n * sizeof(int32_t));
    return FM_OK;
}

fm_status fm_metal_set_jobs(fm_backend *b, const fm_expert_later *a, const fm_expert_job *jobs, int n_jobs)
{
    int n[N_LISTS] = {0};
    fm_status status = FM_OK;
    if (n_jobs > a->n_jobs)
        status = fm_fail(FM_ERR_ARG, "metal set_jobs: %d jobs, recorded for %lld", n_jobs, (long long)a->n_jobs);
    for (int j = 0; j < n_jobs && status == FM_OK; j++)
        status = fill_job((fm_metal *)b, a, &jobs[j], n);
    for (int l = 0; l < N_LISTS; l++) /* what is left of the last time; all of it after an error */
        for (int64_t i = status == FM_OK ? n[l] : 0; i < a->n_jobs; i++)
            items_of(a, (list)l)[i].n = 0;
    return status;
}
