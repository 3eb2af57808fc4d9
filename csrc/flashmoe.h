/* The public C API of flashmoe: engines, sessions, one forward for everything.
 *
 * A reader (in Python) describes a checkpoint; the engine validates the description against the real files, loads the
 * trunk and streams routed experts. The core parses no text and never prints, exits or calls back.
 * Handles are opaque. Every function that can fail returns fm_status and writes its out-parameters only on success
 * (open and create set *out to NULL instead); fm_last_error() tells the calling thread what happened. */
#ifndef FLASHMOE_H
#define FLASHMOE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "base/trace.h"

typedef struct fm_engine fm_engine;
typedef struct fm_session fm_session;
struct fm_model_desc; /* store/desc.h */
struct fm_config;     /* model/config.h */

/* What to run. All three are borrowed during open only. */
typedef struct fm_engine_model {
    const char *arch; /* a name of model/arch_list.h */
    const struct fm_config *config;
    const struct fm_model_desc *desc;
} fm_engine_model;

typedef struct fm_engine_opts {
    int32_t n_slots;           /* expert slots; 0: the smallest that works */
    int64_t context;           /* positions per session, >= 1 */
    int64_t max_rows;          /* rows (tokens) per forward, >= 1 */
    int64_t experts_per_token; /* 0: the trained value */
    int n_threads;             /* compute threads; 0: one per CPU */
    const char *io_method;     /* NULL: "pread" */
    bool io_direct;            /* bypass the page cache */
    int io_workers;            /* 0: the method's default */
    const char *io_fault;      /* tests: script for the "fault" method */
    const char *backend;       /* NULL: "cpu" */
    bool verify;               /* check recorded checksums on every expert read */
    const char *cache_policy;  /* a name of store/expert_cache.h; NULL: "lru" */
    size_t split_bytes;        /* read an expert in parts of about this size; 0: the default */
    const char *numeric;       /* "exact": f32 activations; "fast": int8 activations in quantised products; NULL: exact */
    int64_t lookahead;         /* experts guessed per row for the next layer while this one computes; 0: none, -1: learned */
    const char *kv_format;     /* of the KV cache: "f32", "f16" or "bf16"; NULL: f32 */
} fm_engine_opts;
#define FM_ENGINE_OPTS_INIT { 0, 4096, 512, 0, 0, NULL, false, 0, NULL, NULL, true, NULL, 0, NULL, 0, NULL }

/* Bytes that open and create will take; nothing is read or allocated. */
typedef struct fm_engine_plan {
    size_t trunk_bytes, state_bytes /* per session */, scratch_bytes, slot_bytes;
    int64_t n_slots_min, n_experts_total, expert_record_bytes_max, experts_per_token;
} fm_engine_plan;

typedef struct fm_engine_info {
    const char *arch, *backend, *cpu_variant, *numeric, *kv_format, *io_method; /* static or borrowed until close */
    bool io_direct, verify;
    int n_threads;
    int32_t n_slots;
    int64_t experts_per_token, trained_experts_per_token, context, max_rows, vocab_size, n_layers, hidden_size;
} fm_engine_info;

/* Since open or the last reset. Times in ns; phases add up to about prefill_ns + decode_ns. */
typedef struct fm_engine_stats {
    int64_t prefill_tokens, prefill_ns, decode_tokens, decode_ns, n_forwards;
    int64_t hits, misses, n_reads, bytes_read, read_ns, crc_ns, n_failed_reads;
    int64_t guessed, guess_used, guess_wasted_bytes; /* experts read ahead on a guess; of them, used */
    int64_t predicted, predicted_right; /* guesses about experts that were not in a slot, read or not; came true */
    int64_t embed_ns, attention_ns, delta_ns, router_ns, experts_ns, wait_ns, shared_ns, mlp_ns, head_ns;
} fm_engine_stats;

FM_API fm_status fm_engine_plan_bytes(const fm_engine_model *model, const fm_engine_opts *opts, fm_engine_plan *out);
FM_API fm_status fm_engine_open(const fm_engine_model *model, const fm_engine_opts *opts, fm_engine **out);
/* NULL is fine. Waits for a running forward. Sessions stay valid handles but only answer FM_ERR_STATE. */
FM_API void fm_engine_close(fm_engine *e);
FM_API fm_status fm_engine_get_info(fm_engine *e, fm_engine_info *out);
FM_API fm_status fm_engine_get_stats(fm_engine *e, fm_engine_stats *out);
FM_API fm_status fm_engine_reset_stats(fm_engine *e);
/* Read these experts from the device again, cached or not, with nothing computed meanwhile: the I/O of a recorded
 * forward alone. *ns is the time it took. ids[i] is an expert of layer layers[i]. */
FM_API fm_status fm_engine_reread(fm_engine *e, const int32_t *layers, const int32_t *ids, int64_t n, int64_t *ns);
/* Shrink or grow the expert slots within what was opened; *now is their number. */
FM_API fm_status fm_engine_set_slots(fm_engine *e, int32_t n_slots, int32_t *now);

/* Record up to capacity events from now on; take copies them out and stops. */
FM_API fm_status fm_engine_trace_start(fm_engine *e, int64_t capacity);
FM_API fm_status fm_engine_trace_take(fm_engine *e, fm_trace_event *out, int64_t capacity, int64_t *n, int64_t *n_lost);

/* context 0: the engine's. */
FM_API fm_status fm_session_create(fm_engine *e, int64_t context, fm_session **out);
FM_API void fm_session_free(fm_session *s); /* NULL is fine; before or after fm_engine_close */

/* A ragged batch: rows of one session are consecutive. Prefill and step are thin wrappers over it. */
typedef struct fm_row {
    fm_session *session;
    int32_t id;
} fm_row;
typedef struct fm_forward_out {
    float *logits;  /* [n_rows, vocab] of every row; NULL: only the last of each session, in the session */
    int32_t *router; /* [n_rows, n_layers, k] chosen experts, -1 in dense layers; or NULL */
    float *hidden;  /* [n_rows, n_layers, hidden] residual stream after each layer; or NULL */
} fm_forward_out;
/* All or nothing: on failure every session is where it was, and usable. */
FM_API fm_status fm_engine_forward(fm_engine *e, const fm_row *rows, int64_t n_rows, const fm_forward_out *out);
/* One chunk of at most max_rows ids; *n_done tells how many. */
FM_API fm_status fm_session_prefill(fm_session *s, const int32_t *ids, int64_t n, int64_t *n_done);
FM_API fm_status fm_session_step(fm_session *s, int32_t id);

/* [vocab] f32 of the last row; borrowed until the next forward, rewind or load. NULL before the first. */
FM_API const float *fm_session_logits(const fm_session *s);
FM_API int64_t fm_session_pos(const fm_session *s);
FM_API int64_t fm_session_context(const fm_session *s);
/* got <= want: recurrent layers go back to a remembered position (last forward's start, checkpoint, 0). */
FM_API fm_status fm_session_rewind(fm_session *s, int64_t want, int64_t *got);
FM_API fm_status fm_session_checkpoint(fm_session *s);
FM_API fm_status fm_session_save_bytes(fm_session *s, size_t *bytes);
FM_API fm_status fm_session_save(fm_session *s, void *out, size_t bytes);
FM_API fm_status fm_session_load(fm_session *s, const void *data, size_t bytes);
/* From any thread: the running forward of this session, or else its next one, ends with FM_ERR_CANCELLED. */
FM_API void fm_session_cancel(fm_session *s);

/* CRC-32C of packed expert records. */
FM_API uint32_t fm_checksum(uint32_t crc, const void *data, size_t bytes);

#endif
