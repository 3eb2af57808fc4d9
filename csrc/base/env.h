/* Owns: the only getenv of the core. Each variable is one line of the list, so `flashmoe doctor`
 * can print name, meaning and present value. */
#ifndef FM_BASE_ENV_H
#define FM_BASE_ENV_H

#define FM_ENV_LIST(X)                                                                             \
    X(CPU, "FLASHMOE_CPU", "force a CPU kernel variant (ref, avx2, ...); default: the best supported")  \
    X(COMPARE, "FLASHMOE_COMPARE", "cpu: run every op on the CPU too and report the first difference")  \
    X(PIPELINE, "FLASHMOE_PIPELINE", "0: submit and wait per layer where the device could run a token in one go") \
    X(FAULT, "FLASHMOE_FAULT", "tests only: make reads fail, e.g. eio@5, short@3, delay=200us")    \
    X(DEBUG_CHECKS, "FLASHMOE_DEBUG_CHECKS", "1: assert pins, bounds and decode-time allocations")

typedef enum fm_env {
#define X(id, name, meaning) FM_ENV_##id,
    FM_ENV_LIST(X)
#undef X
    FM_ENV_COUNT
} fm_env;

const char *fm_env_name(fm_env v);
const char *fm_env_meaning(fm_env v);
const char *fm_env_get(fm_env v); /* NULL when unset or empty */

#endif
