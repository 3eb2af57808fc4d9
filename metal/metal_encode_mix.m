/* Mixers: attention and Gated DeltaNet, span by span; short spans of all sequences share one attention dispatch. */
#include "metal_encode.h"

static const fm_metal_constants plain = {{0}};

static fm_metal_constants with_dim(int64_t dim)
{
    fm_metal_constants c = {{0}};
    c.v[FM_FC_DIM] = (fm_u32)dim;
    return c;
}

static fm_status store_rows(fm_metal *m, const fm_attention_args *a, int s)
{
    const int64_t nkv = a->a.n_kv_heads, hd = a->a.head_dim, width = nkv * hd;
    const fm_span *sp = &a->spans[s];
    const int64_t cache = nkv * a->kv[s].capacity * hd * 4, fresh = ((sp->row0 + sp->n - 1) * a->ld_kv + width) * 4;
    fm_metal_call c;
    FM_TRY(fm_metal_call_begin(m, "kv_store", plain, &c));
    FM_TRY(fm_metal_bind(&c, 0, a->k, fresh, "attention k"));
    FM_TRY(fm_metal_bind(&c, 1, a->v, fresh, "attention v"));
    FM_TRY(fm_metal_bind(&c, 2, a->kv[s].k, cache, "the K cache"));
    FM_TRY(fm_metal_bind(&c, 3, a->kv[s].v, cache, "the V cache"));
    const fm_store_args args = {(fm_u32)nkv,      (fm_u32)hd,    (fm_u32)a->ld_kv, (fm_u32)a->kv[s].capacity,
                                (fm_u32)sp->row0, (fm_u32)sp->n, (fm_u32)sp->pos0};
    fm_metal_bind_bytes(&c, 4, &args, sizeof args);
    fm_metal_run(&c, (width + 63) / 64, sp->n, 1, 64, 1);
    return FM_OK;
}

static fm_attend_args attend_args(const fm_attn_args *a)
{
    const fm_attend_args out = {
        .n_heads = (fm_u32)a->n_heads,
        .n_kv_heads = (fm_u32)a->n_kv_heads,
        .head_dim = (fm_u32)a->head_dim,
        .ld_q = (fm_u32)a->ld_q,
        .ld_q_head = (fm_u32)a->ld_q_head,
        .ld_y = (fm_u32)a->ld_y,
        .has_gate = a->gate != NULL,
        .scale = a->scale,
    };
    return out;
}

static fm_status bind_heads(const fm_metal_call *c, int index, const fm_attn_args *a, int64_t rows)
{
    const int64_t q = ((rows - 1) * a->ld_q + (a->n_heads - 1) * a->ld_q_head + a->head_dim) * 4;
    const int64_t y = ((rows - 1) * a->ld_y + a->n_heads * a->head_dim) * 4;
    FM_TRY(fm_metal_bind(c, index, a->q, q, "attention q"));
    FM_TRY(fm_metal_bind(c, index + 1, a->gate ? a->gate : a->q, q, "attention gate"));
    return fm_metal_bind(c, index + 2, a->y, y, "attention y");
}

static fm_status attend_tiled(fm_metal *m, const fm_attention_args *a, int s)
{
    const fm_span *sp = &a->spans[s];
    const int64_t cache = a->a.n_kv_heads * a->kv[s].capacity * a->a.head_dim * 4;
    fm_metal_call c;
    FM_TRY(fm_metal_call_begin(m, "attend_tiles", with_dim(a->a.head_dim), &c));
    FM_TRY(fm_metal_bind(&c, 0, a->kv[s].k, cache, "the K cache"));
    FM_TRY(fm_metal_bind(&c, 1, a->kv[s].v, cache, "the V cache"));
    FM_TRY(bind_heads(&c, 2, &a->a, sp->row0 + sp->n));
    fm_attend_args args = attend_args(&a->a);
    args.row0 = (fm_u32)sp->row0;
    args.n = (fm_u32)sp->n;
    args.pos0 = (fm_u32)sp->pos0;
    args.capacity = (fm_u32)a->kv[s].capacity;
    fm_metal_bind_bytes(&c, 5, &args, sizeof args);
    const int64_t flat = sp->n * (a->a.n_heads / a->a.n_kv_heads);
    fm_metal_run(&c, (flat + FM_ATTN_QUERIES - 1) / FM_ATTN_QUERIES, a->a.n_kv_heads, 1,
                 FM_ATTN_QUERIES * FM_ATTN_KEYS, 1);
    return FM_OK;
}

/* Positions of a part: few enough that one long sequence fills a GPU, so many that merging stays cheap. */
static fm_u32 part_length(int64_t n_pos)
{
    const int64_t least = (n_pos + FM_ATTN_MOST_PARTS - 1) / FM_ATTN_MOST_PARTS;
    return (fm_u32)(least > FM_ATTN_LEAST_PART ? least : FM_ATTN_LEAST_PART);
}

/* One dispatch for the rows of all short spans, n_rows > 0 of them; a second where rows came in parts. */
static fm_status attend_short(fm_metal *m, const fm_attention_args *a, int64_t n_rows)
{
    void *host;
    fm_metal_place table;
    FM_TRY(fm_metal_upload(m, sizeof(fm_attn_row) * (size_t)n_rows, &host, &table));
    fm_attn_row *to = host;
    int64_t last = 0;
    fm_attend_args args = attend_args(&a->a);
    args.max_parts = 1;
    for (int s = 0; s < a->n_spans; s++) {
        const fm_span *sp = &a->spans[s];
        if (sp->n > fm_metal_tune.short_span)
            continue;
        const size_t cache = (size_t)(a->a.n_kv_heads * a->kv[s].capacity * a->a.head_dim) * 4;
        fm_attn_row row = {.capacity = (fm_u32)a->kv[s].capacity};
        FM_TRY(fm_metal_address(m, a->kv[s].k, cache, "the K cache", &row.k));
        FM_TRY(fm_metal_address(m, a->kv[s].v, cache, "the V cache", &row.v));
        for (int64_t t = 0; t < sp->n; t++) {
            row.row = (fm_u32)(sp->row0 + t);
            row.n_pos = (fm_u32)(sp->pos0 + t + 1);
            row.part = part_length(row.n_pos);
            const fm_u32 parts = (row.n_pos + row.part - 1) / row.part;
            args.max_parts = parts > args.max_parts ? parts : args.max_parts;
            *to++ = row;
            last = sp->row0 + t > last ? sp->row0 + t : last;
        }
    }
    fm_metal_call c;
    FM_TRY(fm_metal_call_begin(m, "attend_rows", with_dim(a->a.head_dim), &c));
    fm_metal_bind_place(&c, 0, table);
    FM_TRY(bind_heads(&c, 1, &a->a, last + 1));
    fm_metal_bind_bytes(&c, 4, &args, sizeof args);
    fm_metal_place parts = table; /* rows of one part write none */
    if (args.max_parts > 1) {
        const int64_t floats = n_rows * a->a.n_heads * args.max_parts * (a->a.head_dim + 2);
        FM_TRY(fm_metal_scratch(m, 2, (size_t)floats * 4, &parts));
    }
    fm_metal_bind_place(&c, 5, parts);
    fm_metal_run(&c, a->a.n_heads, n_rows, args.max_parts, FM_WIDTH * FM_ATTN_SIMDGROUPS, 1);
    if (args.max_parts == 1)
        return FM_OK;
    FM_TRY(fm_metal_call_begin(m, "attend_merge", with_dim(a->a.head_dim), &c));
    fm_metal_bind_place(&c, 0, table);
    FM_TRY(bind_heads(&c, 1, &a->a, last + 1));
    fm_metal_bind_bytes(&c, 4, &args, sizeof args);
    fm_metal_bind_place(&c, 5, parts);
    fm_metal_run(&c, a->a.n_heads, n_rows, 1, FM_ATTN_MERGE, 1);
    return FM_OK;
}

fm_status fm_metal_attention(fm_backend *b, const fm_attention_args *a)
{
    fm_metal *m = (fm_metal *)b;
    if (a->a.head_dim > FM_ATTN_MAX_DIM)
        return fm_fail(FM_ERR_UNSUPPORTED, "metal attention: head_dim %lld, at most %d", (long long)a->a.head_dim,
                       FM_ATTN_MAX_DIM);
    int64_t n_short = 0;
    for (int s = 0; s < a->n_spans; s++) {
        FM_TRY(store_rows(m, a, s));
        if (a->spans[s].n <= fm_metal_tune.short_span)
            n_short += a->spans[s].n;
        else
            FM_TRY(attend_tiled(m, a, s));
    }
    return n_short > 0 ? attend_short(m, a, n_short) : FM_OK;
}

/* ---- DeltaNet ------------------------------------------------------------------------------------- */

fm_status fm_metal_conv(fm_backend *b, const fm_conv_args *a)
{
    const int64_t hist = (a->kern - 1) * a->n_ch * 4;
    for (int s = 0; s < a->n_spans; s++) {
        const fm_span *sp = &a->spans[s];
        fm_metal_call c;
        FM_TRY(fm_metal_call_begin((fm_metal *)b, "conv_silu", plain, &c));
        FM_TRY(fm_metal_bind(&c, 0, a->m + sp->row0 * a->ldm, ((sp->n - 1) * a->ldm + a->n_ch) * 4, "conv input"));
        FM_TRY(fm_metal_bind(&c, 1, a->w, a->n_ch * a->kern * 4, "conv weight"));
        FM_TRY(fm_metal_bind(&c, 2, a->hist_in[s], hist, "conv state"));
        FM_TRY(fm_metal_bind(&c, 3, a->hist_out[s], hist, "conv state"));
        FM_TRY(fm_metal_bind(&c, 4, a->y + sp->row0 * a->ldy, ((sp->n - 1) * a->ldy + a->n_ch) * 4, "conv output"));
        const fm_conv_silu_args args = {(fm_u32)sp->n, (fm_u32)a->n_ch, (fm_u32)a->kern, (fm_u32)a->ldm,
                                        (fm_u32)a->ldy};
        fm_metal_bind_bytes(&c, 5, &args, sizeof args);
        fm_metal_run(&c, (a->n_ch + 63) / 64, 1, 1, 64, 1);
    }
    return FM_OK;
}

/* The three dispatches of one sequence. */
typedef struct delta_call {
    fm_metal *m;
    const fm_delta_args *a;
    fm_delta_shape shape;
    const fm_span *span;
    fm_metal_place qk, gates;
} delta_call;

static int64_t rows_bytes(const fm_span *sp, int64_t ld, int64_t width) { return ((sp->n - 1) * ld + width) * 4; }

static fm_status delta_prepare(const delta_call *d)
{
    const fm_delta_args *a = d->a;
    const fm_span *sp = d->span;
    const int64_t q_width = 2 * a->n_k_heads * a->dk, hv = a->n_v_heads;
    fm_metal_call c;
    FM_TRY(fm_metal_call_begin(d->m, "delta_prepare", plain, &c));
    FM_TRY(fm_metal_bind(&c, 0, a->qkv + sp->row0 * a->ld_qkv, rows_bytes(sp, a->ld_qkv, q_width), "delta qkv"));
    FM_TRY(fm_metal_bind(&c, 1, a->a + sp->row0 * a->ld_ab, rows_bytes(sp, a->ld_ab, hv), "delta a"));
    FM_TRY(fm_metal_bind(&c, 2, a->b + sp->row0 * a->ld_ab, rows_bytes(sp, a->ld_ab, hv), "delta b"));
    FM_TRY(fm_metal_bind(&c, 3, a->A_log, hv * 4, "delta A_log"));
    FM_TRY(fm_metal_bind(&c, 4, a->dt_bias, hv * 4, "delta dt_bias"));
    fm_metal_bind_place(&c, 5, d->qk);
    fm_metal_bind_place(&c, 6, d->gates);
    fm_metal_bind_bytes(&c, 7, &d->shape, sizeof d->shape);
    fm_metal_run(&c, a->n_k_heads > hv ? a->n_k_heads : hv, sp->n, 1, FM_WIDTH, 1);
    return FM_OK;
}

static fm_status delta_core(const delta_call *d, const float *s_in, float *s_out)
{
    const fm_delta_args *a = d->a;
    const fm_span *sp = d->span;
    const int64_t hv = a->n_v_heads, width = 2 * a->n_k_heads * a->dk + hv * a->dv, state = hv * a->dk * a->dv * 4;
    const bool chunked = sp->n >= fm_metal_tune.chunk_rows && a->dk <= FM_DELTA_CHUNK_DK;
    fm_metal_call c;
    FM_TRY(fm_metal_call_begin(d->m, chunked ? "delta_chunk" : "delta_step", with_dim(a->dk), &c));
    fm_metal_bind_place(&c, 0, d->qk);
    fm_metal_bind_place(&c, 1, d->gates);
    FM_TRY(fm_metal_bind(&c, 2, a->qkv + sp->row0 * a->ld_qkv, rows_bytes(sp, a->ld_qkv, width), "delta qkv"));
    FM_TRY(fm_metal_bind(&c, 3, s_in, state, "delta state"));
    FM_TRY(fm_metal_bind(&c, 4, s_out, state, "delta state"));
    FM_TRY(fm_metal_bind(&c, 5, a->y + sp->row0 * a->ld_y, rows_bytes(sp, a->ld_y, hv * a->dv), "delta y"));
    fm_metal_bind_bytes(&c, 6, &d->shape, sizeof d->shape);
    fm_metal_run(&c, (a->dv + FM_WIDTH - 1) / FM_WIDTH, hv, 1, FM_WIDTH * FM_DELTA_SIMDGROUPS, 1);
    return FM_OK;
}

static fm_status delta_output(const delta_call *d)
{
    const fm_delta_args *a = d->a;
    const fm_span *sp = d->span;
    const int64_t width = a->n_v_heads * a->dv;
    fm_metal_call c;
    FM_TRY(fm_metal_call_begin(d->m, "delta_output", plain, &c));
    FM_TRY(fm_metal_bind(&c, 0, a->y + sp->row0 * a->ld_y, rows_bytes(sp, a->ld_y, width), "delta y"));
    FM_TRY(fm_metal_bind(&c, 1, a->z + sp->row0 * a->ld_z, rows_bytes(sp, a->ld_z, width), "delta z"));
    FM_TRY(fm_metal_bind(&c, 2, a->norm_w, a->dv * 4, "delta norm"));
    fm_metal_bind_bytes(&c, 3, &d->shape, sizeof d->shape);
    fm_metal_run(&c, a->n_v_heads, sp->n, 1, FM_WIDTH, 1);
    return FM_OK;
}

fm_status fm_metal_delta(fm_backend *b, const fm_delta_batch *batch)
{
    const fm_delta_args *a = &batch->a;
    if (a->dk > FM_DELTA_MAX_DK)
        return fm_fail(FM_ERR_UNSUPPORTED, "metal delta: key head dim %lld, at most %d", (long long)a->dk,
                       FM_DELTA_MAX_DK);
    delta_call d = {.m = (fm_metal *)b, .a = a};
    int64_t most = 0;
    for (int s = 0; s < batch->n_spans; s++)
        most = batch->spans[s].n > most ? batch->spans[s].n : most;
    FM_TRY(fm_metal_scratch(d.m, 0, (size_t)(most * 2 * a->n_k_heads * a->dk) * 4, &d.qk));
    FM_TRY(fm_metal_scratch(d.m, 1, (size_t)(most * 2 * a->n_v_heads) * 4, &d.gates));
    for (int s = 0; s < batch->n_spans; s++) {
        d.span = &batch->spans[s];
        d.shape = (fm_delta_shape){
            .n = (fm_u32)d.span->n,
            .n_k_heads = (fm_u32)a->n_k_heads,
            .n_v_heads = (fm_u32)a->n_v_heads,
            .dk = (fm_u32)a->dk,
            .dv = (fm_u32)a->dv,
            .ld_qkv = (fm_u32)a->ld_qkv,
            .ld_z = (fm_u32)a->ld_z,
            .ld_ab = (fm_u32)a->ld_ab,
            .ld_y = (fm_u32)a->ld_y,
            .eps = a->eps,
        };
        FM_TRY(delta_prepare(&d));
        FM_TRY(delta_core(&d, batch->S_in[s], batch->S_out[s]));
        FM_TRY(delta_output(&d));
    }
    return FM_OK;
}
