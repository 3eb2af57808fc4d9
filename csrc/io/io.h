/* Owns: asynchronous reads of byte ranges from a fixed set of files. Knows bytes, not experts.
 *
 * Contract:
 *  1. The caller owns fm_io_req and dst until completion; tag comes back untouched; completions
 *     arrive in any order.
 *  2. status is OK only if all bytes arrived. Partial reads are continued inside; an early end of
 *     file is FM_ERR_IO with err 0 and done_bytes telling how far it came. Workers word nothing.
 *  3. In direct mode off, bytes and dst must be multiples of caps.align; asking otherwise is
 *     FM_ERR_ARG before anything is queued. A file's last window may reach past its end up to the
 *     next multiple of align: set bytes_wanted to what must exist. Buffered mode has align 1.
 *  4. submit of n queues all n or none.
 *  5. cancel still delivers a completion (FM_ERR_CANCELLED or OK).
 *  6. One waiter at a time; any thread may submit. A forked child may only close.
 *  7. promote makes a queued speculative request a demand, behind those there are; one that has
 *     started runs on as it is. Not after completion was delivered.
 *  8. Requests with priority 0 (demand) are always started before those with priority 1
 *     (speculative), and some of the method's capacity is kept free of speculative ones. */
#ifndef FM_IO_IO_H
#define FM_IO_IO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

typedef struct fm_io fm_io;

typedef struct fm_io_req {
    /* set by the caller */
    int32_t file;        /* index into the opened paths */
    int32_t priority;    /* 0 demand, 1 speculative */
    int64_t off;         /* byte offset in the file */
    size_t bytes;        /* to read into dst */
    size_t bytes_wanted; /* <= bytes; how many must exist in the file; 0 means all of bytes */
    void *dst;
    uint64_t tag;
    size_t crc_bytes; /* > 0: CRC-32C of dst[crc_skip .. crc_skip+crc_bytes) into crc */
    size_t crc_skip;  /* crc_skip + crc_bytes must lie within the wanted bytes */
    /* set on completion */
    fm_status status;
    int err; /* errno of a failed read */
    size_t done_bytes;
    uint32_t crc;
    int64_t submitted_ns; /* by fm_clock_ns; then it queued, was read, and was checked: */
    int64_t ns_queued, ns_read, ns_crc;
    /* private */
    struct fm_io_req *next;
    int64_t seq;
    int32_t state;
} fm_io_req;

typedef struct fm_io_caps {
    const char *method; /* "pread", ... */
    bool direct;        /* bypasses the page cache */
    size_t align;       /* of off, bytes and dst; 1 when buffered */
} fm_io_caps;

typedef struct fm_io_opts {
    const char *method; /* a name of FM_IO_LIST; NULL = "pread" */
    bool direct;        /* O_DIRECT / F_NOCACHE; FM_ERR_UNSUPPORTED if a file's system refuses it */
    int n_workers;      /* 0 = the method's default */
    const char *fault;  /* method "fault": script, see io_fault.c */
} fm_io_opts;
#define FM_IO_OPTS_INIT {NULL, false, 0, NULL}

typedef struct fm_io_counters {
    int64_t n_reads, bytes_read, n_failed, ns_read; /* ns_read is summed over workers */
    int64_t n_registered; /* raw reads into memory that the kernel had registered */
} fm_io_counters;

/* Opens all paths read-only; they must be regular files. Errors name the path. *out is NULL on
 * failure. FLASHMOE_FAULT wraps whatever method was asked for (tests). */
fm_status fm_io_open(const fm_io_opts *opts, const char *const *paths, int n_paths, fm_io **out);
void fm_io_close(fm_io *io); /* waits for running reads, drops queued ones; NULL is fine */
fm_io_caps fm_io_get_caps(const fm_io *io);
int64_t fm_io_file_bytes(const fm_io *io, int32_t file);
const char *fm_io_file_path(const fm_io *io, int32_t file);

fm_status fm_io_submit(fm_io *io, fm_io_req *const *reqs, int n);
/* Blocks until at least min_done (<= max_done, <= in flight) completions are there; min_done 0
 * polls. done[0..*n_done) are the completed requests, whatever their status. timeout_ns < 0 waits
 * for ever; a timeout returns FM_OK with what there is. */
fm_status fm_io_wait(fm_io *io, fm_io_req **done, int max_done, int min_done, int64_t timeout_ns,
                     int *n_done);
/* A request that has not started completes with FM_ERR_CANCELLED; others run on. Not after
 * completion was delivered. */
fm_status fm_io_cancel(fm_io *io, fm_io_req *req);
fm_status fm_io_promote(fm_io *io, fm_io_req *req);
void fm_io_get_counters(const fm_io *io, fm_io_counters *out);

/* Most reads will land in these n buffers of stride bytes, one behind the other in memory of fm_region_alloc, and a
 * method may let the kernel pin each once, when it is first read into; a child of fork may lose them. At most once,
 * before the first read; a refusal costs speed only. */
void fm_io_set_buffers(fm_io *io, void *base, size_t stride, int64_t n);
/* Before the memory of buffers first, first + 1 and so on goes back to the OS; no read into them may be in flight. Once
 * read into again, they are pinned again. */
void fm_io_drop_buffers(fm_io *io, int64_t first);

/* Word a failed request on the calling thread: path, offset, numbers, strerror; returns its status.
 * what says what the bytes are ("layer 3 expert 17") and may be NULL. */
fm_status fm_io_fail(const fm_io *io, const fm_io_req *req, const char *what);

/* Synchronous buffered read for loading, any alignment, any method (uses the calling thread). */
fm_status fm_io_read_sync(fm_io *io, int32_t file, int64_t off, size_t bytes, void *dst);
/* Tell the OS that a range will not be needed again (page cache); best effort. */
void fm_io_forget(fm_io *io, int32_t file, int64_t off, int64_t bytes);

#endif
