#include "io/io_probe.h"

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/mem.h"

enum { MAX_DEPTH = 256, MAX_SAMPLES = 1 << 16 };

typedef struct probe {
    fm_io *io;
    size_t block;
    int64_t n_blocks, next;
    int64_t *first; /* [n_paths + 1] running number of each file's first block */
    int n_paths;
    uint64_t step, start; /* block i of the run is (start + i * step) % n_blocks: each once, far apart */
    fm_io_req reqs[MAX_DEPTH];
    uint8_t *buffer;
    int64_t *samples, n_samples;
} probe;

static uint64_t gcd(uint64_t a, uint64_t b) { return b == 0 ? a : gcd(b, a % b); }

static void fill(probe *p, fm_io_req *r)
{
    const int64_t b = (int64_t)((p->start + (uint64_t)p->next * p->step) % (uint64_t)p->n_blocks);
    int f = 0;
    while (b >= p->first[f + 1])
        f++;
    p->next++;
    uint8_t *const dst = r->dst;
    *r = (fm_io_req){.file = f,
                     .off = (b - p->first[f]) * (int64_t)p->block,
                     .bytes = p->block,
                     .bytes_wanted = p->block,
                     .dst = dst};
}

static int by_value(const void *a, const void *b)
{
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? -1 : x > y;
}

static fm_status plan_blocks(probe *p, const fm_io_probe_args *a)
{
    const fm_io_caps caps = fm_io_get_caps(p->io);
    p->block = fm_round_up(a->block_bytes, caps.align > FM_IO_ALIGN ? caps.align : FM_IO_ALIGN);
    for (int f = 0; f < a->n_paths; f++)
        p->first[f + 1] = p->first[f] + fm_io_file_bytes(p->io, f) / (int64_t)p->block;
    p->n_blocks = p->first[a->n_paths];
    if (p->n_blocks < 1)
        return fm_fail(FM_ERR_ARG, "probe: no file holds a block of %zu bytes", p->block);
    /* A step prime to the count visits every block once; about 0.6 of it keeps neighbours apart. */
    p->step = (uint64_t)((double)p->n_blocks * 0.6180339887) | 1;
    while (gcd(p->step, (uint64_t)p->n_blocks) != 1)
        p->step++;
    p->start = a->seed % (uint64_t)p->n_blocks;
    return FM_OK;
}

static fm_status run(probe *p, const fm_io_probe_args *a, fm_io_probe_result *out)
{
    fm_io_req *ready[MAX_DEPTH];
    const int depth = a->depth < p->n_blocks ? a->depth : (int)p->n_blocks;
    const int64_t t0 = fm_clock_ns(), end = t0 + (int64_t)(a->seconds * 1e9);
    const clock_t cpu0 = clock();
    int in_flight = 0;
    fm_status first = FM_OK;
    for (int i = 0; i < depth; i++) {
        p->reqs[i].dst = p->buffer + (size_t)i * p->block;
        fill(p, &p->reqs[i]);
        ready[i] = &p->reqs[i];
    }
    FM_TRY(fm_io_submit(p->io, ready, depth));
    in_flight = depth;
    while (in_flight > 0) {
        int n = 0;
        FM_TRY(fm_io_wait(p->io, ready, MAX_DEPTH, 1, -1, &n));
        const int64_t now = fm_clock_ns();
        for (int i = 0; i < n; i++) {
            fm_io_req *r = ready[i];
            in_flight--;
            if (r->status != FM_OK && first == FM_OK)
                first = fm_io_fail(p->io, r, "probe");
            out->n_reads++;
            out->bytes += (int64_t)r->done_bytes;
            if (p->n_samples < MAX_SAMPLES)
                p->samples[p->n_samples++] = r->ns_queued + r->ns_read;
            if (first == FM_OK && now < end && p->next < p->n_blocks) {
                fill(p, r);
                const fm_status s = fm_io_submit(p->io, &r, 1);
                first = first == FM_OK ? s : first;
                in_flight += s == FM_OK;
            }
        }
    }
    out->seconds = (double)(fm_clock_ns() - t0) * 1e-9;
    out->cpu_seconds = (double)(clock() - cpu0) / CLOCKS_PER_SEC;
    return first;
}

fm_status fm_io_probe(const fm_io_probe_args *a, fm_io_probe_result *out)
{
    if (a->depth < 1 || a->depth > MAX_DEPTH || a->block_bytes < 1 || a->block_bytes > (1u << 30) || !(a->seconds > 0))
        return fm_fail(FM_ERR_ARG, "probe: depth %d (1 to %d), block of %zu bytes, %g seconds", a->depth, MAX_DEPTH,
                       a->block_bytes, a->seconds);
    void *mem = NULL, *first = NULL, *samples = NULL, *buffer = NULL;
    size_t buffer_bytes = 0;
    fm_io_probe_result r = {0};
    fm_status s = fm_alloc(sizeof(probe), &mem);
    probe *p = mem;
    s = s == FM_OK ? fm_alloc((size_t)(a->n_paths + 1) * sizeof(int64_t), &first) : s;
    s = s == FM_OK ? fm_alloc(MAX_SAMPLES * sizeof(int64_t), &samples) : s;
    if (s == FM_OK) {
        p->first = first;
        p->samples = samples;
        s = fm_io_open(&a->opts, a->paths, a->n_paths, &p->io);
    }
    s = s == FM_OK ? plan_blocks(p, a) : s;
    if (s == FM_OK) {
        buffer_bytes = p->block * (size_t)a->depth;
        s = fm_region_alloc(buffer_bytes, true, &buffer);
        p->buffer = buffer;
    }
    s = s == FM_OK ? run(p, a, &r) : s;
    if (p)
        fm_io_close(p->io);
    if (s == FM_OK) {
        qsort(samples, (size_t)p->n_samples, sizeof(int64_t), by_value);
        r.p50_ns = p->samples[p->n_samples / 2];
        r.p99_ns = p->samples[p->n_samples * 99 / 100];
        *out = r;
    }
    fm_region_free(buffer, buffer_bytes);
    fm_free(samples);
    fm_free(first);
    fm_free(mem);
    return s;
}
