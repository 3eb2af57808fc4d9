/* What all benchmarks share: repeated runs with median and spread, and one JSON object per line
 * that says on which machine and commit it was measured. Text goes to stdout; refuses to judge the
 * numbers. */
#ifndef FM_BENCH_BENCH_H
#define FM_BENCH_BENCH_H

#include <stdbool.h>
#include <stdint.h>

enum { BENCH_MAX_RUNS = 101 };

typedef struct bench_series {
    double v[BENCH_MAX_RUNS];
    int n;
} bench_series;

void bench_add(bench_series *s, double value); /* beyond BENCH_MAX_RUNS: ignored */
double bench_min(const bench_series *s);       /* NaN when empty, as are the following */
double bench_max(const bench_series *s);
double bench_median(const bench_series *s);
double bench_spread(const bench_series *s); /* (max - min) / median */

/* n_warm unmeasured calls, then n_runs measured ones: seconds per call. */
typedef void bench_fn(void *ctx);
void bench_time(bench_fn *fn, void *ctx, int n_warm, int n_runs, bench_series *seconds);

/* The p-th percentile (0..100, nearest rank) of n unsorted numbers; sorts them in place. */
int64_t bench_percentile(int64_t *v, int64_t n, double p);

double bench_cpu_seconds(void); /* user + system time of this process, all threads */

/* One line: bench_json_begin("io"); bench_json_text("method", "pread"); ...; bench_json_end();
 * Machine, system, compiler and commit are added by bench_json_end. */
void bench_json_begin(const char *bench);
void bench_json_text(const char *key, const char *value);
void bench_json_int(const char *key, int64_t value);
void bench_json_real(const char *key, double value); /* NaN and infinity become null */
void bench_json_bool(const char *key, bool value);
void bench_json_series(const char *key,
                       const bench_series *s); /* key: median, min, max, spread, n */
void bench_json_end(void);

/* "64K", "1M", "4G", "123": bytes; -1 when it is none. */
int64_t bench_parse_bytes(const char *text);

#endif
