/* Owns: checked sizes, aligned memory, big anonymous regions, arenas.
 * An arena is a bump allocator over one region: scratch is planned once, decode takes nothing. */
#ifndef FM_BASE_MEM_H
#define FM_BASE_MEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

/* false when the product or sum does not fit; *out is written only on success. */
bool fm_mul_size(size_t a, size_t b, size_t *out);
bool fm_add_size(size_t a, size_t b, size_t *out);
bool fm_mul_i64(int64_t a, int64_t b, int64_t *out); /* a, b >= 0 */
bool fm_add_i64(int64_t a, int64_t b, int64_t *out); /* a, b >= 0 */

static inline size_t fm_round_up(size_t n, size_t align)
{
    return (n + align - 1) / align * align;
}

/* Small objects: zeroed, 64-byte aligned. n = 0 gives a valid pointer. Free with fm_free. */
fm_status fm_alloc(size_t bytes, void **out);
void fm_free(void *p); /* NULL is fine */

/* Allocations (fm_alloc and fm_region_alloc) of this process so far: "decode allocates nothing" is
 * two equal readings. */
int64_t fm_mem_n_allocs(void);

/* Page-aligned zero memory straight from the OS (mmap), committed on first touch. Huge pages are
 * advised when huge is true. fm_region_drop gives the pages of a range back but keeps the
 * addresses. */
fm_status fm_region_alloc(size_t bytes, bool huge, void **out);
/* Asks for huge pages in a part of a region, where the system has them; takes no memory. */
void fm_region_huge(void *p, size_t bytes);
/* Takes the memory of a part of a region now, in huge pages where that can be, and leaves what it holds. Else whoever
 * writes first waits for it, page by page. */
void fm_region_fill(void *p, size_t bytes);
void fm_region_drop(void *p, size_t bytes);
void fm_region_free(void *p, size_t bytes); /* NULL is fine */

typedef struct fm_arena {
    uint8_t *base;
    size_t used, size;
} fm_arena;

/* Measuring pass: an arena with base NULL only counts; the second pass hands out memory. */
fm_status fm_arena_open(fm_arena *a, size_t bytes);
/* 64-byte aligned zero memory; asserts that it fits. NULL while measuring: read a->used then. */
void *fm_arena_take(fm_arena *a, size_t bytes);
void fm_arena_close(fm_arena *a);

#endif
