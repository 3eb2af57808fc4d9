/* Shared events of the stand-in framework. Values only rise: Metal leaves it open what a value that falls does. */
#include "fake_metal.h"

#include <time.h>

@implementation FakeEvent
- (id)init
{
    if ((self = [super init])) {
        pthread_mutex_init(&lock, NULL);
        pthread_cond_init(&changed, NULL);
    }
    return self;
}

- (uint64_t)signaledValue
{
    pthread_mutex_lock(&lock);
    const uint64_t v = value;
    pthread_mutex_unlock(&lock);
    return v;
}

- (void)setSignaledValue:(uint64_t)v
{
    pthread_mutex_lock(&lock);
    const uint64_t was = value;
    value = v;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    CHECK(v > was, @"an event's value goes from %lu to %lu", (unsigned long)was, (unsigned long)v);
    fake_metal_run_eager();
}

/* In short steps: a process that was stopped meanwhile loses one step, not all of its time. */
- (BOOL)reached:(uint64_t)v within:(uint64_t)milliseconds
{
    enum { STEP_MS = 20 };
    pthread_mutex_lock(&lock);
    for (uint64_t left = milliseconds; value < v && left > 0; left -= left < STEP_MS ? left : STEP_MS) {
        struct timespec t;
        clock_gettime(CLOCK_REALTIME, &t);
        t.tv_nsec += (long)(left < STEP_MS ? left : STEP_MS) * 1000000;
        t.tv_sec += t.tv_nsec / 1000000000;
        t.tv_nsec %= 1000000000;
        int status = 0;
        while (value < v && status == 0)
            status = pthread_cond_timedwait(&changed, &lock, &t);
    }
    const BOOL there = value >= v;
    pthread_mutex_unlock(&lock);
    return there;
}

- (BOOL)waitUntilSignaledValue:(uint64_t)v timeoutMS:(uint64_t)milliseconds
{
    fake_metal_run_late_until(self, v);
    return [self reached:v within:milliseconds];
}

- (void)dealloc
{
    pthread_mutex_destroy(&lock);
    pthread_cond_destroy(&changed);
    [super dealloc];
}
@end

/* For the test of the rule above. */
void fake_metal_fall(void);
__attribute__((visibility("default"))) void fake_metal_fall(void)
{
    FakeEvent *e = [[FakeEvent alloc] init];
    [e setSignaledValue:2];
    [e setSignaledValue:1];
    [e release];
}
