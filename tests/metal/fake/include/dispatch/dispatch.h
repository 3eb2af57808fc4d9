/* The few parts of libdispatch that the Metal host uses, over pthreads (Linux stand-in). */
#ifndef FAKE_DISPATCH_H
#define FAKE_DISPATCH_H
#include <stdint.h>

typedef struct fake_semaphore *dispatch_semaphore_t;
typedef uint64_t dispatch_time_t;
#define DISPATCH_TIME_NOW 0ull
#define DISPATCH_TIME_FOREVER (~0ull)

dispatch_semaphore_t dispatch_semaphore_create(intptr_t value);
intptr_t dispatch_semaphore_wait(dispatch_semaphore_t s, dispatch_time_t until); /* 0: got it */
intptr_t dispatch_semaphore_signal(dispatch_semaphore_t s);
dispatch_time_t dispatch_time(dispatch_time_t when, int64_t delta_ns);
void dispatch_release(dispatch_semaphore_t s);
#endif
