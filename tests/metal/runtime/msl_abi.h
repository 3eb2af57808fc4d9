/* What a compiled .metal library exports, and how the runner is driven.
 * Shared by generated code, the runner, the Python driver and the stand-in Metal framework. */
#ifndef MSL_ABI_H
#define MSL_ABI_H
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

enum { MSL_P_BUFFER = 1, MSL_P_THREADGROUP = 2, MSL_P_BUILTIN = 3 };

/* In the order of BUILTINS in msl_rewrite.py. */
enum {
    MSL_B_thread_position_in_grid = 0,
    MSL_B_thread_position_in_threadgroup,
    MSL_B_threadgroup_position_in_grid,
    MSL_B_threads_per_threadgroup,
    MSL_B_threadgroups_per_grid,
    MSL_B_threads_per_grid,
    MSL_B_dispatch_threads_per_threadgroup,
    MSL_B_thread_index_in_threadgroup,
    MSL_B_thread_index_in_simdgroup,
    MSL_B_simdgroup_index_in_threadgroup,
    MSL_B_simdgroups_per_threadgroup,
    MSL_B_threads_per_simdgroup
};

typedef struct {
    unsigned char kind, writable;
    unsigned short index;
    const char *name;
    unsigned elem_size, elem_align; /* 0 when unknown */
    unsigned char is_ref;           /* `constant T &x`: the binding must hold a whole T */
} msl_param;

typedef struct msl_kernel {
    const char *name;
    void (*invoke)(void);
    const msl_param *params;
    int n_params;
    unsigned max_threads; /* 0: no attribute, 1024 */
} msl_kernel;

typedef struct {
    const char *name;
    int index;
    void *value;
    unsigned size;
    unsigned char *defined;
} msl_fconst;

typedef struct {
    const msl_kernel *kernels;
    int n_kernels;
    const msl_fconst *constants;
    int n_constants;
} msl_library;

typedef struct {
    void *ptr;  /* the offset is already in it */
    size_t len; /* bytes left after the offset; 0: unknown */
} msl_binding;

typedef struct {
    unsigned grid[3], tg[3]; /* threads of the grid; threads of a threadgroup */
    msl_binding buf[31];
    size_t tgmem[31];
} msl_dispatch;

typedef struct {
    uint64_t lanes, switches, simd_ops, divergent_simd_ops, barriers;
    double ms;
} msl_stats;

/* Runs the whole grid. Returns 0, or 1 with the reason in err. One caller at a time. */
int msl_run(const msl_library *lib, const msl_kernel *k, const msl_dispatch *d, msl_stats *st,
            char *err, size_t errlen);

#ifdef __cplusplus
}
#endif
#endif
