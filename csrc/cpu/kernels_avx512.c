/* Variant avx512: AVX-512 F, BW, DQ, VL, VBMI and VNNI, and GFNI, as Ice Lake, Zen 4 and later have them.
 * Mode fast: vpdpbusd, int32 sums of one block (< 2^21, exact), f32 between blocks. Mode exact: vfmadd in f32.
 * The algorithms are in the vec_*.h templates; here is only which instruction set they are compiled for. */
#include "cpu/kernels_impl.h"

#if defined(__x86_64__)
#include <assert.h>
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "cpu/target.h"
#include "cpu/x86.h"

FM_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,gfni,avx2,fma,f16c,bmi2")
#define FM_VEC_ISA 2
#include "cpu/vec_attn.h"
#include "cpu/vec_delta.h"
#include "cpu/vec_exact.h"
#include "cpu/vec_fast_mm.h"
#include "cpu/vec_ops.h"
#include "cpu/vec_route.h"
FM_TARGET_END

bool fm_kernels_supported_avx512(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("gfni") &&
           __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && fm_x86_has_f16c() &&
           __builtin_cpu_supports("bmi2");
}

void fm_kernels_overlay_avx512(fm_kernels *k)
{
    ops_overlay(k);
    attn_overlay(k);
    delta_overlay(k);
    route_overlay(k);
    exact_overlay(k);
    if (k->numeric == FM_NUMERIC_FAST)
        fast_overlay(k);
}

#else
bool fm_kernels_supported_avx512(void) { return false; }
void fm_kernels_overlay_avx512(fm_kernels *k) { (void)k; }
#endif
