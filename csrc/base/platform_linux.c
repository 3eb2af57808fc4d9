/* Owns: what Linux says about CPUs and pages. A container's CPU quota counts: more threads than it
 * pays for would only be throttled. Errors read as "no limit". */
#if defined(__linux__)
#define _GNU_SOURCE
#include "base/platform.h"

#include <sched.h>
#include <stdio.h>
#include <unistd.h>

static int affinity_cpus(void)
{
    /* The kernel refuses a set smaller than its own with EINVAL: grow until it fits. */
    for (int n_max = 1024; n_max <= 1 << 18; n_max *= 4) {
        cpu_set_t *const set = CPU_ALLOC((size_t)n_max);
        if (set == NULL)
            break;
        const size_t bytes = CPU_ALLOC_SIZE((size_t)n_max);
        const int rc = sched_getaffinity(0, bytes, set);
        const int n = rc == 0 ? CPU_COUNT_S(bytes, set) : 0;
        CPU_FREE(set);
        if (n > 0)
            return n;
    }
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? (int)online : 1;
}

/* Reads up to two numbers ("200000 100000", or one per file); 0 when there are none ("max"). */
static int read_numbers(const char *path, long *a, long *b)
{
    FILE *const f = fopen(path, "re");
    if (f == NULL)
        return 0;
    const int n = fscanf(f, "%ld %ld", a, b);
    fclose(f);
    return n > 0 ? n : 0;
}

/* CPUs' worth of time this process may use, rounded up; 0 when unlimited or unknown. */
static int quota_cpus(void)
{
    long quota = -1, period = -1, unused = 0;
    if (read_numbers("/sys/fs/cgroup/cpu.max", &quota, &period) != 2) {
        read_numbers("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", &quota, &unused);
        read_numbers("/sys/fs/cgroup/cpu/cpu.cfs_period_us", &period, &unused);
    }
    if (quota <= 0 || period <= 0 || quota / period >= 1 << 20)
        return 0;
    return (int)(quota / period + (quota % period != 0));
}

int fm_cpu_count(void)
{
    const int n = affinity_cpus(), quota = quota_cpus();
    return quota > 0 && quota < n ? quota : n;
}

long fm_page_bytes(void)
{
    const long n = sysconf(_SC_PAGESIZE);
    return n >= 4096 ? n : 4096;
}
#else
typedef int fm_platform_linux_empty; /* ISO C forbids an empty file */
#endif
