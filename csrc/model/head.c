/* The output head: logits of every row, or of each sequence's last. */
#include <string.h>

#include "base/clock.h"
#include "model/block.h"

fm_status fm_norm_rows(fm_model *m, const float *w, int64_t n)
{
    const int64_t H = m->c.hidden_size;
    return m->be->v->rmsnorm(m->be, m->s.x, H, w, (float)m->c.rms_norm_eps, m->s.h, H, n, H);
}

static int64_t last_row(const fm_batch *b, int span) { return b->spans[span].row0 + b->spans[span].n - 1; }

fm_status fm_head_input(fm_model *m, const fm_batch *b, int64_t *n, float *const **to)
{
    const int64_t H = m->c.hidden_size, V = m->c.vocab_size;
    if (b->all_logits) {
        for (int64_t r = 0; r < b->n_rows; r++)
            m->out[r] = b->all_logits + r * V;
        *n = b->n_rows;
        *to = m->out;
        return fm_norm_rows(m, m->norm, b->n_rows);
    }
    *n = b->n_spans;
    *to = b->last_logits;
    for (int i = 0; i < b->n_spans; i++) { /* side by side */
        const float *x = m->s.x + last_row(b, i) * H;
        FM_TRY(m->be->v->rmsnorm(m->be, x, H, m->norm, (float)m->c.rms_norm_eps, m->s.h + i * H, H, 1, H));
    }
    return FM_OK;
}

fm_status fm_head_matmul(fm_model *m, int64_t r, int64_t n, float *y)
{
    const int64_t H = m->c.hidden_size;
    const fm_matmul_item item = {m->head, NULL, y, m->c.vocab_size, false, false};
    return m->be->v->matmul(m->be, m->s.h + r * H, H, n, &item, 1);
}

fm_status fm_head_nonfinite(void)
{
    return fm_fail(FM_ERR_FORMAT, "the logits are not finite: the weights are damaged or overflow f32");
}

void fm_head_output(fm_model *m, int64_t n, float *const *to)
{
    const int64_t V = m->c.vocab_size;
    for (int64_t i = 0; i < n; i++)
        if (to[i])
            memcpy(to[i], m->s.logits + i * V, (size_t)V * sizeof(float));
}

void fm_head_last(fm_model *m, const fm_batch *b)
{
    const int64_t V = m->c.vocab_size;
    for (int i = 0; b->all_logits && i < b->n_spans; i++)
        if (b->last_logits[i])
            memcpy(b->last_logits[i], b->all_logits + last_row(b, i) * V, (size_t)V * sizeof(float));
}

fm_status fm_head(fm_model *m, const fm_batch *b)
{
    const int64_t t0 = fm_clock_ns(), tile = m->s.logit_rows;
    const bool any = m->be->v->caps(m->be).any_memory; /* then a lone row of the head is not copied: it is a MB */
    int64_t n, bad;
    float *const *to;
    FM_TRY(fm_head_input(m, b, &n, &to));
    for (int64_t r = 0; r < n; r += tile) {
        const int64_t rows = n - r < tile ? n - r : tile;
        float *const y = rows == 1 && to[r] && any ? to[r] : m->s.logits;
        FM_TRY(fm_head_matmul(m, r, rows, y));
        FM_TRY(m->be->v->find_nonfinite(m->be, y, rows, m->c.vocab_size, &bad));
        if (bad >= 0)
            return fm_head_nonfinite();
        if (y == m->s.logits)
            fm_head_output(m, rows, to + r);
    }
    fm_head_last(m, b);
    FM_PHASE_END(m, head, -1, t0);
    return FM_OK;
}
