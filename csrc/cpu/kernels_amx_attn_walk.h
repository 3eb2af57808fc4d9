/* Owns: vec_attn_walk.h's walk on matrix tiles, for the up to WALK_Q queries of one row; a part of kernels_amx_attn.c and
 * not self-contained. A unit of 32 positions of K, and one of V of the tile before, are multiplied while what the next unit
 * needs is touched, line after line, in even streams of both. Tile products, which the core cannot look past for long, are
 * spread among the touches. Products and their order are those of many queries, so the bits are the same. */
#ifndef FM_CPU_KERNELS_AMX_ATTN_WALK_H
#define FM_CPU_KERNELS_AMX_ATTN_WALK_H

enum {
    UNIT = 32,                      /* positions */
    UNITS = ATTN_TILE / UNIT,
    UNIT_SLOTS = UNIT / 2,          /* of 32 dims: each takes two lines of K and of V */
};

typedef struct tiles_few {
    _Alignas(64) uint16_t q[TILE_STEPS][3][16][WALK_Q][2]; /* of pairs of dims */
    uint16_t p[UNITS][3][WALK_Q][UNIT];
    tile v[2][2];                                          /* [turn][16 dims] */
    float y[ATTN_DIMS / 16][WALK_Q][16], s[WALK_Q][ATTN_TILE], sums[16][2][WALK_Q];
} tiles_few;

/* A unit's rows, and the next one's; NULL: none. */
typedef struct tiles_unit {
    const uint8_t *k, *v, *next_k, *next_v;
} tiles_unit;

/* 0 K or V, 1 queries, 2 and 3 sums of scores, 4 sums of values, 5 to 7 weights. */
static void few_configure(void)
{
    fm_amx_config c = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        c.bytes[i] = i >= 1 && i <= 3 ? 4 * WALK_Q : 64;
        c.rows[i] = i >= 4 ? WALK_Q : 16;
    }
    fm_amx_configure(&c);
}

/* Step d, 32 dims, of the scores of 16 positions; SUM is their tile. */
#define FEW_SCORES(SUM, D)                                                \
    _tile_loadd(0, u->k + ((SUM) - 2) * 16 * row + (D) * 64, row);        \
    _tile_loadd(1, w->q[D][0], 4 * WALK_Q);                               \
    _tile_dpbf16ps(SUM, 0, 1);                                            \
    _tile_loadd(1, w->q[D][1], 4 * WALK_Q);                               \
    _tile_dpbf16ps(SUM, 0, 1);                                            \
    _tile_loadd(1, w->q[D][2], 4 * WALK_Q);                               \
    _tile_dpbf16ps(SUM, 0, 1)

/* 16 dims of the values. */
FM_INLINE void few_values(const tile v, float (*y)[16])
{
    _tile_loadd(4, y, 64);
    _tile_loadd(0, v, 64);
    _tile_dpbf16ps(4, 5, 0);
    _tile_dpbf16ps(4, 6, 0);
    _tile_dpbf16ps(4, 7, 0);
    _tile_stored(4, y, 64);
}

/* Rows 2*r and 2*r + 1 of step d; V's turns go on from unit to unit. */
FM_INLINE void few_unpack(tiles_few *w, const uint8_t *v, int64_t d, int64_t r, int64_t row)
{
    const uint8_t *from = v + 2 * r * row + d * 64;
    tiles_pairs(_mm512_loadu_si512(from), _mm512_loadu_si512(from + row), w->v[d % 2][0][r], w->v[d % 2][1][r]);
}

/* Unit h of a tile: its scores, and the values with the weights. The first step of V was unpacked before. */
static void few_unit(tiles_few *w, const tiles_unit *u, int h, int64_t hd)
{
    const int64_t row = 2 * hd, steps = hd / 32;
    tiles_sync();
    if (u->v) {
        _tile_loadd(5, w->p[h][0], 64);
        _tile_loadd(6, w->p[h][1], 64);
        _tile_loadd(7, w->p[h][2], 64);
    }
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < steps; d++) {
        const uint8_t *v = d + 1 < steps ? u->v : u->next_v;
#pragma GCC unroll 16
        for (int r = 0; r < UNIT_SLOTS; r++) {
            const int64_t at = (d * UNIT_SLOTS + r) * 128;
            if (u->next_k)
                walk_touch(u->next_k, u->next_k, at, 128);
            if (u->next_v)
                walk_touch(u->next_v, u->next_v, at, 128);
            if (v)
                few_unpack(w, v, d + 1 < steps ? d + 1 : 0, r, row);
            if (u->k && r == 0) {
                FEW_SCORES(2, d);
            }
            if (u->k && r == 8) {
                FEW_SCORES(3, d);
            }
            if (u->v && r % 8 == 2)
                few_values(w->v[d % 2][r / 8], w->y[2 * d + r / 8]);
        }
        tiles_sync();
    }
    if (!u->k)
        return;
    vu x[16];
    _tile_stored(2, w->sums[0][0], 64);
    _tile_stored(3, w->sums[0][1], 64);
    tiles_sync();
    memcpy(x, w->sums, sizeof x);
    v_transpose(x); /* rows: the queries' first 16 positions, then their others */
    for (int i = 0; i < WALK_Q; i++) {
        vu_store(w->s[i] + h * UNIT, x[i]);
        vu_store(w->s[i] + h * UNIT + 16, x[WALK_Q + i]);
    }
}

static void few_softmax(tiles_few *w, attn_query *q, float scale, int64_t hd)
{
    float by[WALK_Q];
    if (walk_softmax(q, w->s, scale, by))
        for (int64_t b = 0; b < hd / 16; b++)
            for (int i = 0; i < WALK_Q; i++)
                vf_store(w->y[b][i], vf_load(w->y[b][i]) * by[i]);
    for (int i = 0; i < WALK_Q; i++)
        for (int h = 0; h < UNITS; h++) {
            vf x[2] = {vf_load(w->s[i] + h * UNIT), vf_load(w->s[i] + h * UNIT + VL)};
            for (int j = 0; j < 3; j++)
                _mm512_store_si512(w->p[h][j][i], tiles_cut(x));
        }
}

/* The whole tiles of a part that begins at t0; returns where they end. packed: of the queries, whose parts are set. */
static int64_t tiles_walk_part(attn_query *q, int64_t nq, const tile (*packed)[3], const fm_kv_head *kv, int64_t t0,
                               int64_t hd, float scale)
{
    tiles_few w;
    attn_query all[WALK_Q];
    const int64_t row = 2 * hd, unit = UNIT * row, left = q->n_pos - t0;
    const int64_t n = (left < FM_ATTN_PART ? left : FM_ATTN_PART) / ATTN_TILE * UNITS;
    const uint8_t *K = (const uint8_t *)kv->k + t0 * row, *V = (const uint8_t *)kv->v + t0 * row;
    if (n == 0)
        return t0;
    for (int i = 0; i < WALK_Q; i++) /* those that are missing have scores of 0 */
        all[i] = (attn_query){.top = -INFINITY};
    memset(w.y, 0, sizeof w.y);
    for (int64_t d = 0; d < hd / 32; d++)
        for (int j = 0; j < 3; j++)
            for (int r = 0; r < 16; r++)
                memcpy(w.q[d][j][r], packed[d][j][r], sizeof w.q[d][j][r]);
    few_configure();
    for (int64_t i = 0; i < n + UNITS; i++) { /* the values are a tile behind */
        const tiles_unit u = {
            .k = i < n ? K + i * unit : NULL,
            .v = i >= UNITS ? V + (i - UNITS) * unit : NULL,
            .next_k = i + 1 < n ? K + (i + 1) * unit : NULL,
            .next_v = i + 1 >= UNITS && i + 1 < n + UNITS ? V + (i + 1 - UNITS) * unit : NULL,
        };
        few_unit(&w, &u, (int)(i % UNITS), hd);
        if (u.k && i % UNITS == UNITS - 1)
            few_softmax(&w, all, scale, hd);
    }
    for (int64_t i = 0; i < nq; i++) {
        q[i].top = all[i].top;
        q[i].total = all[i].total;
        for (int64_t b = 0; b < hd / 16; b++)
            memcpy(q[i].part + b * 16, w.y[b][i], sizeof w.y[b][i]);
    }
    return t0 + n * UNIT;
}

#endif
