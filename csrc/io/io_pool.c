/* Owns: the reading threads and their queues. One lock guards both queues and the completions: a
 * read takes tens of microseconds at least, so it is not contended. Demand requests are taken
 * before speculative ones; within a priority, first come first served. */
#include "io/io_pool.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>

#include "base/clock.h"
#include "base/mem.h"
#include "io/io_queue.h"

enum { DEFAULT_WORKERS = 16, MAX_WORKERS = 256, STACK_BYTES = 256 << 10 };

typedef struct pool {
    fm_io *io;
    fm_io_read_fn *read;
    void *ctx;
    pthread_mutex_t lock;
    pthread_cond_t work, completed;
    fm_io_queue queued[FM_IO_N_PRIORITIES], done;
    int n_speculative, max_speculative; /* being read at once */
    int n_idle, n_waking;               /* workers that sleep; of them, those that were signalled already */
    int min_done;                       /* what the waiter waits for; 0: nobody waits */
    bool stop;
    int n_workers;
    pthread_t threads[MAX_WORKERS];
} pool;

/* Waiting until a point of fm_clock_ns: the two systems know different ways. */
#if defined(__APPLE__)
static int init_cond(pthread_cond_t *c)
{
    return pthread_cond_init(c, NULL);
}
static int wait_until(pthread_cond_t *c, pthread_mutex_t *m, int64_t deadline_ns)
{
    const int64_t left = deadline_ns - fm_clock_ns();
    const struct timespec t = {left / 1000000000, left % 1000000000};
    return left <= 0 ? ETIMEDOUT : pthread_cond_timedwait_relative_np(c, m, &t);
}
#else
static int init_cond(pthread_cond_t *c)
{
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    const int rc = pthread_cond_init(c, &attr);
    pthread_condattr_destroy(&attr);
    return rc;
}
static int wait_until(pthread_cond_t *c, pthread_mutex_t *m, int64_t deadline_ns)
{
    const struct timespec t = {deadline_ns / 1000000000, deadline_ns % 1000000000};
    return pthread_cond_timedwait(c, m, &t);
}
#endif

/* Called with the lock held. */
static void complete(pool *p, fm_io_req *r)
{
    r->state = FM_IO_DONE;
    fm_io_queue_push(&p->done, r);
    if (p->min_done > 0 && p->done.n >= p->min_done)
        pthread_cond_signal(&p->completed);
}

static void read_request(pool *p, fm_io_req *r)
{
    bool finished = false;
    fm_io_start(r);
    while (!finished) {
        const fm_io_part part = fm_io_next_part(p->io, r);
        finished = fm_io_advance(p->io, r, &part, p->read(p->ctx, r, &part));
    }
    fm_io_stop(r);
}

/* As many sleepers as there is work that may start: more would only take time from those who compute. With the lock. */
static void wake(pool *p)
{
    const int room = p->max_speculative - p->n_speculative, guesses = p->queued[1].n;
    for (int n = p->queued[0].n + (guesses < room ? guesses : room) - p->n_waking; n > 0 && p->n_waking < p->n_idle; n--) {
        p->n_waking++;
        pthread_cond_signal(&p->work);
    }
}

/* The device has done its part: the next guess may be read while this one is checked. */
static void end_guess(pool *p)
{
    pthread_mutex_lock(&p->lock);
    p->n_speculative--;
    wake(p);
    pthread_mutex_unlock(&p->lock);
}

static void *worker_main(void *arg)
{
    pool *const p = arg;
    pthread_mutex_lock(&p->lock);
    while (!p->stop) {
        fm_io_req *const r = fm_io_queue_pop_next(p->queued, p->n_speculative, p->max_speculative);
        if (r == NULL) {
            p->n_idle++;
            pthread_cond_wait(&p->work, &p->lock);
            p->n_idle--;
            p->n_waking -= p->n_waking > 0;
            continue;
        }
        const bool guess = r->priority == 1;
        r->state = FM_IO_RUNNING;
        p->n_speculative += guess;
        pthread_mutex_unlock(&p->lock);
        read_request(p, r);
        if (guess)
            end_guess(p);
        fm_io_finish(p->io, r);
        pthread_mutex_lock(&p->lock);
        complete(p, r);
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

static int start_workers(pool *p, int n_workers)
{
    pthread_attr_t attr;
    sigset_t all, before;
    int rc = 0;
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, STACK_BYTES);
    sigfillset(&all); /* signals belong to the program's own threads */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (p->n_workers < n_workers && rc == 0) {
        rc = pthread_create(&p->threads[p->n_workers], &attr, worker_main, p);
        p->n_workers += rc == 0;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
    return rc;
}

fm_status fm_io_pool_open(fm_io *io, int n_workers, fm_io_read_fn *read, void *ctx, void **state)
{
    void *memory = NULL;
    if (n_workers == 0)
        n_workers = DEFAULT_WORKERS;
    if (n_workers < 1 || n_workers > MAX_WORKERS)
        return fm_fail(FM_ERR_ARG, "I/O: %d workers asked, 1 to %d are possible", n_workers,
                       MAX_WORKERS);
    FM_TRY(fm_alloc(sizeof(pool), &memory));
    pool *const p = memory;
    p->io = io;
    p->read = read;
    p->ctx = ctx;
    p->max_speculative = fm_io_max_speculative(n_workers);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->work, NULL);
    init_cond(&p->completed);
    const int err = start_workers(p, n_workers);
    if (err != 0) {
        const int n_started = p->n_workers;
        fm_io_pool_close(p);
        return fm_fail(FM_ERR_NOMEM, "I/O: the system gave %d of %d threads: %s", n_started,
                       n_workers, err == EAGAIN ? "no more allowed" : "refused");
    }
    *state = p;
    return FM_OK;
}

void fm_io_pool_close(void *state)
{
    pool *const p = state;
    pthread_mutex_lock(&p->lock);
    p->stop = true;
    pthread_cond_broadcast(&p->work);
    pthread_mutex_unlock(&p->lock);
    for (int i = 0; i < p->n_workers; i++)
        pthread_join(p->threads[i], NULL);
    pthread_cond_destroy(&p->completed);
    pthread_cond_destroy(&p->work);
    pthread_mutex_destroy(&p->lock);
    fm_free(p);
}

fm_status fm_io_pool_submit(void *state, fm_io_req *const *reqs, int n)
{
    pool *const p = state;
    pthread_mutex_lock(&p->lock);
    for (int i = 0; i < n; i++)
        fm_io_queue_push(&p->queued[reqs[i]->priority], reqs[i]);
    wake(p);
    pthread_mutex_unlock(&p->lock);
    return FM_OK;
}

fm_status fm_io_pool_wait(void *state, fm_io_req **done, int max_done, int min_done,
                          int64_t timeout_ns, int *n_done)
{
    pool *const p = state;
    const int64_t deadline = timeout_ns > 0 ? fm_clock_ns() + timeout_ns : 0;
    int rc = timeout_ns == 0 ? ETIMEDOUT : 0, n = 0;
    pthread_mutex_lock(&p->lock);
    p->min_done = min_done;
    while (p->done.n < min_done && rc != ETIMEDOUT)
        rc = timeout_ns < 0 ? pthread_cond_wait(&p->completed, &p->lock)
                            : wait_until(&p->completed, &p->lock, deadline);
    p->min_done = 0;
    while (n < max_done && p->done.n > 0)
        done[n++] = fm_io_queue_pop(&p->done);
    pthread_mutex_unlock(&p->lock);
    *n_done = n;
    return FM_OK;
}

void fm_io_pool_cancel(void *state, fm_io_req *req)
{
    pool *const p = state;
    pthread_mutex_lock(&p->lock);
    if (req->state == FM_IO_QUEUED && fm_io_queue_remove(&p->queued[req->priority], req)) {
        req->status = FM_ERR_CANCELLED;
        req->ns_queued = fm_clock_ns() - req->ns_queued;
        complete(p, req);
    }
    pthread_mutex_unlock(&p->lock);
}

void fm_io_pool_promote(void *state, fm_io_req *req)
{
    pool *const p = state;
    pthread_mutex_lock(&p->lock);
    if (fm_io_queue_promote(p->queued, req))
        wake(p);
    pthread_mutex_unlock(&p->lock);
}
