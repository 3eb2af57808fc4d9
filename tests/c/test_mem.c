/* Sizes that do not fit are errors; arenas measure first and hand out later. */
#include <sys/mman.h>

#include "harness.h"

#include "base/env.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/platform.h"

static void checked_sizes(void)
{
    size_t s = 7;
    int64_t i = 7;
    CHECK(fm_mul_size(3, 5, &s) && s == 15);
    CHECK(!fm_mul_size(SIZE_MAX / 2 + 1, 2, &s) && s == 15);
    CHECK(!fm_add_size(SIZE_MAX, 1, &s) && s == 15);
    CHECK(fm_add_size(SIZE_MAX - 1, 1, &s) && s == SIZE_MAX);
    CHECK(fm_mul_i64(INT64_C(1) << 31, INT64_C(1) << 31, &i) && i == INT64_C(1) << 62);
    CHECK(!fm_mul_i64(INT64_C(1) << 32, INT64_C(1) << 31, &i));
    CHECK(!fm_mul_i64(-1, 1, &i) && !fm_add_i64(1, -1, &i));
    CHECK(!fm_add_i64(INT64_MAX, 1, &i) && i == INT64_C(1) << 62);
}

static void small_objects(void)
{
    const size_t sizes[] = {0, 1, 63, 64, 65, 4097};
    const int64_t before = fm_mem_n_allocs();
    for (int i = 0; i < FM_COUNT(sizes); i++) {
        void *p = NULL;
        REQUIRE(fm_alloc(sizes[i], &p) == FM_OK && p != NULL);
        CHECK((uintptr_t)p % 64 == 0);
        for (size_t k = 0; k < sizes[i]; k++)
            CHECK(((uint8_t *)p)[k] == 0);
        memset(p, 0xff, sizes[i]);
        fm_free(p);
    }
    CHECK_INT(fm_mem_n_allocs() - before, FM_COUNT(sizes));
    void *p = &p;
    CHECK(fm_alloc(SIZE_MAX, &p) == FM_ERR_NOMEM && p == NULL);
    CHECK(fm_alloc(SIZE_MAX - 63, &p) == FM_ERR_NOMEM);
    CHECK_CONTAINS(fm_last_error()->message, "bytes");
    fm_free(NULL);
}

static void regions(void)
{
    const size_t page = (size_t)fm_page_bytes();
    const size_t sizes[] = {0, 1, page, page + 1, (size_t)5 << 20};
    for (int i = 0; i < FM_COUNT(sizes); i++)
        for (int huge = 0; huge < 2; huge++) {
            void *v = NULL;
            REQUIRE(fm_region_alloc(sizes[i], huge != 0, &v) == FM_OK);
            uint8_t *const p = v;
            CHECK((uintptr_t)p % page == 0);
            if (sizes[i] > 0) {
                CHECK(p[0] == 0 && p[sizes[i] - 1] == 0);
                p[0] = p[sizes[i] - 1] = 1;
            }
            fm_region_drop(p + 1, sizes[i] > 2 ? sizes[i] - 2 : 0);
            CHECK(sizes[i] == 0 || (p[0] == 1 && p[sizes[i] - 1] == 1));
            fm_region_free(p, sizes[i]);
        }
    void *p = &p;
    CHECK(fm_region_alloc(SIZE_MAX - 5, true, &p) == FM_ERR_NOMEM && p == NULL);
    CHECK(fm_region_alloc((size_t)1 << 62, false, &p) == FM_ERR_NOMEM && p == NULL);
    fm_region_free(NULL, 10);
}

static bool resident(uint8_t *page)
{
    unsigned char there[1];
    return mincore((void *)page, 1, (void *)there) == 0 && (there[0] & 1) != 0;
}

static void filled_regions(void)
{
    const size_t page = (size_t)fm_page_bytes(), bytes = (size_t)6 << 20;
    void *v = NULL;
    REQUIRE(fm_region_alloc(bytes, false, &v) == FM_OK);
    uint8_t *const p = v;
    p[3 * page] = 7;
    fm_region_fill(p + page + 1, page - 2); /* no whole page */
    CHECK(!resident(p + page) && !resident(p + 2 * page));
    fm_region_fill(p + page + 1, bytes - 2 * page);
    CHECK(!resident(p + page) && !resident(p + bytes - page));
    for (size_t i = 2 * page; i < bytes - page; i += page)
        CHECK(resident(p + i) && p[i] == (i == 3 * page ? 7 : 0));
    fm_region_free(p, bytes);
}

static void arenas(void)
{
    fm_arena count = {0}, a;
    const size_t sizes[] = {1, 64, 65, 0, 1000, 3 << 20};
    for (int i = 0; i < FM_COUNT(sizes); i++)
        CHECK(fm_arena_take(&count, sizes[i]) == NULL);
    REQUIRE(fm_arena_open(&a, count.used) == FM_OK);
    uint8_t *end = a.base;
    for (int i = 0; i < FM_COUNT(sizes); i++) {
        uint8_t *const p = fm_arena_take(&a, sizes[i]);
        CHECK(p >= end && (uintptr_t)p % 64 == 0);
        memset(p, 1, sizes[i]);
        end = p + sizes[i];
    }
    CHECK_INT(a.used, a.size);
    fm_arena_close(&a);
    fm_arena_close(&a);

    /* A plan that overflows cannot be opened. */
    fm_arena huge = {0};
    fm_arena_take(&huge, SIZE_MAX / 2);
    fm_arena_take(&huge, SIZE_MAX / 2 + 100);
    fm_arena_take(&huge, SIZE_MAX);
    CHECK(fm_arena_open(&a, huge.used) == FM_ERR_NOMEM);
}

static int n_logged;
static void on_log(void *ctx, fm_log_level level, const char *message)
{
    CHECK(ctx == &n_logged && level == FM_LOG_WARN && strcmp(message, "a 5") == 0);
    n_logged++;
}

static void surroundings(void)
{
    CHECK(fm_cpu_count() >= 1 && fm_page_bytes() >= 4096);
    fm_log(FM_LOG_WARN, "lost %d", 1);
    fm_log_set(on_log, &n_logged);
    fm_log(FM_LOG_WARN, "a %d", 5);
    fm_log_set(NULL, NULL);
    fm_log(FM_LOG_WARN, "lost %d", 1);
    CHECK_INT(n_logged, 1);
    for (int v = 0; v < FM_ENV_COUNT; v++)
        CHECK(strncmp(fm_env_name((fm_env)v), "FLASHMOE_", 9) == 0 && fm_env_meaning((fm_env)v)[0]);
    setenv("FLASHMOE_CPU", "", 1);
    CHECK(fm_env_get(FM_ENV_CPU) == NULL);
    setenv("FLASHMOE_CPU", "ref", 1);
    CHECK(strcmp(fm_env_get(FM_ENV_CPU), "ref") == 0);
}

int main(void)
{
    RUN(checked_sizes);
    RUN(small_objects);
    RUN(regions);
    RUN(filled_regions);
    RUN(arenas);
    RUN(surroundings);
    TEST_EXIT();
}
