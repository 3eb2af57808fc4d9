/* The cache's policies against simulators that only know the rules: linear searches over time stamps. */
#include "harness.h"

#include <stdbool.h>

#include "store/expert_cache.h"

enum { MAX_SLOTS = 13, N_KEYS = 40, LFU_MOST = 31, LFU_AGE = 16 };

/* rank: 0 free, 1 cooled, 2 + uses else (uses 0 but for LFU); stamp: rising, the oldest of a rank leaves first. */
typedef struct sim {
    fm_cache_policy policy;
    int n_slots, uses[N_KEYS], n_uses;
    int64_t now;
    struct {
        int64_t key, stamp;
        int rank, pins;
        bool used;
    } s[MAX_SLOTS];
} sim;

static void put(sim *m, int slot, int rank)
{
    m->s[slot].rank = rank;
    m->s[slot].stamp = m->now++;
}

static int oldest(const sim *m, int rank, bool with_pinned)
{
    int best = -1;
    for (int i = 0; i < m->n_slots; i++)
        if (m->s[i].rank == rank && (with_pinned || m->s[i].pins == 0) &&
            (best < 0 || m->s[i].stamp < m->s[best].stamp))
            best = i;
    return best;
}

static void halve(sim *m)
{
    for (int k = 0; k < N_KEYS; k++)
        m->uses[k] /= 2;
    for (int rank = 3; rank <= 2 + LFU_MOST; rank++)
        for (int i; (i = oldest(m, rank, true)) >= 0;)
            put(m, i, 2 + (rank - 2) / 2);
}

static int count_use(sim *m, int64_t key)
{
    if (m->policy != FM_CACHE_LFU)
        return 2;
    if (++m->n_uses % (LFU_AGE * m->n_slots) == 0)
        halve(m);
    m->uses[key] += m->uses[key] < LFU_MOST;
    return 2 + m->uses[key];
}

static void sim_touch(sim *m, int slot)
{
    const int rank = count_use(m, m->s[slot].key);
    m->s[slot].used = true;
    if (m->policy != FM_CACHE_CLOCK || m->s[slot].rank != 2)
        put(m, slot, rank);
}

static int sim_victim(sim *m)
{
    for (int rank = 1; rank <= 2 + LFU_MOST; rank++) {
        int i = oldest(m, rank, false);
        while (i >= 0 && m->policy == FM_CACHE_CLOCK && rank == 2 && m->s[i].used) {
            m->s[i].used = false;
            put(m, i, 2);
            i = oldest(m, rank, false);
        }
        if (i >= 0)
            return i;
    }
    return -1;
}

static int sim_find(const sim *m, int64_t key)
{
    for (int i = 0; i < m->n_slots; i++)
        if (m->s[i].rank > 0 && m->s[i].key == key)
            return i;
    return -1;
}

static void sim_drop(sim *m, int slot)
{
    m->s[slot].rank = 0;
    m->s[slot].key = -1;
}

static void check_take(sim *m, fm_cache *c, int64_t key)
{
    int free_slots = 0;
    for (int i = 0; i < m->n_slots; i++)
        free_slots += m->s[i].rank == 0;
    const int got = fm_cache_take(c, key);
    if (free_slots > 0) /* which of them is no matter */
        CHECK(got >= 0 && got < m->n_slots && m->s[got].rank == 0);
    else
        CHECK_INT(got, sim_victim(m));
    if (got < 0)
        return;
    m->s[got].key = key;
    put(m, got, count_use(m, key));
    m->s[got].used = false;
}

static void check_same(const sim *m, const fm_cache *c)
{
    int pinned = 0;
    for (int64_t k = 0; k < N_KEYS; k++)
        CHECK_INT(fm_cache_find(c, k), sim_find(m, k));
    for (int i = 0; i < m->n_slots; i++) {
        CHECK_INT(fm_cache_key(c, i), m->s[i].rank > 0 ? m->s[i].key : -1);
        CHECK_INT(fm_cache_pins(c, i), m->s[i].pins);
        pinned += m->s[i].pins > 0;
    }
    CHECK_INT(fm_cache_pinned(c), pinned);
    CHECK_INT(fm_cache_slots(c), m->n_slots);
}

static void resize(sim *m, fm_cache *c, int n)
{
    bool pinned = false;
    for (int i = n; i < m->n_slots; i++)
        pinned = pinned || m->s[i].pins > 0;
    CHECK_INT(fm_cache_resize(c, n), pinned ? FM_ERR_STATE : FM_OK);
    for (int i = pinned ? m->n_slots : n; i < m->n_slots; i++)
        sim_drop(m, i);
    for (int i = m->n_slots; i < n && !pinned; i++)
        sim_drop(m, i);
    m->n_slots = pinned ? m->n_slots : n;
}

static void step(sim *m, fm_cache *c, uint64_t *rng)
{
    /* Skewed keys, so that uses differ. */
    const int64_t a = (int64_t)(test_rand(rng) % N_KEYS), b = (int64_t)(test_rand(rng) % N_KEYS), key = a < b ? a : b;
    const int slot = sim_find(m, key), what = (int)(test_rand(rng) % 100);
    if (what >= 98)
        resize(m, c, 1 + (int)(test_rand(rng) % MAX_SLOTS));
    else if (slot < 0)
        check_take(m, c, key);
    else if (what < 60) {
        fm_cache_touch(c, slot);
        sim_touch(m, slot);
    } else if (what < 70) {
        fm_cache_cool(c, slot);
        put(m, slot, 1);
    } else if (what < 82) {
        fm_cache_pin(c, slot);
        m->s[slot].pins++;
    } else if (m->s[slot].pins > 0) {
        fm_cache_unpin(c, slot);
        m->s[slot].pins--;
    } else if (what < 88) {
        fm_cache_drop(c, slot);
        sim_drop(m, slot);
    }
}

static void equals_the_simulator(void)
{
    for (int policy = 0; policy < FM_CACHE_POLICY_COUNT; policy++)
        for (int n_slots = 1; n_slots <= MAX_SLOTS; n_slots += 3)
            for (uint64_t seed = 1; seed <= 3; seed++) {
                static sim m;
                memset(&m, 0, sizeof m);
                m.policy = (fm_cache_policy)policy;
                m.n_slots = MAX_SLOTS;
                for (int i = 0; i < MAX_SLOTS; i++)
                    m.s[i].key = -1;
                fm_cache *c = NULL;
                REQUIRE(fm_cache_open(m.policy, MAX_SLOTS, N_KEYS, &c) == FM_OK);
                resize(&m, c, n_slots);
                uint64_t rng = seed * 977 + (uint64_t)n_slots;
                for (int i = 0; i < 2000; i++) {
                    step(&m, c, &rng);
                    check_same(&m, c);
                }
                fm_cache_close(c);
            }
}

static void edges(void)
{
    fm_cache *c = (void *)&edges;
    CHECK_INT(fm_cache_open(FM_CACHE_LRU, 0, 8, &c), FM_ERR_ARG);
    CHECK(c == NULL);
    CHECK_INT(fm_cache_open(FM_CACHE_LRU, 8, 0, &c), FM_ERR_ARG);
    fm_cache_close(NULL);
    REQUIRE(fm_cache_open(FM_CACHE_CLOCK, 2, 8, &c) == FM_OK);
    fm_cache_pin(c, fm_cache_take(c, 1));
    fm_cache_pin(c, fm_cache_take(c, 2));
    fm_cache_touch(c, fm_cache_find(c, 1));
    CHECK_INT(fm_cache_take(c, 3), -1); /* all pinned, one marked: it ends */
    CHECK_INT(fm_cache_resize(c, 0), FM_ERR_ARG);
    CHECK_INT(fm_cache_resize(c, 3), FM_ERR_ARG);
    CHECK_INT(fm_cache_resize(c, 1), FM_ERR_STATE);
    CHECK_INT(fm_cache_slots(c), 2);
    fm_cache_close(c);
}

static void policies_by_name(void)
{
    for (int p = 0; p < FM_CACHE_POLICY_COUNT; p++) {
        fm_cache_policy found = FM_CACHE_POLICY_COUNT;
        CHECK_INT(fm_cache_policy_find(fm_cache_policy_name(p), &found), FM_OK);
        CHECK_INT(found, p);
    }
    fm_cache_policy none = FM_CACHE_LFU;
    CHECK(fm_cache_policy_name(-1) == NULL && fm_cache_policy_name(FM_CACHE_POLICY_COUNT) == NULL);
    CHECK_INT(fm_cache_policy_find("fifo", &none), FM_ERR_ARG);
    CHECK_CONTAINS(fm_last_error()->message, "lru");
}

int main(void)
{
    RUN(equals_the_simulator);
    RUN(edges);
    RUN(policies_by_name);
    TEST_EXIT();
}
