/* Owns: what a compute device must offer. Blocks (model/) speak only to this.
 *
 * Pointers in args are addresses of the backend's own memory (alloc) or of registered host memory (wrap); the
 * caller never follows them between begin and sync, except in memory it wrote before begin. On unified memory both
 * sides use the same address; a backend finds its buffer object by address range.
 * Arrays inside args (spans, items, jobs, hist_in, kv) are read during the call; what they point to, later.
 * Ops may run at once or be recorded; sync returns when all are done and reports the first failure. Ops run in the
 * order they were called. Each op's arithmetic contract and bound is the twin slot's in cpu/kernels.h.
 * A pipelined device can stop inside a recording until the host has done something, and go on without a new one:
 *   record   ..route.. tell(&a) ..trunk work.. hold(&b) experts_later combine ..next layer.. flush
 *   then     await(a), read the ids, have the experts read, set_jobs, post(b), and so on; sync
 * All activations are f32, row-major; n = rows (tokens). Not thread-safe: one caller at a time. */
#ifndef FM_BACKEND_BACKEND_H
#define FM_BACKEND_BACKEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "backend/backend_list.h"
#include "base/status.h"
#include "base/threads.h"
#include "cpu/kernels.h"

typedef struct fm_backend fm_backend;

typedef enum fm_usage {
    FM_USAGE_WEIGHTS, /* written once by the host, then read */
    FM_USAGE_SLOTS,   /* written by I/O while the device works on other slots; page-aligned */
    FM_USAGE_STATE,   /* KV and recurrent state: zeroed */
    FM_USAGE_SCRATCH,
} fm_usage;

typedef struct fm_caps {
    bool unified_memory; /* alloc'ed addresses are valid on the host too */
    bool asynchronous;   /* ops only run by sync or flush */
    bool pipelined;      /* the ops of that name are there */
    bool any_memory;     /* ops read and write any address of the process, not only what alloc gave */
    size_t max_bytes;    /* recommended limit of all allocations; 0: none known */
    size_t max_buffer_bytes; /* of one allocation; 0: none known */
    const char *device;  /* its name, borrowed until close; NULL: the processor */
    uint32_t kv_formats; /* 1 << fm_quant for each plain format besides f32 that fm_kv may have */
} fm_caps;

/* One matrix of a matmul call; all items of a call share x. */
typedef struct fm_matmul_item {
    const fm_mat *W;
    const float *bias; /* [n_rows] added; NULL: none */
    float *y;          /* [n, n_rows], rows ldy apart; not x */
    int64_t ldy;
    bool add;          /* y += instead of y = */
    bool exact;        /* f32 activations whatever the numeric mode: routers and gates, where rounding decides */
} fm_matmul_item;

/* A sequence's share of the batch: rows row0 .. row0+n, positions pos0 .. pos0+n. */
typedef struct fm_span {
    int64_t row0, n, pos0;
} fm_span;

typedef struct fm_rope_args {
    float *x;               /* row r, head h at x + r*ld + h*ld_head; in place */
    int64_t ld, ld_head, n_heads, rot;
    const double *inv_freq; /* [rot/2], host memory that outlives the call */
    const fm_span *spans;
    int n_spans;
} fm_rope_args;

typedef struct fm_kv {
    void *k, *v;      /* [n_kv_heads, capacity, head_dim] */
    int64_t capacity; /* positions */
    fm_quant format;  /* F32, or one of caps.kv_formats */
} fm_kv;

typedef struct fm_attention_args {
    fm_attn_args a;          /* q, gate, y for all rows of the batch */
    const float *k, *v;      /* new rows [n, n_kv_heads*head_dim], stored at their positions first */
    int64_t ld_kv;
    const fm_span *spans;
    const fm_kv *kv;         /* [n_spans] */
    int n_spans;
} fm_attention_args;

typedef struct fm_conv_args {
    const float *m;    /* [n, n_ch] rows ldm apart */
    float *y;          /* [n, n_ch] rows ldy apart */
    int64_t ldm, ldy, n_ch, kern;
    const float *w;    /* [n_ch, kern] */
    const fm_span *spans;
    const float *const *hist_in; /* [n_spans] of [kern-1, n_ch] */
    float *const *hist_out;
    int n_spans;
} fm_conv_args;

typedef struct fm_delta_batch {
    fm_delta_args a;          /* pointers to row 0 of the batch */
    const fm_span *spans;
    const float *const *S_in; /* [n_spans] of [n_v_heads, dk, dv] */
    float *const *S_out;
    int n_spans;
} fm_delta_batch;

/* One routed expert (or a slice of its rows): out[out0 + i] = expert(x[rows[i]]) for i < n. */
typedef struct fm_expert_job {
    fm_mat gate, up, down;
    const int32_t *rows;
    int64_t n, out0;
} fm_expert_job;

typedef struct fm_expert_args {
    const float *x; /* [n_x, hidden] */
    int64_t n_x;
    const fm_expert_job *jobs;
    int n_jobs;
    float *gate, *up; /* scratch [capacity, width] each */
    float *out;       /* [capacity, hidden] */
} fm_expert_args;

/* Experts whose jobs the host names while the recording runs. */
typedef struct fm_expert_later {
    const float *x; /* [n_x, hidden]; a job has at most n_x rows */
    int64_t n_x;
    fm_mat gate, up, down; /* like every job's; of the addresses only the alignment counts: no job's is less aligned */
    float *gate_y, *up_y;  /* scratch [n_parts, width] each */
    float *out;            /* [n_parts, hidden] */
    int64_t n_jobs, n_parts; /* at most, and rows of all jobs at most */
    void *table;           /* n_parts * FM_LATER_PART_BYTES of the backend's memory, its own until sync */
} fm_expert_later;
#define FM_LATER_PART_BYTES 640

/* y[r] += sum over e in [start[r], start[r+1]) of weight[e] * part[index[e]], in that order. The lists are read when
 * the op runs if they lie in the backend's memory, else during the call. */
typedef struct fm_combine_args {
    float *y; /* [n, hidden] */
    int64_t n, hidden;
    const float *part;
    const int32_t *start; /* [n + 1] */
    const int32_t *index;
    const float *weight;
    int64_t n_parts;      /* rows of part, and room in index and weight */
} fm_combine_args;

typedef struct fm_backend_vtable {
    int version; /* FM_BACKEND_VERSION */
    const char *name;
    void (*close)(fm_backend *b);
    fm_caps (*caps)(const fm_backend *b);
    /* Memory. */
    fm_status (*alloc)(fm_backend *b, size_t bytes, fm_usage usage, void **out);
    void (*free)(fm_backend *b, void *p, size_t bytes, fm_usage usage);
    /* Command recording: begin .. ops .. sync; ops after a sync start a new recording by themselves. flush starts what is recorded without waiting (optional). */
    fm_status (*begin)(fm_backend *b);
    void (*flush)(fm_backend *b);
    fm_status (*sync)(fm_backend *b);
    /* Ops. */
    fm_status (*embed)(fm_backend *b, const fm_mat *W, const int32_t *ids, int64_t n, float *y, int64_t ldy);
    /* Row r at x + r*ldx, y + r*ldy, each n_cols long; y may be x. */
    fm_status (*rmsnorm)(fm_backend *b, const float *x, int64_t ldx, const float *w, float eps, float *y,
                         int64_t ldy, int64_t n, int64_t n_cols);
    fm_status (*matmul)(fm_backend *b, const float *x, int64_t ldx, int64_t n, const fm_matmul_item *items,
                        int n_items);
    fm_status (*clip)(fm_backend *b, float *x, int64_t n, float limit);
    fm_status (*rope)(fm_backend *b, const fm_rope_args *a);
    fm_status (*attention)(fm_backend *b, const fm_attention_args *a);
    fm_status (*conv)(fm_backend *b, const fm_conv_args *a);
    fm_status (*delta)(fm_backend *b, const fm_delta_batch *a);
    fm_status (*swiglu)(fm_backend *b, const float *gate, const float *up, float *y, int64_t n);
    /* logits [n, n_experts]; ids, weights [n, k]. The host reads ids after sync. */
    fm_status (*route)(fm_backend *b, const fm_route_args *a, const float *logits, int64_t n, int32_t *ids,
                       float *weights);
    fm_status (*experts)(fm_backend *b, const fm_expert_args *a);
    fm_status (*combine)(fm_backend *b, const fm_combine_args *a);
    /* y[r] += (gate ? sigmoid(gate[r]) : 1) * x[r];  rows n_cols long, packed. */
    fm_status (*add_gated)(fm_backend *b, const float *x, const float *gate, float *y, int64_t n,
                           int64_t n_cols);
    /* First row of [n, n_cols] that holds a NaN or infinity, -1 if none; implies sync. */
    fm_status (*find_nonfinite)(fm_backend *b, const float *x, int64_t n, int64_t n_cols, int64_t *row);
    /* Pipelining; NULL without caps.pipelined. Recorded: */
    fm_status (*tell)(fm_backend *b, uint64_t *value); /* the host learns that all before is done: see await */
    fm_status (*hold)(fm_backend *b, uint64_t *value); /* nothing after runs before post(value); values rise */
    fm_status (*experts_later)(fm_backend *b, const fm_expert_later *a); /* without jobs until set_jobs */
    fm_status (*mark_nonfinite)(fm_backend *b, const float *x, int64_t n, int64_t n_cols, uint32_t *marks); /* [n]: row r is not finite */
    /* By the host, after flush. set_jobs may only be called while the device does not run the op: before its hold is
     * posted, or after a later tell. */
    fm_status (*await)(fm_backend *b, uint64_t value); /* FM_ERR_BACKEND when the device failed or does not get there */
    fm_status (*set_jobs)(fm_backend *b, const fm_expert_later *a, const fm_expert_job *jobs, int n_jobs);
    void (*post)(fm_backend *b, uint64_t value); /* this hold and all before it are over; twice is fine */
} fm_backend_vtable;
#define FM_BACKEND_VERSION 2

struct fm_backend {
    const fm_backend_vtable *v; /* first field of every backend's own struct */
    int32_t layer;              /* that the caller works on, -1 outside of layers; for messages only */
};

typedef struct fm_backend_opts {
    const char *name; /* a name of FM_BACKEND_LIST; NULL = "cpu" */
    fm_pool *pool;    /* borrowed; outlives the backend */
    fm_numeric numeric; /* of matrix products with quantised weights, where the backend has a choice */
} fm_backend_opts;

/* FM_ERR_ARG for an unknown name, FM_ERR_UNSUPPORTED for one not built in or without a device. */
fm_status fm_backend_open(const fm_backend_opts *opts, fm_backend **out);
void fm_backend_close(fm_backend *b); /* NULL is fine */
const char *fm_backend_name_at(int i); /* NULL past the end */

#endif
