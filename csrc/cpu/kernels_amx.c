/* Variant amx: Intel's matrix tiles with int8 products, for mode fast with 3 rows of x or more; with bf16 products, in
 * kernels_amx_attn.c, for attention over bf16; all else is avx512's.
 * tdpbusd: 16 rows of W (u8) times 16 rows of x (s8) over one block of at most 64 columns, int32 sums, exact; blocks are
 * scaled and added in f32 as in vec_fast.h, so the bits are those of avx512. W is the left operand because that one lies
 * row by row: unpacking needs no transpose. x, the right one, is packed once per call, and its rows are the lanes.
 *
 * A tile gets 16 x 16 x 64 products in 16 cycles, two terms make 32; scaling its 16 vectors of sums costs about 60, and
 * moving tiles most of the rest. So blocks are multiplied two ahead of the scaling, and each piece of W is unpacked, and
 * the one after it asked for from memory, a run of blocks before it is multiplied. Loops of fixed length matter there: a
 * mispredicted branch per row cost a third of the unpacking.
 *
 * Linux grants tiles per process on request; supported() asks for them. Each call configures them and lets them go,
 * so that idle tiles burden no context switch. */
#include "cpu/kernels_impl.h"

#if defined(__x86_64__) && defined(__linux__)
#include <assert.h>
#include <immintrin.h>
#include <math.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu/target.h"
#include "cpu/x86.h"

FM_TARGET_BEGIN("amx-tile,amx-int8,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,gfni,avx2,fma,f16c,bmi2")
#define FM_VEC_ISA 2
#include "cpu/amx.h"
#include "cpu/vec_fast.h"

enum { FAST_TILES_MIN = 3 };
static void amx_tiles(const fm_mat *W, const fm_act *a, int64_t n, float *y, int64_t ldy, int64_t r0, int64_t r1);
#define FAST_TILES amx_tiles
#include "cpu/vec_fast_mm.h"

enum {
    AMX_COLS = 512,         /* of 16 rows of W at a time, 8 KiB: three such pieces stay in L1 */
    AMX_PIECES = 3,
    AMX_PASS = 4096,        /* columns of x that are packed at a time */
    AMX_PANEL = 128 * 1024, /* numbers of x that are packed at a time: twice as many bytes stay in L2 */
    AMX_MAX_XT = 16,        /* tiles of x that are packed at a time */
    AMX_UNIT = 16 * 64,     /* bytes of a tile */
    AMX_QUEUE = 128,        /* three jobs of 32 blocks at most are in it */
};

/* 16 rows of W, unpacked: tiles [64 columns][row][64] with columns in plane order; scales. */
typedef struct amx_piece {
    _Alignas(64) uint8_t code[AMX_COLS / 64][16][64];
    _Alignas(64) float scale[16][AMX_COLS / 16], bias[16][AMX_COLS / 16];
} amx_piece;

/* x: tiles [16 rows][unit][term][column / 4][row][4]; scales [16 rows][unit][row], sums [16 rows][block][row]. */
typedef struct amx_panel {
    _Alignas(64) int8_t q[2 * AMX_PANEL];
    float xs[AMX_PANEL / 64], qs[AMX_PANEL / 16];
} amx_panel;

/* The sums lie in one 4 KiB page, so that no load of one waits for a store to the other (aliasing of the low 12 address
 * bits). */
typedef int32_t amx_sums[2][2][16][16]; /* [turn][hi, lo][row of W][row of x] */
typedef struct amx_work {
    _Alignas(4096) amx_sums sums;
    amx_piece piece[AMX_PIECES];
    float out[AMX_MAX_XT][16][16];
    struct {
        const uint8_t *w;
        const int8_t *q;
    } queue[AMX_QUEUE]; /* tiles of the blocks to multiply, a ring */
} amx_work;

/* One call's constants, and one pass over columns k0 .. k0 + kn with nx tiles of x. A job is a piece of W. */
typedef struct amx_run {
    const fm_mat *W;
    fast_shape f;
    int64_t r0, r1, k0, kn, units;
    int64_t n_pieces, n_jobs; /* pieces per 16 rows; in all */
    int nx;
    __m512i planes, natural;
    v_cut cut;
} amx_run;

/* Tiles 0, 1: sums, hi and lo; 4, 5: x, hi and lo; 6: W. */
static void amx_configure(int sub)
{
    fm_amx_config c = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        c.bytes[i] = (uint16_t)(i >= 6 ? sub : 64);
        c.rows[i] = (uint8_t)(i == 4 || i == 5 ? sub / 4 : 16);
    }
    fm_amx_configure(&c);
}

/* ---- x ------------------------------------------------------------------------------------------------- */

/* Plane order of a unit: place i holds column (i % (64/P)) * P + i / (64/P). Blocks shorter than a unit need natural
 * order, which then W's codes are brought to. */
static __m512i amx_order(int planes, bool to_natural)
{
    uint8_t at[64];
    for (int i = 0; i < 64; i++) {
        const int from = i % (64 / planes) * planes + i / (64 / planes);
        if (to_natural)
            at[from] = (uint8_t)i;
        else
            at[i] = (uint8_t)from;
    }
    return _mm512_loadu_si512(at);
}

/* to[i][r] = from[r][i] for `have` numbers of n rows; zeros elsewhere. */
FM_INLINE void amx_turn(const float *const *from, int64_t at, int64_t n, int64_t have, float *to)
{
    vu d[16];
    for (int r = 0; r < 16; r++)
        d[r] = r < n ? vu_load_part(from[r] + at, have) : (vu){0};
    v_transpose(d);
    for (int i = 0; i < have; i++)
        vu_store(to + i * 16, d[i]);
}

static void amx_pack(const amx_run *g, const fm_act *a, int64_t i, int64_t n, int8_t *q, float *xs, float *qs)
{
    const __m512i order = amx_order(g->f.sub == 64 ? fast_planes(g->f) : 1, false);
    const float *x_xs[16] = {0}, *x_qs[16] = {0};
    fast_x x[16];
    for (int64_t r = 0; r < n; r++) {
        x[r] = fast_row(a, i + r, g->f.sub);
        x_xs[r] = x[r].xs + (g->k0 >> 6);
        x_qs[r] = x[r].qs + (g->k0 >> g->f.sub_shift);
    }
    for (int64_t u = 0; u < g->units; u++)
        for (int term = 0; term < 2; term++, q += AMX_UNIT) {
            vu d[16];
#pragma GCC unroll 16
            for (int r = 0; r < 16; r++)
                d[r] = r < n ? (vu)_mm512_permutexvar_epi8(
                                   order, _mm512_loadu_si512(fast_term(&x[r], g->k0 + u * 64, term)))
                             : (vu){0};
            v_transpose(d);
#pragma GCC unroll 16
            for (int j = 0; j < 16; j++)
                vu_store(q + j * 64, d[j]);
        }
    const int64_t n_sub = g->kn >> g->f.sub_shift;
    for (int64_t b = 0; b < g->units; b += 16)
        amx_turn(x_xs, b, n, g->units - b < 16 ? g->units - b : 16, xs + b * 16);
    for (int64_t b = 0; b < n_sub; b += 16)
        amx_turn(x_qs, b, n, n_sub - b < 16 ? n_sub - b : 16, qs + b * 16);
}

/* ---- W ------------------------------------------------------------------------------------------------- */

/* Codes of a byte to as many 64-byte parts as it has planes, by one product with a bit matrix per part. */
static __m512i amx_plane_bits(int planes)
{
    uint64_t m[8] = {0};
    const int bits = 8 / planes;
    for (int q = 0; q < 8; q++)
        for (int i = 0; i < bits; i++)
            m[q] |= (uint64_t)1 << (8 * (7 - i) + i + q * planes / 8 * bits);
    return _mm512_loadu_si512(m);
}

/* 64 codes at p. */
FM_INLINE __m512i amx_codes(const uint8_t *p, int bits, __m512i planes, const v_cut *cut)
{
    if (bits == 4)
        return _mm512_gf2p8affine_epi64_epi8(_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)p)), planes, 0);
    if (bits == 2)
        return _mm512_gf2p8affine_epi64_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p)), planes, 0);
    return bits == 8 ? _mm512_loadu_si512(p) : (__m512i)v_unpack(cut, p, bits * 8);
}

typedef struct amx_at {
    int64_t row, k, n; /* first row; first column within the matrix, number of columns */
} amx_at;

FM_INLINE amx_at amx_job(const amx_run *g, int64_t job)
{
    const int64_t k = job % g->n_pieces * AMX_COLS, left = g->kn - k;
    return (amx_at){g->r0 + job / g->n_pieces * 16, g->k0 + k, left < AMX_COLS ? left : AMX_COLS};
}

/* Codes of n units; the rows of the next job are asked for meanwhile. */
FM_INLINE void amx_unpack_units(const amx_run *g, const amx_at *at, const uint8_t *row, const uint8_t *ahead, int64_t n,
                                amx_piece *p, int bits, bool natural)
{
    const __m512i planes = g->planes, order = g->natural;
    const v_cut cut = g->cut;
    const int64_t stride = g->W->codes_stride;
    for (int64_t i = 0; i < 16; i++) {
#pragma GCC unroll 8
        for (int64_t u = 0; u < n; u++) {
            const __m512i v = amx_codes(row + u * (8 * bits), bits, planes, &cut);
            _mm512_store_si512(p->code[u][i], natural ? _mm512_permutexvar_epi8(order, v) : v);
            if (u * bits % 8 < bits) /* once per line */
                _mm_prefetch(ahead + u * (8 * bits), _MM_HINT_T0);
        }
        row += at->row + i + 1 < g->r1 ? stride : 0; /* rows past the end repeat the last */
        ahead += stride;
    }
}

FM_INLINE void amx_unpack_as(const amx_run *g, const amx_at *at, const amx_at *next, amx_piece *p, int bits,
                             bool natural)
{
    const uint8_t *row = g->W->codes + at->row * g->W->codes_stride + at->k * bits / 8;
    const uint8_t *ahead = g->W->codes + next->row * g->W->codes_stride + next->k * bits / 8;
    if (at->n == AMX_COLS) {
        amx_unpack_units(g, at, row, ahead, AMX_COLS / 64, p, bits, natural);
        return;
    }
    const int64_t n = at->n / 64, left = at->n % 64 * bits / 8;
    amx_unpack_units(g, at, row, ahead, n, p, bits, natural);
    row += n * (8 * bits);
    for (int64_t i = 0; i < 16 && left > 0; i++) {
        uint8_t some[64] = {0};
        memcpy(some, row, (size_t)left);
        const __m512i v = amx_codes(some, bits, g->planes, &g->cut);
        _mm512_store_si512(p->code[n][i], natural ? _mm512_permutexvar_epi8(g->natural, v) : v);
        row += at->row + i + 1 < g->r1 ? g->W->codes_stride : 0;
    }
}

FM_INLINE void amx_numbers(const amx_run *g, const amx_at *at, const uint8_t *from, float (*to)[AMX_COLS / 16])
{
    const fm_quant format = g->W->scale_format;
    const int64_t n = (at->n + g->W->group - 1) >> g->f.group_shift, size = plain_bytes(format);
    const __mmask16 some = (__mmask16)(0xffffu >> (16 - (n < 16 ? n : 16)));
    from += at->row * g->W->scales_stride + (at->k >> g->f.group_shift) * size;
    for (int64_t i = 0; i < 16; i++) {
        if (format == FM_QUANT_BF16 && n <= 16)
            _mm512_store_si512(to[i], _mm512_slli_epi32(
                                          _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from)), 16));
        else
            for (int64_t k = 0; k < n; k += VL)
                vf_store(to[i] + k, vf_load_num(from + k * size, format, n - k < VL ? n - k : VL));
        from += at->row + i + 1 < g->r1 ? g->W->scales_stride : 0;
    }
}

static __attribute__((noinline)) void amx_unpack(const amx_run *g, int64_t job, amx_piece *p)
{
    const amx_at at = amx_job(g, job), next = amx_job(g, job + 1 < g->n_jobs ? job + 1 : job);
    const fast_shape f = g->f;
    if (f.bits == 4 && f.sub == 64)
        amx_unpack_as(g, &at, &next, p, 4, false);
    else if (f.bits == 2 && f.sub == 64)
        amx_unpack_as(g, &at, &next, p, 2, false);
    else
        amx_unpack_as(g, &at, &next, p, f.bits, f.sub < 64 && fast_planes(f) > 1);
    amx_numbers(g, &at, g->W->scales, p->scale);
    amx_numbers(g, &at, g->W->biases, p->bias);
    if (next.k == g->k0 && next.row + 16 <= g->r1)
        for (int64_t b = next.row * g->W->scales_stride; b < (next.row + 16) * g->W->scales_stride; b += 64) {
            _mm_prefetch(g->W->scales + b, _MM_HINT_T0);
            _mm_prefetch(g->W->biases + b, _MM_HINT_T0);
        }
}

/* ---- products ------------------------------------------------------------------------------------------ */

/* Runs in order: a run is one job with one tile of x. Blocks are multiplied two ahead of being scaled, so runs are
 * queued, and their W unpacked, that much earlier. */
typedef struct amx_ahead {
    int64_t job, pushed; /* the next run to queue; blocks queued so far */
    int x;
} amx_ahead;

static void amx_push(const amx_run *g, const amx_panel *p, amx_ahead *h, amx_work *w)
{
    const amx_at at = amx_job(g, h->job);
    amx_piece *piece = &w->piece[h->job % AMX_PIECES];
    if (h->x == 0)
        amx_unpack(g, h->job, piece);
    const int8_t *q = p->q + (h->x * g->units + (at.k - g->k0) / 64) * (2 * AMX_UNIT);
    for (int64_t c = 0; c < at.n; c += g->f.sub, h->pushed++) {
        w->queue[h->pushed % AMX_QUEUE].w = piece->code[c / 64][0] + c % 64;
        w->queue[h->pushed % AMX_QUEUE].q = q + c / 64 * (2 * AMX_UNIT) + c % 64 * 16;
    }
    if (++h->x == g->nx) {
        h->x = 0;
        h->job++;
    }
}

/* Stores the sums of the block before to `to`, then multiplies block t. */
FM_INLINE void amx_multiply(const amx_work *w, int64_t t, int32_t (*to)[16][16])
{
    const uint8_t *code = w->queue[t % AMX_QUEUE].w;
    const int8_t *q = w->queue[t % AMX_QUEUE].q;
    _tile_stored(0, to[0], 64);
    _tile_zero(0);
    _tile_loadd(6, code, 64);
    _tile_loadd(4, q, 64);
    _tile_dpbusd(0, 6, 4);
    _tile_stored(1, to[1], 64);
    _tile_zero(1);
    _tile_loadd(5, q + AMX_UNIT, 64);
    _tile_dpbusd(1, 6, 5);
    __asm__ volatile("" ::: "memory"); /* the intrinsics do not tell the compiler what they read and write */
}

/* acc += one block of 16 rows of W (columns of scale and bias) and of x (lanes). */
FM_INLINE void amx_add(const amx_piece *p, int64_t group, const int32_t (*sums)[16][16], const float *xs,
                       const float *qs, vf *acc)
{
    const vf x = vf_load(xs), sum = vf_load(qs);
    const float *s = p->scale[0] + group, *o = p->bias[0] + group;
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) {
        const vi isum = ((vi)vu_load(sums[0][r]) << 7) + (vi)vu_load(sums[1][r]);
        const vf local = vf_fma(__builtin_convertvector(isum, vf), vf_set(s[r * (AMX_COLS / 16)]),
                                vf_set(o[r * (AMX_COLS / 16)]) * sum);
        acc[r] = vf_fma(local, x, acc[r]);
    }
}

/* y <-> sums of 16 rows of W times n rows of x. */
static void amx_exchange(const amx_run *g, int64_t row, int64_t n, float *y, int64_t ldy, float (*out)[16][16],
                         bool load)
{
    const int64_t have = g->r1 - row < 16 ? g->r1 - row : 16;
    y += row;
    for (int x = 0; x < g->nx; x++, n -= 16, y += 16 * ldy) {
        const int64_t nt = n < 16 ? n : 16;
        vu d[16];
        if (load) {
            for (int t = 0; t < 16; t++)
                d[t] = t < nt ? vu_load_part(y + t * ldy, have) : (vu){0};
            v_transpose(d);
#pragma GCC unroll 16
            for (int r = 0; r < 16; r++)
                vu_store(out[x][r], d[r]);
            continue;
        }
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++)
            d[r] = vu_load(out[x][r]);
        v_transpose(d);
        for (int64_t t = 0; t < nt; t++)
            _mm512_mask_storeu_ps(y + t * ldy, (__mmask16)(0xffffu >> (16 - have)), (__m512)d[t]);
    }
}

/* out += blocks t .. t + n of one run. */
static __attribute__((noinline)) void amx_blocks(amx_work *w, fast_shape f, int64_t t, int64_t n, const amx_piece *p,
                                                 const float *xs, const float *qs, float (*out)[16])
{
    vf acc[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++)
        acc[r] = vf_load(out[r]);
    for (int64_t c = 0; c < n << f.sub_shift; c += f.sub, t++, qs += 16) {
        amx_multiply(w, t + 2, w->sums[(t + 1) & 1]);
        amx_add(p, c >> f.group_shift, w->sums[t & 1], xs + c / 64 * 16, qs, acc);
    }
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++)
        vf_store(out[r], acc[r]);
}

/* All rows of W times n rows of x over the columns of one pass. */
static void amx_pass(const amx_run *g, const amx_panel *p, int64_t n, float *y, int64_t ldy)
{
    amx_work w;
    amx_ahead h = {0};
    const int64_t n_sub = g->kn >> g->f.sub_shift, n_blocks = n_sub * g->nx * g->n_jobs / g->n_pieces;
    for (int64_t job = 0, t = 0; job < g->n_jobs; job++) {
        const amx_at at = amx_job(g, job);
        const int64_t blocks = at.n >> g->f.sub_shift, block0 = (at.k - g->k0) >> g->f.sub_shift;
        if (at.k == g->k0) {
            if (g->k0 == 0)
                memset(w.out, 0, (size_t)g->nx * sizeof w.out[0]);
            else
                amx_exchange(g, at.row, n, y, ldy, w.out, true);
        }
        for (int x = 0; x < g->nx; x++, t += blocks) {
            while (h.pushed < t + blocks + 2 && h.job < g->n_jobs)
                amx_push(g, p, &h, &w);
            for (; h.pushed < t + blocks + 2; h.pushed++) /* past the end: the last one again */
                w.queue[h.pushed % AMX_QUEUE] = w.queue[(n_blocks - 1) % AMX_QUEUE];
            if (t == 0) {
                amx_multiply(&w, 0, w.sums[1]);
                amx_multiply(&w, 1, w.sums[0]);
            }
            amx_blocks(&w, g->f, t, blocks, &w.piece[job % AMX_PIECES], p->xs + (x * g->units + (at.k - g->k0) / 64) * 16,
                       p->qs + (x * n_sub + block0) * 16, w.out[x]);
        }
        if (at.k + at.n == g->k0 + g->kn)
            amx_exchange(g, at.row, n, y, ldy, w.out, false);
    }
}

static void amx_tiles(const fm_mat *W, const fm_act *a, int64_t n, float *y, int64_t ldy, int64_t r0, int64_t r1)
{
    amx_panel p;
    amx_run g = {.W = W, .f = fast_shape_of(W), .r0 = r0, .r1 = r1};
    const int planes = fast_planes(g.f);
    g.planes = amx_plane_bits(planes);
    g.natural = amx_order(planes, true);
    g.cut = v_cut_make(g.f.bits);
    amx_configure(g.f.sub);
    for (g.k0 = 0; g.k0 < W->n_cols; g.k0 += g.kn) {
        g.kn = W->n_cols - g.k0 < AMX_PASS ? W->n_cols - g.k0 : AMX_PASS;
        g.units = (g.kn + 63) / 64;
        g.n_pieces = (g.kn + AMX_COLS - 1) / AMX_COLS;
        g.n_jobs = g.n_pieces * ((r1 - r0 + 15) / 16);
        const int64_t fit = AMX_PANEL / (g.units * 64 * 16), most = fit < AMX_MAX_XT ? fit : AMX_MAX_XT;
        for (int64_t i = 0; i < n; i += 16 * g.nx) {
            const int64_t tiles = (n - i + 15) / 16;
            g.nx = (int)(tiles < most ? tiles : most);
            for (int64_t x = 0; x < g.nx; x++)
                amx_pack(&g, a, i + 16 * x, n - i - 16 * x < 16 ? n - i - 16 * x : 16,
                         p.q + x * g.units * 2 * AMX_UNIT, p.xs + x * g.units * 16,
                         p.qs + x * (g.kn >> g.f.sub_shift) * 16);
            amx_pass(&g, &p, n - i, y + i * ldy, ldy);
        }
    }
    _tile_release();
}
FM_TARGET_END

bool fm_kernels_supported_amx(void)
{
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return fm_kernels_supported_avx512() && fm_x86_has_amx() &&
           syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

void fm_kernels_overlay_amx(fm_kernels *k)
{
    fm_kernels_overlay_amx_attn(k);
    if (k->numeric == FM_NUMERIC_FAST)
        fast_overlay(k);
}

#else
bool fm_kernels_supported_amx(void) { return false; }
void fm_kernels_overlay_amx(fm_kernels *k) { (void)k; }
#endif
