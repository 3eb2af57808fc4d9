/* Owns: the statistics and the JSON lines of the benchmarks. */
#include "bench.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/utsname.h>

#include "base/clock.h"
#include "base/platform.h"

#if !defined(BENCH_COMMIT)
#define BENCH_COMMIT "unknown"
#endif

static int compare_real(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int compare_int(const void *a, const void *b)
{
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

void bench_add(bench_series *s, double value)
{
    if (s->n < BENCH_MAX_RUNS)
        s->v[s->n++] = value;
}

static double at_rank(const bench_series *s, int rank)
{
    bench_series sorted = *s;
    if (s->n == 0)
        return NAN;
    qsort(sorted.v, (size_t)s->n, sizeof(double), compare_real);
    return sorted.v[rank];
}

double bench_min(const bench_series *s)
{
    return at_rank(s, 0);
}

double bench_max(const bench_series *s)
{
    return at_rank(s, s->n - 1);
}

double bench_median(const bench_series *s)
{
    return (at_rank(s, (s->n - 1) / 2) + at_rank(s, s->n / 2)) / 2;
}

double bench_spread(const bench_series *s)
{
    return (bench_max(s) - bench_min(s)) / bench_median(s);
}

void bench_time(bench_fn *fn, void *ctx, int n_warm, int n_runs, bench_series *seconds)
{
    for (int i = 0; i < n_warm; i++)
        fn(ctx);
    for (int i = 0; i < n_runs; i++) {
        const int64_t start = fm_clock_ns();
        fn(ctx);
        bench_add(seconds, (double)(fm_clock_ns() - start) * 1e-9);
    }
}

int64_t bench_percentile(int64_t *v, int64_t n, double p)
{
    if (n <= 0)
        return 0;
    qsort(v, (size_t)n, sizeof(v[0]), compare_int);
    const int64_t rank = (int64_t)ceil(p / 100 * (double)n) - 1;
    return v[rank < 0 ? 0 : rank >= n ? n - 1 : rank];
}

double bench_cpu_seconds(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) * 1e-6;
}

void bench_json_text(const char *key, const char *value)
{
    printf(", \"%s\": \"", key);
    for (const char *p = value; *p != '\0'; p++) {
        if (*p == '"' || *p == '\\')
            putchar('\\');
        if ((unsigned char)*p >= 0x20)
            putchar(*p);
    }
    putchar('"');
}

void bench_json_begin(const char *bench)
{
    printf("{\"bench\": \"%s\"", bench);
}

void bench_json_int(const char *key, int64_t value)
{
    printf(", \"%s\": %" PRId64, key, value);
}

void bench_json_real(const char *key, double value)
{
    if (isfinite(value))
        printf(", \"%s\": %.6g", key, value);
    else
        printf(", \"%s\": null", key);
}

void bench_json_bool(const char *key, bool value)
{
    printf(", \"%s\": %s", key, value ? "true" : "false");
}

void bench_json_series(const char *key, const bench_series *s)
{
    char name[64];
    bench_json_real(key, bench_median(s));
    snprintf(name, sizeof(name), "%s_min", key);
    bench_json_real(name, bench_min(s));
    snprintf(name, sizeof(name), "%s_max", key);
    bench_json_real(name, bench_max(s));
    snprintf(name, sizeof(name), "%s_spread", key);
    bench_json_real(name, bench_spread(s));
    snprintf(name, sizeof(name), "%s_runs", key);
    bench_json_int(name, s->n);
}

/* The CPU's name where the system tells it in /proc; elsewhere the architecture has to do. */
static void cpu_name(char *out, size_t out_bytes, const char *fallback)
{
    char line[256];
    FILE *const f = fopen("/proc/cpuinfo", "r");
    snprintf(out, out_bytes, "%s", fallback);
    while (f != NULL && fgets(line, sizeof(line), f) != NULL) {
        const char *const colon = strchr(line, ':');
        if (colon == NULL || strncmp(line, "model name", 10) != 0)
            continue;
        snprintf(out, out_bytes, "%s", colon + 2);
        out[strcspn(out, "\n")] = '\0';
        break;
    }
    if (f != NULL)
        fclose(f);
}

void bench_json_end(void)
{
    struct utsname u;
    char cpu[256], os[256];
    if (uname(&u) != 0)
        memset(&u, 0, sizeof(u));
    cpu_name(cpu, sizeof(cpu), u.machine);
    snprintf(os, sizeof(os), "%.64s %.64s %.64s", u.sysname, u.release, u.machine);
    bench_json_text("cpu", cpu);
    bench_json_int("n_cpus", fm_cpu_count());
    bench_json_text("os", os);
    bench_json_text("compiler", __VERSION__);
    bench_json_text("commit", BENCH_COMMIT);
    printf("}\n");
    fflush(stdout);
}

int64_t bench_parse_bytes(const char *text)
{
    static const char units[] = "KMGT";
    char *end = NULL;
    const long long n = strtoll(text, &end, 10);
    if (end == text || n < 0)
        return -1;
    const char *const unit = *end != '\0' ? strchr(units, *end) : NULL;
    if (*end == '\0')
        return n;
    const int bits = unit != NULL ? 10 * (int)(unit - units + 1) : 0;
    return unit == NULL || end[1] != '\0' || n > INT64_MAX >> bits ? -1 : (int64_t)n << bits;
}
