/* Owns: where messages that are no errors go. Silent until a callback is set; never stdout. */
#ifndef FM_BASE_LOG_H
#define FM_BASE_LOG_H

#include "base/platform.h"

typedef enum fm_log_level { FM_LOG_DEBUG = 0, FM_LOG_INFO = 1, FM_LOG_WARN = 2 } fm_log_level;
typedef void fm_log_fn(void *ctx, fm_log_level level, const char *message);

void fm_log_set(fm_log_fn *fn, void *ctx); /* NULL silences; not while other threads log */
void fm_log(fm_log_level level, const char *fmt, ...) FM_PRINTF(2, 3);

#endif
