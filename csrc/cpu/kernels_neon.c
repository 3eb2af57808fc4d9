/* Variant neon: AArch64 NEON with dotprod (Armv8.2; Cortex-A76, Apple M1 and later).
 * Mode fast: sdot, codes of 8 bits with their top bit apart; int32 sums of one block (< 2^21, exact), f32 between
 * blocks. Mode exact: fmla in f32. The algorithms are in vec_*.h. */
#include "cpu/kernels_impl.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#include <assert.h>
#include <math.h>
#include <string.h>

#include "cpu/arm.h"
#include "cpu/target.h"

FM_TARGET_BEGIN(FM_ARM_DOTPROD)
#define FM_VEC_ISA 3
#include "cpu/vec_attn.h"
#include "cpu/vec_delta.h"
#include "cpu/vec_exact.h"
#include "cpu/vec_fast_mm.h"
#include "cpu/vec_ops.h"
#include "cpu/vec_route.h"
FM_TARGET_END

bool fm_kernels_supported_neon(void) { return fm_arm_has_dotprod(); }

void fm_kernels_overlay_neon(fm_kernels *k)
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
bool fm_kernels_supported_neon(void) { return false; }
void fm_kernels_overlay_neon(fm_kernels *k) { (void)k; }
#endif
