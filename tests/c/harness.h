/* The C tests' few tools. A test file lists its cases in main through RUN; exit 0 passed, 1 failed,
 * 77 skipped (with the reason on stderr). CHECK counts and goes on, REQUIRE leaves the case. */
#ifndef FM_TESTS_HARNESS_H
#define FM_TESTS_HARNESS_H

#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/status.h"

static int harness_n_failed;

static inline void harness_fail(const char *file, int line, const char *what)
{
    if (harness_n_failed++ < 20)
        fprintf(stderr, "%s:%d: failed: %s (last error: %s)\n", file, line, what,
                fm_last_error()->message);
}

#define CHECK(cond) ((cond) ? (void)0 : harness_fail(__FILE__, __LINE__, #cond))
#define CHECK_INT(got, want)                                                                       \
    do {                                                                                           \
        const int64_t got_ = (int64_t)(got), want_ = (int64_t)(want);                              \
        char text_[256];                                                                           \
        snprintf(text_, sizeof(text_), "%s is %" PRId64 ", wanted %" PRId64, #got, got_, want_);   \
        if (got_ != want_)                                                                         \
            harness_fail(__FILE__, __LINE__, text_);                                               \
    } while (0)
#define CHECK_CONTAINS(text, part) CHECK(strstr((text), (part)) != NULL)
#define REQUIRE(cond)                                                                              \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            harness_fail(__FILE__, __LINE__, #cond);                                               \
            return;                                                                                \
        }                                                                                          \
    } while (0)

#define RUN(test)                                                                                  \
    do {                                                                                           \
        const int before_ = harness_n_failed;                                                      \
        test();                                                                                    \
        if (harness_n_failed != before_)                                                           \
            fprintf(stderr, "FAILED %s\n", #test);                                                 \
    } while (0)
#define TEST_EXIT() return harness_n_failed == 0 ? 0 : 1
#define TEST_SKIP(reason)                                                                          \
    do {                                                                                           \
        fprintf(stderr, "skipped: %s\n", reason);                                                  \
        return 77;                                                                                 \
    } while (0)

/* The same sequence everywhere (splitmix64). */
static inline uint64_t test_rand(uint64_t *state)
{
    uint64_t z = *state += UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    return z ^ z >> 31;
}

#endif
