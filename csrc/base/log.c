/* Owns: the log callback. Without one, messages vanish. */
#include "base/log.h"

#include <stdarg.h>
#include <stdio.h>

static fm_log_fn *log_fn;
static void *log_ctx;

void fm_log_set(fm_log_fn *fn, void *ctx)
{
    log_fn = fn;
    log_ctx = ctx;
}

void fm_log(fm_log_level level, const char *fmt, ...)
{
    char text[1024];
    va_list args;
    if (log_fn == NULL)
        return;
    va_start(args, fmt);
    const int n = vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    if (n >= 0)
        log_fn(log_ctx, level, text);
}
