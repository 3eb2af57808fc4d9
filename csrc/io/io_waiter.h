/* Private to io/: the lock of a method with threads of its own, its finished requests, and the one
 * thread that waits for them. */
#ifndef FM_IO_IO_WAITER_H
#define FM_IO_IO_WAITER_H

#include <pthread.h>

#include "io/io_queue.h"

typedef struct fm_io_waiter {
    pthread_mutex_t lock; /* the method guards its own fields with it too */
    pthread_cond_t completed;
    fm_io_queue done;
    int min_done; /* what the waiter waits for; 0: nobody waits */
} fm_io_waiter;

void fm_io_waiter_init(fm_io_waiter *w);
void fm_io_waiter_destroy(fm_io_waiter *w);
void fm_io_waiter_complete(fm_io_waiter *w, fm_io_req *r); /* with the lock held */
/* As fm_io_cancel; queued: the method's, by priority. Without the lock. */
void fm_io_waiter_cancel(fm_io_waiter *w, fm_io_queue *queued, fm_io_req *req);
/* As fm_io_wait, arguments checked; without the lock. */
void fm_io_waiter_wait(fm_io_waiter *w, fm_io_req **done, int max_done, int min_done,
                       int64_t timeout_ns, int *n_done);

/* FM_ERR_NOMEM when the system gives fewer than n; *n_started are running either way. */
fm_status fm_io_start_threads(pthread_t *threads, int n, void *(*run)(void *), void *arg,
                              int *n_started);

#endif
