/* Owns: the core's allocations. Small ones come from the C heap, big ones straight from the OS.
 * Every allocation is counted, so that tests can assert that decode makes none. */
#include "base/mem.h"

#include <assert.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static atomic_int_fast64_t n_allocs;

#if defined(__linux__)
enum { HAS_HUGE = 1, HUGE_BYTES = 2 << 20 };
static void advise_huge(void *p, size_t bytes)
{
    (void)madvise(p, bytes, MADV_HUGEPAGE);
}
static void give_back(void *p, size_t bytes)
{
    (void)madvise(p, bytes, MADV_DONTNEED);
}
#else
enum { HAS_HUGE = 0, HUGE_BYTES = 2 << 20 };
static void advise_huge(void *p, size_t bytes)
{
    (void)p, (void)bytes;
}
static void give_back(void *p, size_t bytes)
{
    (void)madvise(p, bytes, MADV_FREE);
}
#endif

bool fm_mul_size(size_t a, size_t b, size_t *out)
{
    size_t r;
    if (__builtin_mul_overflow(a, b, &r))
        return false;
    *out = r;
    return true;
}

bool fm_add_size(size_t a, size_t b, size_t *out)
{
    size_t r;
    if (__builtin_add_overflow(a, b, &r))
        return false;
    *out = r;
    return true;
}

bool fm_mul_i64(int64_t a, int64_t b, int64_t *out)
{
    int64_t r;
    if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &r))
        return false;
    *out = r;
    return true;
}

bool fm_add_i64(int64_t a, int64_t b, int64_t *out)
{
    int64_t r;
    if (a < 0 || b < 0 || __builtin_add_overflow(a, b, &r))
        return false;
    *out = r;
    return true;
}

int64_t fm_mem_n_allocs(void)
{
    return atomic_load_explicit(&n_allocs, memory_order_relaxed);
}

fm_status fm_alloc(size_t bytes, void **out)
{
    void *p = NULL;
    *out = NULL;
    if (bytes > PTRDIFF_MAX - FM_CACHE_LINE ||
        posix_memalign(&p, FM_CACHE_LINE, fm_round_up(bytes ? bytes : 1, FM_CACHE_LINE)) != 0)
        return fm_fail(FM_ERR_NOMEM, "out of memory: %zu bytes asked", bytes);
    memset(p, 0, bytes);
    atomic_fetch_add_explicit(&n_allocs, 1, memory_order_relaxed);
    *out = p;
    return FM_OK;
}

void fm_free(void *p)
{
    free(p);
}

/* Whole pages, at least one, so that alloc and free agree on the length for every bytes. */
static bool region_bytes(size_t bytes, size_t *out)
{
    const size_t page = (size_t)fm_page_bytes();
    if (bytes > PTRDIFF_MAX - page)
        return false;
    *out = fm_round_up(bytes ? bytes : 1, page);
    return true;
}

fm_status fm_region_alloc(size_t bytes, bool huge, void **out)
{
    size_t len = 0, map_len = 0;
    const bool big = HAS_HUGE && huge && bytes >= HUGE_BYTES;
    *out = NULL;
    if (!region_bytes(bytes, &len) || !fm_add_size(len, big ? HUGE_BYTES : 0, &map_len))
        return fm_fail(FM_ERR_NOMEM, "out of memory: %zu bytes asked", bytes);
    uint8_t *p = mmap(NULL, map_len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (p == MAP_FAILED)
        return fm_fail(FM_ERR_NOMEM, "out of memory: the system refused a region of %zu bytes",
                       bytes);
    if (big) {
        /* Huge pages need an aligned start: map one more and cut off both ends. */
        uint8_t *start = (uint8_t *)fm_round_up((uintptr_t)p, HUGE_BYTES);
        const size_t head = (size_t)(start - p), tail = map_len - head - len;
        if (head > 0)
            munmap(p, head);
        if (tail > 0)
            munmap(start + len, tail);
        p = start;
        advise_huge(p, len);
    }
    atomic_fetch_add_explicit(&n_allocs, 1, memory_order_relaxed);
    *out = p;
    return FM_OK;
}

/* The pages that lie wholly inside a range; false if none does. */
static bool whole_pages(const void *p, size_t bytes, uintptr_t *start, uintptr_t *end)
{
    const size_t page = (size_t)fm_page_bytes();
    *start = fm_round_up((uintptr_t)p, page);
    *end = ((uintptr_t)p + bytes) / page * page;
    return p != NULL && *end > *start;
}

void fm_region_huge(void *p, size_t bytes)
{
    uintptr_t start, end;
    if (HAS_HUGE && whole_pages(p, bytes, &start, &end) && end - start >= HUGE_BYTES)
        advise_huge((void *)start, end - start);
}

void fm_region_fill(void *p, size_t bytes)
{
    const size_t page = (size_t)fm_page_bytes();
    uintptr_t start, end;
    if (!whole_pages(p, bytes, &start, &end))
        return;
    fm_region_huge(p, bytes);
    for (volatile uint8_t *at = (uint8_t *)start; at < (uint8_t *)end; at += page)
        *at = *at;
}

void fm_region_drop(void *p, size_t bytes)
{
    uintptr_t start, end;
    if (whole_pages(p, bytes, &start, &end))
        give_back((void *)start, end - start);
}

void fm_region_free(void *p, size_t bytes)
{
    size_t len = 0;
    if (p != NULL && region_bytes(bytes, &len))
        munmap(p, len);
}

fm_status fm_arena_open(fm_arena *a, size_t bytes)
{
    void *base = NULL;
    *a = (fm_arena){0};
    FM_TRY(fm_region_alloc(bytes, true, &base));
    *a = (fm_arena){.base = base, .used = 0, .size = bytes};
    return FM_OK;
}

void *fm_arena_take(fm_arena *a, size_t bytes)
{
    /* A sum that does not fit sticks at SIZE_MAX; fm_arena_open then refuses it. */
    size_t end = SIZE_MAX;
    const size_t start = a->used;
    if (bytes > SIZE_MAX - FM_CACHE_LINE ||
        !fm_add_size(start, fm_round_up(bytes, FM_CACHE_LINE), &end))
        end = SIZE_MAX / FM_CACHE_LINE * FM_CACHE_LINE;
    if (a->base == NULL) {
        a->used = end;
        return NULL;
    }
    assert(end <= fm_round_up(a->size, FM_CACHE_LINE) && "arena smaller than measured");
    if (end > fm_round_up(a->size, FM_CACHE_LINE))
        return NULL;
    a->used = end;
    return a->base + start;
}

void fm_arena_close(fm_arena *a)
{
    fm_region_free(a->base, a->size);
    *a = (fm_arena){0};
}
