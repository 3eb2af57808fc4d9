/* Validation of model descriptions. A message names file, tensor and the two numbers that disagree. */
#include "store/desc.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"

enum { VECTOR, MATRIX };
static const struct {
    const char *name;
    int kind;
} tensors[] = {
#define X(id, name, kind) {name, kind},
    FM_TENSOR_LIST(X)
#undef X
};

#define MAX_DIM (INT64_C(1) << 40)

const char *fm_tensor_name(int id) { return id >= 0 && id < FM_TENSOR_COUNT ? tensors[id].name : "?"; }

bool fm_tensor_is_vector(int id) { return tensors[id].kind == VECTOR; }

bool fm_tensor_find(const char *name, int *id)
{
    for (int i = 0; i < FM_TENSOR_COUNT; i++)
        if (strcmp(name, tensors[i].name) == 0) {
            *id = i;
            return true;
        }
    return false;
}

int64_t fm_format_area_bytes(const fm_format *f, int area)
{
    const fm_quant q = (fm_quant)f->quant;
    if (area == FM_AREA_CODES)
        return f->n_rows * fm_quant_codes_bytes(q, f->n_cols);
    return fm_quant_get(q)->affine ? f->n_rows * fm_quant_scales_bytes(q, f->n_cols, f->group, (fm_quant)f->scale_quant)
                                   : 0;
}

int fm_expert_segments(const fm_expert_desc *e, fm_segment out[FM_MAX_SEGMENTS])
{
    int n = 0;
    for (int r = 0; r < FM_ROLE_COUNT; r++)
        for (int a = 0; a < FM_AREA_COUNT; a++) {
            const int64_t bytes = fm_format_area_bytes(&e->role[r], a);
            if (bytes > 0)
                out[n++] = (fm_segment){r, a, bytes};
        }
    return n;
}

static fm_status check_format(const char *what, const fm_format *f)
{
    if (f->quant < 0 || f->quant >= FM_QUANT_COUNT || f->scale_quant < 0 || f->scale_quant >= FM_QUANT_COUNT)
        return fm_fail(FM_ERR_FORMAT, "%s: format %d with scales %d is unknown", what, f->quant, f->scale_quant);
    if (f->n_rows < 1 || f->n_cols < 1 || f->n_rows > MAX_DIM || f->n_cols > MAX_DIM ||
        f->n_rows > MAX_DIM / f->n_cols)
        return fm_fail(FM_ERR_FORMAT, "%s: shape [%" PRId64 ", %" PRId64 "] is out of range", what, f->n_rows,
                       f->n_cols);
    if (fm_quant_check((fm_quant)f->quant, f->n_cols, f->group, (fm_quant)f->scale_quant) != FM_OK) {
        char why[256];
        strncpy(why, fm_last_error()->message, sizeof why - 1);
        why[sizeof why - 1] = 0;
        return fm_fail(FM_ERR_FORMAT, "%s: %s", what, why);
    }
    return FM_OK;
}

static fm_status check_range(const fm_model_desc *d, const char *what, int32_t file, int64_t off, int64_t n_bytes)
{
    if (file < 0 || file >= d->n_files)
        return fm_fail(FM_ERR_FORMAT, "%s: names file %d of %d", what, file, d->n_files);
    const fm_desc_file *f = &d->files[file];
    if (off < 0 || n_bytes < 0 || off > f->n_bytes || n_bytes > f->n_bytes - off)
        return fm_fail_path(FM_ERR_FORMAT, 0, f->path, "%s: %s: bytes %" PRId64 " + %" PRId64 ", file has %" PRId64,
                            f->path, what, off, n_bytes, f->n_bytes);
    return FM_OK;
}

static fm_status check_tensor(const fm_model_desc *d, const fm_tensor_desc *t)
{
    if (t->id < 0 || t->id >= FM_TENSOR_COUNT)
        return fm_fail(FM_ERR_FORMAT, "%s: tensor id %d of %d", t->source, t->id, FM_TENSOR_COUNT);
    if (t->layer < -1)
        return fm_fail(FM_ERR_FORMAT, "%s: layer %d", t->source, t->layer);
    FM_TRY(check_format(t->source, &t->format));
    if (fm_tensor_is_vector(t->id) && fm_quant_get((fm_quant)t->format.quant)->affine)
        return fm_fail(FM_ERR_FORMAT, "%s: %s must be f32, f16 or bf16, not %s", t->source, fm_tensor_name(t->id),
                       fm_quant_get((fm_quant)t->format.quant)->name);
    for (int a = 0; a < FM_AREA_COUNT; a++) {
        const int64_t want = fm_format_area_bytes(&t->format, a);
        int64_t have = 0;
        for (int64_t i = 0; i < t->n_pieces[a]; i++) {
            const fm_piece *p = &t->pieces[a][i];
            FM_TRY(check_range(d, t->source, p->file, p->off, p->n_bytes));
            if (!fm_add_i64(have, p->n_bytes, &have))
                return fm_fail(FM_ERR_FORMAT, "%s: pieces overflow", t->source);
        }
        if (have != want)
            return fm_fail(FM_ERR_FORMAT, "%s: area %d has %" PRId64 " bytes, its shape needs %" PRId64, t->source, a,
                           have, want);
    }
    return FM_OK;
}

static fm_status check_experts(const fm_model_desc *d, const fm_expert_desc *e)
{
    char what[160];
    for (int r = 0; r < FM_ROLE_COUNT; r++) {
        snprintf(what, sizeof what, "layer %d experts (%s)", e->layer,
                 r == FM_ROLE_GATE ? "gate" : r == FM_ROLE_UP ? "up" : "down");
        FM_TRY(check_format(what, &e->role[r]));
    }
    snprintf(what, sizeof what, "layer %d experts", e->layer);
    if (e->layer < 0 || e->n_experts < 1 || e->n_experts > (1 << 20))
        return fm_fail(FM_ERR_FORMAT, "%s: %" PRId64 " experts", what, e->n_experts);
    const fm_format *g = &e->role[FM_ROLE_GATE], *u = &e->role[FM_ROLE_UP], *w = &e->role[FM_ROLE_DOWN];
    if (g->n_rows != u->n_rows || g->n_cols != u->n_cols || w->n_rows != g->n_cols || w->n_cols != g->n_rows)
        return fm_fail(FM_ERR_FORMAT,
                       "%s: gate [%" PRId64 ", %" PRId64 "], up [%" PRId64 ", %" PRId64 "] and down [%" PRId64
                       ", %" PRId64 "] do not fit together",
                       what, g->n_rows, g->n_cols, u->n_rows, u->n_cols, w->n_rows, w->n_cols);
    fm_segment seg[FM_MAX_SEGMENTS];
    const int n = fm_expert_segments(e, seg);
    if (e->n_sources != n)
        return fm_fail(FM_ERR_FORMAT, "%s: %d source names for %d segments", what, e->n_sources, n);
    for (int64_t i = 0; i < e->n_experts; i++)
        for (int s = 0; s < n; s++) {
            const int64_t at = i * n + s;
            if (e->seg_file[at] >= 0 && e->seg_file[at] < d->n_files && e->seg_off[at] >= 0 &&
                e->seg_off[at] <= d->files[e->seg_file[at]].n_bytes - seg[s].n_bytes)
                continue; /* the common case, without formatting a name */
            snprintf(what, sizeof what, "layer %d expert %" PRId64 " (%s)", e->layer, i, e->source[s]);
            FM_TRY(check_range(d, what, e->seg_file[at], e->seg_off[at], seg[s].n_bytes));
        }
    return FM_OK;
}

/* ---- no byte twice ------------------------------------------------------------------------------ */

typedef struct range {
    int64_t off, end;
    int32_t file, owner; /* tensor index, or -1 - expert layer index */
} range;

static int by_file_and_offset(const void *a, const void *b)
{
    const range *x = a, *y = b;
    if (x->file != y->file)
        return x->file < y->file ? -1 : 1;
    return x->off < y->off ? -1 : x->off > y->off;
}

static const char *owner_name(const fm_model_desc *d, int32_t owner, char *buf, size_t n)
{
    if (owner >= 0)
        return d->tensors[owner].source;
    snprintf(buf, n, "layer %d experts", d->experts[-1 - owner].layer);
    return buf;
}

static fm_status check_overlaps(const fm_model_desc *d)
{
    int64_t n = 0, max = 0;
    for (int64_t t = 0; t < d->n_tensors; t++)
        for (int a = 0; a < FM_AREA_COUNT; a++)
            max += d->tensors[t].n_pieces[a];
    for (int64_t l = 0; l < d->n_expert_layers; l++)
        max += d->experts[l].n_experts * FM_MAX_SEGMENTS;
    size_t bytes;
    void *mem;
    if (!fm_mul_size((size_t)max + 1, sizeof(range), &bytes))
        return fm_fail(FM_ERR_FORMAT, "the description has %" PRId64 " byte ranges", max);
    FM_TRY(fm_alloc(bytes, &mem));
    range *r = mem;
    for (int64_t t = 0; t < d->n_tensors; t++)
        for (int a = 0; a < FM_AREA_COUNT; a++)
            for (int64_t i = 0; i < d->tensors[t].n_pieces[a]; i++) {
                const fm_piece *p = &d->tensors[t].pieces[a][i];
                if (p->n_bytes > 0)
                    r[n++] = (range){p->off, p->off + p->n_bytes, p->file, (int32_t)t};
            }
    for (int64_t l = 0; l < d->n_expert_layers; l++) {
        const fm_expert_desc *e = &d->experts[l];
        fm_segment seg[FM_MAX_SEGMENTS];
        const int n_seg = fm_expert_segments(e, seg);
        for (int64_t i = 0; i < e->n_experts * n_seg; i++)
            r[n++] = (range){e->seg_off[i], e->seg_off[i] + seg[i % n_seg].n_bytes, e->seg_file[i], (int32_t)(-1 - l)};
    }
    qsort(r, (size_t)n, sizeof *r, by_file_and_offset);
    fm_status status = FM_OK;
    for (int64_t i = 1; i < n && status == FM_OK; i++)
        if (r[i].file == r[i - 1].file && r[i].off < r[i - 1].end) {
            char x[64], y[64];
            const char *path = d->files[r[i].file].path;
            status = fm_fail_path(FM_ERR_FORMAT, 0, path, "%s: %s and %s overlap at byte %" PRId64, path,
                                  owner_name(d, r[i - 1].owner, x, sizeof x), owner_name(d, r[i].owner, y, sizeof y),
                                  r[i].off);
        }
    fm_free(r);
    return status;
}

static int by_layer_and_id(const void *a, const void *b)
{
    const fm_tensor_desc *x = *(const fm_tensor_desc *const *)a, *y = *(const fm_tensor_desc *const *)b;
    if (x->layer != y->layer)
        return x->layer < y->layer ? -1 : 1;
    return x->id - y->id;
}

static fm_status check_twice(const fm_model_desc *d)
{
    void *mem;
    FM_TRY(fm_alloc(((size_t)d->n_tensors + 1) * sizeof(void *), &mem));
    const fm_tensor_desc **t = mem;
    for (int64_t i = 0; i < d->n_tensors; i++)
        t[i] = &d->tensors[i];
    qsort(t, (size_t)d->n_tensors, sizeof *t, by_layer_and_id);
    fm_status status = FM_OK;
    for (int64_t i = 1; i < d->n_tensors && status == FM_OK; i++)
        if (by_layer_and_id(&t[i - 1], &t[i]) == 0)
            status = fm_fail(FM_ERR_FORMAT, "layer %d: %s is there twice (%s, %s)", t[i]->layer,
                             fm_tensor_name(t[i]->id), t[i - 1]->source, t[i]->source);
    fm_free(t);
    return status;
}

fm_status fm_desc_check(const fm_model_desc *d)
{
    for (int32_t f = 0; f < d->n_files; f++)
        if (d->files[f].n_bytes < 0)
            return fm_fail(FM_ERR_FORMAT, "%s: %" PRId64 " bytes", d->files[f].path, d->files[f].n_bytes);
    for (int64_t t = 0; t < d->n_tensors; t++)
        FM_TRY(check_tensor(d, &d->tensors[t]));
    for (int64_t l = 0; l < d->n_expert_layers; l++) {
        FM_TRY(check_experts(d, &d->experts[l]));
        if (l > 0 && d->experts[l].layer <= d->experts[l - 1].layer)
            return fm_fail(FM_ERR_FORMAT, "expert layers %d and %d are out of order", d->experts[l - 1].layer,
                           d->experts[l].layer);
    }
    FM_TRY(check_twice(d));
    return check_overlaps(d);
}

/* ---- deep copy: one pass to measure, one to fill ------------------------------------------------- */

static void *take(fm_arena *a, const void *from, size_t bytes)
{
    void *to = fm_arena_take(a, bytes);
    if (to && bytes > 0)
        memcpy(to, from, bytes);
    return to;
}

static const char *take_string(fm_arena *a, const char *s) { return take(a, s, strlen(s) + 1); }

static fm_model_desc *copy_into(fm_arena *a, const fm_model_desc *d)
{
    fm_model_desc *out = take(a, d, sizeof *d);
    fm_desc_file *files = take(a, d->files, (size_t)d->n_files * sizeof *files);
    fm_tensor_desc *ts = take(a, d->tensors, (size_t)d->n_tensors * sizeof *ts);
    fm_expert_desc *es = take(a, d->experts, (size_t)d->n_expert_layers * sizeof *es);
    for (int32_t f = 0; f < d->n_files; f++) {
        const char *path = take_string(a, d->files[f].path);
        if (files)
            files[f].path = path;
    }
    for (int64_t t = 0; t < d->n_tensors; t++) {
        const char *source = take_string(a, d->tensors[t].source);
        if (ts)
            ts[t].source = source;
        for (int r = 0; r < FM_AREA_COUNT; r++) {
            const fm_piece *p = take(a, d->tensors[t].pieces[r], (size_t)d->tensors[t].n_pieces[r] * sizeof *p);
            if (ts)
                ts[t].pieces[r] = p;
        }
    }
    for (int64_t l = 0; l < d->n_expert_layers; l++) {
        const fm_expert_desc *e = &d->experts[l];
        const size_t n = (size_t)e->n_experts * (size_t)e->n_sources;
        const int32_t *seg_file = take(a, e->seg_file, n * sizeof *seg_file);
        const int64_t *seg_off = take(a, e->seg_off, n * sizeof *seg_off);
        const uint32_t *crc = e->crc ? take(a, e->crc, (size_t)e->n_experts * sizeof *crc) : NULL;
        const char *source[FM_MAX_SEGMENTS] = {NULL};
        for (int s = 0; s < e->n_sources; s++)
            source[s] = take_string(a, e->source[s]);
        if (!es)
            continue;
        es[l].seg_file = seg_file;
        es[l].seg_off = seg_off;
        es[l].crc = crc;
        memcpy(es[l].source, source, sizeof source);
    }
    if (out) {
        out->files = files;
        out->tensors = ts;
        out->experts = es;
    }
    return out;
}

fm_status fm_desc_copy(const fm_model_desc *d, fm_model_desc **out)
{
    *out = NULL;
    fm_arena measure = {NULL, 0, 0};
    copy_into(&measure, d);
    void *mem;
    FM_TRY(fm_alloc(measure.used, &mem));
    fm_arena fill = {mem, 0, measure.used};
    *out = copy_into(&fill, d);
    return FM_OK;
}
