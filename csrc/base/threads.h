/* Owns: the one worker pool, and starting threads: its own and those that read (io/io_waiter.c).
 * One fm_parallel_for at a time per pool, from any thread; no nesting; the calling thread works
 * too. After fork the child's pool has no workers: it still works, on the calling thread alone. */
#ifndef FM_BASE_THREADS_H
#define FM_BASE_THREADS_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

typedef struct fm_pool fm_pool;
/* Called with 0 <= task < n_tasks, any thread, any order; worker in [0, n_threads). */
typedef void fm_task_fn(void *ctx, int64_t task, int worker);
/* The same for the tasks begin <= task < end, one at least. */
typedef void fm_range_fn(void *ctx, int64_t begin, int64_t end, int worker);

fm_status fm_pool_open(int n_threads, fm_pool **out); /* n_threads >= 1 counts the caller */
void fm_pool_close(fm_pool *p);                       /* NULL is fine */
int fm_pool_threads(const fm_pool *p);

/* Returns when all tasks are done; n_tasks < 2^32. Each thread takes one by one of its own share of consecutive tasks,
 * then from the ends of others', so make them coarse enough (>= ~5 us). n_tasks <= 1 or one thread runs inline. */
void fm_parallel_for(fm_pool *p, int64_t n_tasks, fm_task_fn *fn, void *ctx);
/* The same for small tasks that are cheaper in a row: a call gets up to `most` >= 1 of them, and fewer and fewer towards
 * the end, so that all threads end together. */
void fm_parallel_ranges(fm_pool *p, int64_t n_tasks, int64_t most, fm_range_fn *fn, void *ctx);

/* A thread that never gets a signal. Returns 0 or what pthread_create does. */
int fm_thread_start(pthread_t *thread, size_t stack_bytes, void *(*run)(void *), void *arg);

#endif
