/* The runner: executes a compute kernel's grid on one OS thread; each GPU thread is a fiber.
 *
 * Threadgroups run one after another; lanes meet at barriers and simdgroup operations.  A simd
 * operation resolves for the lanes of a simdgroup that wait at the same source position: those
 * are the active lanes.  Faults: a barrier that some threads never reach, threads waiting at
 * different barriers, more than 32 KB of threadgroup memory, missing or misaligned bindings.
 * Threadgroup memory starts as 0xFF bytes (NaN); float denormals are flushed as on the GPU.
 *
 * MSL_ORDER=rev|randN: the order in which lanes and simdgroups run. MSL_STACK_KB: per fiber. */
#include "msl_abi.h"
#include "msl_fiber.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { MAX_LANES = 1024, WIDTH = 32, TG_LIMIT = 32768, ARENA = 1 << 16, MAX_VARS = 4096 };
enum { RUN, WAIT_SIMD, WAIT_BAR, DONE };
enum { ORDER_UP, ORDER_REVERSED, ORDER_RANDOM };

typedef void (*collective)(void **, unsigned);

struct Lane {
    void *sp;
    char *stack;
    int state;
    unsigned site;
    collective fn;
    void *data;
    unsigned tpos[3], gpos[3], index;
    void *tsan, *fake;
};

static Lane lanes[MAX_LANES];
static Lane *cur;
static void *sched_sp;
static const msl_kernel *K;
static const msl_dispatch *D;
static unsigned tgpos[3], tgsize[3], n_groups[3], n_lanes;
static void *tgmem[31];
static msl_stats S;
static char *Err;
static size_t ErrLen, StackLen;
static bool failed;
static int order;
static unsigned rng;

static void fail(const char *format, ...) {
    if (failed)
        return;
    failed = true;
    va_list args;
    va_start(args, format);
    vsnprintf(Err, ErrLen, format, args);
    va_end(args);
}

/* ---------------------------------------------------------------- switching */

#ifdef MSL_TSAN
static unsigned rot; /* stacks are handed out rotated: TSan then sees no false happens-before */
static void *sched_tsan;
static char end_sync, begin_sync, bar_sync;
#endif
#ifdef MSL_ASAN
static const void *sched_stack;
static size_t sched_stack_len;
#endif

NOTSAN static void to_scheduler(bool dying) {
    Lane *me = cur;
    (void)dying;
    S.switches++;
#ifdef MSL_TSAN
    __tsan_switch_to_fiber(sched_tsan, 1);
#endif
#ifdef MSL_ASAN
    __sanitizer_start_switch_fiber(dying ? nullptr : &me->fake, sched_stack, sched_stack_len);
#endif
    msl_switch(&me->sp, sched_sp);
#ifdef MSL_ASAN
    __sanitizer_finish_switch_fiber(me->fake, &sched_stack, &sched_stack_len);
#endif
}

extern "C" NOTSAN void msl_fiber_main() {
#ifdef MSL_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &sched_stack, &sched_stack_len);
#endif
#ifdef MSL_TSAN
    __tsan_acquire(&begin_sync);
    __tsan_acquire(cur->stack);
#endif
    K->invoke();
    cur->state = DONE;
#ifdef MSL_TSAN
    __tsan_release(&end_sync);
    __tsan_release(cur->stack);
#endif
    to_scheduler(true);
    abort();
}

NOTSAN static void resume(Lane *l) {
    cur = l;
#ifdef MSL_TSAN
    __tsan_switch_to_fiber(l->tsan, 1);
#endif
#ifdef MSL_ASAN
    void *fake;
    __sanitizer_start_switch_fiber(&fake, l->stack, StackLen);
#endif
    msl_switch(&sched_sp, l->sp);
#ifdef MSL_ASAN
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    cur = nullptr;
}

/* ---------------------------------------------------------------- what kernels call */

static char *arena;
static size_t arena_used, tg_used;
static char *tg_vars[MAX_VARS];
static unsigned tg_vars_n;

/* p is aligned to 64 bytes. Step by step, so that the compiler cannot make it a sanitizer-visible memset. */
NOTSAN static void fill_ff(char *p, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        *(uint64_t *)(p + i) = ~(uint64_t)0;
        asm volatile("" ::: "memory");
    }
    for (; i < n; i++) {
        p[i] = (char)0xff;
        asm volatile("" ::: "memory");
    }
}

NOTSAN static char *tg_take(size_t n, size_t align) {
    if (align < 64)
        align = 64;
    arena_used = (arena_used + 32 + align - 1) / align * align; /* a gap, for ASan to poison */
    char *p = arena + arena_used;
    arena_used += n;
#ifdef MSL_ASAN
    __asan_unpoison_memory_region(p, n);
#endif
    fill_ff(p, n);
    return p;
}

extern "C" {
NOTSAN void __msl_simd(void *data, collective fn, unsigned site, const char *what) {
    (void)what;
    Lane *l = cur;
    l->data = data;
    l->fn = fn;
    l->site = site;
    l->state = WAIT_SIMD;
    to_scheduler(false);
}

NOTSAN void __msl_barrier(unsigned flags, unsigned site) {
    Lane *l = cur;
    (void)flags;
    l->site = site;
    l->state = WAIT_BAR;
#ifdef MSL_TSAN
    if (flags)
        __tsan_release(&bar_sync);
#endif
    to_scheduler(false);
#ifdef MSL_TSAN
    if (flags)
        __tsan_acquire(&bar_sync);
#endif
}

NOTSAN void __msl_fault(const char *what, unsigned site) {
    fail("kernel %s, threadgroup (%u,%u,%u), line %u: %s", K->name, tgpos[0], tgpos[1], tgpos[2],
         site >> 10, what);
}

NOTSAN void *__msl_tg(unsigned id, unsigned long size, unsigned long align, const char *name) {
    if (id >= MAX_VARS || tg_used + (tg_vars[id] ? 0 : size) > TG_LIMIT) {
        fail("kernel %s: more than %d bytes of threadgroup memory (at %s)", K->name, TG_LIMIT,
             name);
        to_scheduler(false);
    }
    if (!tg_vars[id]) {
        tg_used += size;
        tg_vars[id] = tg_take(size, align);
        if (id >= tg_vars_n)
            tg_vars_n = id + 1;
    }
    return tg_vars[id];
}

unsigned __msl_lane(void) { return cur->index % WIDTH; }

NOTSAN void *msl_arg_ptr(int kind, int index) {
    return kind == MSL_P_BUFFER ? D->buf[index].ptr : tgmem[index];
}

NOTSAN void msl_arg_builtin(int id, unsigned *out) {
    const Lane *l = cur;
    unsigned one[3] = {0, 0, 0};
    const unsigned *s = one;
    switch (id) {
    case MSL_B_thread_position_in_grid: s = l->gpos; break;
    case MSL_B_thread_position_in_threadgroup: s = l->tpos; break;
    case MSL_B_threadgroup_position_in_grid: s = tgpos; break;
    case MSL_B_threads_per_threadgroup: s = tgsize; break;
    case MSL_B_dispatch_threads_per_threadgroup: s = D->tg; break;
    case MSL_B_threadgroups_per_grid: s = n_groups; break;
    case MSL_B_threads_per_grid: s = D->grid; break;
    case MSL_B_thread_index_in_threadgroup: one[0] = l->index; break;
    case MSL_B_thread_index_in_simdgroup: one[0] = l->index % WIDTH; break;
    case MSL_B_simdgroup_index_in_threadgroup: one[0] = l->index / WIDTH; break;
    case MSL_B_simdgroups_per_threadgroup: one[0] = (n_lanes + WIDTH - 1) / WIDTH; break;
    case MSL_B_threads_per_simdgroup: one[0] = WIDTH; break;
    }
    for (int a = 0; a < 3; a++)
        out[a] = s[a];
}
}

/* ---------------------------------------------------------------- scheduling */

NOTSAN static void permute(unsigned *perm, unsigned lo, unsigned n) {
    for (unsigned i = 0; i < n; i++)
        perm[i] = order == ORDER_REVERSED ? lo + n - 1 - i : lo + i;
    if (order != ORDER_RANDOM)
        return;
    for (unsigned i = n - 1; i > 0; i--) {
        rng = rng * 1664525u + 1013904223u;
        unsigned j = (rng >> 8) % (i + 1), t = perm[i];
        perm[i] = perm[j];
        perm[j] = t;
    }
}

/* Runs the lanes of a simdgroup until all wait at a barrier or have returned. */
NOTSAN static void run_simdgroup(unsigned sg) {
    unsigned lo = sg * WIDTH, hi = lo + WIDTH < n_lanes ? lo + WIDTH : n_lanes;
    for (;;) {
        unsigned perm[WIDTH];
        permute(perm, lo, hi - lo);
        for (unsigned i = 0; i < hi - lo; i++)
            if (lanes[perm[i]].state == RUN)
                resume(&lanes[perm[i]]);
        if (failed)
            return;
        Lane *first = nullptr;
        unsigned live = 0, active = 0;
        for (unsigned i = lo; i < hi; i++) {
            if (lanes[i].state != DONE)
                live |= 1u << (i - lo);
            if (lanes[i].state == WAIT_SIMD && (!first || lanes[i].site < first->site))
                first = &lanes[i];
        }
        if (!first)
            return;
        void *data[WIDTH] = {};
        for (unsigned i = lo; i < hi; i++)
            if (lanes[i].state == WAIT_SIMD && lanes[i].site == first->site &&
                lanes[i].fn == first->fn) {
                active |= 1u << (i - lo);
                data[i - lo] = lanes[i].data;
            }
        S.simd_ops++;
        S.divergent_simd_ops += active != live;
        first->fn(data, active);
        if (failed)
            return;
        for (unsigned i = lo; i < hi; i++)
            if (active >> (i - lo) & 1)
                lanes[i].state = RUN;
    }
}

#ifdef MSL_TSAN
/* TSan tells at most 255 threads apart. Up to 240 GPU threads each get a TSan thread of their
 * own; in a larger threadgroup as many simdgroups as fit do (others from one threadgroup to the
 * next), and each other simdgroup shares one. */
static void *tsan_fibers[256];
static int tsan_map[MAX_LANES];

NOTSAN static void tsan_plan() {
    unsigned n_sg = (n_lanes + WIDTH - 1) / WIDTH, n = 0;
    unsigned full = n_lanes <= 240 ? n_sg : (240 - n_sg) / (WIDTH - 1);
    for (unsigned s = 0; s < n_sg; s++) {
        bool own = (s + rot) % n_sg < full;
        unsigned base = n;
        for (unsigned i = s * WIDTH; i < s * WIDTH + WIDTH && i < n_lanes; i++)
            tsan_map[i] = (int)(own ? n++ : base);
        if (!own)
            n++;
    }
    for (unsigned i = 0; i < n_lanes; i++) {
        int f = (int)((tsan_map[i] + rot) % n);
        if (!tsan_fibers[f])
            tsan_fibers[f] = __tsan_create_fiber(0);
        lanes[i].tsan = tsan_fibers[f];
    }
}
#endif

NOTSAN static void threadgroup_memory() {
#ifdef MSL_TSAN
    /* fresh memory, so that TSan forgets the accesses of the last threadgroup */
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    free(arena);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    arena = nullptr;
#endif
    if (!arena)
        arena = (char *)aligned_alloc(64, ARENA);
    arena_used = tg_used = 0;
    for (unsigned i = 0; i < tg_vars_n; i++)
        tg_vars[i] = nullptr;
#ifdef MSL_ASAN
    __asan_poison_memory_region(arena, ARENA);
#endif
    for (int i = 0; i < 31; i++)
        if (D->tgmem[i]) {
            tg_used += D->tgmem[i];
            tgmem[i] = tg_take(D->tgmem[i], 64);
        }
}

NOTSAN static void start_lanes() {
    unsigned at[3] = {0, 0, 0};
    for (unsigned i = 0; i < n_lanes; i++) {
        Lane *l = &lanes[i];
        l->index = i;
        for (int a = 0; a < 3; a++)
            l->tpos[a] = at[a];
        if (++at[0] == tgsize[0]) {
            at[0] = 0;
            if (++at[1] == tgsize[1]) {
                at[1] = 0;
                at[2]++;
            }
        }
        for (int a = 0; a < 3; a++)
            l->gpos[a] = tgpos[a] * D->tg[a] + l->tpos[a];
        /* tops at different places of a page, or the stacks fight for the same lines of the cache */
        l->sp = fiber_stack(l->stack, StackLen - i % WIDTH * 5 * 64, msl_fiber_main);
        l->state = RUN;
    }
    S.lanes += n_lanes;
#ifdef MSL_TSAN
    __tsan_release(&begin_sync);
    tsan_plan();
#endif
}

/* All live lanes wait at one barrier: let them go. False when the threadgroup is done. */
NOTSAN static bool pass_barrier() {
    unsigned waiting = 0;
    const Lane *b = nullptr;
    for (unsigned i = 0; i < n_lanes; i++) {
        if (lanes[i].state != WAIT_BAR)
            continue;
        waiting++;
        if (!b)
            b = &lanes[i];
        else if (b->site != lanes[i].site) {
            fail("kernel %s: threads wait at different barriers (lines %u and %u)", K->name,
                 b->site >> 10, lanes[i].site >> 10);
            return false;
        }
    }
    if (!b)
        return false;
    if (waiting != n_lanes) {
        fail("kernel %s, threadgroup (%u,%u,%u): the barrier at line %u is reached by %u of %u "
             "threads", K->name, tgpos[0], tgpos[1], tgpos[2], b->site >> 10, waiting, n_lanes);
        return false;
    }
    S.barriers++;
    for (unsigned i = 0; i < n_lanes; i++)
        lanes[i].state = RUN;
    return true;
}

NOTSAN static void run_threadgroup() {
    threadgroup_memory();
    start_lanes();
    unsigned n_sg = (n_lanes + WIDTH - 1) / WIDTH;
    do {
        unsigned perm[MAX_LANES / WIDTH];
        permute(perm, 0, n_sg);
        for (unsigned s = 0; s < n_sg && !failed; s++)
            run_simdgroup(perm[s]);
    } while (!failed && pass_barrier());
}

/* ---------------------------------------------------------------- entry */

static bool check_dispatch() {
    unsigned threads = D->tg[0] * D->tg[1] * D->tg[2], most = K->max_threads;
    if (!most)
        most = MAX_LANES;
    if (threads == 0 || threads > most)
        fail("kernel %s: %u threads per threadgroup, at most %u", K->name, threads, most);
    for (int i = 0; i < K->n_params; i++) {
        const msl_param *p = &K->params[i];
        if (p->kind == MSL_P_THREADGROUP && !D->tgmem[p->index])
            fail("kernel %s: no threadgroup memory length set at index %u for %s", K->name,
                 p->index, p->name);
        if (p->kind != MSL_P_BUFFER)
            continue;
        const msl_binding *b = &D->buf[p->index];
        if (!b->ptr)
            fail("kernel %s: missing buffer binding at index %u for %s", K->name, p->index,
                 p->name);
        else if (p->elem_align && (uintptr_t)b->ptr % p->elem_align)
            fail("kernel %s: buffer %u (%s): offset not aligned to %u bytes", K->name, p->index,
                 p->name, p->elem_align);
        else if (p->is_ref && b->len && b->len < p->elem_size)
            fail("kernel %s: argument %s from buffer(%u) has space for %zu bytes, but needs %u",
                 K->name, p->name, p->index, b->len, p->elem_size);
    }
    size_t total = 0;
    for (int i = 0; i < 31; i++) {
        if (D->tgmem[i] % 16)
            fail("kernel %s: threadgroup memory length %zu at index %d is not a multiple of 16",
                 K->name, D->tgmem[i], i);
        total += D->tgmem[i];
    }
    if (total > TG_LIMIT)
        fail("kernel %s: %zu bytes of threadgroup memory, at most %d", K->name, total, TG_LIMIT);
    return !failed;
}

static void make_stacks() {
    if (lanes[0].stack)
        return;
    const char *kb = getenv("MSL_STACK_KB");
    StackLen = (size_t)(kb ? atoi(kb) : 128) * 1024;
    for (int i = 0; i < MAX_LANES; i++) {
        char *p = (char *)mmap(nullptr, StackLen + 4096, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        mprotect(p, 4096, PROT_NONE);
        lanes[i].stack = p + 4096;
    }
}

static void read_order() {
    const char *o = getenv("MSL_ORDER");
    order = !o || !*o ? ORDER_UP : !strcmp(o, "rev") ? ORDER_REVERSED : ORDER_RANDOM;
    if (order == ORDER_RANDOM)
        rng = (unsigned)atoi(o + (strlen(o) > 4 ? 4 : 0)) * 2654435761u + 1;
}

extern "C" NOTSAN int msl_run(const msl_library *lib, const msl_kernel *k, const msl_dispatch *d,
                              msl_stats *st, char *err, size_t errlen) {
    (void)lib;
    K = k;
    D = d;
    Err = err;
    ErrLen = errlen;
    failed = false;
    memset(&S, 0, sizeof S);
    struct timespec t0, t1;
    clock_gettime(CLOCK_MONOTONIC, &t0);
    read_order();
    if (!check_dispatch())
        return 1;
    make_stacks();
#if defined(__x86_64__)
    unsigned csr = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(csr | 0x8040); /* flush denormals */
#endif
#ifdef MSL_TSAN
    sched_tsan = __tsan_get_current_fiber();
#endif
    for (int a = 0; a < 3; a++)
        n_groups[a] = (d->grid[a] + d->tg[a] - 1) / d->tg[a];
    unsigned long total = (unsigned long)n_groups[0] * n_groups[1] * n_groups[2];
    for (unsigned long g = 0; g < total && !failed; g++) {
        unsigned long at = order == ORDER_REVERSED ? total - 1 - g : g;
        tgpos[0] = (unsigned)(at % n_groups[0]);
        tgpos[1] = (unsigned)(at / n_groups[0] % n_groups[1]);
        tgpos[2] = (unsigned)(at / n_groups[0] / n_groups[1]);
        n_lanes = 1;
        for (int a = 0; a < 3; a++) {
            unsigned left = d->grid[a] - tgpos[a] * d->tg[a];
            tgsize[a] = left < d->tg[a] ? left : d->tg[a];
            n_lanes *= tgsize[a];
        }
        run_threadgroup();
#ifdef MSL_TSAN
        rot++;
        char *stacks[MAX_LANES];
        for (int i = 0; i < MAX_LANES; i++)
            stacks[i] = lanes[i].stack;
        for (int i = 0; i < MAX_LANES; i++)
            lanes[i].stack = stacks[(i + 37) % MAX_LANES];
#endif
    }
#ifdef MSL_TSAN
    __tsan_acquire(&end_sync);
#endif
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr(csr);
#endif
    clock_gettime(CLOCK_MONOTONIC, &t1);
    S.ms = (double)(t1.tv_sec - t0.tv_sec) * 1e3 + (double)(t1.tv_nsec - t0.tv_nsec) / 1e6;
    if (st)
        *st = S;
    return failed;
}
