/* Owns: the reading threads and their queues. One lock guards both queues and the completions: a
 * read takes tens of microseconds at least, so it is not contended. Demand requests are taken
 * before speculative ones; within a priority, first come first served. */
#include "io/io_pool.h"

#include "base/mem.h"
#include "io/io_waiter.h"

enum { DEFAULT_WORKERS = 16, MAX_WORKERS = 256 };

typedef struct pool {
    fm_io *io;
    fm_io_read_fn *read;
    void *ctx;
    fm_io_waiter out;
    pthread_cond_t work;
    fm_io_queue queued[FM_IO_N_PRIORITIES];
    int n_speculative, max_speculative; /* being read at once */
    int n_idle, n_waking;               /* workers that sleep; of them, those that were signalled already */
    bool stop;
    int n_workers;
    pthread_t threads[MAX_WORKERS];
} pool;

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
    pthread_mutex_lock(&p->out.lock);
    p->n_speculative--;
    wake(p);
    pthread_mutex_unlock(&p->out.lock);
}

static void *worker_main(void *arg)
{
    pool *const p = arg;
    pthread_mutex_lock(&p->out.lock);
    while (!p->stop) {
        fm_io_req *const r = fm_io_queue_pop_next(p->queued, p->n_speculative, p->max_speculative);
        if (r == NULL) {
            p->n_idle++;
            pthread_cond_wait(&p->work, &p->out.lock);
            p->n_idle--;
            p->n_waking -= p->n_waking > 0;
            continue;
        }
        const bool guess = r->priority == 1;
        r->state = FM_IO_RUNNING;
        p->n_speculative += guess;
        pthread_mutex_unlock(&p->out.lock);
        read_request(p, r);
        if (guess)
            end_guess(p);
        fm_io_finish(p->io, r);
        pthread_mutex_lock(&p->out.lock);
        fm_io_waiter_complete(&p->out, r);
    }
    pthread_mutex_unlock(&p->out.lock);
    return NULL;
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
    fm_io_waiter_init(&p->out);
    pthread_cond_init(&p->work, NULL);
    const fm_status s = fm_io_start_threads(p->threads, n_workers, worker_main, p, &p->n_workers);
    if (s != FM_OK) {
        fm_io_pool_close(p);
        return s;
    }
    *state = p;
    return FM_OK;
}

void fm_io_pool_close(void *state)
{
    pool *const p = state;
    pthread_mutex_lock(&p->out.lock);
    p->stop = true;
    pthread_cond_broadcast(&p->work);
    pthread_mutex_unlock(&p->out.lock);
    for (int i = 0; i < p->n_workers; i++)
        pthread_join(p->threads[i], NULL);
    pthread_cond_destroy(&p->work);
    fm_io_waiter_destroy(&p->out);
    fm_free(p);
}

fm_status fm_io_pool_submit(void *state, fm_io_req *const *reqs, int n)
{
    pool *const p = state;
    pthread_mutex_lock(&p->out.lock);
    for (int i = 0; i < n; i++)
        fm_io_queue_push(&p->queued[reqs[i]->priority], reqs[i]);
    wake(p);
    pthread_mutex_unlock(&p->out.lock);
    return FM_OK;
}

fm_status fm_io_pool_wait(void *state, fm_io_req **done, int max_done, int min_done,
                          int64_t timeout_ns, int *n_done)
{
    pool *const p = state;
    fm_io_waiter_wait(&p->out, done, max_done, min_done, timeout_ns, n_done);
    return FM_OK;
}

void fm_io_pool_cancel(void *state, fm_io_req *req)
{
    pool *const p = state;
    fm_io_waiter_cancel(&p->out, p->queued, req);
}

void fm_io_pool_promote(void *state, fm_io_req *req)
{
    pool *const p = state;
    pthread_mutex_lock(&p->out.lock);
    if (fm_io_queue_promote(p->queued, req))
        wake(p);
    pthread_mutex_unlock(&p->out.lock);
}
