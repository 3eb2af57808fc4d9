/* Owns: the conformance suite of a backend on its real device: every op, format and a set of sizes, judged by the CPU
 * backend (backend_compare), and the speed of the ops that a model's time goes into, at the shapes of real models.
 * For `flashmoe doctor`; inputs are made here, no model is needed. */
#ifndef FM_BACKEND_BACKEND_CHECK_H
#define FM_BACKEND_BACKEND_CHECK_H

#include "backend/backend.h"

typedef struct fm_check fm_check;

typedef struct fm_check_result {
    const char *op;    /* static */
    char sizes[120];
    double worst;      /* largest difference from the CPU, as a share of what is allowed; above 1: wrong */
    double gb_per_s;   /* bytes that the op must move, per second; 0: not timed */
    double us;         /* of one call; 0: not timed */
    fm_status status;  /* FM_OK, or why the case failed */
    char message[512]; /* "" when FM_OK */
} fm_check_result;

/* small: sizes that a CPU standing in for a GPU runs in seconds. Errors as fm_backend_open's; the backend "cpu" judges
 * and cannot be checked. */
fm_status fm_check_open(const char *backend, fm_pool *pool, bool small, fm_check **out);
void fm_check_close(fm_check *c); /* NULL is fine */
/* What the device says of itself; strings are borrowed until close. */
fm_caps fm_check_caps(const fm_check *c);
int fm_check_n_cases(const fm_check *c);
/* Run case i. A wrong or refused case is a result, not an error; FM_ERR_NOMEM when its inputs do not fit. */
fm_status fm_check_run(fm_check *c, int i, fm_check_result *out);

#endif
