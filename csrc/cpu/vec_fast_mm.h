/* Owns: the tile path of mode `fast` (vec_fast.h holds the arithmetic): codes of MM_RT*VL rows x MM_KB columns are
 * unpacked once to bytes, then used by all n rows. Partial sums between column blocks wait in y (f32, exact). */
#ifndef FM_CPU_VEC_FAST_MM_H
#define FM_CPU_VEC_FAST_MM_H

#include "cpu/vec_fast.h"
#include "cpu/vec_fast_rows.h"

#if FM_VEC_ISA == FM_VEC_AVX512
enum { MM_RT = 2, MM_T = 6 }; /* 12 int32 sums, 12 f32 sums, 2 weights, scales: 32 registers */
#elif FM_VEC_ISA == FM_VEC_AVX2
enum { MM_RT = 1, MM_T = 6 };
#else
enum { MM_RT = 2, MM_T = 6 };
#endif
enum { MM_KB = 512, MM_NB = 256 }; /* columns, rows of x that share an unpacked tile: their panel stays in L2 */

typedef struct mm_tile {
    _Alignas(64) uint8_t code[MM_RT][MM_KB / 4 * VB]; /* [column / 4][row][4], columns in plane order */
    _Alignas(64) float scale[MM_RT][MM_KB / 16 * VL], bias[MM_RT][MM_KB / 16 * VL];
} mm_tile;

FM_INLINE void mm_unpack_as(const fm_mat *W, const fast_tile *t, int64_t k0, int64_t kn, int bits, int planes,
                            uint8_t *out)
{
    const v_cut cut = v_cut_make(bits);
    for (int64_t c = k0; c < k0 + kn; c += VL * 4 * planes) {
        vu d[VL];
        fast_chunk(W, t, c, planes, bits, &cut, d);
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++)
#pragma GCC unroll 4
            for (int p = 0; p < planes; p++, out += VB)
                vu_store(out, planes == 1 ? d[i] : v_plane(d[i], planes, p));
    }
}

FM_STATIC void mm_unpack(const fm_mat *W, fast_shape f, int64_t r, int64_t r1, int64_t k0, int64_t kn, mm_tile *m)
{
    for (int i = 0; i < MM_RT; i++) {
        const fast_tile t = fast_tile_at(W, r + i * VL < r1 ? r + i * VL : r1 - 1, r1);
        fast_scales(W, &t, k0 >> f.group_shift, kn >> f.group_shift, kn >> f.group_shift, m->scale[i], m->bias[i]);
        if (f.bits == 4)
            mm_unpack_as(W, &t, k0, kn, 4, 2, m->code[i]);
        else if (f.bits == 2)
            mm_unpack_as(W, &t, k0, kn, 2, 4, m->code[i]);
        else
            mm_unpack_as(W, &t, k0, kn, f.bits, 1, m->code[i]);
    }
}

/* Where y holds the sums of T rows x MM_RT*VL outputs, of which `have` exist. */
typedef struct mm_out {
    float *y;
    int64_t ldy, have;
    bool first;
} mm_out;

FM_INLINE vf mm_load(const mm_out *o, int t, int rt)
{
    const int64_t n = o->have - rt * VL;
    const float *p = o->y + t * o->ldy + rt * VL;
    return o->first || n <= 0 ? (vf){0} : n >= VL ? vf_load(p) : vf_load_part(p, n);
}

FM_INLINE void mm_store(const mm_out *o, int t, int rt, vf v)
{
    const int64_t n = o->have - rt * VL;
    float *p = o->y + t * o->ldy + rt * VL;
    if (n >= VL)
        vf_store(p, v);
    else if (n > 0)
        vf_store_part(p, v, n);
}

/* Rows of x over MM_KB columns, codes in the order in which planes leave a dword of W: code i*4P + b*P + p lies at
 * (i*P + p)*4 + b. */
typedef struct mm_panel {
    _Alignas(64) int8_t q[MM_NB][2][MM_KB];
} mm_panel;

FM_INLINE void mm_order(const int8_t *from, int planes, int8_t *to)
{
    typedef int8_t s8x16 __attribute__((vector_size(16)));
    s8x16 q;
    memcpy(&q, from, sizeof q);
    if (planes == 2)
        q = __builtin_shufflevector(q, q, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    else if (planes == 4)
        q = __builtin_shufflevector(q, q, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    memcpy(to, &q, sizeof q);
}

FM_STATIC void mm_pack(const fm_act *a, int64_t i0, int64_t n, fast_shape f, int planes, int64_t k0, int64_t kn,
                       mm_panel *p)
{
    for (int64_t i = 0; i < n; i++) {
        const fast_x x = fast_row(a, i0 + i, f.sub);
        for (int term = 0; term < 2; term++)
            for (int64_t c = 0; c < kn; c += 16)
                mm_order(fast_term(&x, k0 + c, term), planes, p->q[i][term] + c);
    }
}

FM_INLINE void mm_block(const mm_tile *m, fast_shape f, const fast_x *x, const int8_t (*q)[2][MM_KB], int64_t k0,
                        int64_t kn, const mm_out *o, int T, bool wide)
{
    vf acc[MM_T][MM_RT];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 2
        for (int i = 0; i < MM_RT; i++)
            acc[t][i] = mm_load(o, t, i);
    for (int64_t c = 0; c < kn; c += f.sub) {
        vi isum[MM_T][MM_RT] = {{{0}}};
#pragma GCC unroll 2
        for (int term = 0; term < 2; term++) {
#pragma GCC unroll 2
            for (int64_t k = c; k < c + f.sub; k += 4) {
                vu w[MM_RT];
#pragma GCC unroll 2
                for (int i = 0; i < MM_RT; i++)
                    w[i] = vu_load(m->code[i] + k / 4 * VB);
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) {
                    const vi v = (vi)vu_set(dword_at(q[t][term] + k));
#pragma GCC unroll 2
                    for (int i = 0; i < MM_RT; i++)
                        isum[t][i] = vi_dp(isum[t][i], w[i], v, wide);
                }
            }
            if (term == 1)
                break;
#pragma GCC unroll 8
            for (int t = 0; t < T; t++)
#pragma GCC unroll 2
                for (int i = 0; i < MM_RT; i++)
                    isum[t][i] <<= 7;
        }
        const int64_t g = c >> f.group_shift;
#pragma GCC unroll 2
        for (int i = 0; i < MM_RT; i++) {
            const vf s = vf_load(m->scale[i] + g * VL), b = vf_load(m->bias[i] + g * VL);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++)
                fast_add(&acc[t][i], isum[t][i], s, b, x[t].qs[(k0 + c) >> f.sub_shift], x[t].xs[(k0 + c) >> 6]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 2
        for (int i = 0; i < MM_RT; i++)
            mm_store(o, t, i, acc[t][i]);
}

FM_INLINE void mm_rows(const mm_tile *m, fast_shape f, const fm_act *a, const mm_panel *p, int64_t i0, int64_t n,
                       int64_t k0, int64_t kn, mm_out o, bool wide)
{
    for (int64_t i = 0; i < n; i += MM_T, o.y += MM_T * o.ldy) {
        fast_x x[MM_T];
        const int T = (int)(n - i < MM_T ? n - i : MM_T);
        for (int t = 0; t < T; t++)
            x[t] = fast_row(a, i0 + i + t, f.sub);
        const int8_t(*q)[2][MM_KB] = p->q + i;
        switch (T) {
        case 1: mm_block(m, f, x, q, k0, kn, &o, 1, wide); break;
        case 2: mm_block(m, f, x, q, k0, kn, &o, 2, wide); break;
        case 3: mm_block(m, f, x, q, k0, kn, &o, 3, wide); break;
        case 4: mm_block(m, f, x, q, k0, kn, &o, 4, wide); break;
        case 5: mm_block(m, f, x, q, k0, kn, &o, 5, wide); break;
        default: mm_block(m, f, x, q, k0, kn, &o, MM_T, wide); break;
        }
    }
}

FM_INLINE int fast_planes(fast_shape f) { return f.bits == 4 ? 2 : f.bits == 2 ? 4 : 1; }

FM_STATIC void fast_tiles(const fm_mat *W, const fm_act *a, int64_t n, float *y, int64_t ldy, int64_t r0, int64_t r1)
{
    const fast_shape f = fast_shape_of(W);
    mm_tile m;
    mm_panel p;
    for (int64_t i = 0; i < n; i += MM_NB) {
        const int64_t nb = n - i < MM_NB ? n - i : MM_NB;
        for (int64_t k0 = 0; k0 < W->n_cols; k0 += MM_KB) {
            const int64_t kn = W->n_cols - k0 < MM_KB ? W->n_cols - k0 : MM_KB;
            mm_pack(a, i, nb, f, fast_planes(f), k0, kn, &p);
            for (int64_t r = r0; r < r1; r += MM_RT * VL) {
                const mm_out o = {y + i * ldy + r, ldy, r1 - r, k0 == 0};
                mm_unpack(W, f, r, r1, k0, kn, &m);
                if (VI_DP_SPLITS && f.bits < 8)
                    mm_rows(&m, f, a, &p, i, nb, k0, kn, o, false);
                else
                    mm_rows(&m, f, a, &p, i, nb, k0, kn, o, true);
            }
        }
    }
}

#ifndef FAST_TILES
/* A variant with matrix units puts its own function for n >= FAST_TILES_MIN here. */
#define FAST_TILES fast_tiles
enum { FAST_TILES_MIN = FAST_MAX_T + 1 };
#endif

#define FAST_MATMUL(name, few)                                                                     \
    static void name(const fm_mat *W, const fm_act *a, int64_t n, float *y, int64_t ldy, int64_t r0, int64_t r1) \
    {                                                                                              \
        if (r0 >= r1)                                                                              \
            return;                                                                                \
        if (n >= FAST_TILES_MIN)                                                                   \
            FAST_TILES(W, a, n, y, ldy, r0, r1);                                                   \
        else if (n > FAST_MAX_T)                                                                   \
            fast_tiles(W, a, n, y, ldy, r0, r1);                                                   \
        else                                                                                       \
            fast_few_##few(W, a, n, y, ldy, r0, r1);                                               \
    }
FAST_MATMUL(matmul_fast_p1, p1)
FAST_MATMUL(matmul_fast_p2, p2)
FAST_MATMUL(matmul_fast_p4, p4)

/* Plain formats keep f32 activations in this mode too. */
FM_STATIC void fast_overlay(fm_kernels *k)
{
    k->act_bytes = fast_act_bytes;
    k->act_prepare = fast_act_prepare;
    k->matmul[FM_QUANT_AFFINE2] = matmul_fast_p4;
    k->matmul[FM_QUANT_AFFINE3] = matmul_fast_p1;
    k->matmul[FM_QUANT_AFFINE4] = matmul_fast_p2;
    k->matmul[FM_QUANT_AFFINE5] = matmul_fast_p1;
    k->matmul[FM_QUANT_AFFINE6] = matmul_fast_p1;
    k->matmul[FM_QUANT_AFFINE8] = matmul_fast_p1;
}

#endif
