/* Variant i8mm: NEON with dotprod and i8mm (Armv8.6; Neoverse V1, Apple M2 and later): mode fast with usdot, which
 * takes unsigned codes as they are. int32 sums of one block (< 2^21, exact). All else is neon's. */
#include "cpu/kernels_impl.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#include <assert.h>
#include <math.h>
#include <string.h>

#include "cpu/arm.h"
#include "cpu/target.h"

FM_TARGET_BEGIN(FM_ARM_I8MM)
#define FM_VEC_ISA 3
#define FM_VEC_I8MM 1
#include "cpu/vec_fast_mm.h"
FM_TARGET_END

bool fm_kernels_supported_i8mm(void) { return fm_arm_has_dotprod() && fm_arm_has_i8mm(); }

void fm_kernels_overlay_i8mm(fm_kernels *k)
{
    if (k->numeric == FM_NUMERIC_FAST)
        fast_overlay(k);
}

#else
bool fm_kernels_supported_i8mm(void) { return false; }
void fm_kernels_overlay_i8mm(fm_kernels *k) { (void)k; }
#endif
