/* Queueing: order, cancellation, many submitters, timeouts, closing early; and every scripted
 * fault. */
#include "io_fixture.h"

#include <errno.h>
#include <pthread.h>

#include "base/clock.h"
#include "base/crc32c.h"
#include "io/io_queue.h"

enum { BLOCK = 4096, N_BLOCKS = 64, FILE_BYTES = BLOCK * N_BLOCKS, MAX_REQS = 1024 };
static char path[4096];
static io_variant variant; /* what the running case shall use */
static uint8_t *memory;    /* MAX_REQS blocks, page aligned */
static fm_io_req reqs[MAX_REQS];
static fm_io_req *list[MAX_REQS], *done[MAX_REQS];

static fm_io_req block_request(int i)
{
    return (fm_io_req){.off = (int64_t)(i * 7 % N_BLOCKS) * BLOCK,
                       .bytes = BLOCK,
                       .dst = memory + (size_t)i * BLOCK,
                       .tag = (uint64_t)i,
                       .crc_bytes = BLOCK};
}

static void prepare(int n)
{
    memset(memory, 0, (size_t)n * BLOCK);
    for (int i = 0; i < n; i++) {
        reqs[i] = block_request(i);
        list[i] = &reqs[i];
    }
}

static bool is_right(const fm_io_req *r)
{
    return r->status == FM_OK && r->done_bytes == BLOCK && bytes_match(r->dst, r->off, BLOCK) &&
           r->crc == fm_crc32c(0, r->dst, BLOCK);
}

/* The variant wrapped in a fault script; NULL where it cannot run here. */
static fm_io *open_faulty(const char *script, int n_workers)
{
    char text[256];
    snprintf(text, sizeof(text), "%s:%s", variant.method, script);
    return open_variant((io_variant){"fault", variant.direct}, n_workers, text, path);
}

static void wait_for(fm_io *io, int n)
{
    int got = 0;
    CHECK_INT(fm_io_wait(io, done, MAX_REQS, n, -1, &got), FM_OK);
    CHECK_INT(got, n);
}

static void many_at_once(void)
{
    fm_io *const io = open_variant(variant, 0, NULL, path);
    prepare(MAX_REQS);
    REQUIRE(fm_io_submit(io, list, MAX_REQS) == FM_OK);
    wait_for(io, MAX_REQS);
    int n_right = 0;
    for (int i = 0; i < MAX_REQS; i++)
        n_right += is_right(&reqs[i]);
    CHECK_INT(n_right, MAX_REQS);
    fm_io_close(io);
}

static void demand_goes_first(void)
{
    fm_io *const io = open_faulty("delay=2000", 1);
    int at[16];
    prepare(16);
    for (int i = 0; i < 8; i++)
        reqs[i].priority = 1;
    REQUIRE(fm_io_submit(io, list, 16) == FM_OK);
    wait_for(io, 16);
    for (int i = 0; i < 16; i++)
        at[done[i]->tag] = i;
    for (int speculative = 0; speculative < 8; speculative++)
        for (int demand = 8; demand < 16; demand++)
            CHECK(at[speculative] > at[demand]);
    fm_io_close(io);
}

/* What depends on who runs first is tried a few times: on a busy machine we may be held up for
 * longer than a read takes, but a wrong implementation never shows it. */
enum { TRIES = 5 };

/* Guesses that came first may not fill all workers: a demand read starts at once. */
static void speculation_leaves_room(void)
{
    bool overtook = false;
    for (int try = 0; try < TRIES && !overtook; try++) {
        fm_io *const io = open_faulty("delay=20000", 4);
        prepare(9);
        for (int i = 0; i < 8; i++)
            reqs[i].priority = 1;
        REQUIRE(fm_io_submit(io, list, 8) == FM_OK);
        REQUIRE(fm_io_submit(io, list + 8, 1) == FM_OK);
        wait_for(io, 9);
        for (int i = 0; i < 4; i++)
            overtook |= done[i]->tag == 8;
        fm_io_close(io);
    }
    CHECK(overtook);
}

static int by_time(const void *a, const void *b)
{
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* The most of reqs[0..n) that were at the device at one time. */
static int most_at_once(int n)
{
    static int64_t begin[MAX_REQS], end[MAX_REQS];
    int most = 0, ended = 0;
    for (int i = 0; i < n; i++) {
        begin[i] = reqs[i].submitted_ns + reqs[i].ns_queued;
        end[i] = begin[i] + reqs[i].ns_read;
    }
    qsort(begin, (size_t)n, sizeof(int64_t), by_time);
    qsort(end, (size_t)n, sizeof(int64_t), by_time);
    for (int i = 0; i < n; i++) {
        while (end[ended] <= begin[i])
            ended++;
        most = i + 1 - ended > most ? i + 1 - ended : most;
    }
    return most;
}

/* Few guesses are at the device at once, however many workers there are; demand takes them all. */
static void few_guesses_at_once(void)
{
    enum { WORKERS = 16 };
    fm_io *const io = open_variant(variant, WORKERS, NULL, path);
    prepare(MAX_REQS);
    for (int i = 0; i < MAX_REQS; i++)
        reqs[i].priority = 1;
    REQUIRE(fm_io_submit(io, list, MAX_REQS) == FM_OK);
    wait_for(io, MAX_REQS);
    CHECK(most_at_once(MAX_REQS) <= fm_io_max_speculative(WORKERS));
    fm_io_close(io);
    CHECK_INT(fm_io_max_speculative(1), 1);
    CHECK_INT(fm_io_max_speculative(4), 3);
    CHECK(fm_io_max_speculative(WORKERS) < WORKERS / 2);
}

/* A speculative read that is demanded now overtakes the others, and may be promoted at any time. */
static void promoted(void)
{
    bool overtook = false;
    for (int try = 0; try < TRIES && !overtook; try++) {
        fm_io *const io = open_faulty("delay=5000", 1);
        prepare(8);
        for (int i = 0; i < 8; i++)
            reqs[i].priority = i != 5;
        REQUIRE(fm_io_submit(io, list, 8) == FM_OK);
        CHECK_INT(fm_io_promote(io, &reqs[7]), FM_OK);
        CHECK_INT(fm_io_promote(io, &reqs[7]), FM_OK);
        CHECK_INT(fm_io_promote(io, &reqs[5]), FM_OK); /* demand already, running or done */
        wait_for(io, 8);
        for (int i = 0; i < 3; i++) /* behind the demand, and the guess that may have begun */
            overtook |= done[i]->tag == 7;
        int n_right = 0;
        for (int i = 0; i < 8; i++)
            n_right += is_right(&reqs[i]);
        CHECK_INT(n_right, 8);
        fm_io_close(io);
    }
    CHECK(overtook);
}

static void cancelled(void)
{
    const int order[] = {11, 5, 6, 0, 10, 5}; /* last, middle, maybe running, twice */
    int n_cancelled = 0;
    for (int try = 0; try < TRIES && n_cancelled < 4; try++) {
        fm_io *const io = open_faulty("delay=3000", 1);
        int n_right = 0;
        n_cancelled = 0;
        prepare(12);
        REQUIRE(fm_io_submit(io, list, 12) == FM_OK);
        for (int i = 0; i < FM_COUNT(order); i++)
            CHECK_INT(fm_io_cancel(io, &reqs[order[i]]), FM_OK);
        wait_for(io, 12);
        for (int i = 0; i < 12; i++) {
            n_cancelled += reqs[i].status == FM_ERR_CANCELLED;
            n_right += is_right(&reqs[i]);
        }
        CHECK(n_cancelled <= 5 && n_cancelled + n_right == 12);
        CHECK_INT(fm_io_fail(io, &reqs[11], NULL), reqs[11].status);
        fm_io_close(io);
    }
    CHECK(n_cancelled >= 4);
}

static void timeouts(void)
{
    bool in_time = false;
    for (int try = 0; try < TRIES && !in_time; try++) {
        fm_io *const io = open_faulty("delay=50000", 1);
        int n_polled = -1, n_waited = -1;
        prepare(2);
        REQUIRE(fm_io_submit(io, list, 2) == FM_OK);
        const int64_t start = fm_clock_ns();
        CHECK_INT(fm_io_wait(io, done, 2, 0, 0, &n_polled), FM_OK);
        if (n_polled == 0) {
            CHECK_INT(fm_io_wait(io, done, 2, 2, 5000000, &n_waited), FM_OK);
            const int64_t waited = fm_clock_ns() - start;
            CHECK(waited >= 5000000);
            in_time = n_waited == 0 && waited < 45000000;
        }
        if (n_polled == 0 && n_waited == 0)
            wait_for(io, 2);
        fm_io_close(io);
    }
    CHECK(in_time);
}

static void closed_early(void)
{
    for (int i = 0; i < 10; i++) {
        fm_io *const io = open_faulty("delay=500", 1 + i % 3);
        prepare(64);
        REQUIRE(fm_io_submit(io, list, 64) == FM_OK);
        int n = 0;
        if (i % 2 == 0)
            CHECK_INT(fm_io_wait(io, done, MAX_REQS, 0, 0, &n), FM_OK);
        fm_io_close(io);
        memset(memory, 1, 64 * BLOCK); /* nobody writes there any more: TSan and ASan watch */
    }
}

static void faults(void)
{
    const struct {
        const char *script;
        int victim, err;
        fm_status status;
    } cases[] = {{"eio@5", 5, EIO, FM_ERR_IO},
                 {"eof@7", 7, 0, FM_ERR_IO},
                 {"short%2,eio@9", 9, EIO, FM_ERR_IO},
                 {"short@1+,reorder,seed=7", 0, 0, FM_OK},
                 {"delay=100us,reorder", 0, 0, FM_OK}};
    for (int c = 0; c < FM_COUNT(cases); c++) {
        fm_io *const io = open_faulty(cases[c].script, 0);
        prepare(40);
        REQUIRE(fm_io_submit(io, list, 40) == FM_OK);
        int left = 40, n = 0;
        for (; left > 0; left -= n)
            REQUIRE(fm_io_wait(io, done, 7, left < 3 ? left : 3, -1, &n) == FM_OK && n > 0);
        for (int i = 0; i < 40; i++)
            if (i + 1 != cases[c].victim)
                CHECK(is_right(&reqs[i]));
            else
                CHECK(reqs[i].status == cases[c].status && reqs[i].err == cases[c].err);
        fm_io_close(io);
    }
}

static void corruption_shows_in_the_checksum(void)
{
    fm_io *const io = open_faulty("corrupt@3", 0);
    uint8_t good[BLOCK];
    prepare(5);
    for (int i = 0; i < 5; i++)
        reqs[i].off = 0;
    for (int i = 0; i < BLOCK; i++)
        good[i] = file_byte(i);
    REQUIRE(fm_io_submit(io, list, 5) == FM_OK);
    wait_for(io, 5);
    for (int i = 0; i < 5; i++)
        CHECK((reqs[i].crc == fm_crc32c(0, good, BLOCK)) == (i + 1 != 3));
    fm_io_close(io);
}

typedef struct submitter {
    fm_io *io;
    int first, n;
} submitter;

static void *submit_some(void *arg)
{
    const submitter *const s = arg;
    for (int i = s->first; i < s->first + s->n; i++) {
        CHECK_INT(fm_io_submit(s->io, &list[i], 1), FM_OK);
        if (i % 16 == 3)
            CHECK_INT(fm_io_cancel(s->io, &reqs[i]), FM_OK);
    }
    return NULL;
}

/* Cancels may race with the read and with delivery, never with reuse: the waiter keeps all. */
static void many_submitters(void)
{
    enum { N_THREADS = 4, EACH = 100 };
    fm_io *const io = open_faulty("short%3,reorder", 3);
    submitter s[N_THREADS];
    pthread_t threads[N_THREADS];
    int seen[N_THREADS * EACH] = {0}, total = 0, n = 0;
    prepare(N_THREADS * EACH);
    for (int i = 0; i < N_THREADS; i++) {
        s[i] = (submitter){io, i * EACH, EACH};
        REQUIRE(pthread_create(&threads[i], NULL, submit_some, &s[i]) == 0);
    }
    while (total < N_THREADS * EACH) {
        CHECK_INT(fm_io_wait(io, done, 32, 0, 100000, &n), FM_OK);
        for (int i = 0; i < n; i++) {
            seen[done[i]->tag]++;
            CHECK(is_right(done[i]) || done[i]->status == FM_ERR_CANCELLED);
        }
        total += n;
    }
    for (int i = 0; i < N_THREADS; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < N_THREADS * EACH; i++)
        CHECK_INT(seen[i], 1);
    fm_io_close(io);
}

/* Random scripts, sizes and cancellations: right bytes or the scripted error, and always an end. */
static void random_faults(void)
{
    uint64_t seed = 11;
    for (int round = 0; round < 30; round++) {
        char script[128];
        const int n = 1 + (int)(test_rand(&seed) % 60), eio = 1 + (int)(test_rand(&seed) % 80);
        snprintf(script, sizeof(script), "short%%%d,eio@%d,reorder,seed=%d,delay=%d",
                 1 + (int)(test_rand(&seed) % 4), eio, round, (int)(test_rand(&seed) % 100));
        fm_io *const io = open_faulty(script, 1 + (int)(test_rand(&seed) % 6));
        prepare(n);
        for (int i = 0; i < n; i++)
            reqs[i].priority = (int32_t)(test_rand(&seed) % 2);
        REQUIRE(fm_io_submit(io, list, n) == FM_OK);
        for (int i = 0; i < n / 8; i++)
            CHECK_INT(fm_io_cancel(io, &reqs[test_rand(&seed) % (uint64_t)n]), FM_OK);
        for (int i = 0; i < n / 8; i++)
            CHECK_INT(fm_io_promote(io, &reqs[test_rand(&seed) % (uint64_t)n]), FM_OK);
        int left = n, got = 0;
        for (; left > 0; left -= got)
            REQUIRE(fm_io_wait(io, done, 5, 1, -1, &got) == FM_OK && got > 0);
        for (int i = 0; i < n; i++)
            CHECK(is_right(&reqs[i]) || reqs[i].status == FM_ERR_CANCELLED ||
                  (i + 1 == eio && reqs[i].err == EIO));
        fm_io_close(io);
    }
}

/* More guesses than may be read at once end although nobody submits or waits: the computing thread does neither. */
static void reads_go_on_alone(void)
{
    enum { N = 40 };
    fm_io *const io = open_variant(variant, 0, NULL, path);
    fm_io_counters c = {0};
    prepare(N);
    for (int i = 0; i < N; i++)
        reqs[i].priority = 1;
    REQUIRE(fm_io_submit(io, list, N) == FM_OK);
    for (int64_t end = fm_clock_ns() + INT64_C(60000000000); c.n_reads < N && fm_clock_ns() < end;) {
        const struct timespec pause = {0, 1000000};
        nanosleep(&pause, NULL);
        fm_io_get_counters(io, &c);
    }
    CHECK_INT(c.n_reads, N);
    wait_for(io, N);
    for (int i = 0; i < N; i++)
        CHECK(is_right(&reqs[i]));
    fm_io_close(io);
}

static void fault_from_the_environment(void)
{
    setenv("FLASHMOE_FAULT", "eio@2", 1);
    fm_io *const io = open_variant(variant, 0, NULL, path);
    prepare(3);
    REQUIRE(fm_io_submit(io, list, 3) == FM_OK);
    wait_for(io, 3);
    CHECK(is_right(&reqs[0]) && is_right(&reqs[2]) && reqs[1].err == EIO);
    CHECK_INT(fm_io_fail(io, &reqs[1], NULL), FM_ERR_IO);
    CHECK_INT(fm_last_error()->err, EIO);
    fm_io_close(io);
    unsetenv("FLASHMOE_FAULT");
}

int main(void)
{
    void *region = NULL;
    unsetenv("FLASHMOE_FAULT");
    make_file(path, sizeof(path), FILE_BYTES);
    if (fm_region_alloc((size_t)MAX_REQS * BLOCK, false, &region) != FM_OK)
        return 1;
    memory = region;
    for (int i = 0; i < FM_COUNT(io_variants); i++) {
        variant = io_variants[i];
        fm_io *const io = open_variant(variant, 0, NULL, path);
        fm_io_close(io);
        if (io == NULL || strcmp(variant.method, "fault") == 0)
            continue;
        RUN(many_at_once);
        RUN(demand_goes_first);
        RUN(speculation_leaves_room);
        RUN(few_guesses_at_once);
        RUN(cancelled);
        RUN(promoted);
        RUN(timeouts);
        RUN(closed_early);
        RUN(faults);
        RUN(corruption_shows_in_the_checksum);
        RUN(reads_go_on_alone);
        RUN(many_submitters);
        RUN(random_faults);
        RUN(fault_from_the_environment);
    }
    fm_region_free(region, (size_t)MAX_REQS * BLOCK);
    unlink(path);
    TEST_EXIT();
}
