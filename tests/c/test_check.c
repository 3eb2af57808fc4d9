/* The conformance suite as far as it goes without another device: its list, and what it refuses. */
#include "backend/backend_check.h"
#include "backend/check_list.h"
#include "harness.h"

static fm_case cases[FM_CHECK_MAX_CASES];

static void test_lists_are_whole(void)
{
    static const char *const ops[] = {"embed", "matmul", "experts", "rmsnorm", "swiglu", "clip", "add_gated", "combine",
                                      "find_nonfinite", "rope", "route", "attention", "conv", "delta"};
    for (int small = 0; small < 2; small++) {
        const int n = fm_check_list(cases, small);
        CHECK(n > 300 && n < FM_CHECK_MAX_CASES); /* at the limit cases would be lost */
        int n_timed = 0;
        size_t most = 0;
        for (int i = 0; i < n; i++) {
            fm_maker m = {0};
            CHECK(cases[i].call(&m, &cases[i], NULL) == FM_OK);
            CHECK(m.used > 0 && strlen(cases[i].sizes) + 1 < sizeof cases[i].sizes);
            CHECK(cases[i].copies == 0 || m.bytes_moved > 0);
            most = m.used > most ? m.used : most;
            n_timed += cases[i].copies > 0;
        }
        CHECK(n_timed > 40);
        CHECK(most < (size_t)(small ? 64 : 1100) << 20);
        for (int o = 0; o < FM_COUNT(ops); o++) {
            int seen = 0;
            for (int i = 0; i < n; i++)
                seen += strcmp(cases[i].op, ops[o]) == 0;
            CHECK(seen > 0);
        }
        for (int q = 0; q < FM_QUANT_COUNT; q++) {
            int seen = 0;
            for (int i = 0; i < n; i++)
                seen += strcmp(cases[i].op, "experts") == 0 && (int)cases[i].format == q;
            CHECK(seen >= 3);
        }
    }
}

static void test_refusals(void)
{
    fm_pool *pool;
    fm_check *c;
    REQUIRE(fm_pool_open(1, &pool) == FM_OK);
    CHECK_INT(fm_check_open("cpu", pool, true, &c), FM_ERR_ARG);
    CHECK_CONTAINS(fm_last_error()->message, "backend 'cpu' judges the others");
    CHECK(c == NULL);
    CHECK_INT(fm_check_open("gpu", pool, true, &c), FM_ERR_ARG);
    CHECK_CONTAINS(fm_last_error()->message, "backend 'gpu' is unknown");
    CHECK_INT(fm_check_open("metal", pool, true, &c), FM_ERR_UNSUPPORTED);
    CHECK_CONTAINS(fm_last_error()->message, "backend 'metal' is not in this build");
    fm_check_close(NULL);
    fm_pool_close(pool);
}

int main(void)
{
    RUN(test_lists_are_whole);
    RUN(test_refusals);
    TEST_EXIT();
}
