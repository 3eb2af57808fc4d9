/* Queue and command buffers of the stand-in framework. Each queue has a worker thread that runs command
 * buffers in order; with FAKE_METAL_LATE=1 they run only while someone waits and no further than that needs, so that
 * a result read too early is always wrong. */
#include "fake_metal.h"

#include <Block.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static pthread_mutex_t gpu = PTHREAD_MUTEX_INITIALIZER; /* the runner runs one dispatch at a time */

/* Command buffers and dispatches of the whole process. */
static long n_commands, n_dispatches;
__attribute__((visibility("default"))) void fake_metal_counts(long out[2])
{
    out[0] = __atomic_load_n(&n_commands, __ATOMIC_SEQ_CST);
    out[1] = __atomic_load_n(&n_dispatches, __ATOMIC_SEQ_CST);
}

@implementation FakeCommandBuffer
- (id<MTLComputeCommandEncoder>)computeCommandEncoder
{
    CHECK(st < MTLCommandBufferStatusCommitted, @"encoder created after commit");
    CHECK(!open, @"a command encoder is already encoding to this command buffer");
    FakeEncoder *e = [[[FakeEncoder alloc] init] autorelease];
    e->commands = self;
    e->used_from = [used count];
    open = e;
    return e;
}

- (fake_dispatch *)append
{
    if (n == capacity) {
        capacity = capacity ? 2 * capacity : 16;
        list = realloc(list, (size_t)capacity * sizeof *list);
    }
    memset(&list[n], 0, sizeof *list);
    return &list[n++];
}

- (void)encode:(fake_kind)kind event:(id<MTLEvent>)event value:(uint64_t)value
{
    CHECK(st < MTLCommandBufferStatusCommitted, @"event encoded after commit");
    CHECK(!open, @"event encoded while an encoder is still encoding");
    CHECK(event, @"event encoded: nil");
    fake_dispatch *to = [self append];
    to->kind = kind;
    to->event = (FakeEvent *)event;
    to->value = value;
    [keep addObject:event];
}

- (void)encodeSignalEvent:(id<MTLEvent>)event value:(uint64_t)value
{
    [self encode:FAKE_SIGNAL event:event value:value];
}

- (void)encodeWaitForEvent:(id<MTLEvent>)event value:(uint64_t)value
{
    [self encode:FAKE_WAIT event:event value:value];
}

- (void)addCompletedHandler:(MTLCommandBufferHandler)block
{
    CHECK(st < MTLCommandBufferStatusCommitted, @"addCompletedHandler after commit");
    [handlers addObject:[NSValue valueWithPointer:(void *)Block_copy(block)]];
}

- (void)commit
{
    CHECK(!open, @"commit while an encoder is still encoding");
    CHECK([self status] < MTLCommandBufferStatusCommitted, @"command buffer committed twice");
    pthread_mutex_lock(&lock);
    st = MTLCommandBufferStatusCommitted;
    pthread_mutex_unlock(&lock);
    __atomic_fetch_add(&n_commands, 1, __ATOMIC_SEQ_CST);
    for (int i = 0; i < n; i++)
        __atomic_fetch_add(&n_dispatches, list[i].kind == FAKE_RUN, __ATOMIC_SEQ_CST);
    [queue submit:self];
}

- (NSString *)runDispatch:(fake_dispatch *)d
{
    const FakeFunction *f = d->pipeline->function;
    const msl_library *lib = f->library->lib;
    char error[1024] = "";
    pthread_mutex_lock(&gpu);
    for (int i = 0; i < lib->n_constants; i++) {
        const msl_fconst *q = &lib->constants[i];
        NSData *v = [f->constants objectForKey:[NSNumber numberWithUnsignedLong:(unsigned long)q->index]];
        *q->defined = v != nil;
        memset(q->value, 0, q->size);
        if (v)
            memcpy(q->value, [v bytes], q->size < 4 ? q->size : 4);
    }
    const bool protect = fake_env("FAKE_METAL_PROTECT", 0);
    NSMutableSet *allowed = protect ? [NSMutableSet set] : nil;
    for (int i = 0; i < FAKE_SLOTS && protect; i++)
        if (d->bound[i])
            [allowed addObject:d->bound[i]];
    for (size_t i = d->used_from; i < d->n_used && protect; i++)
        [allowed addObject:[used objectAtIndex:i]];
    if (protect)
        fake_buffers_protect(allowed, true);
    const int failed = msl_run(lib, f->kernel, &d->d, NULL, error, sizeof error);
    if (protect)
        fake_buffers_protect(allowed, false);
    pthread_mutex_unlock(&gpu);
    return failed ? [NSString stringWithUTF8String:error] : nil;
}

/* One command; false: it waits for an event and is not over. */
- (BOOL)step:(fake_dispatch *)d problem:(NSString **)why
{
    if (d->kind == FAKE_RUN)
        *why = [self runDispatch:d];
    else if (d->kind == FAKE_SIGNAL)
        [d->event setSignaledValue:d->value];
    else if (queue->late)
        return [d->event signaledValue] >= d->value;
    else if (![d->event reached:d->value within:(uint64_t)fake_env("FAKE_METAL_EVENT_MS", 20000)])
        *why = [NSString stringWithFormat:@"timed out waiting for value %lu of an event", (unsigned long)d->value];
    else
        usleep((useconds_t)fake_env("FAKE_METAL_SLOW_MS", 0) * 1000);
    return YES;
}

- (BOOL)runUntil:(FakeEvent *)event value:(uint64_t)value
{
    @autoreleasepool {
        if (number == fake_env("FAKE_METAL_HANG", -1))
            for (;;)
                pause();
        const long fails = number == fake_env("FAKE_METAL_FAIL", -1) ? fake_env("FAKE_METAL_FAIL_AT", 0) : n + 1;
        NSString *why = fails == 0 ? @"planted failure" : nil;
        while (next < n && !why) {
            if (![self step:&list[next] problem:&why])
                return NO;
            next++;
            if (next >= fails)
                why = @"planted failure";
            if (event && next < n && !why && [event signaledValue] >= value)
                return NO;
        }
        [self finish:why];
    }
    return YES;
}

- (void)finish:(NSString *)why
{
    if (why)
        problem = [fake_error(@"MTLCommandBufferErrorDomain", 3, why) retain];
    for (int i = 0; i < n; i++)
        for (int j = 0; j < FAKE_SLOTS; j++) {
            free(list[i].bytes[j]);
            if (list[i].bound[j])
                __atomic_fetch_sub(&list[i].bound[j]->in_flight, 1, __ATOMIC_SEQ_CST);
        }
    for (FakeBuffer *b in used)
        __atomic_fetch_sub(&b->in_flight, 1, __ATOMIC_SEQ_CST);
    for (NSValue *v in handlers) {
        ((MTLCommandBufferHandler)[v pointerValue])(self);
        Block_release([v pointerValue]);
    }
    [handlers removeAllObjects];
    [keep removeAllObjects];
    pthread_mutex_lock(&lock);
    st = problem ? MTLCommandBufferStatusError : MTLCommandBufferStatusCompleted;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

- (void)waitUntilCompleted
{
    CHECK([self status] >= MTLCommandBufferStatusCommitted, @"waitUntilCompleted before commit");
    [queue runUntil:self event:nil value:0];
    pthread_mutex_lock(&lock);
    while (st < MTLCommandBufferStatusCompleted)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

- (MTLCommandBufferStatus)status
{
    pthread_mutex_lock(&lock);
    const MTLCommandBufferStatus s = st;
    pthread_mutex_unlock(&lock);
    return s;
}

- (NSError *)error { return problem; }

- (void)dealloc
{
    CHECK(st < MTLCommandBufferStatusCommitted || st >= MTLCommandBufferStatusCompleted,
          @"command buffer deallocated while in flight");
    if (st < MTLCommandBufferStatusCommitted) /* dropped: its resources are free again */
        for (int i = 0; i < n; i++)
            for (int j = 0; j < FAKE_SLOTS; j++) {
                free(list[i].bytes[j]);
                if (list[i].bound[j])
                    __atomic_fetch_sub(&list[i].bound[j]->in_flight, 1, __ATOMIC_SEQ_CST);
            }
    if (st < MTLCommandBufferStatusCommitted)
        for (FakeBuffer *b in used)
            __atomic_fetch_sub(&b->in_flight, 1, __ATOMIC_SEQ_CST);
    free(list);
    [handlers release];
    [keep release];
    [used release];
    [problem release];
    pthread_mutex_destroy(&lock);
    pthread_cond_destroy(&changed);
    [super dealloc];
}
@end

static void *work(void *p)
{
    FakeQueue *q = p;
    for (;;) {
        pthread_mutex_lock(&q->lock);
        while (!q->stop && (q->late || [q->waiting count] == 0))
            pthread_cond_wait(&q->changed, &q->lock);
        FakeCommandBuffer *c = nil;
        if (!q->stop) {
            c = [[q->waiting objectAtIndex:0] retain];
            [q->waiting removeObjectAtIndex:0];
        }
        pthread_mutex_unlock(&q->lock);
        if (!c)
            return NULL;
        @autoreleasepool {
            [c runUntil:nil value:0];
            [c release];
        }
    }
}

static FakeQueue *late_queue; /* the newest */

void fake_metal_run_late(void) { [late_queue runUntil:nil event:nil value:0]; }

void fake_metal_run_eager(void)
{
    if (late_queue && late_queue->eager)
        [late_queue runUntil:nil event:nil value:0];
}

void fake_metal_run_late_until(FakeEvent *event, uint64_t value) { [late_queue runUntil:nil event:event value:value]; }

@implementation FakeQueue
- (id)init
{
    if ((self = [super init])) {
        late_queue = self;
        waiting = [[NSMutableArray alloc] init];
        eager = fake_env("FAKE_METAL_EAGER", 0);
        late = eager || fake_env("FAKE_METAL_LATE", 0);
        pthread_mutex_init(&lock, NULL);
        pthread_cond_init(&changed, NULL);
        pthread_create(&worker, NULL, work, self);
    }
    return self;
}

- (id<MTLCommandBuffer>)commandBuffer
{
    FakeCommandBuffer *c = [[[FakeCommandBuffer alloc] init] autorelease];
    c->queue = self; /* not retained: the last release may be the worker's own, which the queue joins */
    c->handlers = [[NSMutableArray alloc] init];
    c->keep = [[NSMutableArray alloc] init];
    c->used = [[NSMutableArray alloc] init];
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->changed, NULL);
    return c;
}

- (void)submit:(FakeCommandBuffer *)c
{
    pthread_mutex_lock(&lock);
    c->number = ++n_committed;
    [waiting addObject:c];
    pthread_cond_signal(&changed);
    pthread_mutex_unlock(&lock);
    if (eager)
        [self runUntil:nil event:nil value:0];
}

- (void)runUntil:(FakeCommandBuffer *)last event:(FakeEvent *)event value:(uint64_t)value
{
    const bool nested = running; /* by a signal of the device itself */
    while (late && !nested && !(event && [event signaledValue] >= value)) {
        pthread_mutex_lock(&lock);
        FakeCommandBuffer *c = [waiting count] ? [[waiting objectAtIndex:0] retain] : nil;
        pthread_mutex_unlock(&lock);
        if (!c)
            return;
        running = true;
        const bool done = [c runUntil:event value:value];
        running = false;
        if (done) {
            pthread_mutex_lock(&lock);
            [waiting removeObjectAtIndex:0];
            pthread_mutex_unlock(&lock);
        }
        const bool stop_here = !done || c == last;
        [c release];
        if (stop_here)
            return;
    }
}

- (void)dealloc
{
    pthread_mutex_lock(&lock);
    stop = true;
    pthread_cond_signal(&changed);
    pthread_mutex_unlock(&lock);
    pthread_join(worker, NULL);
    if (late_queue == self)
        late_queue = nil;
    [waiting release];
    pthread_mutex_destroy(&lock);
    pthread_cond_destroy(&changed);
    [super dealloc];
}
@end
