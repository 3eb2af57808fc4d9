/* A whole tiny engine from C: forwards, sessions, failing opens, threads that share and cancel and close. */
#include "tiny_model.h"

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

static tiny t;
static const int32_t prompt[] = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4};
enum { N_PROMPT = sizeof prompt / sizeof *prompt, N_THREADS = 4 };

static fm_engine *open_engine(int32_t slots, const char *method, const char *fault)
{
    fm_engine_opts o = FM_ENGINE_OPTS_INIT;
    o.n_slots = slots;
    o.context = 256;
    o.max_rows = 32;
    o.n_threads = 2;
    o.io_method = method;
    o.io_fault = fault;
    o.lookahead = 2;
    fm_engine *e = NULL;
    CHECK_INT(fm_engine_open(&t.m, &o, &e), FM_OK);
    return e;
}

static uint64_t digest(fm_session *s)
{
    uint64_t h = UINT64_C(14695981039346656037);
    const uint8_t *const p = (const void *)fm_session_logits(s);
    for (size_t i = 0; p != NULL && i < TINY_VOCAB * sizeof(float); i++)
        h = (h ^ p[i]) * UINT64_C(1099511628211);
    return h;
}

static fm_status feed(fm_session *s, int from, int to)
{
    for (int64_t at = from, n = 0; at < to; at += n)
        FM_TRY(fm_session_prefill(s, prompt + at, to - at, &n));
    return FM_OK;
}

static void forward_and_back(void)
{
    fm_engine *const e = open_engine(0, NULL, NULL);
    fm_session *s = NULL;
    int64_t got = -1;
    REQUIRE(e != NULL && fm_session_create(e, 0, &s) == FM_OK);
    CHECK(fm_session_logits(s) == NULL);
    CHECK_INT(feed(s, 0, 10), FM_OK);
    CHECK_INT(fm_session_checkpoint(s), FM_OK);
    CHECK_INT(feed(s, 10, N_PROMPT), FM_OK);
    const uint64_t want = digest(s);
    CHECK_INT(fm_session_pos(s), N_PROMPT);
    CHECK_INT(fm_session_rewind(s, 12, &got), FM_OK);
    CHECK_INT(got, 10);
    CHECK_INT(feed(s, 10, N_PROMPT), FM_OK);
    CHECK(digest(s) == want);
    size_t bytes = 0;
    CHECK_INT(fm_session_save_bytes(s, &bytes), FM_OK);
    void *const saved = tiny_alloc(bytes, 1); /* exactly as long */
    CHECK_INT(fm_session_save(s, saved, bytes), FM_OK);
    CHECK_INT(fm_session_save(s, saved, bytes - 1), FM_ERR_ARG);
    CHECK_INT(fm_session_step(s, 7), FM_OK);
    const uint64_t next = digest(s);
    for (size_t cut = 0; cut < bytes; cut += 1 + bytes / 50)
        CHECK_INT(fm_session_load(s, saved, cut), FM_ERR_FORMAT);
    CHECK_INT(fm_session_pos(s), N_PROMPT + 1);
    CHECK_INT(fm_session_load(s, saved, bytes), FM_OK);
    CHECK(fm_session_logits(s) == NULL);
    CHECK_INT(fm_session_step(s, 7), FM_OK);
    CHECK(digest(s) == next);
    free(saved);
    CHECK_INT(fm_session_step(s, TINY_VOCAB), FM_ERR_ARG);
    CHECK_INT(fm_session_step(s, -1), FM_ERR_ARG);
    CHECK_INT(fm_session_rewind(s, -1, &got), FM_ERR_ARG);
    fm_session_free(s);
    fm_engine_close(e);
}

static void decode_allocates_nothing(void)
{
    fm_engine *const e = open_engine(3, NULL, NULL);
    fm_session *s = NULL;
    REQUIRE(e != NULL && fm_session_create(e, 0, &s) == FM_OK);
    CHECK_INT(feed(s, 0, N_PROMPT), FM_OK);
    CHECK_INT(fm_session_step(s, 1), FM_OK);
    const int64_t before = fm_mem_n_allocs();
    for (int32_t i = 0; i < 20; i++)
        CHECK_INT(fm_session_step(s, i), FM_OK);
    CHECK_INT(fm_mem_n_allocs(), before);
    fm_session_free(s);
    fm_engine_close(e);
}

static void faults_move_nobody(void)
{
    fm_engine *e = open_engine(0, NULL, NULL);
    fm_session *s = NULL;
    REQUIRE(e != NULL && fm_session_create(e, 0, &s) == FM_OK);
    CHECK_INT(feed(s, 0, N_PROMPT), FM_OK);
    const uint64_t want = digest(s);
    fm_session_free(s);
    fm_engine_close(e);
    static const char *const scripts[] = {"eio%61", "corrupt%67,reorder", "short%2,eof%71", "delay=50us,reorder"};
    for (int i = 0; i < FM_COUNT(scripts); i++) {
        int failed = 0;
        e = open_engine(6, "fault", scripts[i]);
        REQUIRE(e != NULL && fm_session_create(e, 0, &s) == FM_OK);
        for (int pass = 0; pass < 10; pass++) {
            int64_t got;
            for (int tries = 0; fm_session_pos(s) == 0 && tries < 500; tries++) {
                const fm_status status = feed(s, 0, N_PROMPT);
                failed += status != FM_OK;
                CHECK(status == FM_OK || fm_session_pos(s) == 0);
            }
            CHECK(digest(s) == want);
            CHECK_INT(fm_session_rewind(s, 0, &got), FM_OK);
        }
        CHECK(i == 3 ? failed == 0 : failed > 0);
        fm_session_free(s);
        fm_engine_close(e);
    }
}

static void failing_opens(void)
{
    fm_engine *e = (void *)&e;
    fm_engine_opts o = FM_ENGINE_OPTS_INIT;
    o.context = 16;
#define REFUSED(field, value, want)                                                                \
    do {                                                                                           \
        fm_engine_opts o_ = o;                                                                     \
        o_.field = value;                                                                          \
        CHECK_INT(fm_engine_open(&t.m, &o_, &e), want);                                            \
        CHECK(e == NULL);                                                                          \
    } while (0)
    REFUSED(n_slots, 1, FM_ERR_ARG);
    REFUSED(context, 0, FM_ERR_ARG);
    REFUSED(backend, "nosuch", FM_ERR_ARG);
    REFUSED(cache_policy, "nosuch", FM_ERR_ARG);
    REFUSED(lookahead, -2, FM_ERR_ARG);
    REFUSED(max_rows, 1 << 20, FM_ERR_ARG);
    char keep[sizeof t.path];
    memcpy(keep, t.path, sizeof keep);
    snprintf(t.path, sizeof t.path, "/nonexistent/file");
    REFUSED(n_slots, 0, FM_ERR_IO);
    memcpy(t.path, keep, sizeof keep);
    t.files[0].n_bytes++; /* described longer than it is */
    REFUSED(n_slots, 0, FM_ERR_FORMAT);
    CHECK_CONTAINS(fm_last_error()->message, "its description says");
    t.files[0].n_bytes--;
    fm_engine_close(NULL);
    fm_session_free(NULL);
}

static void sessions_outlive_the_engine(void)
{
    fm_engine *const e = open_engine(0, NULL, NULL);
    fm_session *s[3] = {NULL};
    size_t bytes;
    for (int i = 0; i < 3; i++)
        REQUIRE(e != NULL && fm_session_create(e, 0, &s[i]) == FM_OK);
    CHECK_INT(feed(s[0], 0, 5), FM_OK);
    fm_session_free(s[1]);
    fm_engine_close(e);
    CHECK_INT(fm_session_step(s[0], 1), FM_ERR_STATE);
    CHECK_INT(fm_session_save_bytes(s[0], &bytes), FM_ERR_STATE);
    fm_session_cancel(s[0]);
    CHECK_INT(fm_session_pos(s[0]), 5);
    fm_session_free(s[2]);
    fm_session_free(s[0]);
}

typedef struct job {
    fm_session *s;
    uint64_t digest;
    fm_status status;
    bool forever;
} job;

static void *work(void *p)
{
    job *const j = p;
    do {
        int64_t got;
        j->status = feed(j->s, 0, N_PROMPT);
        j->digest = j->status == FM_OK ? digest(j->s) : 0;
        if (j->status == FM_OK)
            j->status = fm_session_rewind(j->s, 0, &got);
    } while (j->forever && j->status == FM_OK);
    return NULL;
}

/* Each thread its session, one engine with few slots; a fifth thread asks for statistics. */
static void threads_share_an_engine(void)
{
    fm_engine *const e = open_engine(4, NULL, NULL);
    pthread_t threads[N_THREADS];
    job jobs[N_THREADS] = {{0}};
    for (int i = 0; i < N_THREADS; i++)
        REQUIRE(e != NULL && fm_session_create(e, 0, &jobs[i].s) == FM_OK);
    for (int i = 0; i < N_THREADS; i++)
        REQUIRE(pthread_create(&threads[i], NULL, work, &jobs[i]) == 0);
    for (int i = 0; i < 50; i++) {
        fm_engine_stats x;
        fm_engine_info info;
        int32_t now;
        CHECK_INT(fm_engine_get_stats(e, &x), FM_OK);
        CHECK_INT(fm_engine_get_info(e, &info), FM_OK);
        CHECK_INT(fm_engine_set_slots(e, 2 + i % 3, &now), FM_OK);
    }
    for (int i = 0; i < N_THREADS; i++) {
        pthread_join(threads[i], NULL);
        CHECK_INT(jobs[i].status, FM_OK);
        CHECK(jobs[i].digest == jobs[0].digest && jobs[i].digest != 0);
        fm_session_free(jobs[i].s);
    }
    fm_engine_close(e);
}

/* Cancelled or closed under running threads: each ends with the status that says so. */
static void cancel_and_close_under_threads(void)
{
    for (int closing = 0; closing < 2; closing++) {
        fm_engine *const e = open_engine(2, "fault", "delay=200us");
        pthread_t threads[N_THREADS];
        job jobs[N_THREADS] = {{0}};
        for (int i = 0; i < N_THREADS; i++) {
            jobs[i].forever = true;
            REQUIRE(e != NULL && fm_session_create(e, 0, &jobs[i].s) == FM_OK);
        }
        for (int i = 0; i < N_THREADS; i++)
            REQUIRE(pthread_create(&threads[i], NULL, work, &jobs[i]) == 0);
        nanosleep(&(struct timespec){0, 20 * 1000 * 1000}, NULL);
        for (int i = 0; i < N_THREADS && !closing; i++)
            fm_session_cancel(jobs[i].s);
        if (closing)
            fm_engine_close(e);
        for (int i = 0; i < N_THREADS; i++) {
            pthread_join(threads[i], NULL);
            CHECK_INT(jobs[i].status, closing ? FM_ERR_STATE : FM_ERR_CANCELLED);
            fm_session_free(jobs[i].s);
        }
        if (!closing)
            fm_engine_close(e);
    }
}

int main(void)
{
    tiny_make(&t, true);
    tiny_write(&t, 11);
    RUN(forward_and_back);
    RUN(decode_allocates_nothing);
    RUN(faults_move_nobody);
    RUN(failing_opens);
    RUN(sessions_outlive_the_engine);
    RUN(threads_share_an_engine);
    RUN(cancel_and_close_under_threads);
    tiny_free(&t);
    TEST_EXIT();
}
