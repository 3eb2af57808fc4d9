/* Gated DeltaNet: one projection call, causal convolution, delta rule, output norm and gate.
 * The state is read from one buffer and written to the other. Source: tests/oracle/attention.py. */
#include "base/clock.h"
#include "model/block.h"

void fm_scratch_delta(fm_scratch *s, const fm_config *c, int64_t rows, fm_arena *a)
{
    s->qkv = fm_take_floats(a, rows, fm_config_conv_dim(c));
    s->conv = fm_take_floats(a, rows, fm_config_conv_dim(c));
    s->z = fm_take_floats(a, rows, fm_config_value_dim(c));
    s->a = fm_take_floats(a, rows, c->linear_num_value_heads);
    s->b = fm_take_floats(a, rows, c->linear_num_value_heads);
    s->delta = fm_take_floats(a, rows, fm_config_value_dim(c));
}

fm_status fm_block_delta(fm_model *m, const fm_batch *b, int32_t layer)
{
    const fm_config *c = &m->c;
    const fm_layer *y = &m->layers[layer];
    const fm_backend_vtable *v = m->be->v;
    const fm_scratch *s = &m->s;
    const int64_t t0 = fm_clock_ns(), n = b->n_rows, H = c->hidden_size, hv = c->linear_num_value_heads;
    const int64_t C = fm_config_conv_dim(c), V = fm_config_value_dim(c);
    const fm_matmul_item in[] = {
        {y->qkv, NULL, s->qkv, C, false, false},
        {y->z, NULL, s->z, V, false, false},
        {y->b, NULL, s->b, hv, false, true},
        {y->a, NULL, s->a, hv, false, true},
    };
    FM_TRY(v->matmul(m->be, s->h, H, n, in, FM_COUNT(in)));
    for (int i = 0; i < b->n_spans; i++) {
        const fm_linear_state st = fm_state_linear(b->states[i], layer);
        m->in[i] = st.conv_in;
        m->out[i] = st.conv_out;
    }
    const fm_conv_args conv = {
        .m = s->qkv,
        .y = s->conv,
        .ldm = C,
        .ldy = C,
        .n_ch = C,
        .kern = c->linear_conv_kernel_dim,
        .w = y->conv,
        .spans = b->spans,
        .hist_in = m->in,
        .hist_out = m->out,
        .n_spans = b->n_spans,
    };
    FM_TRY(v->conv(m->be, &conv));
    for (int i = 0; i < b->n_spans; i++) {
        const fm_linear_state st = fm_state_linear(b->states[i], layer);
        m->in[i] = st.rec_in;
        m->out[i] = st.rec_out;
    }
    const fm_delta_batch d = {
        .a = {.n_k_heads = c->linear_num_key_heads,
              .n_v_heads = hv,
              .dk = c->linear_key_head_dim,
              .dv = c->linear_value_head_dim,
              .qkv = s->conv,
              .z = s->z,
              .a = s->a,
              .b = s->b,
              .A_log = y->A_log,
              .dt_bias = y->dt_bias,
              .norm_w = y->lin_norm,
              .eps = (float)c->rms_norm_eps,
              .y = s->delta,
              .ld_qkv = C,
              .ld_z = V,
              .ld_ab = hv,
              .ld_y = V},
        .spans = b->spans,
        .S_in = m->in,
        .S_out = m->out,
        .n_spans = b->n_spans,
    };
    FM_TRY(v->delta(m->be, &d));
    const fm_matmul_item out = {y->out, NULL, s->x, H, true, false};
    FM_TRY(v->matmul(m->be, s->delta, V, n, &out, 1));
    FM_PHASE_END(m, delta, layer, t0);
    return FM_OK;
}
