/* Which Arm extensions CPU and OS offer: getauxval on Linux, sysctl on macOS. */
#ifndef FM_CPU_ARM_H
#define FM_CPU_ARM_H

#include <stdbool.h>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

static inline bool fm_arm_has_dotprod(void) { return (getauxval(AT_HWCAP) >> 20 & 1) != 0; } /* HWCAP_ASIMDDP */
static inline bool fm_arm_has_i8mm(void) { return (getauxval(AT_HWCAP2) >> 13 & 1) != 0; }   /* HWCAP2_I8MM */

#elif defined(__aarch64__) && defined(__APPLE__)
#include <stddef.h>
#include <sys/sysctl.h>

static inline bool fm_arm_has(const char *feature)
{
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, NULL, 0) == 0 && value == 1;
}

static inline bool fm_arm_has_dotprod(void) { return fm_arm_has("hw.optional.arm.FEAT_DotProd"); }
static inline bool fm_arm_has_i8mm(void) { return fm_arm_has("hw.optional.arm.FEAT_I8MM"); }

#else
static inline bool fm_arm_has_dotprod(void) { return false; }
static inline bool fm_arm_has_i8mm(void) { return false; }
#endif

/* GCC and clang spell the target of a region differently; GCC's intrinsics want the architecture that brought the
 * extension (dotprod came with Armv8.2, so a CPU that has it has that too). */
#if defined(__clang__)
#define FM_ARM_DOTPROD "dotprod"
#define FM_ARM_I8MM "dotprod,i8mm"
#else
#define FM_ARM_DOTPROD "arch=armv8.2-a+dotprod"
#define FM_ARM_I8MM "arch=armv8.2-a+dotprod+i8mm"
#endif

#endif
