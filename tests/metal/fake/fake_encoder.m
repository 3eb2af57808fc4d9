/* Encoders of the stand-in framework: what Metal's validation checks is checked here, while recording. */
#include "fake_metal.h"

#include <stdlib.h>
#include <string.h>

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
    fake_dispatch *to = [c append];
    *to = now;
    to->used_from = used_from;
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
