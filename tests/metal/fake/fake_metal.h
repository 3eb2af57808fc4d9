/* Shared by the files of the stand-in framework.
 *
 * Environment: FAKE_METAL_LATE=1     nothing runs before someone waits
 *              FAKE_METAL_EAGER=1    it runs as far as it can before commit or a signal of the host returns
 *              FAKE_METAL_PROTECT=1  buffers that a dispatch did not bind or declare are unreadable while it runs
 *              FAKE_METAL_FAIL=n     the n-th command buffer ends in an error, after
 *              FAKE_METAL_FAIL_AT=m  m of its commands (0)
 *              FAKE_METAL_HANG=n     the n-th command buffer never ends
 *              FAKE_METAL_EVENT_MS=n a wait for an event ends its command buffer in an error after n ms (20000)
 *              FAKE_METAL_SLOW_MS=n  goes on n ms after an event let it (0): the host gets ahead of it
 *              FAKE_METAL_NO_DEVICE=1, FAKE_METAL_WORKING_SET=bytes, FAKE_METAL_MAX_BUFFER=bytes */
#ifndef FAKE_METAL_INTERNAL_H
#define FAKE_METAL_INTERNAL_H
#import <Metal/Metal.h>
#include <pthread.h>
#include <stdbool.h>

#include "msl_abi.h"

enum { FAKE_PAGE = 16384, FAKE_SLOTS = 31, FAKE_MAX_BUFFERS = 4096 };

/* A violated rule: printed and raised, as Metal's validation layer stops the program. */
void fake_fail(NSString *what);
#define CHECK(c, ...)                                                                                                  \
    do {                                                                                                               \
        if (!(c))                                                                                                      \
            fake_fail([NSString stringWithFormat:__VA_ARGS__]);                                                        \
    } while (0)

long fake_env(const char *name, long otherwise);

/* Every object of the stand-in, so that leaks can be counted. */
@interface FakeObject : NSObject
@end
long fake_metal_live(void);
void fake_metal_counts(long out[2]);

@interface FakeBuffer : FakeObject <MTLBuffer> {
@public
    void *p;
    size_t len, map_bytes; /* map_bytes 0: not ours to free */
    MTLResourceOptions options;
    int in_flight;
}
@end

@interface FakeLibrary : FakeObject <MTLLibrary> {
@public
    const msl_library *lib;
}
@end

@interface FakeFunction : FakeObject <MTLFunction> {
@public
    FakeLibrary *library;
    const msl_kernel *kernel;
    NSMutableDictionary *constants; /* index -> NSData */
}
@end

@interface FakePipeline : FakeObject <MTLComputePipelineState> {
@public
    FakeFunction *function;
}
@end

/* What two sides tell each other by a rising number. */
@interface FakeEvent : FakeObject <MTLSharedEvent> {
@public
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint64_t value;
}
- (BOOL)reached:(uint64_t)v within:(uint64_t)milliseconds;
@end

typedef enum fake_kind { FAKE_RUN, FAKE_SIGNAL, FAKE_WAIT } fake_kind;

/* A recorded command: a dispatch, or an event with its value. */
typedef struct fake_dispatch {
    fake_kind kind;
    FakeEvent *event;
    uint64_t value;
    FakePipeline *pipeline;
    msl_dispatch d;
    void *bytes[FAKE_SLOTS]; /* owned copies of setBytes */
    FakeBuffer *bound[FAKE_SLOTS];
    size_t used_from, n_used; /* what its encoder declared of the command buffer's `used` before it */
} fake_dispatch;

@class FakeCommandBuffer;
@interface FakeEncoder : FakeObject <MTLComputeCommandEncoder> {
@public
    FakeCommandBuffer *commands;
    fake_dispatch now;
    size_t byte_len[FAKE_SLOTS], used_from;
    BOOL ended;
}
@end

@interface FakeQueue : FakeObject <MTLCommandQueue> {
@public
    pthread_t worker;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    NSMutableArray *waiting;
    bool late, eager, running, stop; /* eager: late, too, as no worker runs */
    long n_committed;
}
- (void)submit:(FakeCommandBuffer *)c;
/* Late mode: run in the caller until `last` is done, the event has the value, or nothing can go on. */
- (void)runUntil:(FakeCommandBuffer *)last event:(FakeEvent *)event value:(uint64_t)value;
@end

@interface FakeCommandBuffer : FakeObject <MTLCommandBuffer> {
@public
    FakeQueue *queue;
    fake_dispatch *list;
    int n, capacity, next; /* next: the first command that did not run */
    MTLCommandBufferStatus st;
    NSMutableArray *handlers, *keep, *used; /* used: buffers declared with useResource */
    FakeEncoder *open;
    NSError *problem;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    long number;
}
- (fake_dispatch *)append;
/* Run on; false: stopped at a wait that is not over, or (late mode) because the event has its value. */
- (BOOL)runUntil:(FakeEvent *)event value:(uint64_t)value;
@end

/* Late mode: whoever waits for the device runs it. */
void fake_metal_run_late(void);
void fake_metal_run_late_until(FakeEvent *event, uint64_t value);
void fake_metal_run_eager(void); /* what the host's signal allows */

/* Make the buffers that are not in `allowed` unreadable, or readable again. */
void fake_buffers_protect(NSSet *allowed, bool hide);
NSError *fake_error(NSString *domain, NSInteger code, NSString *text);
#endif
