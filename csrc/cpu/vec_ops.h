/* Owns: the element-wise ops over vec.h: rmsnorm, swiglu, axpy, rope, conv_silu. e^x is vec.h's (2 ulp). */
#ifndef FM_CPU_VEC_OPS_H
#define FM_CPU_VEC_OPS_H

#include <assert.h>

#include "cpu/kernels.h"
#include "cpu/vec.h"

/* Sum of squares: f32 lanes over 16 vectors (chains of 4), f64 between, so the error does not grow with n. */
FM_INLINE double sum_squares(const float *x, int64_t n)
{
    double sum = 0;
    int64_t c = 0;
    for (; c + 16 * VL <= n; c += 16 * VL) {
        vf s[4] = {{0}};
#pragma GCC unroll 4
        for (int i = 0; i < 16; i++) {
            const vf v = vf_load(x + c + i * VL);
            s[i % 4] = vf_fma(v, v, s[i % 4]);
        }
        sum += (double)vf_sum((s[0] + s[1]) + (s[2] + s[3]));
    }
    vf s = {0};
    for (; c < n; c += VL) {
        const vf v = c + VL <= n ? vf_load(x + c) : vf_load_part(x + c, n - c);
        s = vf_fma(v, v, s);
    }
    return sum + (double)vf_sum(s);
}

FM_STATIC void rmsnorm_vec(const float *x, const float *w, float eps, float *y, int64_t n)
{
    const vf scale = vf_set((float)(1 / sqrt(sum_squares(x, n) / (double)n + (double)eps)));
    int64_t c = 0;
    for (; c + VL <= n; c += VL)
        vf_store(y + c, vf_load(x + c) * scale * vf_load(w + c));
    if (c < n)
        vf_store_part(y + c, vf_load_part(x + c, n - c) * scale * vf_load_part(w + c, n - c), n - c);
}

FM_STATIC void swiglu_vec(const float *gate, const float *up, float *y, int64_t n)
{
    int64_t c = 0;
    for (; c + VL <= n; c += VL)
        vf_store(y + c, vf_silu(vf_load(gate + c)) * vf_load(up + c));
    if (c < n)
        vf_store_part(y + c, vf_silu(vf_load_part(gate + c, n - c)) * vf_load_part(up + c, n - c), n - c);
}

FM_STATIC void axpy_vec(float a, const float *x, float *y, int64_t n)
{
    const vf av = vf_set(a);
    int64_t c = 0;
    for (; c + VL <= n; c += VL)
        vf_store(y + c, vf_fma(av, vf_load(x + c), vf_load(y + c)));
    if (c < n)
        vf_store_part(y + c, vf_fma(av, vf_load_part(x + c, n - c), vf_load_part(y + c, n - c)), n - c);
}

FM_STATIC void rope_vec(float *x, const float *cs_cos, const float *cs_sin, int64_t rot)
{
    const int64_t half = rot / 2;
    int64_t i = 0;
    for (; i + VL <= half; i += VL) {
        const vf lo = vf_load(x + i), hi = vf_load(x + i + half), c = vf_load(cs_cos + i), s = vf_load(cs_sin + i);
        vf_store(x + i, lo * c - hi * s);
        vf_store(x + i + half, hi * c + lo * s);
    }
    for (; i < half; i++) {
        const float lo = x[i], hi = x[i + half];
        x[i] = lo * cs_cos[i] - hi * cs_sin[i];
        x[i + half] = hi * cs_cos[i] + lo * cs_sin[i];
    }
}

enum { CONV_MAX = 16 };

/* Taps j of VL channels from c: w[j] lane i = weight[(c + i) * kern + j]. */
FM_INLINE void conv_taps(const float *weight, int64_t kern, int64_t c, int64_t n, vf *w)
{
    float t[CONV_MAX][VL] = {{0}};
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < kern; j++)
            t[j][i] = weight[(c + i) * kern + j];
    for (int64_t j = 0; j < kern; j++)
        w[j] = vf_load(t[j]);
}

/* The same for kern = 4 and VL whole channels, in shuffles. */
FM_INLINE void conv_taps4(const float *weight, vf *w)
{
    const vf a = vf_load(weight), b = vf_load(weight + VL), c = vf_load(weight + 2 * VL),
             d = vf_load(weight + 3 * VL);
    const vf e0 = V_EVEN(a, b), e1 = V_EVEN(c, d), o0 = V_ODD(a, b), o1 = V_ODD(c, d);
    w[0] = V_EVEN(e0, e1);
    w[1] = V_EVEN(o0, o1);
    w[2] = V_ODD(e0, e1);
    w[3] = V_ODD(o0, o1);
}

/* Channels c .. c + n of rows t < n_rows: rows outside, so that memory is walked along the rows. */
FM_INLINE void conv_rows(const float *m, int64_t ldm, int64_t kern, const float *hist_in, float *y, int64_t ldy,
                         int64_t n_rows, int64_t n_ch, int64_t c, int64_t n, const vf *w)
{
    for (int64_t t = 0; t < n_rows; t++) {
        const float *row[CONV_MAX];
        for (int64_t j = 0; j < kern; j++) {
            const int64_t src = t - (kern - 1) + j; /* < 0: before this call */
            row[j] = src < 0 ? hist_in + (src + kern - 1) * n_ch + c : m + src * ldm + c;
        }
        for (int64_t i = 0; i < n; i += VL) {
            const int64_t have = n - i < VL ? n - i : VL;
            vf s = {0};
            for (int64_t j = 0; j < kern; j++)
                s = vf_fma(w[i / VL * kern + j], have == VL ? vf_load(row[j] + i) : vf_load_part(row[j] + i, have), s);
            if (have == VL)
                vf_store(y + t * ldy + c + i, vf_silu(s));
            else
                vf_store_part(y + t * ldy + c + i, vf_silu(s), have);
        }
    }
}

FM_STATIC void conv_silu_vec(const float *m, int64_t ldm, const float *weight, int64_t kern, const float *hist_in,
                             float *hist_out, float *y, int64_t ldy, int64_t n, int64_t n_ch, int64_t c0, int64_t c1)
{
    enum { BLOCK = 32 }; /* vectors: rows are read in long enough pieces for the hardware's prefetcher */
    const int64_t hist = kern - 1;
    assert(kern <= CONV_MAX);
    for (int64_t c = c0; n == 1 && c < c1; c += 16) { /* many short pieces: no hardware prefetcher sees them coming */
        for (int64_t j = 0; j < hist; j++) {
            __builtin_prefetch(hist_in + j * n_ch + c);
            __builtin_prefetch(hist_out + j * n_ch + c, 1);
        }
        for (int64_t j = 0; j < kern; j++)
            __builtin_prefetch(weight + c * kern + j * 16);
    }
    for (int64_t c = c0; c < c1; c += BLOCK * VL) {
        const int64_t nc = c1 - c < BLOCK * VL ? c1 - c : BLOCK * VL;
        vf w[BLOCK * CONV_MAX]; /* [vector][tap] */
        for (int64_t i = 0; i < nc; i += VL) {
            if (kern == 4 && nc - i >= VL)
                conv_taps4(weight + (c + i) * 4, w + i / VL * kern);
            else
                conv_taps(weight, kern, c + i, nc - i < VL ? nc - i : VL, w + i / VL * kern);
        }
        if (kern == 4)
            conv_rows(m, ldm, 4, hist_in, y, ldy, n, n_ch, c, nc, w);
        else
            conv_rows(m, ldm, kern, hist_in, y, ldy, n, n_ch, c, nc, w);
    }
    for (int64_t j = 0; j < hist; j++) {
        const int64_t src = n - hist + j;
        const float *row = src < 0 ? hist_in + (src + hist) * n_ch : m + src * ldm;
        memcpy(hist_out + j * n_ch + c0, row + c0, (size_t)(c1 - c0) * sizeof *row);
    }
}

FM_STATIC void ops_overlay(fm_kernels *k)
{
    k->rmsnorm = rmsnorm_vec;
    k->swiglu = swiglu_vec;
    k->axpy = axpy_vec;
    k->rope = rope_vec;
    k->conv_silu = conv_silu_vec;
}

#endif
