/* Queue, command buffers and encoders of the stand-in framework. Each queue has a worker thread that runs command
 * buffers in order; with FAKE_METAL_LATE=1 they run only inside waitUntilCompleted, so that a result read too early is
 * always wrong. */
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

@implementation FakeEncoder
#define LIVE CHECK(!ended, @"%s after endEncoding", sel_getName(_cmd))
- (void)setComputePipelineState:(id<MTLComputePipelineState>)state
{
    LIVE;
    CHECK(state, @"setComputePipelineState: nil");
    now.pipeline = (FakePipeline *)state;
    [commands->keep addObject:state];
}

- (void)setBuffer:(id<MTLBuffer>)buffer offset:(NSUInteger)offset atIndex:(NSUInteger)index
{
    LIVE;
    FakeBuffer *b = (FakeBuffer *)buffer;
    CHECK(index < FAKE_SLOTS, @"buffer index %lu: at most 30", (unsigned long)index);
    CHECK(b, @"setBuffer: nil at index %lu", (unsigned long)index);
    CHECK(offset < b->len, @"setBuffer: offset %lu must be < length %lu [index %lu]", (unsigned long)offset,
          (unsigned long)b->len, (unsigned long)index);
    now.bound[index] = b;
    free(now.bytes[index]);
    now.bytes[index] = NULL;
    now.d.buf[index].ptr = (char *)b->p + offset;
    now.d.buf[index].len = b->len - offset;
}

- (void)setBytes:(const void *)bytes length:(NSUInteger)length atIndex:(NSUInteger)index
{
    LIVE;
    CHECK(index < FAKE_SLOTS, @"buffer index %lu: at most 30", (unsigned long)index);
    CHECK(length > 0 && length <= 4096, @"setBytes: length %lu, at most 4096", (unsigned long)length);
    free(now.bytes[index]);
    now.bytes[index] = malloc(length);
    memcpy(now.bytes[index], bytes, length);
    byte_len[index] = length;
    now.bound[index] = nil;
    now.d.buf[index].ptr = now.bytes[index];
    now.d.buf[index].len = length;
}

- (void)useResource:(id<MTLResource>)resource usage:(MTLResourceUsage)usage
{
    LIVE;
    CHECK(resource && usage, @"useResource: nil, or no usage");
    [commands->used addObject:resource];
    [commands->keep addObject:resource];
    __atomic_fetch_add(&((FakeBuffer *)resource)->in_flight, 1, __ATOMIC_SEQ_CST);
}

static void check_bindings(const fake_dispatch *d)
{
    const msl_kernel *k = d->pipeline->function->kernel;
    for (int i = 0; i < k->n_params; i++) {
        const msl_param *p = &k->params[i];
        if (p->kind != MSL_P_BUFFER)
            continue;
        const msl_binding *b = &d->d.buf[p->index];
        CHECK(b->ptr, @"kernel %s: missing buffer binding at index %u for %s", k->name, p->index, p->name);
        CHECK(!p->elem_align || (uintptr_t)b->ptr % p->elem_align == 0,
              @"kernel %s: buffer %u (%s): offset is not aligned to %u bytes", k->name, p->index, p->name,
              p->elem_align);
        CHECK(!p->is_ref || b->len >= p->elem_size, @"kernel %s: argument %s at buffer %u has %zu bytes, needs %u",
              k->name, p->name, p->index, b->len, p->elem_size);
    }
}

- (void)dispatchThreadgroups:(MTLSize)g threadsPerThreadgroup:(MTLSize)t
{
    LIVE;
    CHECK(now.pipeline, @"dispatch without a compute pipeline state");
    CHECK(g.width && g.height && g.depth && t.width && t.height && t.depth, @"dispatch with an empty grid or group");
    const NSUInteger threads = t.width * t.height * t.depth;
    CHECK(threads <= [now.pipeline maxTotalThreadsPerThreadgroup], @"%lu threads per threadgroup, at most %lu",
          (unsigned long)threads, (unsigned long)[now.pipeline maxTotalThreadsPerThreadgroup]);
    check_bindings(&now);
    FakeCommandBuffer *c = commands;
    if (c->n == c->capacity) {
        c->capacity = c->capacity ? 2 * c->capacity : 16;
        c->list = realloc(c->list, (size_t)c->capacity * sizeof *c->list);
    }
    fake_dispatch *to = &c->list[c->n++];
    *to = now;
    to->n_used = [c->used count];
    const unsigned groups[3] = {(unsigned)g.width, (unsigned)g.height, (unsigned)g.depth};
    const unsigned size[3] = {(unsigned)t.width, (unsigned)t.height, (unsigned)t.depth};
    for (int a = 0; a < 3; a++) {
        to->d.grid[a] = groups[a] * size[a];
        to->d.tg[a] = size[a];
    }
    for (int i = 0; i < FAKE_SLOTS; i++) {
        if (now.bytes[i]) {
            to->bytes[i] = malloc(byte_len[i]);
            memcpy(to->bytes[i], now.bytes[i], byte_len[i]);
            to->d.buf[i].ptr = to->bytes[i];
        }
        if (now.bound[i]) {
            [c->keep addObject:now.bound[i]];
            __atomic_fetch_add(&now.bound[i]->in_flight, 1, __ATOMIC_SEQ_CST);
        }
    }
}

- (void)memoryBarrierWithScope:(MTLBarrierScope)scope
{
    LIVE;
    CHECK(scope == MTLBarrierScopeBuffers, @"memoryBarrierWithScope: the stand-in knows buffers only");
    CHECK(commands->n > 0, @"memoryBarrierWithScope before any dispatch"); /* dispatches run in order here */
}

- (void)endEncoding
{
    LIVE;
    ended = YES;
    commands->open = nil;
    for (int i = 0; i < FAKE_SLOTS; i++) {
        free(now.bytes[i]);
        now.bytes[i] = NULL;
    }
}

- (void)dealloc
{
    CHECK(ended, @"command encoder released without endEncoding");
    [super dealloc];
}
@end

@implementation FakeCommandBuffer
- (id<MTLComputeCommandEncoder>)computeCommandEncoder
{
    CHECK(st < MTLCommandBufferStatusCommitted, @"encoder created after commit");
    CHECK(!open, @"a command encoder is already encoding to this command buffer");
    FakeEncoder *e = [[[FakeEncoder alloc] init] autorelease];
    e->commands = self;
    open = e;
    return e;
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
    __atomic_fetch_add(&n_dispatches, n, __ATOMIC_SEQ_CST);
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
    for (size_t i = 0; i < d->n_used && protect; i++)
        [allowed addObject:[used objectAtIndex:i]];
    if (protect)
        fake_buffers_protect(allowed, true);
    const int failed = msl_run(lib, f->kernel, &d->d, NULL, error, sizeof error);
    if (protect)
        fake_buffers_protect(allowed, false);
    pthread_mutex_unlock(&gpu);
    return failed ? [NSString stringWithUTF8String:error] : nil;
}

- (void)run
{
    @autoreleasepool {
        if (number == fake_env("FAKE_METAL_HANG", -1))
            for (;;)
                pause();
        NSString *why = number == fake_env("FAKE_METAL_FAIL", -1) ? @"planted failure" : nil;
        for (int i = 0; i < n && !why; i++)
            why = [self runDispatch:&list[i]];
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
}

- (void)waitUntilCompleted
{
    CHECK([self status] >= MTLCommandBufferStatusCommitted, @"waitUntilCompleted before commit");
    [queue runUntil:self];
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
            [c run];
            [c release];
        }
    }
}

static FakeQueue *late_queue; /* the newest */

void fake_metal_run_late(void);
void fake_metal_run_late(void)
{
    [late_queue runUntil:nil];
}

@implementation FakeQueue
- (id)init
{
    if ((self = [super init])) {
        late_queue = self;
        waiting = [[NSMutableArray alloc] init];
        late = fake_env("FAKE_METAL_LATE", 0);
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
}

- (void)runUntil:(FakeCommandBuffer *)last
{
    while (late) {
        pthread_mutex_lock(&lock);
        FakeCommandBuffer *c = [waiting count] ? [[waiting objectAtIndex:0] retain] : nil;
        if (c)
            [waiting removeObjectAtIndex:0];
        pthread_mutex_unlock(&lock);
        if (!c)
            return;
        [c run];
        const bool done = c == last;
        [c release];
        if (done)
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
