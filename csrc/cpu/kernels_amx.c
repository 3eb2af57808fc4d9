/* Variant amx: Intel's matrix tiles with int8 products, for mode fast with 8 rows or more; all else is avx512's.
 * tdpbsud: 16 rows of x (s8) times 16 rows of W (u8) over one block of at most 64 columns, int32 sums (< 2^21, exact);
 * blocks are scaled and added in f32 as in vec_fast.h, so the bits are those of avx512. A tile gets 16 x 16 x 64
 * products in 16 cycles; scaling its 16 vectors of sums costs about 40 and bounds the speed.
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
#include "cpu/vec_fast.h"

enum { FAST_TILES_MIN = 8 }; /* fewer rows leave most of a tile idle */
static void amx_tiles(const fm_mat *W, const fm_act *a, int64_t n, float *y, int64_t ldy, int64_t r0, int64_t r1);
#define FAST_TILES amx_tiles
#include "cpu/vec_fast_mm.h"

enum { AMX_NB = 256 }; /* rows of x that share one unpacked tile of W: 128 KiB of panel, stays in L2 */

/* Tiles 0-3: sums of 2 x 2; 4, 5: x; 6, 7: W. */
static void amx_configure(int sub)
{
    _Alignas(64) struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } c = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        c.bytes[i] = (uint16_t)(i == 4 || i == 5 ? sub : 64);
        c.rows[i] = (uint8_t)(i >= 6 ? sub / 4 : 16);
    }
    __asm__ volatile("" ::"r"(&c) : "memory"); /* GCC's intrinsic admits to reading 8 bytes only */
    _tile_loadconfig(&c);
}

/* Rows of x in one column block: q [row][column], rows MM_KB apart, whole sixteens; scales and sums [block][row]. */
typedef struct amx_panel {
    _Alignas(64) int8_t q[AMX_NB][2][MM_KB];
    float xs[MM_KB / 16][AMX_NB], qs[MM_KB / 16][AMX_NB];
} amx_panel;

static void amx_pack(const fm_act *a, int64_t i, int64_t n, int planes, fast_shape f, int64_t k0, int64_t kn,
                     amx_panel *p)
{
    for (int64_t t = 0; t < (n + 15) / 16 * 16; t++) {
        if (t >= n) {
            memset(p->q[t], 0, sizeof p->q[t]);
            continue;
        }
        const fast_x x = fast_row(a, i + t, f.sub);
        for (int term = 0; term < 2; term++)
            for (int64_t c = 0; c < kn; c += 16)
                mm_order(fast_term(&x, k0 + c, term), planes, p->q[t][term] + c);
        for (int64_t c = 0; c < kn; c += f.sub) {
            p->xs[c >> f.sub_shift][t] = x.xs[(k0 + c) >> 6];
            p->qs[c >> f.sub_shift][t] = x.qs[(k0 + c) >> f.sub_shift];
        }
    }
}

/* Two of these lie in one 4 KiB page, so that no load of one waits for a store to the other (aliasing of the low 12
 * address bits), and the sums that are added to lie in the next. */
typedef int32_t amx_sums[4][16][16];
typedef struct amx_work {
    _Alignas(4096) amx_sums sums[2];
    vf out[16][MM_RT];
} amx_work;

/* Integer sums of one block, both terms: 16 rows of x times 32 rows of W. */
FM_INLINE void amx_multiply(const mm_tile *m, const int8_t *q, int64_t c, int32_t (*sums)[16][16])
{
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, q + c, 2 * MM_KB);
    _tile_loadd(5, q + MM_KB + c, 2 * MM_KB);
    _tile_loadd(6, m->code[0] + c * VL, 64);
    _tile_loadd(7, m->code[1] + c * VL, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    __asm__ volatile("" ::: "memory"); /* the intrinsics do not tell the compiler what they write */
}

FM_INLINE vi amx_sum(const int32_t (*sums)[16][16], int j, int64_t t)
{
    return ((vi)vu_load(sums[j][t]) << 7) + (vi)vu_load(sums[j + 2][t]);
}

/* w->out += rows at .. at + 16 of the panel over kn columns. The next block is multiplied before this one is scaled,
 * so that the two overlap. */
FM_INLINE void amx_block(const mm_tile *m, fast_shape f, const amx_panel *p, int64_t at, int64_t kn, amx_work *w)
{
    const int8_t *q = p->q[at][0];
    amx_multiply(m, q, 0, w->sums[0]);
    for (int64_t c = 0, g = 0; c < kn; c += f.sub, g++) {
        if (c + f.sub < kn)
            amx_multiply(m, q, c + f.sub, w->sums[(g + 1) & 1]);
        const int64_t group = c >> f.group_shift;
        const vf s0 = vf_load(m->scale[0] + group * VL), b0 = vf_load(m->bias[0] + group * VL);
        const vf s1 = vf_load(m->scale[1] + group * VL), b1 = vf_load(m->bias[1] + group * VL);
        const float *xs = p->xs[g] + at, *qs = p->qs[g] + at;
        int32_t(*sums)[16][16] = w->sums[g & 1];
#pragma GCC unroll 4
        for (int64_t t = 0; t < 16; t++) { /* rows past n are padding */
            fast_add(&w->out[t][0], amx_sum(sums, 0, t), s0, b0, qs[t], xs[t]);
            fast_add(&w->out[t][1], amx_sum(sums, 1, t), s1, b1, qs[t], xs[t]);
        }
    }
}

static void amx_rows(const mm_tile *m, fast_shape f, const amx_panel *p, int64_t n, int64_t kn, mm_out o)
{
    amx_work w;
    for (int64_t i = 0; i < n; i += 16, o.y += 16 * o.ldy) {
        const int64_t nt = n - i < 16 ? n - i : 16;
        for (int64_t t = 0; t < 16; t++)
            for (int j = 0; j < MM_RT; j++)
                w.out[t][j] = t < nt ? mm_load(&o, (int)t, j) : (vf){0};
        amx_block(m, f, p, i, kn, &w);
        for (int64_t t = 0; t < nt; t++)
            for (int j = 0; j < MM_RT; j++)
                mm_store(&o, (int)t, j, w.out[t][j]);
    }
}

static void amx_tiles(const fm_mat *W, const fm_act *a, int64_t n, float *y, int64_t ldy, int64_t r0, int64_t r1)
{
    const fast_shape f = fast_shape_of(W);
    const int planes = fast_planes(f);
    amx_panel p;
    mm_tile m;
    amx_configure(f.sub);
    for (int64_t i = 0; i < n; i += AMX_NB) {
        const int64_t nb = n - i < AMX_NB ? n - i : AMX_NB;
        for (int64_t k0 = 0; k0 < W->n_cols; k0 += MM_KB) {
            const int64_t kn = W->n_cols - k0 < MM_KB ? W->n_cols - k0 : MM_KB;
            amx_pack(a, i, nb, planes, f, k0, kn, &p);
            for (int64_t r = r0; r < r1; r += MM_RT * VL) {
                mm_unpack(W, f, r, r1, k0, kn, &m);
                __asm__ volatile("" ::: "memory");
                amx_rows(&m, f, &p, nb, kn, (mm_out){y + i * ldy + r, ldy, r1 - r, k0 == 0});
            }
        }
    }
    _tile_release();
}
FM_TARGET_END

bool fm_kernels_supported_amx(void)
{
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return fm_kernels_supported_avx512() && fm_x86_has_amx_int8() &&
           syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

void fm_kernels_overlay_amx(fm_kernels *k)
{
    if (k->numeric == FM_NUMERIC_FAST)
        fast_overlay(k);
}

#else
bool fm_kernels_supported_amx(void) { return false; }
void fm_kernels_overlay_amx(fm_kernels *k) { (void)k; }
#endif
