/* Calls, and the ops that are one dispatch each. */
#include "metal_encode.h"

#include <math.h>
#include <string.h>

fm_metal_tuning fm_metal_tune = {.vec_rows = 4, .short_span = 2, .chunk_rows = FM_DELTA_CHUNK / 2};

static const fm_metal_constants plain = {{0}};

fm_status fm_metal_call_begin(fm_metal *m, const char *kernel, fm_metal_constants c, fm_metal_call *out)
{
    id<MTLComputePipelineState> state;
    FM_TRY(fm_metal_encoder(m, &out->encoder));
    FM_TRY(fm_metal_pipeline_get(m, kernel, c, &state));
    [out->encoder setComputePipelineState:state];
    out->m = m;
    out->kernel = kernel;
    return FM_OK;
}

void fm_metal_bind_place(const fm_metal_call *c, int index, fm_metal_place place)
{
    [c->encoder setBuffer:place.buffer offset:place.offset atIndex:(NSUInteger)index];
}

fm_status fm_metal_bind(const fm_metal_call *c, int index, const void *p, int64_t bytes, const char *what)
{
    fm_metal_place place;
    FM_TRY(fm_metal_find(c->m, p, (size_t)bytes, what, &place));
    fm_metal_bind_place(c, index, place);
    return FM_OK;
}

static fm_status bind_copy(const fm_metal_call *c, int index, const void *p, int64_t bytes, const char *what)
{
    fm_metal_place place;
    FM_TRY(fm_metal_find_or_copy(c->m, p, (size_t)bytes, what, &place));
    fm_metal_bind_place(c, index, place);
    return FM_OK;
}

void fm_metal_bind_bytes(const fm_metal_call *c, int index, const void *p, size_t bytes)
{
    [c->encoder setBytes:p length:bytes atIndex:(NSUInteger)index];
}

void fm_metal_run(const fm_metal_call *c, int64_t gx, int64_t gy, int64_t gz, int tx, int ty)
{
    const MTLSize groups = MTLSizeMake((NSUInteger)gx, (NSUInteger)gy, (NSUInteger)gz);
    const MTLSize threads = MTLSizeMake((NSUInteger)tx, (NSUInteger)ty, 1);
    [c->encoder dispatchThreadgroups:groups threadsPerThreadgroup:threads];
    c->m->counters.dispatches++;
}

/* Counts in the shaders are 32 bits wide. */
static fm_status check_count(const char *op, int64_t n)
{
    if (n < 0 || n > INT32_MAX)
        return fm_fail(FM_ERR_UNSUPPORTED, "metal %s: %lld elements, at most %d", op, (long long)n, INT32_MAX);
    return FM_OK;
}

enum { LINE = 256 }; /* threads of an element-wise group */

static int64_t groups_of(int64_t n, int64_t per) { return (n + per - 1) / per; }

fm_status fm_metal_rmsnorm(fm_backend *b, const float *x, int64_t ldx, const float *w, float eps, float *y,
                           int64_t ldy, int64_t n, int64_t n_cols)
{
    fm_metal_call c;
    FM_TRY(fm_metal_call_begin((fm_metal *)b, "rms_norm", plain, &c));
    FM_TRY(fm_metal_bind(&c, 0, x, ((n - 1) * ldx + n_cols) * 4, "rmsnorm x"));
    FM_TRY(fm_metal_bind(&c, 1, w, n_cols * 4, "rmsnorm weight"));
    FM_TRY(fm_metal_bind(&c, 2, y, ((n - 1) * ldy + n_cols) * 4, "rmsnorm y"));
    const fm_norm_args args = {(fm_u32)n_cols, (fm_u32)ldx, (fm_u32)ldy, eps};
    fm_metal_bind_bytes(&c, 3, &args, sizeof args);
    fm_metal_run(&c, n, 1, 1, FM_NORM_THREADS, 1);
    return FM_OK;
}

fm_status fm_metal_clip(fm_backend *b, float *x, int64_t n, float limit)
{
    FM_TRY(check_count("clip", n));
    fm_metal_call c;
    FM_TRY(fm_metal_call_begin((fm_metal *)b, "clip_abs", plain, &c));
    FM_TRY(fm_metal_bind(&c, 0, x, n * 4, "clip x"));
    const fm_rows_args args = {(fm_u32)n, 0, limit};
    fm_metal_bind_bytes(&c, 1, &args, sizeof args);
    fm_metal_run(&c, groups_of(n, LINE), 1, 1, LINE, 1);
    return FM_OK;
}

fm_status fm_metal_rope(fm_backend *b, const fm_rope_args *a)
{
    fm_metal *m = (fm_metal *)b;
    const int64_t half = a->rot / 2;
    for (int s = 0; s < a->n_spans; s++) {
        const fm_span *sp = &a->spans[s];
        void *host;
        fm_metal_place table;
        FM_TRY(fm_metal_upload(m, (size_t)(sp->n * half) * 8, &host, &table));
        float *cs = host;
        for (int64_t t = 0; t < sp->n; t++)
            for (int64_t i = 0; i < half; i++) {
                const double angle = (double)(sp->pos0 + t) * a->inv_freq[i];
                *cs++ = (float)cos(angle);
                *cs++ = (float)sin(angle);
            }
        fm_metal_call c;
        FM_TRY(fm_metal_call_begin(m, "rotary", plain, &c));
        const int64_t floats = (sp->n - 1) * a->ld + (a->n_heads - 1) * a->ld_head + a->rot;
        FM_TRY(fm_metal_bind(&c, 0, a->x + sp->row0 * a->ld, floats * 4, "rope x"));
        fm_metal_bind_place(&c, 1, table);
        const fm_rotary_args args = {(fm_u32)sp->n, (fm_u32)a->ld, (fm_u32)a->ld_head, (fm_u32)a->n_heads,
                                     (fm_u32)half};
        fm_metal_bind_bytes(&c, 2, &args, sizeof args);
        fm_metal_run(&c, groups_of(half, 32), a->n_heads, sp->n, 32, 1);
    }
    return FM_OK;
}

fm_status fm_metal_swiglu(fm_backend *b, const float *gate, const float *up, float *y, int64_t n)
{
    FM_TRY(check_count("swiglu", n));
    fm_metal_call c;
    FM_TRY(fm_metal_call_begin((fm_metal *)b, "swiglu", plain, &c));
    FM_TRY(fm_metal_bind(&c, 0, gate, n * 4, "swiglu gate"));
    FM_TRY(fm_metal_bind(&c, 1, up, n * 4, "swiglu up"));
    FM_TRY(fm_metal_bind(&c, 2, y, n * 4, "swiglu y"));
    const fm_rows_args args = {(fm_u32)n, 0, 0};
    fm_metal_bind_bytes(&c, 3, &args, sizeof args);
    fm_metal_run(&c, groups_of(n, LINE), 1, 1, LINE, 1);
    return FM_OK;
}

fm_status fm_metal_add_gated(fm_backend *b, const float *x, const float *gate, float *y, int64_t n, int64_t n_cols)
{
    fm_metal_call c;
    FM_TRY(fm_metal_call_begin((fm_metal *)b, "add_gated", plain, &c));
    FM_TRY(fm_metal_bind(&c, 0, x, n * n_cols * 4, "add_gated x"));
    FM_TRY(fm_metal_bind(&c, 1, gate ? gate : x, n * 4, "add_gated gate"));
    FM_TRY(fm_metal_bind(&c, 2, y, n * n_cols * 4, "add_gated y"));
    const fm_rows_args args = {(fm_u32)n, (fm_u32)n_cols, gate ? 1.0f : 0.0f};
    fm_metal_bind_bytes(&c, 3, &args, sizeof args);
    fm_metal_run(&c, groups_of(n_cols, LINE), n, 1, LINE, 1);
    return FM_OK;
}

fm_status fm_metal_combine(fm_backend *b, const fm_combine_args *a)
{
    fm_metal_call c;
    FM_TRY(fm_metal_call_begin((fm_metal *)b, "combine", plain, &c));
    FM_TRY(fm_metal_bind(&c, 0, a->y, a->n * a->hidden * 4, "combine y"));
    FM_TRY(fm_metal_bind(&c, 1, a->part, a->n_parts * a->hidden * 4, "combine parts"));
    FM_TRY(bind_copy(&c, 2, a->start, (a->n + 1) * 4, "combine start"));
    FM_TRY(bind_copy(&c, 3, a->index, a->n_parts * 4, "combine index"));
    FM_TRY(bind_copy(&c, 4, a->weight, a->n_parts * 4, "combine weight"));
    const fm_rows_args args = {(fm_u32)a->n, (fm_u32)a->hidden, 0};
    fm_metal_bind_bytes(&c, 5, &args, sizeof args);
    fm_metal_run(&c, groups_of(a->hidden, LINE), a->n, 1, LINE, 1);
    return FM_OK;
}

fm_status fm_metal_route(fm_backend *b, const fm_route_args *a, const float *logits, int64_t n, int32_t *ids,
                         float *weights)
{
    if (a->n_experts > FM_ROUTE_MAX_EXPERTS || a->n_group > FM_ROUTE_MAX_GROUPS)
        return fm_fail(FM_ERR_UNSUPPORTED, "metal route: %lld experts in %lld groups, at most %d in %d",
                       (long long)a->n_experts, (long long)a->n_group, FM_ROUTE_MAX_EXPERTS, FM_ROUTE_MAX_GROUPS);
    fm_metal_call c;
    FM_TRY(fm_metal_call_begin((fm_metal *)b, "route", plain, &c));
    FM_TRY(fm_metal_bind(&c, 0, logits, n * a->n_experts * 4, "route logits"));
    FM_TRY(bind_copy(&c, 1, a->bias ? a->bias : logits, a->n_experts * 4, "route bias"));
    FM_TRY(fm_metal_bind(&c, 2, ids, n * a->k * 4, "route ids"));
    FM_TRY(fm_metal_bind(&c, 3, weights, n * a->k * 4, "route weights"));
    const fm_topk_args args = {
        .n_experts = (fm_u32)a->n_experts,
        .k = (fm_u32)a->k,
        .sigmoid = a->sigmoid != 0,
        .renorm = a->renorm != 0,
        .has_bias = a->bias != NULL,
        .n_group = (fm_u32)(a->n_group > 1 ? a->n_group : 1),
        .topk_group = (fm_u32)(a->topk_group > 1 ? a->topk_group : 1),
        .eps = a->eps,
        .scale = a->scale,
    };
    fm_metal_bind_bytes(&c, 4, &args, sizeof args);
    fm_metal_run(&c, n, 1, 1, FM_WIDTH, 1);
    return FM_OK;
}

static fm_status mark(fm_metal *m, const float *x, int64_t n, int64_t n_cols, fm_metal_place marks)
{
    fm_metal_call c;
    FM_TRY(fm_metal_call_begin(m, "find_nonfinite", plain, &c));
    FM_TRY(fm_metal_bind(&c, 0, x, n * n_cols * 4, "find_nonfinite x"));
    fm_metal_bind_place(&c, 1, marks);
    const fm_rows_args args = {(fm_u32)n, (fm_u32)n_cols, 0};
    fm_metal_bind_bytes(&c, 2, &args, sizeof args);
    fm_metal_run(&c, n, 1, 1, FM_NORM_THREADS, 1);
    return FM_OK;
}

fm_status fm_metal_mark_nonfinite(fm_backend *b, const float *x, int64_t n, int64_t n_cols, uint32_t *marks)
{
    fm_metal_place place;
    FM_TRY(fm_metal_find((fm_metal *)b, marks, (size_t)n * 4, "marks", &place));
    return mark((fm_metal *)b, x, n, n_cols, place);
}

fm_status fm_metal_find_nonfinite(fm_backend *b, const float *x, int64_t n, int64_t n_cols, int64_t *row)
{
    fm_metal *m = (fm_metal *)b;
    *row = -1;
    if (n == 0)
        return fm_metal_sync(m);
    void *host;
    fm_metal_place place;
    FM_TRY(fm_metal_upload(m, (size_t)n * 4, &host, &place));
    memset(host, 0, (size_t)n * 4);
    FM_TRY(mark(m, x, n, n_cols, place));
    FM_TRY(fm_metal_sync(m));
    const fm_u32 *bad = host;
    for (int64_t r = 0; r < n && *row < 0; r++)
        if (bad[r])
            *row = r;
    return FM_OK;
}
