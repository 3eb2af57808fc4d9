/* Buffers are anonymous pages handed to Metal with newBufferWithBytesNoCopy, so that the I/O engine reads experts
 * straight into memory that the GPU sees. Objects are retained here by hand and released in close: no entry point
 * leaves anything to an autorelease pool of the caller. */
#include "metal_device.h"

#include <string.h>
#include <sys/mman.h>

#include "base/mem.h"

enum { PAGE = 16384, RING_CHUNK = 1 << 20, RING_ALIGN = 256, AWAIT_STEP_MS = 50 };

static int timeout_s = 60; /* a token takes far less; the system kills a stuck GPU sooner */

void fm_metal_timeout_set(int seconds) { timeout_s = seconds; }

static const fm_metal *newest;

const fm_metal_counters *fm_metal_counters_get(const fm_metal *m) { return &m->counters; }

const fm_metal_counters *fm_metal_counters_newest(void) { return newest ? &newest->counters : NULL; }

fm_status fm_metal_device_open(fm_metal *m)
{
    m->device = MTLCreateSystemDefaultDevice();
    if (!m->device)
        return fm_fail(FM_ERR_UNSUPPORTED, "backend 'metal': this machine has no Metal device");
    if (![m->device supportsFamily:MTLGPUFamilyMetal3])
        return fm_fail(FM_ERR_UNSUPPORTED, "backend 'metal': device '%s' lacks the family Metal 3",
                       [[m->device name] UTF8String]);
    strncpy(m->name, [[m->device name] UTF8String], sizeof m->name - 1);
    m->queue = [m->device newCommandQueue];
    m->ring = [[NSMutableArray alloc] init];
    m->pending = [[NSMutableArray alloc] init];
    m->done = dispatch_semaphore_create(0);
    m->told = [m->device newSharedEvent];
    m->ready = [m->device newSharedEvent];
    m->max_bytes = (size_t)[m->device recommendedMaxWorkingSetSize];
    m->max_buffer_bytes = (size_t)[m->device maxBufferLength];
    if (!m->queue || !m->ring || !m->pending || !m->done || !m->told || !m->ready)
        return fm_fail(FM_ERR_NOMEM, "backend 'metal': no command queue");
    newest = m;
    return FM_OK;
}

void fm_metal_device_close(fm_metal *m)
{
    newest = newest == m ? NULL : newest;
    [m->encoder endEncoding]; /* what was recorded and never synced is dropped */
    [m->encoder release];
    [m->commands release];
    m->encoder = nil;
    m->commands = nil;
    if (m->pending && [m->pending count] > 0 && !m->lost)
        (void)fm_metal_sync(m);
    while (m->n_buffers > 0)
        fm_metal_free(m, m->buffers[m->n_buffers - 1].base);
    for (size_t i = 0; i < sizeof m->scratch / sizeof m->scratch[0]; i++)
        [m->scratch[i] release];
    [m->ring release];
    [m->pending release];
    if (m->done)
        dispatch_release(m->done);
    [m->told release];
    [m->ready release];
    [m->queue release];
    [m->device release];
}

/* ---- memory ------------------------------------------------------------------------------------- */

fm_status fm_metal_alloc(fm_metal *m, size_t bytes, fm_usage usage, void **out)
{
    const size_t whole = fm_round_up(bytes > 0 ? bytes : 1, PAGE);
    if (m->max_bytes > 0 && m->bytes + whole > m->max_bytes)
        return fm_fail(FM_ERR_NOMEM,
                       "backend 'metal': %zu bytes on top of %zu exceed the device's recommended working set of %zu; "
                       "lower --memory",
                       whole, m->bytes, m->max_bytes);
    if (whole > m->max_buffer_bytes)
        return fm_fail(FM_ERR_NOMEM, "backend 'metal': a buffer of %zu bytes, the device allows %zu; lower --memory",
                       whole, m->max_buffer_bytes);
    if (m->n_buffers == FM_METAL_MAX_BUFFERS)
        return fm_fail(FM_ERR_NOMEM, "backend 'metal': more than %d buffers", FM_METAL_MAX_BUFFERS);
    fm_metal_buffer b = {.bytes = whole, .map_bytes = whole + PAGE, .usage = usage}; /* mmap may align to less */
    b.map = mmap(NULL, b.map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (b.map == MAP_FAILED)
        return fm_fail(FM_ERR_NOMEM, "backend 'metal': no %zu bytes of memory", whole);
    b.base = (char *)fm_round_up((size_t)b.map, PAGE);
    b.buffer = [m->device newBufferWithBytesNoCopy:b.base
                                            length:whole
                                           options:MTLResourceStorageModeShared
                                       deallocator:nil];
    if (!b.buffer) {
        munmap(b.map, b.map_bytes);
        return fm_fail(FM_ERR_NOMEM, "backend 'metal': the device refused a buffer of %zu bytes", whole);
    }
    int i = m->n_buffers++;
    for (; i > 0 && m->buffers[i - 1].base > b.base; i--)
        m->buffers[i] = m->buffers[i - 1];
    m->buffers[i] = b;
    m->bytes += whole;
    *out = b.base;
    return FM_OK;
}

void fm_metal_free(fm_metal *m, void *p)
{
    for (int i = 0; i < m->n_buffers; i++) {
        fm_metal_buffer b = m->buffers[i];
        if (b.base != p)
            continue;
        if (!m->lost && (m->commands || [m->pending count] > 0))
            (void)fm_metal_sync(m); /* nothing may be freed under the GPU */
        m->n_buffers--;
        for (; i < m->n_buffers; i++)
            m->buffers[i] = m->buffers[i + 1];
        [b.buffer release]; /* before its pages go */
        if (!m->lost)
            munmap(b.map, b.map_bytes); /* a hung device may still write: better leak than be written over */
        m->bytes -= b.bytes;
        return;
    }
}

static fm_metal_buffer *holder(fm_metal *m, const void *p, size_t bytes)
{
    int lo = 0, hi = m->n_buffers;
    while (lo < hi) { /* the last buffer that starts at or before p */
        const int mid = (lo + hi) / 2;
        if ((const char *)p >= m->buffers[mid].base)
            lo = mid + 1;
        else
            hi = mid;
    }
    if (lo == 0)
        return NULL;
    fm_metal_buffer *b = &m->buffers[lo - 1];
    const size_t at = (size_t)((const char *)p - b->base);
    return at < b->bytes && bytes <= b->bytes - at ? b : NULL;
}

fm_status fm_metal_find(fm_metal *m, const void *p, size_t bytes, const char *what, fm_metal_place *out)
{
    const fm_metal_buffer *b = holder(m, p, bytes);
    if (!b)
        return fm_fail(FM_ERR_ARG, "backend 'metal': %s (%zu bytes) is not in memory of the backend", what, bytes);
    out->buffer = b->buffer;
    out->offset = (NSUInteger)((const char *)p - b->base);
    return FM_OK;
}

fm_status fm_metal_upload(fm_metal *m, size_t bytes, void **host, fm_metal_place *out)
{
    const NSUInteger need = fm_round_up(bytes > 0 ? bytes : 1, RING_ALIGN);
    while (m->ring_chunk < [m->ring count]) {
        id<MTLBuffer> chunk = [m->ring objectAtIndex:m->ring_chunk];
        if (m->ring_used + need <= [chunk length])
            break;
        m->ring_chunk++;
        m->ring_used = 0;
    }
    if (m->ring_chunk == [m->ring count]) {
        const NSUInteger size = need > RING_CHUNK ? fm_round_up(need, PAGE) : RING_CHUNK;
        id<MTLBuffer> chunk = [m->device newBufferWithLength:size options:MTLResourceStorageModeShared];
        if (!chunk)
            return fm_fail(FM_ERR_NOMEM, "backend 'metal': no %zu bytes for arguments", (size_t)size);
        [m->ring addObject:chunk];
        [chunk release];
        m->ring_used = 0;
    }
    out->buffer = [m->ring objectAtIndex:m->ring_chunk];
    out->offset = m->ring_used;
    *host = (char *)[out->buffer contents] + m->ring_used;
    m->ring_used += need;
    m->counters.upload_bytes += bytes;
    return FM_OK;
}

fm_status fm_metal_find_or_copy(fm_metal *m, const void *p, size_t bytes, const char *what, fm_metal_place *out)
{
    if (holder(m, p, bytes))
        return fm_metal_find(m, p, bytes, what, out);
    void *host;
    FM_TRY(fm_metal_upload(m, bytes, &host, out));
    memcpy(host, p, bytes);
    return FM_OK;
}

/* Makes it resident and orders our writes to it. */
static fm_status declare(fm_metal *m, fm_metal_buffer *b)
{
    id<MTLComputeCommandEncoder> e;
    FM_TRY(fm_metal_encoder(m, &e));
    if (b->used_in != m->encoder_number) {
        [e useResource:b->buffer usage:MTLResourceUsageRead | MTLResourceUsageWrite];
        b->used_in = m->encoder_number;
    }
    return FM_OK;
}

fm_status fm_metal_declare_slots(fm_metal *m)
{
    for (int i = 0; i < m->n_buffers; i++)
        if (m->buffers[i].usage == FM_USAGE_SLOTS)
            FM_TRY(declare(m, &m->buffers[i]));
    return FM_OK;
}

fm_status fm_metal_gpu_address(fm_metal *m, const void *p, size_t bytes, const char *what, uint64_t *out)
{
    const fm_metal_buffer *b = holder(m, p, bytes);
    if (!b)
        return fm_fail(FM_ERR_ARG, "backend 'metal': %s (%zu bytes) is not in memory of the backend", what, bytes);
    *out = [b->buffer gpuAddress] + (uint64_t)((const char *)p - b->base);
    return FM_OK;
}

fm_status fm_metal_address(fm_metal *m, const void *p, size_t bytes, const char *what, uint64_t *out)
{
    FM_TRY(fm_metal_gpu_address(m, p, bytes, what, out));
    return declare(m, holder(m, p, bytes));
}

fm_status fm_metal_scratch(fm_metal *m, int i, size_t bytes, fm_metal_place *out)
{
    if (!m->scratch[i] || [m->scratch[i] length] < bytes) {
        id<MTLBuffer> bigger = [m->device newBufferWithLength:fm_round_up(bytes, PAGE)
                                                      options:MTLResourceStorageModePrivate];
        if (!bigger)
            return fm_fail(FM_ERR_NOMEM, "backend 'metal': no %zu bytes of scratch", bytes);
        [m->scratch[i] release]; /* command buffers that use it hold their own reference */
        m->scratch[i] = bigger;
    }
    out->buffer = m->scratch[i];
    out->offset = 0;
    return FM_OK;
}

/* ---- command buffers ------------------------------------------------------------------------------ */

static fm_status open_commands(fm_metal *m)
{
    if (m->lost)
        return fm_fail(FM_ERR_STATE, "backend 'metal': the device failed before; reopen the engine");
    if (!m->commands)
        m->commands = [[m->queue commandBuffer] retain];
    return m->commands ? FM_OK : fm_fail(FM_ERR_BACKEND, "backend 'metal': no command buffer");
}

fm_status fm_metal_encoder(fm_metal *m, id<MTLComputeCommandEncoder> *out)
{
    FM_TRY(open_commands(m));
    if (!m->encoder) {
        m->encoder = [[m->commands computeCommandEncoder] retain]; /* serial: ops run in order */
        if (!m->encoder)
            return fm_fail(FM_ERR_BACKEND, "backend 'metal': no command encoder");
        m->encoder_number++;
        m->counters.encoders++;
    }
    *out = m->encoder;
    return FM_OK;
}

static void end_encoder(fm_metal *m)
{
    [m->encoder endEncoding];
    [m->encoder release];
    m->encoder = nil;
}

void fm_metal_flush(fm_metal *m)
{
    if (!m->commands)
        return;
    end_encoder(m);
    dispatch_semaphore_t done = m->done;
    [m->commands addCompletedHandler:^(id<MTLCommandBuffer> finished) {
        (void)finished;
        dispatch_semaphore_signal(done);
    }];
    [m->pending addObject:m->commands];
    [m->commands commit];
    [m->commands release];
    m->commands = nil;
    m->counters.command_buffers++;
}

static fm_status failure(fm_metal *m, id<MTLCommandBuffer> commands)
{
    NSError *error = [commands error];
    m->lost = true;
    return fm_fail(FM_ERR_BACKEND, "backend 'metal': a command buffer failed: %s (code %ld)",
                   error ? [[error localizedDescription] UTF8String] : "no reason given",
                   error ? (long)[error code] : 0L);
}

fm_status fm_metal_sync(fm_metal *m)
{
    if (m->lost)
        return fm_fail(FM_ERR_STATE, "backend 'metal': the device failed before; reopen the engine");
    fm_metal_flush(m);
    fm_status status = FM_OK;
    const NSUInteger n = [m->pending count];
    for (NSUInteger i = 0; i < n && status == FM_OK; i++) {
        const dispatch_time_t until = dispatch_time(DISPATCH_TIME_NOW, (int64_t)timeout_s * 1000000000);
        if (dispatch_semaphore_wait(m->done, until) != 0) {
            m->lost = true; /* its memory stays in use: nothing may be freed under the GPU */
            return fm_fail(FM_ERR_BACKEND, "backend 'metal': a command buffer did not finish within %d s",
                           timeout_s);
        }
    }
    for (NSUInteger i = 0; i < n && status == FM_OK; i++) {
        id<MTLCommandBuffer> commands = [m->pending objectAtIndex:i];
        [commands waitUntilCompleted]; /* the handler may run just before the status changes */
        if ([commands status] != MTLCommandBufferStatusCompleted)
            status = failure(m, commands);
    }
    [m->pending removeAllObjects];
    m->ring_chunk = m->ring_used = 0;
    m->counters.waits += n > 0;
    return status;
}

/* ---- events --------------------------------------------------------------------------------------- */

fm_status fm_metal_tell(fm_metal *m, uint64_t *value)
{
    FM_TRY(open_commands(m));
    end_encoder(m);
    *value = ++m->told_value;
    [m->commands encodeSignalEvent:m->told value:*value];
    m->counters.events++;
    return FM_OK;
}

fm_status fm_metal_hold(fm_metal *m, uint64_t *value)
{
    FM_TRY(open_commands(m));
    end_encoder(m);
    *value = ++m->ready_value;
    [m->commands encodeWaitForEvent:m->ready value:*value];
    m->counters.events++;
    return FM_OK;
}

void fm_metal_post(fm_metal *m, uint64_t value)
{
    if (value <= m->posted) /* values only rise */
        return;
    m->posted = value;
    [m->ready setSignaledValue:value];
}

/* In steps, so that a device that failed is noticed at once. */
fm_status fm_metal_await(fm_metal *m, uint64_t value)
{
    if (m->lost)
        return fm_fail(FM_ERR_STATE, "backend 'metal': the device failed before; reopen the engine");
    m->counters.awaits++;
    for (int step = 0; step < timeout_s * (1000 / AWAIT_STEP_MS); step++) {
        if ([m->told waitUntilSignaledValue:value timeoutMS:AWAIT_STEP_MS])
            return FM_OK;
        id<MTLCommandBuffer> last = [m->pending lastObject];
        if (last && [last status] >= MTLCommandBufferStatusCompleted && [m->told signaledValue] < value) {
            FM_TRY(fm_metal_sync(m)); /* words the failure */
            return fm_fail(FM_ERR_BACKEND, "backend 'metal': a command buffer ended without reaching its event");
        }
    }
    m->lost = true;
    return fm_fail(FM_ERR_BACKEND, "backend 'metal': a command buffer did not reach its event within %d s", timeout_s);
}
