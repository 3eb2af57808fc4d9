/* Owns: a bounded list of timed events, for timelines and routing records. Off unless opened; never grows.
 * One writer at a time (the engine's lock is held). */
#ifndef FM_BASE_TRACE_H
#define FM_BASE_TRACE_H

#include <stdint.h>

#include "base/status.h"

/* X(name): what an event is. read and guess are reads of experts, from their start at the
 * device to their last byte. */
#define FM_TRACE_LIST(X)                                                                           \
    X(embed) X(attention) X(delta) X(router) X(experts) X(wait) X(shared) X(mlp) X(head) X(read) X(guess) X(forward)

typedef enum fm_trace_kind {
#define X(name) FM_TRACE_##name,
    FM_TRACE_LIST(X)
#undef X
    FM_TRACE_KINDS
} fm_trace_kind;

typedef struct fm_trace_event {
    int32_t kind, layer, id, reserved; /* id: expert of a read, rows of a forward; else 0 */
    int64_t t0_ns, t1_ns, bytes;
} fm_trace_event;

typedef struct fm_trace {
    fm_trace_event *events;
    int64_t n, capacity, n_lost;
} fm_trace;

const char *fm_trace_kind_name(int kind); /* NULL past the end */
fm_status fm_trace_open(fm_trace *t, int64_t capacity);
void fm_trace_close(fm_trace *t); /* a closed or zeroed trace is off */
void fm_trace_add(fm_trace *t, fm_trace_kind kind, int32_t layer, int32_t id, int64_t t0, int64_t t1, int64_t bytes);

#endif
