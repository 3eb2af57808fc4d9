/* Gated attention with rotary positions, GQA and a KV cache per sequence.
 * q_proj's rows are [query, gate] per head when the model gates its output. Source: tests/oracle/attention.py. */
#include <math.h>

#include "base/clock.h"
#include "model/block.h"

void fm_scratch_attn(fm_scratch *s, const fm_config *c, int64_t rows, fm_arena *a)
{
    s->q = fm_take_floats(a, rows, fm_arch_dim(c, FM_DIM_Q));
    s->k = fm_take_floats(a, rows, fm_arch_dim(c, FM_DIM_KV));
    s->v = fm_take_floats(a, rows, fm_arch_dim(c, FM_DIM_KV));
    s->attn = fm_take_floats(a, rows, fm_arch_dim(c, FM_DIM_ATTN));
}

static fm_status norm_heads(fm_model *m, const fm_layer *y, int64_t n, int64_t ld_q, int64_t ld_head)
{
    const fm_config *c = &m->c;
    const fm_backend_vtable *v = m->be->v;
    const float eps = (float)c->rms_norm_eps;
    const int64_t kv = fm_arch_dim(c, FM_DIM_KV), hd = c->head_dim;
    if (c->qk_norm == FM_QK_NORM_FLAT) {
        FM_TRY(v->rmsnorm(m->be, m->s.q, ld_q, y->q_norm, eps, m->s.q, ld_q, n, ld_q));
        return v->rmsnorm(m->be, m->s.k, kv, y->k_norm, eps, m->s.k, kv, n, kv);
    }
    if (c->qk_norm == FM_QK_NORM_HEAD) { /* heads of all rows lie ld_head apart */
        FM_TRY(v->rmsnorm(m->be, m->s.q, ld_head, y->q_norm, eps, m->s.q, ld_head, n * c->num_attention_heads, hd));
        return v->rmsnorm(m->be, m->s.k, hd, y->k_norm, eps, m->s.k, hd, n * c->num_key_value_heads, hd);
    }
    return FM_OK;
}

fm_status fm_block_attn(fm_model *m, const fm_batch *b, int32_t layer)
{
    const fm_config *c = &m->c;
    const fm_layer *y = &m->layers[layer];
    const fm_backend_vtable *v = m->be->v;
    const fm_scratch *s = &m->s;
    const int64_t t0 = fm_clock_ns(), n = b->n_rows, H = c->hidden_size, hd = c->head_dim;
    const int64_t ld_q = fm_arch_dim(c, FM_DIM_Q), kv = fm_arch_dim(c, FM_DIM_KV), attn = fm_arch_dim(c, FM_DIM_ATTN);
    const int64_t ld_head = c->attn_output_gate ? 2 * hd : hd;
    const fm_matmul_item in[] = {
        {y->q, y->q_bias, s->q, ld_q, false, false},
        {y->k, y->k_bias, s->k, kv, false, false},
        {y->v, y->v_bias, s->v, kv, false, false},
    };
    FM_TRY(v->matmul(m->be, s->h, H, n, in, FM_COUNT(in)));
    FM_TRY(norm_heads(m, y, n, ld_q, ld_head));
    if (c->clip_qkv > 0) {
        FM_TRY(v->clip(m->be, s->q, n * ld_q, (float)c->clip_qkv));
        FM_TRY(v->clip(m->be, s->k, n * kv, (float)c->clip_qkv));
        FM_TRY(v->clip(m->be, s->v, n * kv, (float)c->clip_qkv));
    }
    if (c->rotary_dim > 0) {
        fm_rope_args r = {s->q, ld_q, ld_head, c->num_attention_heads, c->rotary_dim, m->inv_freq, b->spans, b->n_spans};
        FM_TRY(v->rope(m->be, &r));
        r = (fm_rope_args){s->k, kv, hd, c->num_key_value_heads, c->rotary_dim, m->inv_freq, b->spans, b->n_spans};
        FM_TRY(v->rope(m->be, &r));
    }
    for (int i = 0; i < b->n_spans; i++)
        m->kv[i] = fm_state_kv(b->states[i], layer);
    const fm_attention_args a = {
        .a = {.n_heads = c->num_attention_heads,
              .n_kv_heads = c->num_key_value_heads,
              .head_dim = hd,
              .scale = (float)(1 / sqrt((double)hd)),
              .q = s->q,
              .gate = c->attn_output_gate ? s->q + hd : NULL,
              .ld_q = ld_q,
              .ld_q_head = ld_head,
              .y = s->attn,
              .ld_y = attn},
        .k = s->k,
        .v = s->v,
        .ld_kv = kv,
        .spans = b->spans,
        .kv = m->kv,
        .n_spans = b->n_spans,
    };
    FM_TRY(v->attention(m->be, &a));
    const fm_matmul_item out = {y->o, y->o_bias, s->x, H, true, false};
    FM_TRY(v->matmul(m->be, s->attn, attn, n, &out, 1));
    FM_PHASE_END(m, attention, layer, t0);
    return FM_OK;
}
