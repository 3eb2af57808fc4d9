/* The lists of a MoE block: which rows an expert computes, wave by wave, and where each row finds its parts. */
#include <string.h>

#include "model/wave.h"

enum { MAX_WAVE = 1024 };

fm_status fm_wave_open(const fm_config *c, int64_t k, int64_t max_rows, struct fm_wave **out)
{
    const size_t E = (size_t)c->num_experts, n = E < MAX_WAVE ? E : MAX_WAVE;
    fm_arena measure = {NULL, 0, 0}, fill;
    void *mem = NULL;
    struct fm_wave *w = NULL;
    for (int pass = 0; pass < 2; pass++) {
        if (pass == 1)
            FM_TRY(fm_alloc(measure.used, &mem));
        fill = (fm_arena){mem, 0, measure.used};
        fm_arena *a = pass == 0 ? &measure : &fill;
        struct fm_wave tmp = {0};
        w = fm_arena_take(a, sizeof *w); /* first, so that freeing w frees all */
        tmp.first = fm_take_ints(a, (int64_t)E + 1);
        tmp.entries = fm_take_ints(a, max_rows * k);
        tmp.order = fm_take_ints(a, (int64_t)E);
        tmp.hist = fm_take_ints(a, max_rows + 1);
        tmp.keep = fm_arena_take(a, E * sizeof(bool));
        tmp.ids = fm_take_ints(a, (int64_t)n);
        tmp.guess = fm_take_ints(a, (int64_t)n);
        tmp.slices = fm_arena_take(a, n * sizeof(fm_slice));
        tmp.claimed = fm_arena_take(a, n * sizeof(bool));
        tmp.ran = fm_arena_take(a, n * sizeof(bool));
        tmp.cool = fm_arena_take(a, n * sizeof(bool));
        tmp.mats = fm_arena_take(a, n * sizeof *tmp.mats);
        tmp.jobs = fm_arena_take(a, n * sizeof *tmp.jobs);
        tmp.max = (int)n;
        if (w)
            *w = tmp;
    }
    *out = w;
    return FM_OK;
}

void fm_wave_close(struct fm_wave *w) { fm_free(w); }

void fm_wave_sort(struct fm_wave *w, const int32_t *ids, int64_t n_entries, int64_t n_experts)
{
    memset(w->first, 0, (size_t)(n_experts + 1) * sizeof(int32_t));
    for (int64_t i = 0; i < n_entries; i++)
        w->first[ids[i] + 1]++;
    w->n_order = 0;
    for (int64_t e = 0; e < n_experts; e++) {
        if (w->first[e + 1] > 0)
            w->order[w->n_order++] = (int32_t)e;
        w->first[e + 1] += w->first[e];
    }
    for (int64_t i = 0; i < n_entries; i++)
        w->entries[w->first[ids[i]]++] = (int32_t)i;
    for (int64_t e = n_experts; e > 0; e--) /* first[e] was moved to the end of e: shift back */
        w->first[e] = w->first[e - 1];
    w->first[0] = 0;
}

void fm_wave_next(struct fm_wave *w, const fm_scratch *s, int64_t k, int limit, int *at, int32_t *done)
{
    w->n = 0;
    w->rows = 0;
    while (*at < w->n_order && w->n < limit && w->rows < s->part_rows) {
        const int32_t e = w->order[*at], begin = w->first[e] + *done, all = w->first[e + 1] - begin;
        const int64_t room = s->part_rows - w->rows;
        const int32_t n = all < room ? all : (int32_t)room;
        w->ids[w->n] = e;
        w->slices[w->n] = (fm_slice){begin, begin + n, (int32_t)w->rows};
        w->claimed[w->n] = w->ran[w->n] = false;
        w->cool[w->n] = !w->keep[e];
        for (int32_t i = 0; i < n; i++)
            s->exp_rows[w->rows + i] = (int32_t)(w->entries[begin + i] / k);
        w->rows += n;
        w->n++;
        if (n < all) {
            *done += n;
            break;
        }
        *done = 0;
        ++*at;
    }
}

int fm_wave_jobs(const fm_model *m, struct fm_wave *w)
{
    int n_jobs = 0;
    for (int i = 0; i < w->n; i++) {
        if (!w->claimed[i] || w->ran[i])
            continue;
        w->ran[i] = true;
        const fm_slice *sl = &w->slices[i];
        w->jobs[n_jobs++] = (fm_expert_job){
            .gate = w->mats[i][FM_ROLE_GATE],
            .up = w->mats[i][FM_ROLE_UP],
            .down = w->mats[i][FM_ROLE_DOWN],
            .rows = m->s.exp_rows + sl->out0,
            .n = sl->end - sl->begin,
            .out0 = sl->out0,
        };
    }
    return n_jobs;
}

void fm_wave_parts(const fm_model *m, const struct fm_wave *w, int64_t n_rows, const fm_parts *to)
{
    const int32_t *rows = m->s.exp_rows;
    memset(to->start, 0, (size_t)(n_rows + 1) * sizeof(int32_t));
    for (int64_t p = 0; p < w->rows; p++)
        to->start[rows[p] + 1]++;
    for (int64_t r = 0; r < n_rows; r++)
        to->start[r + 1] += to->start[r];
    for (int i = 0; i < w->n; i++)
        for (int32_t e = w->slices[i].begin; e < w->slices[i].end; e++) {
            const int32_t row = (int32_t)(w->entries[e] / m->k), at = to->start[row]++;
            to->index[at] = w->slices[i].out0 + (e - w->slices[i].begin);
            to->weight[at] = m->s.route_w[w->entries[e]];
        }
    for (int64_t r = n_rows; r > 0; r--)
        to->start[r] = to->start[r - 1];
    to->start[0] = 0;
}
