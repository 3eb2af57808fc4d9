#include "base/trace.h"

#include "base/mem.h"

static const char *const names[] = {
#define X(name) #name,
    FM_TRACE_LIST(X)
#undef X
};

const char *fm_trace_kind_name(int kind) { return kind >= 0 && kind < FM_TRACE_KINDS ? names[kind] : NULL; }

fm_status fm_trace_open(fm_trace *t, int64_t capacity)
{
    size_t bytes;
    void *p;
    if (capacity < 1 || !fm_mul_size((size_t)capacity, sizeof(fm_trace_event), &bytes))
        return fm_fail(FM_ERR_ARG, "trace: %lld events", (long long)capacity);
    FM_TRY(fm_alloc(bytes, &p));
    *t = (fm_trace){p, 0, capacity, 0};
    return FM_OK;
}

void fm_trace_close(fm_trace *t)
{
    fm_free(t->events);
    *t = (fm_trace){0};
}

void fm_trace_add(fm_trace *t, fm_trace_kind kind, int32_t layer, int32_t id, int64_t t0, int64_t t1, int64_t bytes)
{
    if (!t->events)
        return;
    if (t->n == t->capacity) {
        t->n_lost++;
        return;
    }
    t->events[t->n++] = (fm_trace_event){kind, layer, id, 0, t0, t1, bytes};
}
