/* Semaphores of libdispatch over pthreads. */
#include <dispatch/dispatch.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

/* FAKE_METAL_LATE: a waiter is what makes command buffers run. */
extern void fake_metal_run_late(void);

struct fake_semaphore {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    intptr_t value;
};

dispatch_semaphore_t dispatch_semaphore_create(intptr_t value)
{
    struct fake_semaphore *s = calloc(1, sizeof *s);
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->changed, NULL);
    s->value = value;
    return s;
}

intptr_t dispatch_semaphore_wait(dispatch_semaphore_t s, dispatch_time_t until)
{
    const struct timespec t = {(time_t)(until / 1000000000u), (long)(until % 1000000000u)};
    int status = 0;
    fake_metal_run_late();
    pthread_mutex_lock(&s->lock);
    while (s->value <= 0 && status != ETIMEDOUT)
        status = until == DISPATCH_TIME_FOREVER ? pthread_cond_wait(&s->changed, &s->lock)
                                                : pthread_cond_timedwait(&s->changed, &s->lock, &t);
    const int got = s->value > 0;
    s->value -= got;
    pthread_mutex_unlock(&s->lock);
    return got ? 0 : 1;
}

intptr_t dispatch_semaphore_signal(dispatch_semaphore_t s)
{
    pthread_mutex_lock(&s->lock);
    s->value++;
    pthread_cond_signal(&s->changed);
    pthread_mutex_unlock(&s->lock);
    return 0;
}

dispatch_time_t dispatch_time(dispatch_time_t when, int64_t delta_ns)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    (void)when; /* only DISPATCH_TIME_NOW is used */
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec + (uint64_t)delta_ns;
}

void dispatch_release(dispatch_semaphore_t s)
{
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->changed);
    free(s);
}
