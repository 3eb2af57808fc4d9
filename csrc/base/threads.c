/* Owns: the worker pool. A worker joins a job by one compare-and-swap on `gate` while the job is
 * open; the caller closes the gate once the tasks are handed out and waits only for those who
 * joined, so a worker that wakes late (busy machine, forked child without workers) never delays or
 * breaks a job. */
#include "base/threads.h"

#include <assert.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "base/clock.h"
#include "base/mem.h"

enum {
    SPIN_NS = 30000, /* how long an idle worker burns its CPU before it parks */
    STACK_BYTES = 2 << 20,
    MAX_THREADS = 1024,
};

/* gate = job number << 32 | open << 31 | workers inside */
#define GATE_OPEN (UINT64_C(1) << 31)
#define GATE_INSIDE (GATE_OPEN - 1)
#define GATE_JOB(gate) ((gate) >> 32)

typedef struct worker {
    struct fm_pool *pool;
    pthread_t thread;
    int index; /* 1 .. n_threads-1; 0 is the caller */
} worker;

/* The tasks begin <= i < end that nobody has taken: begin << 32 | end. */
typedef struct share {
    _Alignas(FM_CACHE_LINE) atomic_uint_fast64_t range;
} share;

struct fm_pool {
    /* written by the caller before the gate opens, read by those who joined */
    fm_range_fn *fn;
    void *ctx;
    int64_t most;
    int n_threads;
    int64_t spin_ns;
    int fork_id;
    worker *workers;
    share *shares; /* [n_threads asked for] */
    pthread_mutex_t lock;
    pthread_cond_t wake, idle;
    atomic_bool busy, stop;
    _Alignas(FM_CACHE_LINE) atomic_uint_fast64_t gate;
    _Alignas(FM_CACHE_LINE) atomic_int n_parked;
    atomic_bool caller_parked;
};

/* Threads do not survive fork: a pool knows by this number that it lost its workers. */
static atomic_int fork_id;
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;
static void count_fork(void)
{
    atomic_fetch_add(&fork_id, 1);
}
static void watch_forks(void)
{
    (void)pthread_atfork(NULL, NULL, count_fork);
}

static inline void cpu_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Half of what is left, at most `most`. */
static bool take(share *s, bool from_front, int64_t most, int64_t *begin, int64_t *end)
{
    uint64_t r = atomic_load_explicit(&s->range, memory_order_relaxed);
    while (r >> 32 < (r & UINT32_MAX)) {
        const int64_t first = (int64_t)(r >> 32), last = (int64_t)(r & UINT32_MAX), half = (last - first + 1) / 2;
        const int64_t n = half < most ? half : most;
        const uint64_t rest = from_front ? r + ((uint64_t)n << 32) : r - (uint64_t)n;
        if (atomic_compare_exchange_weak_explicit(&s->range, &r, rest, memory_order_relaxed, memory_order_relaxed)) {
            *begin = from_front ? first : last - n;
            *end = *begin + n;
            return true;
        }
    }
    return false;
}

/* First the own share, in order: neighbouring tasks read neighbouring memory. Then the ends of others'. */
static void run_tasks(fm_pool *p, int index)
{
    fm_range_fn *const fn = p->fn;
    void *const ctx = p->ctx;
    const int64_t most = p->most;
    int64_t begin, end;
    for (int i = 0; i < p->n_threads; i++)
        while (take(&p->shares[(index + i) % p->n_threads], i == 0, most, &begin, &end))
            fn(ctx, begin, end, index);
}

static void deal(fm_pool *p, int64_t n_tasks)
{
    for (int64_t i = 0; i < p->n_threads; i++) {
        const uint64_t begin = (uint64_t)(n_tasks * i / p->n_threads);
        const uint64_t end = (uint64_t)(n_tasks * (i + 1) / p->n_threads);
        atomic_store_explicit(&p->shares[i].range, begin << 32 | end, memory_order_relaxed);
    }
}

static bool join_job(fm_pool *p, uint64_t last_job, uint64_t *job)
{
    uint64_t gate = atomic_load(&p->gate);
    while ((gate & GATE_OPEN) != 0 && GATE_JOB(gate) != last_job) {
        if (atomic_compare_exchange_weak(&p->gate, &gate, gate + 1)) {
            *job = GATE_JOB(gate);
            return true;
        }
    }
    return false;
}

static void leave_job(fm_pool *p)
{
    const uint64_t gate = atomic_fetch_sub(&p->gate, 1) - 1;
    if ((gate & (GATE_OPEN | GATE_INSIDE)) == 0 && atomic_load(&p->caller_parked)) {
        pthread_mutex_lock(&p->lock);
        pthread_cond_signal(&p->idle);
        pthread_mutex_unlock(&p->lock);
    }
}

static void park_worker(fm_pool *p, uint64_t last_job)
{
    pthread_mutex_lock(&p->lock);
    /* Announce first, look again after: the caller opens the gate, then counts the parked. */
    atomic_fetch_add(&p->n_parked, 1);
    for (;;) {
        const uint64_t gate = atomic_load(&p->gate);
        if (atomic_load(&p->stop) || ((gate & GATE_OPEN) != 0 && GATE_JOB(gate) != last_job))
            break;
        pthread_cond_wait(&p->wake, &p->lock);
    }
    atomic_fetch_sub(&p->n_parked, 1);
    pthread_mutex_unlock(&p->lock);
}

static void *worker_main(void *arg)
{
    const worker *const w = arg;
    fm_pool *const p = w->pool;
    uint64_t last_job = 0;
    while (!atomic_load(&p->stop)) {
        const int64_t start = p->spin_ns > 0 ? fm_clock_ns() : 0;
        bool joined = join_job(p, last_job, &last_job);
        while (!joined && p->spin_ns > 0 && fm_clock_ns() - start < p->spin_ns) {
            for (int i = 0; i < 16; i++)
                cpu_relax();
            joined = join_job(p, last_job, &last_job);
        }
        if (joined) {
            run_tasks(p, w->index);
            leave_job(p);
        } else {
            park_worker(p, last_job);
        }
    }
    return NULL;
}

int fm_thread_start(pthread_t *thread, size_t stack_bytes, void *(*run)(void *), void *arg)
{
    pthread_attr_t attr;
    sigset_t all, before;
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, stack_bytes);
    /* Signals belong to the program's own threads (Ctrl-C must reach Python's). */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const int rc = pthread_create(thread, &attr, run, arg);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
    return rc;
}

static int start_workers(fm_pool *p)
{
    int rc = 0, n = 1;
    for (; n < p->n_threads && rc == 0; n += rc == 0) {
        p->workers[n] = (worker){.pool = p, .index = n};
        rc = fm_thread_start(&p->workers[n].thread, STACK_BYTES, worker_main, &p->workers[n]);
    }
    p->n_threads = n; /* on failure: only those that run are joined */
    return rc;
}

fm_status fm_pool_open(int n_threads, fm_pool **out)
{
    void *memory = NULL;
    *out = NULL;
    if (n_threads < 1 || n_threads > MAX_THREADS)
        return fm_fail(FM_ERR_ARG, "threads: %d asked, 1 to %d are possible", n_threads,
                       MAX_THREADS);
    FM_TRY(fm_alloc(sizeof(fm_pool), &memory));
    fm_pool *const p = memory;
    if (fm_alloc((size_t)n_threads * sizeof(worker), &memory) != FM_OK) {
        fm_free(p);
        return FM_ERR_NOMEM;
    }
    p->workers = memory;
    if (fm_alloc((size_t)n_threads * sizeof(share), &memory) != FM_OK) {
        fm_free(p->workers);
        fm_free(p);
        return FM_ERR_NOMEM;
    }
    p->shares = memory;
    pthread_once(&fork_once, watch_forks);
    p->n_threads = n_threads;
    p->fork_id = atomic_load(&fork_id);
    /* With more threads than CPUs a spinning worker would only hold up one that has work. */
    p->spin_ns = n_threads <= fm_cpu_count() ? SPIN_NS : 0;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    pthread_cond_init(&p->idle, NULL);
    if (start_workers(p) != 0) {
        const int n_started = p->n_threads;
        fm_pool_close(p);
        return fm_fail(FM_ERR_NOMEM, "threads: the system gave %d of %d", n_started, n_threads);
    }
    *out = p;
    return FM_OK;
}

void fm_pool_close(fm_pool *p)
{
    if (p == NULL)
        return;
    if (p->fork_id == atomic_load(&fork_id)) {
        pthread_mutex_lock(&p->lock);
        atomic_store(&p->stop, true);
        pthread_cond_broadcast(&p->wake);
        pthread_mutex_unlock(&p->lock);
        for (int i = 1; i < p->n_threads; i++)
            pthread_join(p->workers[i].thread, NULL);
        pthread_cond_destroy(&p->idle);
        pthread_cond_destroy(&p->wake);
        pthread_mutex_destroy(&p->lock);
    }
    fm_free(p->shares);
    fm_free(p->workers);
    fm_free(p);
}

int fm_pool_threads(const fm_pool *p)
{
    return p->n_threads;
}

static void open_gate(fm_pool *p, int64_t n_tasks, uint64_t job)
{
    atomic_store(&p->gate, job << 32 | GATE_OPEN);
    const int64_t n_parked = atomic_load(&p->n_parked);
    if (n_parked == 0)
        return;
    pthread_mutex_lock(&p->lock);
    if (n_tasks - 1 >= n_parked)
        pthread_cond_broadcast(&p->wake);
    else
        for (int64_t i = 1; i < n_tasks; i++)
            pthread_cond_signal(&p->wake);
    pthread_mutex_unlock(&p->lock);
}

static void close_gate(fm_pool *p)
{
    uint64_t inside = atomic_fetch_and(&p->gate, ~GATE_OPEN) & GATE_INSIDE;
    const int64_t start = inside != 0 && p->spin_ns > 0 ? fm_clock_ns() : 0;
    while (inside != 0 && p->spin_ns > 0 && fm_clock_ns() - start < p->spin_ns) {
        for (int i = 0; i < 16; i++)
            cpu_relax();
        inside = atomic_load(&p->gate) & GATE_INSIDE;
    }
    if (inside == 0)
        return;
    pthread_mutex_lock(&p->lock);
    atomic_store(&p->caller_parked, true);
    while ((atomic_load(&p->gate) & GATE_INSIDE) != 0)
        pthread_cond_wait(&p->idle, &p->lock);
    atomic_store(&p->caller_parked, false);
    pthread_mutex_unlock(&p->lock);
}

void fm_parallel_ranges(fm_pool *p, int64_t n_tasks, int64_t most, fm_range_fn *fn, void *ctx)
{
    if (n_tasks <= 0)
        return;
    if (n_tasks == 1 || p->n_threads == 1 || p->fork_id != atomic_load(&fork_id)) {
        for (int64_t i = 0; i < n_tasks; i += most)
            fn(ctx, i, n_tasks - i < most ? n_tasks : i + most, 0);
        return;
    }
    assert(n_tasks <= UINT32_MAX);
    const bool was_busy = atomic_exchange(&p->busy, true);
    assert(!was_busy && "one parallel loop at a time per pool");
    (void)was_busy;
    p->fn = fn;
    p->ctx = ctx;
    p->most = most;
    deal(p, n_tasks);
    open_gate(p, n_tasks, (GATE_JOB(atomic_load(&p->gate)) + 1) & UINT32_MAX);
    run_tasks(p, 0);
    close_gate(p);
    atomic_store(&p->busy, false);
}

typedef struct one_by_one {
    fm_task_fn *fn;
    void *ctx;
} one_by_one;

static void run_one(void *ctx, int64_t begin, int64_t end, int worker)
{
    const one_by_one *const o = ctx;
    for (int64_t i = begin; i < end; i++)
        o->fn(o->ctx, i, worker);
}

void fm_parallel_for(fm_pool *p, int64_t n_tasks, fm_task_fn *fn, void *ctx)
{
    one_by_one o = {fn, ctx};
    fm_parallel_ranges(p, n_tasks, 1, run_one, &o);
}
