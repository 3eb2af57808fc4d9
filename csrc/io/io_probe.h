/* Owns: a short measurement of random reads through any method. Never reads an offset twice in a run, so the page
 * cache cannot answer for what this run read itself; what earlier runs cached is the caller's affair. */
#ifndef FM_IO_IO_PROBE_H
#define FM_IO_IO_PROBE_H

#include "io/io.h"

typedef struct fm_io_probe_args {
    const char *const *paths;
    int n_paths;
    fm_io_opts opts;
    size_t block_bytes; /* per read, rounded up to the alignment */
    int depth;          /* reads in flight, >= 1 */
    double seconds;     /* at least this long, unless every block was read once */
    uint64_t seed;      /* order of the blocks */
} fm_io_probe_args;

typedef struct fm_io_probe_result {
    double seconds, cpu_seconds; /* wall time; CPU time of the whole process meanwhile */
    int64_t n_reads, bytes;
    int64_t p50_ns, p99_ns;      /* queued and read */
} fm_io_probe_result;

fm_status fm_io_probe(const fm_io_probe_args *a, fm_io_probe_result *out);

#endif
