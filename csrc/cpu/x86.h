/* CPU features that some compilers' __builtin_cpu_supports cannot name. */
#ifndef FM_CPU_X86_H
#define FM_CPU_X86_H

#include <stdbool.h>

#if defined(__x86_64__)
#include <cpuid.h>

/* F16C works on the registers of AVX, so the caller asks for avx2 as well: that covers the OS's part. */
static inline bool fm_x86_has_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}

/* AMX tiles with int8 and bf16 products. The OS must grant them too (Linux: per process, on request). */
static inline bool fm_x86_has_amx(void)
{
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 3) == 3 && (d >> 22 & 1) == 1;
}
#endif

#endif
