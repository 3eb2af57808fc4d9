/* Variant amx, attention over K and V in bf16: matrix tiles of bf16 products with f32 sums (tdpbf16ps). All else is
 * avx512's.
 *
 * bf16 holds K and V as they are; a query, and a weight of softmax, is the sum of three bf16 numbers of 8 bits each, hi,
 * mid and lo, exactly. So only sums are rounded, as in vec_attn.h. The instruction takes subnormal numbers as zero.
 *   scores: K (16 positions, row by row as it lies) x Q (16 queries, pairs of dims together).
 *   values: weights (queries row by row) x V (16 dims, pairs of positions together).
 * A sum's order follows from head_dim alone: tiles of positions begin at multiples of ATTN_TILE, and what is not there is
 * zeros; so a query's result depends on no other.
 *
 * Unpacking V to pairs within 128 bits leaves 32 dims in another order; the sums of a part stay in it until it is done.
 *
 * Here are a prompt's many queries; the few of one row take another way through whole tiles: kernels_amx_attn_walk.h. What
 * helps here: four sums at a time against the latency of each, V unpacked between the products of the dims before, V asked
 * for while K is used and the next K while V is. */
#include "cpu/kernels_impl.h"

#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "cpu/target.h"

FM_TARGET_BEGIN("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,gfni,avx2,fma,f16c,bmi2")
#define FM_VEC_ISA 2
#include "cpu/amx.h"
#include "cpu/vec_attn_scores.h"

static bool tiles_part(attn_query *q, int64_t nq, const fm_kv_head *kv, int64_t t0, int64_t hd, float scale);
#define ATTN_TILES tiles_part
#include "cpu/vec_attn.h"

enum {
    TILE_Q = 16,                            /* queries of a block */
    TILE_BLOCKS = ATTN_MAX / TILE_Q,
    TILE_STEPS = ATTN_DIMS / 32,            /* of 32 dims of a score */
    TILE_HALVES = ATTN_TILE / 32,           /* of 32 positions of a value */
    TILE_DIMS = 64,                         /* dims of V that are unpacked at a time */
};

typedef uint16_t tile[16][32];

typedef struct tiles_work {
    _Alignas(64) tile q[TILE_BLOCKS][TILE_STEPS][3]; /* [pair of dims][query][2] */
    uint16_t p[TILE_HALVES][3][ATTN_MAX][32];        /* [query][position] */
    tile v[2][TILE_HALVES][TILE_DIMS / 16];          /* [turn]: [pair of positions][dim][2] */
    uint16_t k[16][ATTN_DIMS];                       /* the last rows of K, and zeros */
    float s[ATTN_MAX][ATTN_TILE], sums[ATTN_TILE / 16][16][TILE_Q];
    int rows; /* of the tiles that hold queries row by row */
} tiles_work;

/* Lines i*n .. i*n + n from p on, into L2: a tile of K and one of V do not fit into L1. */
FM_INLINE void tiles_fetch(const uint8_t *p, int64_t i, int64_t n)
{
    for (int64_t b = i * n * 64; p && b < (i + 1) * n * 64; b += 64)
        __builtin_prefetch(p + b, 0, 2);
}

/* The tile intrinsics do not tell the compiler what they read and write. */
FM_INLINE void tiles_sync(void) { __asm__ volatile("" ::: "memory"); }

/* Scores: 0 to 3 sums of 16 positions each, 4 K, 5 to 7 Q. Values: 0 to 3 sums of 16 dims each, 4 V, 5 to 7 weights. */
static void tiles_rows(tiles_work *w, int rows)
{
    fm_amx_config c = {.palette = 1};
    if (w->rows == rows)
        return;
    for (int i = 0; i < 8; i++) {
        c.bytes[i] = 64;
        c.rows[i] = (uint8_t)(i == 4 ? 16 : rows);
    }
    fm_amx_configure(&c);
    w->rows = rows;
}

/* The three parts of 32 numbers in bf16; x becomes what is left. */
FM_INLINE __m512i tiles_cut(vf x[2])
{
    static const _Alignas(64) int16_t odd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const vu top = vu_set(0xffff0000u);
    vu hi[2];
    for (int i = 0; i < 2; i++) {
        hi[i] = (vu)x[i] & top;
        x[i] -= (vf)hi[i];
    }
    return _mm512_permutex2var_epi16((__m512i)hi[0], _mm512_load_si512(odd), (__m512i)hi[1]);
}

static void tiles_pack_queries(tiles_work *w, const attn_query *q, int64_t nq, int64_t hd)
{
    for (int64_t b = 0; b * TILE_Q < nq; b++)
        for (int64_t d = 0; d < hd / 32; d++) {
            vu part[3][16];
            for (int64_t i = 0; i < TILE_Q; i++) {
                vf x[2] = {{0}, {0}};
                if (b * TILE_Q + i < nq) {
                    const float *from = q[b * TILE_Q + i].q + d * 32;
                    x[0] = vf_load(from), x[1] = vf_load(from + VL);
                }
                for (int j = 0; j < 3; j++)
                    part[j][i] = (vu)tiles_cut(x);
            }
            for (int j = 0; j < 3; j++) {
                v_transpose(part[j]);
                memcpy(w->q[b][d][j], part[j], sizeof(tile));
            }
        }
}

static void tiles_pack_weights(tiles_work *w, const float (*s)[ATTN_TILE], int64_t nq)
{
    for (int64_t i = 0; i < nq; i++)
        for (int64_t h = 0; h < TILE_HALVES; h++) {
            vf x[2] = {vf_load(s[i] + h * 32), vf_load(s[i] + h * 32 + VL)};
            for (int j = 0; j < 3; j++)
                _mm512_store_si512(w->p[h][j][i], tiles_cut(x));
        }
}

/* s[query][position] of 64 positions for a block of queries. ahead: of the tile's bytes, if they are to be fetched. */
static void tiles_scores_block(tiles_work *w, const tile (*q)[3], const uint8_t *const *k, int64_t hd, int64_t n,
                               float (*s)[ATTN_TILE], const uint8_t *ahead)
{
    tiles_sync();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < hd / 32; d++) {
        _tile_loadd(5, q[d][0], 64);
        _tile_loadd(6, q[d][1], 64);
        _tile_loadd(7, q[d][2], 64);
#define TILES_16(I)                              \
    tiles_fetch(ahead, 4 * d + I, 16);           \
    _tile_loadd(4, k[I] + d * 64, hd * 2);       \
    _tile_dpbf16ps(I, 4, 5);                     \
    _tile_dpbf16ps(I, 4, 6);                     \
    _tile_dpbf16ps(I, 4, 7)
        TILES_16(0);
        TILES_16(1);
        TILES_16(2);
        TILES_16(3);
#undef TILES_16
    }
    _tile_stored(0, w->sums[0], 64);
    _tile_stored(1, w->sums[1], 64);
    _tile_stored(2, w->sums[2], 64);
    _tile_stored(3, w->sums[3], 64);
    tiles_sync();
    for (int i = 0; i < ATTN_TILE / 16; i++) {
        vu v[16];
        memcpy(v, w->sums[i], sizeof v);
        v_transpose(v);
        for (int64_t r = 0; r < n; r++)
            vu_store(s[r] + i * 16, v[r]);
    }
}

static void tiles_scores(tiles_work *w, int64_t first, const attn_walk *at, const fm_kv_head *kv, int64_t hd)
{
    const uint8_t *k[ATTN_TILE / 16];
    const int64_t have = at->end - at->t0, row = hd * 2;
    for (int64_t i = 0; i < ATTN_TILE / 16; i++) { /* past the end: what is there, and zeros, or anything */
        k[i] = (const uint8_t *)kv->k + (at->t0 + i * 16) * row;
        if (have < i * 16 + 16) {
            if (have > i * 16) {
                memset(w->k, 0, sizeof w->k);
                memcpy(w->k, k[i], (size_t)((have - i * 16) * row));
            }
            k[i] = (const uint8_t *)w->k;
        }
    }
    tiles_rows(w, 16);
    for (int64_t b = first / TILE_Q * TILE_Q; b < first + at->n; b += TILE_Q) {
        const int64_t n = first + at->n - b < TILE_Q ? first + at->n - b : TILE_Q;
        tiles_scores_block(w, (const tile(*)[3])w->q[b / TILE_Q], k, hd, n, w->s + b,
                           b <= first ? (const uint8_t *)kv->v + at->t0 * row : NULL);
    }
}

/* Whether n rows of V hold numbers only: those that a query does not see meet its weight of 0. */
static bool tiles_finite(const uint8_t *V, int64_t n, int64_t hd)
{
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    uint32_t bad = 0;
    for (int64_t i = 0; i < n * hd * 2; i += 64)
        bad |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(_mm512_loadu_si512(V + i), exponent), exponent);
    return bad == 0;
}

/* 32 dims of two rows of V as a row of two tiles. */
FM_INLINE void tiles_pairs(__m512i even, __m512i odd, uint16_t *first, uint16_t *second)
{
    _mm512_store_si512(first, _mm512_unpacklo_epi16(even, odd));
    _mm512_store_si512(second, _mm512_unpackhi_epi16(even, odd));
}

/* Pairs from .. to of n rows at V, zeros past them; 64 dims. K of the next tile is asked for meanwhile. */
FM_INLINE void tiles_unpack(tile (*v)[TILE_DIMS / 16], const uint8_t *V, int64_t n, int64_t hd, int64_t from, int64_t to,
                            const uint8_t *ahead)
{
#pragma GCC unroll 4
    for (int64_t r = from; r < to; r++) {
        const uint8_t *row = V + 2 * r * hd * 2;
        tiles_fetch(ahead, r, 4);
#pragma GCC unroll 2
        for (int x = 0; x < TILE_DIMS / 32; x++) {
            const __m512i even = 2 * r < n ? _mm512_loadu_si512(row + x * 64) : _mm512_setzero_si512();
            const __m512i odd = 2 * r + 1 < n ? _mm512_loadu_si512(row + hd * 2 + x * 64) : _mm512_setzero_si512();
            tiles_pairs(even, odd, v[r / 16][2 * x][r % 16], v[r / 16][2 * x + 1][r % 16]);
        }
    }
}

/* Where dims d .. d + TILE_DIMS of V are unpacked; of dim 0: the first rows. */
typedef struct tiles_v {
    const uint8_t *rows, *ahead;
    int64_t n, hd, d;
} tiles_v;

/* Adds the unpacked dims to the parts of n <= TILE_Q queries, from the walk's i on; `more` is a constant: unpacks the next
 * dims too. */
FM_INLINE void tiles_values_block(tiles_work *w, const attn_query *live, int64_t i, int64_t n, const tiles_v *a, bool more)
{
    float *part = live[i].part + a->d;
    const int64_t ld = fm_attn_part_floats(a->hd) * (int64_t)sizeof *part; /* the parts of a call lie in a row */
    const int64_t turn = a->d / TILE_DIMS, lines = ATTN_TILE / 2 * 4 * 64;
    tiles_rows(w, (int)n);
    tiles_sync();
    _tile_loadd(0, part, ld);
    _tile_loadd(1, part + 16, ld);
    _tile_loadd(2, part + 32, ld);
    _tile_loadd(3, part + 48, ld);
#pragma GCC unroll 2
    for (int h = 0; h < TILE_HALVES; h++) {
        _tile_loadd(5, w->p[h][0][i], 64);
        _tile_loadd(6, w->p[h][1][i], 64);
        _tile_loadd(7, w->p[h][2][i], 64);
#define TILES_16(I)                                                                                               \
    _tile_loadd(4, w->v[turn % 2][h][I], 64);                                                                     \
    _tile_dpbf16ps(I, 5, 4);                                                                                      \
    _tile_dpbf16ps(I, 6, 4);                                                                                      \
    _tile_dpbf16ps(I, 7, 4);                                                                                      \
    if (more)                                                                                                     \
    tiles_unpack(w->v[(turn + 1) % 2], a->rows + (a->d + TILE_DIMS) * 2, a->n, a->hd, h * 16 + 4 * I,             \
                 h * 16 + 4 * I + 4, a->ahead ? a->ahead + (turn + 1) * lines : NULL)
        TILES_16(0);
        TILES_16(1);
        TILES_16(2);
        TILES_16(3);
#undef TILES_16
    }
    _tile_stored(0, part, ld);
    _tile_stored(1, part + 16, ld);
    _tile_stored(2, part + 32, ld);
    _tile_stored(3, part + 48, ld);
    tiles_sync();
}

/* Queries from .. to of the walk, which see n of the tile's rows. */
static void tiles_values(tiles_work *w, const attn_walk *at, int64_t from, int64_t to, tiles_v a)
{
    tiles_unpack(w->v[0], a.rows, a.n, a.hd, 0, ATTN_TILE / 2, a.ahead);
    for (; a.d < a.hd; a.d += TILE_DIMS)
        for (int64_t i = from; i < to; i += TILE_Q) {
            const int64_t n = to - i < TILE_Q ? to - i : TILE_Q;
            if (i == from && a.d + TILE_DIMS < a.hd)
                tiles_values_block(w, at->live, i, n, &a, true);
            else
                tiles_values_block(w, at->live, i, n, &a, false);
        }
}

static void tiles_all_values(tiles_work *w, const attn_walk *at, const fm_kv_head *kv, int64_t hd)
{
    tiles_v a = {.rows = (const uint8_t *)kv->v + at->t0 * hd * 2, .ahead = at->next.k, .hd = hd};
    const int64_t have = at->end - at->t0, least = attn_have(&at->live[0], at->t0);
    const bool finite = tiles_finite(a.rows + least * hd * 2, have - least, hd);
    for (int64_t i = 0, end; i < at->n; i = end, a.ahead = NULL) { /* all at once, but for infinities */
        a.n = finite ? have : attn_have(&at->live[i], at->t0);
        for (end = i + 1; end < at->n && (finite || attn_have(&at->live[end], at->t0) == a.n);)
            end++;
        tiles_values(w, at, i, end, a);
    }
}

/* Dims as unpacked to dims in order. */
static void tiles_order(const attn_query *q, int64_t nq, int64_t hd)
{
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_or_si512(first, _mm512_set1_epi32(8));
    for (int64_t i = 0; i < nq; i++)
        for (float *p = q[i].part; p < q[i].part + hd; p += 32) {
            const __m512 lo = (__m512)vf_load(p), hi = (__m512)vf_load(p + 16);
            vf_store(p, (vf)_mm512_permutex2var_ps(lo, first, hi));
            vf_store(p + 16, (vf)_mm512_permutex2var_ps(lo, second, hi));
        }
}

#include "cpu/kernels_amx_attn_walk.h"

static bool tiles_part(attn_query *q, int64_t nq, const fm_kv_head *kv, int64_t t0, int64_t hd, float scale)
{
    tiles_work w;
    if (kv->format != FM_QUANT_BF16 || hd % TILE_DIMS != 0 || hd > ATTN_DIMS)
        return false;
    attn_walk at = attn_part_begin(q, nq, t0, hd);
    tiles_pack_queries(&w, q, nq, hd);
    if (nq <= WALK_Q && q[0].n_pos == q[nq - 1].n_pos) { /* whole tiles; another one is the last of all */
        at.end = tiles_walk_part(q, nq, (const tile(*)[3])w.q[0], kv, t0, hd, scale);
        at.t0 = at.end > t0 ? t0 : at.end;
    }
    w.rows = 0;
    while (attn_part_step(&at, kv, hd, FM_QUANT_BF16)) {
        float (*s)[ATTN_TILE] = w.s + (at.live - q);
        tiles_scores(&w, at.live - q, &at, kv, hd);
        for (int64_t i = 0; i < at.n; i++)
            attn_softmax(&at.live[i], s[i], attn_have(&at.live[i], at.t0), scale, hd);
        tiles_pack_weights(&w, (const float (*)[ATTN_TILE])s, at.n);
        tiles_all_values(&w, &at, kv, hd);
    }
    _tile_release();
    tiles_order(q, nq, hd);
    attn_part_end(q, nq, hd);
    return true;
}
FM_TARGET_END

void fm_kernels_overlay_amx_attn(fm_kernels *k) { attn_overlay(k); }

#else
void fm_kernels_overlay_amx_attn(fm_kernels *k) { (void)k; }
#endif
