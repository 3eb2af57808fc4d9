/* Every task runs exactly once, whoever calls, however small the job. */
#include "harness.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/threads.h"

enum { MAX_TASKS = 1000 };

typedef struct job {
    fm_pool *pool;
    int64_t n_tasks, most;
    int hits[MAX_TASKS]; /* plain: a task run twice at once is a race that TSan sees */
    atomic_int n_bad_workers, n_bad_ranges;
} job;

static void count_task(void *ctx, int64_t task, int worker)
{
    job *const j = ctx;
    j->hits[task]++;
    if (worker < 0 || worker >= fm_pool_threads(j->pool))
        atomic_fetch_add(&j->n_bad_workers, 1);
}

static void count_range(void *ctx, int64_t begin, int64_t end, int worker)
{
    job *const j = ctx;
    if (begin < 0 || begin >= end || end > j->n_tasks || end - begin > j->most)
        atomic_fetch_add(&j->n_bad_ranges, 1);
    for (int64_t i = begin; i < end; i++)
        count_task(ctx, i, worker);
}

/* most = 0: one by one. */
static void run_ranges(fm_pool *pool, int64_t n_tasks, int64_t most)
{
    job j = {.pool = pool, .n_tasks = n_tasks, .most = most};
    if (most > 0)
        fm_parallel_ranges(pool, n_tasks, most, count_range, &j);
    else
        fm_parallel_for(pool, n_tasks, count_task, &j);
    for (int64_t i = 0; i < n_tasks; i++)
        CHECK_INT(j.hits[i], 1);
    CHECK_INT(j.n_bad_workers, 0);
    CHECK_INT(j.n_bad_ranges, 0);
}

static void run_job(fm_pool *pool, int64_t n_tasks) { run_ranges(pool, n_tasks, 0); }

static void task_counts(void)
{
    const int64_t counts[] = {0, 1, 2, 3, 7, 31, 64, 1000};
    for (int n_threads = 1; n_threads <= 5; n_threads++) {
        fm_pool *pool = NULL;
        REQUIRE(fm_pool_open(n_threads, &pool) == FM_OK);
        CHECK_INT(fm_pool_threads(pool), n_threads);
        for (int i = 0; i < FM_COUNT(counts); i++)
            for (int64_t most = 0; most <= 1024; most = most * 4 + 1)
                run_ranges(pool, counts[i], most);
        fm_pool_close(pool);
    }
}

static void many_small_jobs(void)
{
    fm_pool *pool = NULL;
    REQUIRE(fm_pool_open(3, &pool) == FM_OK);
    for (int i = 0; i < 5000; i++)
        run_job(pool, 2 + i % 5);
    for (int i = 0; i < 20; i++) {
        usleep(500); /* long enough for the workers to park */
        run_job(pool, 8);
    }
    fm_pool_close(pool);
}

static void *call_from_here(void *pool)
{
    for (int i = 0; i < 50; i++)
        run_job(pool, 16);
    return NULL;
}

static void different_callers(void)
{
    fm_pool *pool = NULL;
    REQUIRE(fm_pool_open(2, &pool) == FM_OK);
    for (int i = 0; i < 10; i++) {
        pthread_t t;
        REQUIRE(pthread_create(&t, NULL, call_from_here, pool) == 0);
        pthread_join(t, NULL);
        run_job(pool, 16);
    }
    fm_pool_close(pool);
}

static void open_and_close(void)
{
    fm_pool *pool = (fm_pool *)&pool;
    CHECK(fm_pool_open(0, &pool) == FM_ERR_ARG && pool == NULL);
    CHECK(fm_pool_open(1 << 20, &pool) == FM_ERR_ARG);
    fm_pool_close(NULL);
    for (int i = 0; i < 100; i++) {
        REQUIRE(fm_pool_open(1 + i % 4, &pool) == FM_OK);
        if (i % 3 == 0)
            run_job(pool, 5);
        fm_pool_close(pool);
    }
}

#if defined(__SANITIZE_THREAD__)
static void forked_child(void)
{
} /* TSan does not follow a fork of a threaded program */
#else
static void forked_child(void)
{
    fm_pool *pool = NULL;
    int code = -1;
    REQUIRE(fm_pool_open(3, &pool) == FM_OK);
    run_job(pool, 10);
    const pid_t pid = fork();
    if (pid == 0) {
        alarm(20); /* a hang must become a failure */
        run_job(pool, 10);
        fm_pool_close(pool);
        _exit(harness_n_failed == 0 ? 0 : 1);
    }
    REQUIRE(pid > 0 && waitpid(pid, &code, 0) == pid);
    CHECK(WIFEXITED(code) && WEXITSTATUS(code) == 0);
    run_job(pool, 10);
    fm_pool_close(pool);
}
#endif

int main(void)
{
    RUN(task_counts);
    RUN(many_small_jobs);
    RUN(different_callers);
    RUN(open_and_close);
    RUN(forked_child);
    TEST_EXIT();
}
