/* Variant avx2: AVX2, FMA, F16C and BMI2, as Haswell, Zen and later have them.
 * Mode fast: vpmaddubsw + vpmaddwd, codes of 8 bits as two nibbles so that no int16 saturates; int32 sums of one
 * block (< 2^21, exact), f32 between blocks. Mode exact: vfmadd in f32. The algorithms are in vec_*.h. */
#include "cpu/kernels_impl.h"

#if defined(__x86_64__)
#include <assert.h>
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "cpu/target.h"
#include "cpu/x86.h"

FM_TARGET_BEGIN("avx2,fma,f16c,bmi2")
#define FM_VEC_ISA 1
#include "cpu/vec_attn.h"
#include "cpu/vec_delta.h"
#include "cpu/vec_exact.h"
#include "cpu/vec_fast_mm.h"
#include "cpu/vec_ops.h"
#include "cpu/vec_route.h"
FM_TARGET_END

bool fm_kernels_supported_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && fm_x86_has_f16c() &&
           __builtin_cpu_supports("bmi2");
}

void fm_kernels_overlay_avx2(fm_kernels *k)
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
bool fm_kernels_supported_avx2(void) { return false; }
void fm_kernels_overlay_avx2(fm_kernels *k) { (void)k; }
#endif
