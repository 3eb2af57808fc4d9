/* Dense SwiGLU feed-forward: down(silu(gate u) * (up u)). */
#include "base/clock.h"
#include "model/block.h"

void fm_scratch_mlp(fm_scratch *s, const fm_config *c, int64_t rows, fm_arena *a)
{
    s->mlp_g = fm_take_floats(a, rows, c->intermediate_size);
    s->mlp_u = fm_take_floats(a, rows, c->intermediate_size);
}

fm_status fm_block_mlp(fm_model *m, const fm_batch *b, int32_t layer)
{
    const fm_layer *y = &m->layers[layer];
    const fm_backend_vtable *v = m->be->v;
    const fm_scratch *s = &m->s;
    const int64_t t0 = fm_clock_ns(), n = b->n_rows, H = m->c.hidden_size, I = m->c.intermediate_size;
    const fm_matmul_item in[] = {
        {y->gate_proj, NULL, s->mlp_g, I, false, false},
        {y->up_proj, NULL, s->mlp_u, I, false, false},
    };
    FM_TRY(v->matmul(m->be, s->h, H, n, in, FM_COUNT(in)));
    FM_TRY(v->swiglu(m->be, s->mlp_g, s->mlp_u, s->mlp_g, n * I));
    const fm_matmul_item out = {y->down_proj, NULL, s->x, H, true, false};
    FM_TRY(v->matmul(m->be, s->mlp_g, I, n, &out, 1));
    FM_PHASE_END(m, mlp, layer, t0);
    return FM_OK;
}
