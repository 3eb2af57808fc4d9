/* backend/backend.h for Metal: ops are recorded into one command buffer and run by sync or flush. Every entry drains
 * what Metal autoreleases, so that a long generation holds no more objects than a short one. */
#include <string.h>

#include "backend/backend_impl.h"
#include "base/clock.h"
#include "base/mem.h"
#include "metal_encode.h"

/* An op inside its own pool, timed as encoding work. */
#define POOLED(b, call)                                                                                                \
    fm_status status;                                                                                                  \
    const int64_t t0 = fm_clock_ns();                                                                                  \
    @autoreleasepool {                                                                                                 \
        status = call;                                                                                                 \
    }                                                                                                                  \
    ((fm_metal *)(b))->counters.encode_ns += (uint64_t)(fm_clock_ns() - t0);                                           \
    return status

static fm_status op_embed(fm_backend *b, const fm_mat *W, const int32_t *ids, int64_t n, float *y, int64_t ldy)
{
    POOLED(b, n > 0 ? fm_metal_embed(b, W, ids, n, y, ldy) : FM_OK);
}

static fm_status op_rmsnorm(fm_backend *b, const float *x, int64_t ldx, const float *w, float eps, float *y,
                            int64_t ldy, int64_t n, int64_t n_cols)
{
    POOLED(b, n > 0 ? fm_metal_rmsnorm(b, x, ldx, w, eps, y, ldy, n, n_cols) : FM_OK);
}

static fm_status op_matmul(fm_backend *b, const float *x, int64_t ldx, int64_t n, const fm_matmul_item *items,
                           int n_items)
{
    POOLED(b, n > 0 && n_items > 0 ? fm_metal_matmul(b, x, ldx, n, items, n_items) : FM_OK);
}

static fm_status op_clip(fm_backend *b, float *x, int64_t n, float limit)
{
    POOLED(b, n > 0 ? fm_metal_clip(b, x, n, limit) : FM_OK);
}

static fm_status op_rope(fm_backend *b, const fm_rope_args *a) { POOLED(b, fm_metal_rope(b, a)); }

static fm_status op_attention(fm_backend *b, const fm_attention_args *a) { POOLED(b, fm_metal_attention(b, a)); }

static fm_status op_conv(fm_backend *b, const fm_conv_args *a) { POOLED(b, fm_metal_conv(b, a)); }

static fm_status op_delta(fm_backend *b, const fm_delta_batch *a) { POOLED(b, fm_metal_delta(b, a)); }

static fm_status op_swiglu(fm_backend *b, const float *gate, const float *up, float *y, int64_t n)
{
    POOLED(b, n > 0 ? fm_metal_swiglu(b, gate, up, y, n) : FM_OK);
}

static fm_status op_route(fm_backend *b, const fm_route_args *a, const float *logits, int64_t n, int32_t *ids,
                          float *weights)
{
    POOLED(b, n > 0 ? fm_metal_route(b, a, logits, n, ids, weights) : FM_OK);
}

static fm_status op_experts(fm_backend *b, const fm_expert_args *a) { POOLED(b, fm_metal_experts(b, a)); }

static fm_status op_combine(fm_backend *b, const fm_combine_args *a)
{
    POOLED(b, a->n > 0 && a->n_parts > 0 ? fm_metal_combine(b, a) : FM_OK);
}

static fm_status op_add_gated(fm_backend *b, const float *x, const float *gate, float *y, int64_t n, int64_t n_cols)
{
    POOLED(b, n > 0 ? fm_metal_add_gated(b, x, gate, y, n, n_cols) : FM_OK);
}

static fm_status op_find_nonfinite(fm_backend *b, const float *x, int64_t n, int64_t n_cols, int64_t *row)
{
    fm_status status;
    @autoreleasepool {
        status = fm_metal_find_nonfinite(b, x, n, n_cols, row);
    }
    return status;
}

/* ---- pipelining ------------------------------------------------------------------------------------- */

static fm_status op_tell(fm_backend *b, uint64_t *value) { POOLED(b, fm_metal_tell((fm_metal *)b, value)); }

static fm_status op_hold(fm_backend *b, uint64_t *value) { POOLED(b, fm_metal_hold((fm_metal *)b, value)); }

static fm_status op_experts_later(fm_backend *b, const fm_expert_later *a) { POOLED(b, fm_metal_experts_later(b, a)); }

static fm_status op_mark_nonfinite(fm_backend *b, const float *x, int64_t n, int64_t n_cols, uint32_t *marks)
{
    POOLED(b, n > 0 ? fm_metal_mark_nonfinite(b, x, n, n_cols, marks) : FM_OK);
}

static fm_status op_set_jobs(fm_backend *b, const fm_expert_later *a, const fm_expert_job *jobs, int n_jobs)
{
    POOLED(b, fm_metal_set_jobs(b, a, jobs, n_jobs));
}

static fm_status op_await(fm_backend *b, uint64_t value)
{
    fm_status status;
    @autoreleasepool {
        status = fm_metal_await((fm_metal *)b, value);
    }
    return status;
}

static void op_post(fm_backend *b, uint64_t value)
{
    @autoreleasepool {
        fm_metal_post((fm_metal *)b, value);
    }
}

/* ---- memory and commands -------------------------------------------------------------------------- */

static fm_caps op_caps(const fm_backend *b)
{
    const fm_caps out = {
        .unified_memory = true,
        .asynchronous = true,
        .pipelined = true,
        .max_bytes = ((const fm_metal *)b)->max_bytes,
        .max_buffer_bytes = ((const fm_metal *)b)->max_buffer_bytes,
        .device = ((const fm_metal *)b)->name,
    };
    return out;
}

static fm_status op_alloc(fm_backend *b, size_t bytes, fm_usage usage, void **out)
{
    fm_status status; /* unified memory: one kind for every usage */
    @autoreleasepool {
        status = fm_metal_alloc((fm_metal *)b, bytes, usage, out);
    }
    return status;
}

static void op_free(fm_backend *b, void *p, size_t bytes, fm_usage usage)
{
    (void)bytes;
    (void)usage;
    @autoreleasepool {
        fm_metal_free((fm_metal *)b, p);
    }
}

static fm_status op_begin(fm_backend *b)
{
    if (((fm_metal *)b)->lost)
        return fm_fail(FM_ERR_STATE, "backend 'metal': the device failed before; reopen the engine");
    return FM_OK; /* the first op opens the command buffer */
}

static void op_flush(fm_backend *b)
{
    @autoreleasepool {
        fm_metal_flush((fm_metal *)b);
    }
}

static fm_status op_sync(fm_backend *b)
{
    fm_status status;
    @autoreleasepool {
        status = fm_metal_sync((fm_metal *)b);
    }
    return status;
}

static void op_close(fm_backend *b)
{
    fm_metal *m = (fm_metal *)b;
    @autoreleasepool {
        fm_metal_pipelines_close(m);
        fm_metal_device_close(m);
    }
    fm_free(m);
}

static const fm_backend_vtable metal_vtable = {
    .version = FM_BACKEND_VERSION,
    .name = "metal",
    .close = op_close,
    .caps = op_caps,
    .alloc = op_alloc,
    .free = op_free,
    .begin = op_begin,
    .flush = op_flush,
    .sync = op_sync,
    .embed = op_embed,
    .rmsnorm = op_rmsnorm,
    .matmul = op_matmul,
    .clip = op_clip,
    .rope = op_rope,
    .attention = op_attention,
    .conv = op_conv,
    .delta = op_delta,
    .swiglu = op_swiglu,
    .route = op_route,
    .experts = op_experts,
    .combine = op_combine,
    .add_gated = op_add_gated,
    .find_nonfinite = op_find_nonfinite,
    .tell = op_tell,
    .hold = op_hold,
    .experts_later = op_experts_later,
    .mark_nonfinite = op_mark_nonfinite,
    .await = op_await,
    .set_jobs = op_set_jobs,
    .post = op_post,
};

fm_status fm_backend_open_metal(const fm_backend_opts *opts, fm_backend **out)
{
    (void)opts; /* the pool is for the CPU */
    *out = NULL;
    void *p;
    FM_TRY(fm_alloc(sizeof(fm_metal), &p));
    fm_metal *m = p;
    m->base.v = &metal_vtable;
    fm_status status;
    @autoreleasepool {
        status = fm_metal_device_open(m);
        if (status == FM_OK)
            status = fm_metal_pipelines_open(m);
    }
    if (status != FM_OK) {
        op_close(&m->base);
        return status;
    }
    *out = &m->base;
    return FM_OK;
}
