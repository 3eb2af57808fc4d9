/* Loading the trunk: plan every area's place, read in parallel, look for NaN, decode the vectors. */
#include "store/weights.h"

#include <inttypes.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"

enum { AREA_ALIGN = 256, READ_BYTES = 4 << 20 };

typedef struct entry {
    const fm_tensor_desc *t;
    size_t off[FM_AREA_COUNT]; /* in the region; raw bytes of matrices, f32 of vectors */
    fm_mat mat;
} entry;

struct fm_weights {
    fm_backend *be;
    uint8_t *region;
    size_t bytes;
    entry *entries; /* sorted by (layer, id) */
    int64_t n;
};

static size_t vector_bytes(const fm_tensor_desc *t) { return (size_t)(t->format.n_rows * t->format.n_cols) * 4; }

static fm_status place(const fm_tensor_desc *t, size_t *used, size_t off[FM_AREA_COUNT])
{
    for (int a = 0; a < FM_AREA_COUNT; a++) {
        size_t bytes = (size_t)fm_format_area_bytes(&t->format, a);
        if (fm_tensor_is_vector(t->id))
            bytes = a == FM_AREA_CODES ? vector_bytes(t) : 0;
        off[a] = *used;
        size_t end;
        if (!fm_add_size(*used, bytes, &end) || !fm_add_size(end, AREA_ALIGN, used))
            return fm_fail(FM_ERR_FORMAT, "%s: the resident tensors overflow", t->source);
        *used = end == off[a] ? off[a] : fm_round_up(end, AREA_ALIGN);
    }
    return FM_OK;
}

fm_status fm_weights_bytes(const fm_model_desc *d, size_t *bytes)
{
    size_t used = 0, off[FM_AREA_COUNT];
    for (int64_t i = 0; i < d->n_tensors; i++)
        FM_TRY(place(&d->tensors[i], &used, off));
    *bytes = used;
    return FM_OK;
}

/* ---- reading -------------------------------------------------------------------------------------- */

typedef struct read_job {
    int32_t file;
    int64_t off;
    size_t bytes;
    uint8_t *dst;
} read_job;

typedef struct read_ctx {
    fm_io *io;
    const read_job *jobs;
    atomic_llong failed; /* index of a failed job, -1 */
} read_ctx;

static void read_task(void *p, int64_t task, int worker)
{
    (void)worker;
    read_ctx *c = p;
    const read_job *j = &c->jobs[task];
    if (fm_io_read_sync(c->io, j->file, j->off, j->bytes, j->dst) != FM_OK)
        atomic_store(&c->failed, task);
    else
        fm_io_forget(c->io, j->file, j->off, (int64_t)j->bytes);
}

static int64_t add_jobs(const fm_tensor_desc *t, int area, uint8_t *dst, read_job *jobs)
{
    int64_t n = 0;
    for (int64_t i = 0; i < t->n_pieces[area]; i++) {
        const fm_piece *p = &t->pieces[area][i];
        for (int64_t at = 0; at < p->n_bytes; at += READ_BYTES, n++) {
            const int64_t bytes = p->n_bytes - at < READ_BYTES ? p->n_bytes - at : READ_BYTES;
            if (jobs)
                jobs[n] = (read_job){p->file, p->off + at, (size_t)bytes, dst + at};
        }
        dst += p->n_bytes;
    }
    return n;
}

static fm_status read_all(fm_weights *w, fm_io *io, fm_pool *pool)
{
    int64_t n = 0;
    for (int64_t i = 0; i < w->n; i++)
        for (int a = 0; a < FM_AREA_COUNT && !fm_tensor_is_vector(w->entries[i].t->id); a++)
            n += add_jobs(w->entries[i].t, a, w->region, NULL);
    void *mem;
    FM_TRY(fm_alloc((size_t)(n + 1) * sizeof(read_job), &mem));
    read_job *jobs = mem;
    n = 0;
    for (int64_t i = 0; i < w->n; i++)
        for (int a = 0; a < FM_AREA_COUNT && !fm_tensor_is_vector(w->entries[i].t->id); a++)
            n += add_jobs(w->entries[i].t, a, w->region + w->entries[i].off[a], jobs + n);
    read_ctx c = {.io = io, .jobs = jobs};
    atomic_init(&c.failed, -1);
    fm_parallel_for(pool, n, read_task, &c);
    /* A message belongs to this thread, so the failed read is tried again here. */
    const int64_t failed = atomic_load(&c.failed);
    const fm_status s =
        failed < 0 ? FM_OK
                   : fm_io_read_sync(io, jobs[failed].file, jobs[failed].off, jobs[failed].bytes, jobs[failed].dst);
    fm_free(jobs);
    return s;
}

static fm_status read_vector(const entry *e, fm_io *io, float *y)
{
    const fm_tensor_desc *t = e->t;
    const int64_t n = t->format.n_rows * t->format.n_cols;
    void *raw;
    FM_TRY(fm_alloc((size_t)fm_format_area_bytes(&t->format, FM_AREA_CODES) + 1, &raw));
    fm_status s = FM_OK;
    size_t at = 0;
    for (int64_t i = 0; i < t->n_pieces[0] && s == FM_OK; i++) {
        const fm_piece *p = &t->pieces[0][i];
        s = fm_io_read_sync(io, p->file, p->off, (size_t)p->n_bytes, (uint8_t *)raw + at);
        at += (size_t)p->n_bytes;
    }
    if (s == FM_OK) {
        const fm_quant_row row = {.codes = raw};
        fm_quant_get((fm_quant)t->format.quant)->decode_ref(&row, n, y);
        for (int64_t i = 0; t->add_one && i < n; i++)
            y[i] += 1;
    }
    fm_free(raw);
    return s;
}

/* ---- NaN ------------------------------------------------------------------------------------------ */

/* Index of the first NaN or infinity among n numbers of a plain format, -1 if none. */
static int64_t first_nonfinite(const uint8_t *p, fm_quant q, int64_t n)
{
    if (q == FM_QUANT_F32) {
        for (int64_t i = 0; i < n; i++) {
            uint32_t v;
            memcpy(&v, p + 4 * i, 4);
            if ((v & 0x7f800000u) == 0x7f800000u)
                return i;
        }
        return -1;
    }
    const uint16_t mask = q == FM_QUANT_F16 ? 0x7c00 : 0x7f80;
    for (int64_t i = 0; i < n; i++) {
        uint16_t v;
        memcpy(&v, p + 2 * i, 2);
        if ((v & mask) == mask)
            return i;
    }
    return -1;
}

static int64_t find_bad(const fm_format *f, const uint8_t *const area[FM_AREA_COUNT], int *bad_area)
{
    const bool affine = fm_quant_get((fm_quant)f->quant)->affine;
    for (int a = affine ? FM_AREA_SCALES : FM_AREA_CODES; a < (affine ? FM_AREA_COUNT : FM_AREA_SCALES); a++) {
        const fm_quant q = (fm_quant)(affine ? f->scale_quant : f->quant);
        const int64_t n = fm_format_area_bytes(f, a) / (fm_quant_get(q)->bits / 8);
        const int64_t at = first_nonfinite(area[a], q, n);
        if (at >= 0) {
            *bad_area = a;
            return at;
        }
    }
    return -1;
}

fm_status fm_format_check_finite(const fm_format *f, const uint8_t *const area[FM_AREA_COUNT], const char *path,
                                 const char *source)
{
    int bad;
    const int64_t at = find_bad(f, area, &bad);
    if (at < 0)
        return FM_OK;
    static const char *const names[] = {"weights", "scales", "biases"};
    return fm_fail_path(FM_ERR_FORMAT, 0, path, "%s: %s: element %" PRId64 " of its %s is NaN or infinite", path, source,
                        at, names[bad]);
}

typedef struct finite_ctx {
    const fm_weights *w;
    atomic_llong bad; /* entry index, -1 */
} finite_ctx;

static void areas_of(const fm_weights *w, int64_t i, const uint8_t *area[FM_AREA_COUNT])
{
    for (int a = 0; a < FM_AREA_COUNT; a++)
        area[a] = w->region + w->entries[i].off[a];
}

static void finite_task(void *p, int64_t i, int worker)
{
    (void)worker;
    finite_ctx *c = p;
    const entry *e = &c->w->entries[i];
    const uint8_t *area[FM_AREA_COUNT];
    areas_of(c->w, i, area);
    int bad;
    if (fm_tensor_is_vector(e->t->id)
            ? first_nonfinite(area[0], FM_QUANT_F32, e->t->format.n_rows * e->t->format.n_cols) >= 0
            : find_bad(&e->t->format, area, &bad) >= 0)
        atomic_store(&c->bad, i);
}

static fm_status check_finite(const fm_model_desc *d, const fm_weights *w, fm_pool *pool)
{
    finite_ctx c = {.w = w};
    atomic_init(&c.bad, -1);
    fm_parallel_for(pool, w->n, finite_task, &c);
    const int64_t i = atomic_load(&c.bad);
    if (i < 0)
        return FM_OK;
    const fm_tensor_desc *t = w->entries[i].t;
    const char *path = t->n_pieces[0] > 0 ? d->files[t->pieces[0][0].file].path : "";
    if (fm_tensor_is_vector(t->id))
        return fm_fail_path(FM_ERR_FORMAT, 0, path, "%s: %s holds NaN or infinity", path, t->source);
    const uint8_t *area[FM_AREA_COUNT];
    areas_of(w, i, area);
    return fm_format_check_finite(&t->format, area, path, t->source);
}

/* ---- opening and finding ---------------------------------------------------------------------------- */

static int by_layer_and_id(const void *a, const void *b)
{
    const fm_tensor_desc *x = ((const entry *)a)->t, *y = ((const entry *)b)->t;
    if (x->layer != y->layer)
        return x->layer < y->layer ? -1 : 1;
    return x->id - y->id;
}

static fm_status load(fm_weights *w, const fm_model_desc *d, fm_io *io, fm_pool *pool)
{
    size_t used = 0;
    for (int64_t i = 0; i < d->n_tensors; i++) {
        w->entries[i].t = &d->tensors[i];
        FM_TRY(place(&d->tensors[i], &used, w->entries[i].off));
    }
    w->bytes = used;
    void *region;
    FM_TRY(w->be->v->alloc(w->be, used > 0 ? used : 1, FM_USAGE_WEIGHTS, &region));
    w->region = region;
    FM_TRY(read_all(w, io, pool));
    for (int64_t i = 0; i < w->n; i++) {
        entry *e = &w->entries[i];
        const fm_format *f = &e->t->format;
        if (fm_tensor_is_vector(e->t->id))
            FM_TRY(read_vector(e, io, (float *)(void *)(w->region + e->off[0])));
        else {
            const bool affine = fm_quant_get((fm_quant)f->quant)->affine;
            e->mat = fm_mat_make((fm_quant)f->quant, f->group, (fm_quant)f->scale_quant, f->n_rows, f->n_cols,
                                 w->region + e->off[0], affine ? w->region + e->off[1] : NULL,
                                 affine ? w->region + e->off[2] : NULL);
        }
    }
    qsort(w->entries, (size_t)w->n, sizeof(entry), by_layer_and_id);
    return check_finite(d, w, pool);
}

fm_status fm_weights_open(const fm_model_desc *d, fm_io *io, fm_backend *be, fm_pool *pool, fm_weights **out)
{
    *out = NULL;
    void *mem, *entries;
    FM_TRY(fm_alloc(sizeof(fm_weights), &mem));
    fm_weights *w = mem;
    fm_status s = fm_alloc((size_t)(d->n_tensors + 1) * sizeof(entry), &entries);
    if (s != FM_OK) {
        fm_free(w);
        return s;
    }
    *w = (fm_weights){.be = be, .entries = entries, .n = d->n_tensors};
    s = load(w, d, io, pool);
    if (s != FM_OK) {
        fm_weights_close(w);
        return s;
    }
    *out = w;
    return FM_OK;
}

void fm_weights_close(fm_weights *w)
{
    if (!w)
        return;
    if (w->region)
        w->be->v->free(w->be, w->region, w->bytes > 0 ? w->bytes : 1, FM_USAGE_WEIGHTS);
    fm_free(w->entries);
    fm_free(w);
}

static const entry *find(const fm_weights *w, int id, int32_t layer)
{
    int64_t lo = 0, hi = w->n;
    while (lo < hi) {
        const int64_t mid = (lo + hi) / 2;
        const fm_tensor_desc *t = w->entries[mid].t;
        if (t->layer < layer || (t->layer == layer && t->id < id))
            lo = mid + 1;
        else
            hi = mid;
    }
    if (lo < w->n && w->entries[lo].t->layer == layer && w->entries[lo].t->id == id)
        return &w->entries[lo];
    return NULL;
}

const fm_mat *fm_weights_mat(const fm_weights *w, int id, int32_t layer)
{
    const entry *e = find(w, id, layer);
    return e && !fm_tensor_is_vector(id) ? &e->mat : NULL;
}

const float *fm_weights_vec(const fm_weights *w, int id, int32_t layer)
{
    const entry *e = find(w, id, layer);
    return e && fm_tensor_is_vector(id) ? (const float *)(const void *)(w->region + e->off[0]) : NULL;
}

const fm_tensor_desc *fm_weights_desc(const fm_weights *w, int id, int32_t layer)
{
    const entry *e = find(w, id, layer);
    return e ? e->t : NULL;
}
