#include "store/expert_layout.h"

#include "base/mem.h"

enum { PLACE_ALIGN = 64, MIN_SPLIT_ALIGN = 4096 };

/* Parts of the window [from, from + bytes) whose record bytes are [first, last). */
static void add_parts(fm_expert_layout *l, int room, int32_t file, int64_t from, int64_t bytes, int64_t first, int64_t last,
                      size_t place, size_t split)
{
    int64_t n = split > 0 ? (bytes + (int64_t)split - 1) / (int64_t)split : 1;
    n = n > room ? room : n < 1 ? 1 : n;
    const int64_t step = (int64_t)fm_round_up((size_t)((bytes + n - 1) / n), MIN_SPLIT_ALIGN);
    for (int64_t at = 0; at < bytes; at += step) {
        fm_part *p = &l->part[l->n_parts++];
        const int64_t end = at + step < bytes ? at + step : bytes;
        const int64_t a = from + at > first ? from + at : first, b = from + end < last ? from + end : last;
        p->file = file;
        p->off = from + at;
        p->bytes = (size_t)(end - at);
        p->wanted = (size_t)(b - (from + at));
        p->place = place + (size_t)at;
        p->crc_skip = (size_t)(a - (from + at));
        p->crc_bytes = (size_t)(b - a);
    }
}

void fm_expert_lay_out(const fm_expert_desc *e, int64_t id, size_t align, size_t split_bytes, fm_expert_layout *l)
{
    fm_segment seg[FM_MAX_SEGMENTS];
    const int n = fm_expert_segments(e, seg);
    const int32_t *file = e->seg_file + id * n;
    const int64_t *off = e->seg_off + id * n;
    const int64_t a = (int64_t)align;
    size_t place = 0;
    l->n_parts = 0;
    l->n_segments = n;
    for (int s = 0; s < n;) {
        int end = s + 1;
        while (end < n && file[end] == file[s] && off[end] == off[end - 1] + seg[end - 1].n_bytes)
            end++;
        const int64_t from = off[s] / a * a, last = off[end - 1] + seg[end - 1].n_bytes;
        const int64_t bytes = (last - from + a - 1) / a * a;
        for (int i = s; i < end; i++)
            l->segment[i] = place + (size_t)(off[i] - from);
        /* Leave one part for each segment to come. */
        add_parts(l, FM_MAX_PARTS - l->n_parts - (n - end), file[s], from, bytes, off[s], last, place, split_bytes);
        place = fm_round_up(place + (size_t)bytes, align > PLACE_ALIGN ? align : PLACE_ALIGN);
        s = end;
    }
    l->bytes = place;
}

size_t fm_expert_layout_max(const fm_model_desc *d, size_t align)
{
    size_t most = 0;
    fm_expert_layout l;
    for (int64_t i = 0; i < d->n_expert_layers; i++)
        for (int64_t x = 0; x < d->experts[i].n_experts; x++) {
            fm_expert_lay_out(&d->experts[i], x, align, 0, &l);
            most = l.bytes > most ? l.bytes : most;
        }
    /* Whole pages, so that a slot can be handed to a device and given back to the system alone. */
    return fm_round_up(most, (size_t)fm_page_bytes());
}
