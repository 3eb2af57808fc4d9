/* Owns: CPU count and page size where nothing better is known (macOS, BSD). */
#if !defined(__linux__)
#include "base/platform.h"

#include <unistd.h>

int fm_cpu_count(void)
{
    const long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int)n : 1;
}

long fm_page_bytes(void)
{
    const long n = sysconf(_SC_PAGESIZE);
    return n >= 4096 ? n : 4096;
}
#else
typedef int fm_platform_posix_empty; /* ISO C forbids an empty file */
#endif
