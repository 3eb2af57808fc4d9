/* The expert store on a real file: what is claimed is what the file holds, whatever reads do on the way. */
#include "tiny_model.h"

#include "io/io.h"
#include "store/experts.h"

static tiny t;
static uint8_t *content;

typedef struct store {
    fm_pool *pool;
    fm_backend *be;
    fm_io *io;
    fm_experts *e;
} store;

static bool open_store(store *s, const char *method, const char *fault, fm_experts_opts o)
{
    *s = (store){0};
    const char *const path = t.path;
    const fm_io_opts io = {.method = method, .n_workers = 3, .fault = fault};
    CHECK_INT(fm_pool_open(1, &s->pool), FM_OK);
    const fm_backend_opts be = {.pool = s->pool};
    CHECK_INT(fm_backend_open(&be, &s->be), FM_OK);
    const fm_status status = fm_io_open(&io, &path, 1, &s->io);
    if (status != FM_OK) {
        CHECK_INT(status, FM_ERR_UNSUPPORTED);
        return false;
    }
    CHECK_INT(fm_experts_open(&t.d, s->io, s->be, &o, &s->e), FM_OK);
    return s->e != NULL;
}

static void close_store(store *s)
{
    fm_experts_close(s->e);
    fm_io_close(s->io);
    fm_backend_close(s->be);
    fm_pool_close(s->pool);
}

static void check_bytes(int32_t layer, int32_t id, const fm_mat mats[FM_ROLE_COUNT])
{
    const fm_expert_desc *const x = &t.experts[layer];
    fm_segment seg[FM_MAX_SEGMENTS];
    const int n = fm_expert_segments(x, seg);
    for (int s = 0; s < n; s++) {
        const fm_mat *const m = &mats[seg[s].role];
        const uint8_t *const got = seg[s].area == FM_AREA_CODES    ? m->codes
                                   : seg[s].area == FM_AREA_SCALES ? m->scales
                                                                   : m->biases;
        CHECK(memcmp(got, content + x->seg_off[id * n + s], (size_t)seg[s].n_bytes) == 0);
    }
}

/* Claims n experts as the MoE block does; returns the first failure. */
static fm_status demand(store *s, int32_t layer, const int32_t *ids, int n)
{
    bool claimed[TINY_EXPERTS] = {false};
    fm_mat mats[TINY_EXPERTS][FM_ROLE_COUNT];
    fm_status status = fm_experts_hint(s->e, layer, ids, n, FM_HINT_DEMAND);
    for (int left = n, n_new = 0; status == FM_OK && left > 0; left -= n_new) {
        status = fm_experts_claim(s->e, layer, ids, n, claimed, mats, NULL, &n_new);
        CHECK(status != FM_OK || n_new > 0);
    }
    for (int i = 0; i < n; i++)
        if (claimed[i])
            check_bytes(layer, ids[i], mats[i]);
    fm_experts_release(s->e, layer, ids, n, claimed, NULL);
    return status;
}

/* k different ids in random order. */
static void draw(uint64_t *rng, int32_t *ids, int k)
{
    int32_t all[TINY_EXPERTS];
    for (int i = 0; i < TINY_EXPERTS; i++)
        all[i] = i;
    for (int i = 0; i < k; i++) {
        const int j = i + (int)(test_rand(rng) % (uint64_t)(TINY_EXPERTS - i));
        ids[i] = all[j];
        all[j] = all[i];
    }
}

/* Random layers, demands and guesses for long; returns how many demands failed. */
static int walk(store *s, int slots, int rounds, uint64_t seed)
{
    int failed = 0;
    for (int i = 0; i < rounds; i++) {
        int32_t ids[TINY_EXPERTS], guess[TINY_EXPERTS];
        const int32_t layer = (int32_t)(test_rand(&seed) % TINY_LAYERS);
        const int most = slots < TINY_EXPERTS ? slots : TINY_EXPERTS, k = 1 + (int)(test_rand(&seed) % (uint64_t)most);
        draw(&seed, ids, k);
        draw(&seed, guess, 3);
        if (i % 3 == 0)
            CHECK_INT(fm_experts_hint(s->e, layer, guess, 3, FM_HINT_GUESS), FM_OK);
        if (i % 6 == 0)
            fm_experts_expire(s->e, layer, ids, k);
        const fm_status status = demand(s, layer, ids, k);
        if (status != FM_OK) {
            failed++;
            CHECK(status == FM_ERR_IO || status == FM_ERR_FORMAT);
            CHECK_CONTAINS(fm_last_error()->message, t.path);
            CHECK_CONTAINS(fm_last_error()->message, "expert");
        }
        if (i % 50 == 49) {
            const int32_t now = (int32_t)(1 + test_rand(&seed) % (uint64_t)slots);
            CHECK_INT(fm_experts_resize(s->e, now), FM_OK); /* waits for reads: now nothing may be pinned */
            CHECK_INT(fm_experts_pinned(s->e), 0);
            CHECK_INT(fm_experts_resize(s->e, (int32_t)slots), FM_OK);
        }
    }
    return failed;
}

static void right_bytes(void)
{
    static const char *const methods[] = {"pread", "uring", "mmap"};
    for (int m = 0; m < FM_COUNT(methods); m++)
        for (int policy = 0; policy < FM_CACHE_POLICY_COUNT; policy++)
            for (int slots = 1; slots <= 24; slots += slots < 3 ? 1 : 7) {
                store s;
                const fm_experts_opts o = {slots, true, (fm_cache_policy)policy, policy == 0 ? 1024 : 0};
                if (open_store(&s, methods[m], NULL, o))
                    CHECK_INT(walk(&s, slots, 120, (uint64_t)(m * 100 + slots)), 0);
                close_store(&s);
            }
}

static void faults(void)
{
    static const struct {
        const char *script;
        bool fails;
    } cases[] = {{"short%2", false},           {"reorder,seed=3", false}, {"delay=20us,reorder,short%3", false},
                 {"eio%17", true},             {"eof%23,reorder", true},  {"corrupt%19", true},
                 {"eio%7,corrupt%11,short%3,reorder", true}};
    for (int i = 0; i < FM_COUNT(cases); i++)
        for (int slots = 2; slots <= 12; slots += 5) {
            store s;
            const fm_experts_opts o = {slots, true, FM_CACHE_LRU, 2048};
            if (open_store(&s, "fault", cases[i].script, o)) {
                const int failed = walk(&s, slots, 200, (uint64_t)i);
                CHECK(cases[i].fails ? failed > 0 : failed == 0);
                fm_expert_stats x;
                fm_experts_get_stats(s.e, &x);
                CHECK(cases[i].fails ? x.n_failed > 0 : x.n_failed == 0);
            }
            close_store(&s);
        }
}

/* A guess that fails is nobody's error; demanded later, it is read again. */
static void failed_guess(void)
{
    store s;
    const int32_t ids[2] = {3, 5};
    const fm_experts_opts o = {8, true, FM_CACHE_LRU, 0}; /* guesses fill a quarter at most */
    const bool packed = t.experts[0].seg_off[1] == t.experts[0].seg_off[0] + 1024; /* else nine reads each */
    if (open_store(&s, "fault", packed ? "eio@1,corrupt@2" : "eio@1,eio@10", o)) {
        CHECK_INT(fm_experts_hint(s.e, 0, ids, 2, FM_HINT_GUESS), FM_OK);
        CHECK_INT(fm_experts_resize(s.e, 8), FM_OK); /* waits */
        CHECK(!fm_experts_present(s.e, 0, 3) && !fm_experts_present(s.e, 0, 5));
        CHECK_INT(demand(&s, 0, ids, 2), FM_OK);
    }
    close_store(&s);
}

/* Right guesses are used, wrong ones are counted, more than a quarter of the slots are not begun. */
static void guesses(void)
{
    store s;
    const int32_t ids[4] = {3, 5, 6, 7};
    const fm_experts_opts o = {8, true, FM_CACHE_LRU, 0};
    fm_expert_stats x;
    if (open_store(&s, "pread", NULL, o)) {
        CHECK_INT(fm_experts_hint(s.e, 0, ids, 4, FM_HINT_GUESS), FM_OK);
        CHECK_INT(fm_experts_guesses(s.e), 2);
        CHECK(!fm_experts_present(s.e, 0, 6));
        fm_experts_expire(s.e, 1, ids + 2, 2); /* of another layer: nothing */
        CHECK_INT(fm_experts_guesses(s.e), 2);
        bool claimed = false;
        fm_mat mats[1][FM_ROLE_COUNT];
        int n_new;
        CHECK_INT(fm_experts_claim(s.e, 0, ids + 1, 1, &claimed, mats, NULL, &n_new), FM_OK);
        fm_experts_release(s.e, 0, ids + 1, 1, &claimed, NULL);
        CHECK_INT(fm_experts_guesses(s.e), 1);
        fm_experts_expire(s.e, 0, ids + 1, 1); /* 3 was wrong */
        CHECK_INT(fm_experts_guesses(s.e), 0);
        fm_experts_get_stats(s.e, &x);
        CHECK_INT(x.guess_used, 1);
        CHECK(x.guessed <= 2);
        CHECK_INT(demand(&s, 0, ids, 4), FM_OK);
    }
    close_store(&s);
}

/* poll never waits; what it returns is pinned and right. */
static void polled(void)
{
    store s;
    const int32_t ids[2] = {1, 2};
    const fm_experts_opts o = {4, true, FM_CACHE_LRU, 0};
    if (open_store(&s, "fault", "delay=2000us", o)) {
        bool claimed[2] = {false};
        fm_mat mats[2][FM_ROLE_COUNT];
        int n_new = -1, n = 0;
        CHECK_INT(fm_experts_poll(s.e, 0, ids, 2, claimed, mats, &n_new), FM_OK); /* begins the reads */
        CHECK_INT(n_new, 0);
        for (; n < 2; n += n_new)
            REQUIRE(fm_experts_poll(s.e, 0, ids, 2, claimed, mats, &n_new) == FM_OK);
        CHECK_INT(fm_experts_pinned(s.e), 2);
        check_bytes(0, 1, mats[0]);
        check_bytes(0, 2, mats[1]);
        fm_experts_release(s.e, 0, ids, 2, claimed, NULL);
    }
    close_store(&s);
    if (open_store(&s, "fault", "eio@1", o)) { /* a demanded read that fails is an error of whoever looks next */
        bool claimed[2] = {false};
        fm_mat mats[2][FM_ROLE_COUNT];
        int n_new;
        fm_status status = FM_OK;
        for (int n = 0; status == FM_OK && n < 2; n += n_new)
            status = fm_experts_poll(s.e, 0, ids, 2, claimed, mats, &n_new);
        CHECK_INT(status, FM_ERR_IO);
        fm_experts_release(s.e, 0, ids, 2, claimed, NULL);
    }
    close_store(&s);
}

/* Every expert is read anew, more than there are slots, one of them twice at once. */
static void reread(void)
{
    store s;
    const int32_t layers[] = {0, 0, 1, 0, 1, 1}, ids[] = {1, 2, 3, 2, 3, 4};
    const fm_experts_opts o = {2, true, FM_CACHE_LRU, 0};
    fm_expert_stats before, after;
    if (open_store(&s, "pread", NULL, o)) {
        CHECK_INT(demand(&s, 0, ids, 2), FM_OK);
        fm_experts_get_stats(s.e, &before);
        CHECK_INT(fm_experts_reread(s.e, layers, ids, FM_COUNT(ids)), FM_OK);
        fm_experts_get_stats(s.e, &after);
        CHECK(after.bytes_read >= 2 * before.bytes_read);
        CHECK_INT(fm_experts_pinned(s.e), 0);
        CHECK_INT(demand(&s, 1, ids + 4, 2), FM_OK);
    }
    close_store(&s);
    if (open_store(&s, "fault", "eio@3", o)) {
        CHECK_INT(fm_experts_reread(s.e, layers, ids, FM_COUNT(ids)), FM_ERR_IO);
        CHECK_INT(fm_experts_pinned(s.e), 0);
        CHECK_INT(demand(&s, 0, ids, 2), FM_OK);
    }
    close_store(&s);
}

static void all_pinned(void)
{
    store s;
    const fm_experts_opts o = {2, true, FM_CACHE_LRU, 0};
    if (open_store(&s, "pread", NULL, o)) {
        const int32_t ids[3] = {1, 2, 3};
        bool claimed[3] = {false};
        fm_mat mats[3][FM_ROLE_COUNT];
        int n_new = 0;
        for (int left = 2; left > 0; left -= n_new)
            REQUIRE(fm_experts_claim(s.e, 1, ids, 2, claimed, mats, NULL, &n_new) == FM_OK);
        CHECK_INT(fm_experts_pinned(s.e), 2);
        CHECK_INT(fm_experts_claim(s.e, 1, ids, 3, claimed, mats, NULL, &n_new), FM_ERR_STATE);
        CHECK_CONTAINS(fm_last_error()->message, "all 2 expert slots are pinned");
        CHECK_INT(fm_experts_resize(s.e, 1), FM_ERR_STATE);
        fm_experts_release(s.e, 1, ids, 3, claimed, NULL);
        CHECK_INT(fm_experts_pinned(s.e), 0);
        atomic_bool cancel;
        atomic_init(&cancel, true);
        memset(claimed, 0, sizeof claimed);
        CHECK_INT(fm_experts_claim(s.e, 0, ids, 1, claimed, mats, &cancel, &n_new), FM_ERR_CANCELLED);
        CHECK(!claimed[0]);
    }
    close_store(&s); /* with the cancelled read under way */
}

int main(void)
{
    for (int packed = 0; packed < 2; packed++) {
        tiny_make(&t, packed != 0);
        tiny_write(&t, 7);
        content = tiny_alloc((size_t)t.end, 1);
        FILE *const f = fopen(t.path, "rb");
        if (f == NULL || fread(content, 1, (size_t)t.end, f) != (size_t)t.end)
            return 1;
        fclose(f);
        t.files[0].n_bytes = t.end;
        RUN(right_bytes);
        RUN(faults);
        RUN(failed_guess);
        RUN(guesses);
        RUN(polled);
        RUN(reread);
        RUN(all_pinned);
        free(content);
        tiny_free(&t);
    }
    TEST_EXIT();
}
