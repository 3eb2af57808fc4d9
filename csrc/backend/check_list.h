/* Owns: the cases of the conformance suite. Private to backend/. */
#ifndef FM_BACKEND_CHECK_LIST_H
#define FM_BACKEND_CHECK_LIST_H

#include "backend/backend.h"

enum { FM_CHECK_MAX_CASES = 640 };

/* Hands out a case's memory in the same order every time: base NULL only counts, fill writes random numbers. */
typedef struct fm_maker {
    uint8_t *base;
    size_t used;
    bool fill;
    uint64_t seed;
    int64_t rep;         /* of a timed case: which copy of the weights to use */
    int64_t bytes_moved; /* that the call must read or write at least */
} fm_maker;

typedef struct fm_case {
    const char *op;
    fm_status (*call)(fm_maker *m, const struct fm_case *k, fm_backend *b); /* b NULL: only lay out */
    char sizes[120];
    fm_quant format, scale_format;
    int32_t group;
    int odd;        /* bytes that weight areas lie past an aligned address */
    int64_t d[8];   /* sizes; their meaning is the function's */
    int copies;     /* of the weights when timed, each call on another: no cache holds them. 0: not timed */
} fm_case;

/* Fills `out` [FM_CHECK_MAX_CASES]; returns how many. */
int fm_check_list(fm_case *out, bool small);

void *fm_make_bytes(fm_maker *m, int64_t bytes);                           /* 256-byte aligned, not filled */
float *fm_make_floats(fm_maker *m, int64_t n, float low, float high);      /* random */
fm_mat fm_make_mat(fm_maker *m, const fm_case *k, int64_t n_rows, int64_t n_cols); /* of k's format; counted as moved */

#endif
