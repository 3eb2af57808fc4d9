/* Owns: export macro, cache line, page-size constants. Knows nothing of the library. */
#ifndef FM_BASE_PLATFORM_H
#define FM_BASE_PLATFORM_H

#define FM_API __attribute__((visibility("default")))
#define FM_CACHE_LINE 64
/* Direct I/O and the packed form both align to this; larger OS pages are asked for at run time. */
#define FM_IO_ALIGN 4096

#define FM_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#define FM_COUNT(a) ((int)(sizeof(a) / sizeof((a)[0])))

int fm_cpu_count(void);   /* CPUs this process may run on, >= 1 */
long fm_page_bytes(void); /* the OS page, >= 4096 */

#endif
