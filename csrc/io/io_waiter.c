/* Owns: handing finished requests from a method's threads to the thread that waits. */
#include "io/io_waiter.h"

#include <errno.h>

#include "base/clock.h"
#include "base/threads.h"

enum { STACK_BYTES = 256 << 10 };

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

void fm_io_waiter_init(fm_io_waiter *w)
{
    pthread_mutex_init(&w->lock, NULL);
    init_cond(&w->completed);
}

void fm_io_waiter_destroy(fm_io_waiter *w)
{
    pthread_cond_destroy(&w->completed);
    pthread_mutex_destroy(&w->lock);
}

void fm_io_waiter_complete(fm_io_waiter *w, fm_io_req *r)
{
    r->state = FM_IO_DONE;
    fm_io_queue_push(&w->done, r);
    if (w->min_done > 0 && w->done.n >= w->min_done)
        pthread_cond_signal(&w->completed);
}

void fm_io_waiter_cancel(fm_io_waiter *w, fm_io_queue *queued, fm_io_req *req)
{
    pthread_mutex_lock(&w->lock);
    if (req->state == FM_IO_QUEUED && fm_io_queue_remove(&queued[req->priority], req)) {
        req->status = FM_ERR_CANCELLED;
        req->ns_queued = fm_clock_ns() - req->ns_queued;
        fm_io_waiter_complete(w, req);
    }
    pthread_mutex_unlock(&w->lock);
}

void fm_io_waiter_wait(fm_io_waiter *w, fm_io_req **done, int max_done, int min_done,
                       int64_t timeout_ns, int *n_done)
{
    const int64_t deadline = timeout_ns > 0 ? fm_clock_ns() + timeout_ns : 0;
    int rc = timeout_ns == 0 ? ETIMEDOUT : 0, n = 0;
    pthread_mutex_lock(&w->lock);
    w->min_done = min_done;
    while (w->done.n < min_done && rc != ETIMEDOUT)
        rc = timeout_ns < 0 ? pthread_cond_wait(&w->completed, &w->lock)
                            : wait_until(&w->completed, &w->lock, deadline);
    w->min_done = 0;
    while (n < max_done && w->done.n > 0)
        done[n++] = fm_io_queue_pop(&w->done);
    pthread_mutex_unlock(&w->lock);
    *n_done = n;
}

fm_status fm_io_start_threads(pthread_t *threads, int n, void *(*run)(void *), void *arg,
                              int *n_started)
{
    int rc = 0;
    for (*n_started = 0; *n_started < n && rc == 0; *n_started += rc == 0)
        rc = fm_thread_start(&threads[*n_started], STACK_BYTES, run, arg);
    return rc == 0 ? FM_OK
                   : fm_fail(FM_ERR_NOMEM, "I/O: the system gave %d of %d threads: %s", *n_started, n,
                             rc == EAGAIN ? "no more allowed" : "refused");
}
