/* Owns: device, queue, buffers and the command buffer being recorded. Knows nothing of ops.
 *
 * Every address that an op names lies in a buffer made by fm_metal_alloc (host and GPU see the same bytes), or is
 * copied into the upload ring, which lives until the next sync. Not thread-safe: one caller at a time. */
#ifndef FM_METAL_DEVICE_H
#define FM_METAL_DEVICE_H

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>
#include <dispatch/dispatch.h>

#include "backend/backend.h"
#include "metal_args.h"

enum { FM_METAL_N_CONSTANTS = 8, FM_METAL_MAX_PIPELINES = 256, FM_METAL_MAX_BUFFERS = 256 };

typedef struct fm_metal_buffer {
    char *base;     /* as handed out; page-aligned */
    size_t bytes;   /* whole pages */
    void *map;      /* what mmap returned, and how much */
    size_t map_bytes;
    id<MTLBuffer> buffer;
    fm_usage usage;
    uint64_t used_in; /* encoder number of the last useResource */
} fm_metal_buffer;

typedef struct fm_metal_pipeline {
    const char *kernel;
    fm_u32 constants[FM_METAL_N_CONSTANTS];
    id<MTLComputePipelineState> state;
} fm_metal_pipeline;

/* What was recorded since the backend was opened; read by tests and by `doctor`. */
typedef struct fm_metal_counters {
    uint64_t command_buffers, encoders, dispatches, waits, upload_bytes, encode_ns, events, awaits;
} fm_metal_counters;

typedef struct fm_metal {
    fm_backend base; /* first: this is a backend */
    id<MTLDevice> device;
    char name[96]; /* of the device */
    id<MTLCommandQueue> queue;
    id<MTLLibrary> library;
    fm_metal_pipeline pipelines[FM_METAL_MAX_PIPELINES];
    int n_pipelines;
    fm_metal_buffer buffers[FM_METAL_MAX_BUFFERS]; /* by rising base */
    int n_buffers;
    size_t bytes, max_bytes, max_buffer_bytes;
    NSMutableArray *ring; /* id<MTLBuffer> chunks; the first n_ring_full are full until the next sync */
    NSUInteger ring_chunk, ring_used;
    NSMutableArray *pending; /* committed command buffers, oldest first */
    id<MTLCommandBuffer> commands;
    id<MTLComputeCommandEncoder> encoder;
    uint64_t encoder_number;
    dispatch_semaphore_t done; /* signalled once per finished command buffer */
    id<MTLSharedEvent> told, ready; /* the device's word to the host, the host's to the device */
    uint64_t told_value, ready_value, posted; /* the last recorded ones; the last posted */
    id<MTLBuffer> scratch[3];  /* delta: unit q and k; gates. Attention: parts of rows */
    bool lost;                 /* a command buffer failed or hung: only close is legal */
    fm_metal_counters counters;
} fm_metal;

/* Where the bytes of an argument lie. */
typedef struct fm_metal_place {
    id<MTLBuffer> buffer;
    NSUInteger offset; /* bytes */
} fm_metal_place;

fm_status fm_metal_device_open(fm_metal *m);
void fm_metal_device_close(fm_metal *m);

fm_status fm_metal_alloc(fm_metal *m, size_t bytes, fm_usage usage, void **out);
void fm_metal_free(fm_metal *m, void *p);

/* The buffer that holds [p, p + bytes); FM_ERR_ARG if none does. `what` names the argument. */
fm_status fm_metal_find(fm_metal *m, const void *p, size_t bytes, const char *what, fm_metal_place *out);
/* The same, or a copy in the upload ring when p is the caller's own memory. */
fm_status fm_metal_find_or_copy(fm_metal *m, const void *p, size_t bytes, const char *what, fm_metal_place *out);
/* bytes of ring memory for the host to fill now. */
fm_status fm_metal_upload(fm_metal *m, size_t bytes, void **host, fm_metal_place *out);
/* A GPU address inside a buffer that the current encoder may follow (the buffer is declared to it). */
fm_status fm_metal_address(fm_metal *m, const void *p, size_t bytes, const char *what, uint64_t *out);
/* The same for the host to write into a table: the encoder that reads it declared the buffer itself. */
fm_status fm_metal_gpu_address(fm_metal *m, const void *p, size_t bytes, const char *what, uint64_t *out);
/* Declare all slots to the current encoder, whichever will be used. */
fm_status fm_metal_declare_slots(fm_metal *m);
/* Private memory of at least `bytes`, kept for slot i of fm_metal.scratch; contents undefined. */
fm_status fm_metal_scratch(fm_metal *m, int i, size_t bytes, fm_metal_place *out);

/* The open encoder, made on first use after begin, flush or sync. */
fm_status fm_metal_encoder(fm_metal *m, id<MTLComputeCommandEncoder> *out);
/* What was recorded so far; borrowed until close. For tests and benchmarks. */
const fm_metal_counters *fm_metal_counters_get(const fm_metal *m);
/* Of the backend that was opened last; NULL when it is closed. */
const fm_metal_counters *fm_metal_counters_newest(void);
/* Longest wait for one command buffer, of all backends; 60 at start. */
void fm_metal_timeout_set(int seconds);

/* Events in the command buffer, and the host's side of them: as backend.h says. */
fm_status fm_metal_tell(fm_metal *m, uint64_t *value);
fm_status fm_metal_hold(fm_metal *m, uint64_t *value);
fm_status fm_metal_await(fm_metal *m, uint64_t value);
void fm_metal_post(fm_metal *m, uint64_t value);

/* Commit what is recorded; sync also waits for everything and reports the first failure. */
void fm_metal_flush(fm_metal *m);
fm_status fm_metal_sync(fm_metal *m);

#endif
