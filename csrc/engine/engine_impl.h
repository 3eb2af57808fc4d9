/* The structs behind the handles. Private to engine/. */
#ifndef FM_ENGINE_IMPL_H
#define FM_ENGINE_IMPL_H

#include <pthread.h>
#include <stdatomic.h>
#include <sys/types.h>

#include "flashmoe.h"
#include "model/model.h"

struct fm_engine {
    pthread_mutex_t lock; /* held by whoever touches what follows */
    atomic_int refs;      /* the owner plus each session */
    pid_t pid;            /* threads do not survive a fork */
    bool closed;
    fm_pool *pool;
    fm_io *io;
    fm_backend *be;
    fm_model_desc *desc;
    fm_weights *weights;
    fm_experts *experts;
    fm_model *model;
    fm_session *sessions; /* all that are alive */
    int64_t context;
    bool verify;
    const char *cpu_variant;
    fm_numeric numeric;
    fm_quant kv_format;
    fm_engine_stats stats; /* tokens and their time only */
    /* forward's per-span lists, [max_rows] */
    fm_span *spans;
    fm_state **states;
    float **last_logits;
    int32_t *ids;
    fm_session **span_sessions;
    void *lists;
};

enum { FM_SESSION_ROWS = 2 }; /* of logits */

struct fm_session {
    fm_engine *engine;
    fm_session *next, *prev;
    fm_state *state; /* NULL once the engine is closed */
    float *logits[FM_SESSION_ROWS]; /* rows of one block; a forward writes that which is not `now`, and turns it when it succeeded */
    int now;
    int64_t pos, context; /* copies that need no lock */
    bool has_logits;
    atomic_bool cancel;
};

/* Locks; FM_ERR_STATE when closed or in a forked child. Unlock after FM_OK only. */
fm_status fm_engine_enter(fm_engine *e);
void fm_engine_leave(fm_engine *e);
void fm_engine_unref(fm_engine *e);

#endif
