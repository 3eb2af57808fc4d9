/* The CPU backend's own loops, which no kernel test sees. */
#include <math.h>

#include "backend/backend.h"
#include "harness.h"

static void the_first_bad_row_is_found(void)
{
    enum { ROWS = 300, COLS = 83 };
    static float x[ROWS * COLS];
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    uint64_t s = 1;
    fm_pool *pool;
    fm_backend *b;
    int64_t row = 7;
    CHECK_INT(fm_pool_open(3, &pool), FM_OK);
    const fm_backend_opts o = {.name = "cpu", .pool = pool};
    CHECK_INT(fm_backend_open(&o, &b), FM_OK);
    for (int i = 0; i < ROWS * COLS; i++)
        x[i] = i % 5 == 0 ? 3.4e38f : i % 5 == 1 ? -3.4e38f : i % 5 == 2 ? 1e-45f : 0; /* finite, and sums overflow */
    CHECK_INT(b->v->find_nonfinite(b, x, ROWS, COLS, &row), FM_OK);
    CHECK_INT(row, -1);
    for (int i = 0; i < 200; i++) {
        const int64_t first = (int64_t)(test_rand(&s) % ROWS), at = first * COLS + (int64_t)(test_rand(&s) % COLS);
        const int64_t other = at + (int64_t)(test_rand(&s) % (uint64_t)(ROWS * COLS - at));
        const float keep = x[at], keep_other = x[other];
        x[other] = NAN;
        x[at] = bad[i % FM_COUNT(bad)];
        CHECK_INT(b->v->find_nonfinite(b, x, ROWS, COLS, &row), FM_OK);
        CHECK_INT(row, first);
        x[other] = keep_other;
        x[at] = keep;
    }
    fm_backend_close(b);
    fm_pool_close(pool);
}

int main(void)
{
    RUN(the_first_bad_row_is_found);
    TEST_EXIT();
}
