/* Owns: choosing a backend by name. */
#include "backend/backend.h"

#include <string.h>

#include "backend/backend_impl.h"

static const struct {
    const char *name;
    fm_status (*open)(const fm_backend_opts *opts, fm_backend **out);
} backends[] = {
#define X(name) {#name, fm_backend_open_##name},
    FM_BACKEND_LIST(X)
#undef X
};

const char *fm_backend_name_at(int i) { return i >= 0 && i < FM_COUNT(backends) ? backends[i].name : NULL; }

fm_status fm_backend_open(const fm_backend_opts *opts, fm_backend **out)
{
    *out = NULL;
    const char *name = opts->name ? opts->name : "cpu";
    for (int i = 0; i < FM_COUNT(backends); i++)
        if (strcmp(name, backends[i].name) == 0)
            return backends[i].open(opts, out);
    return fm_fail(FM_ERR_ARG, "backend '%s' is unknown; there are: cpu, metal", name);
}

void fm_backend_close(fm_backend *b)
{
    if (b)
        b->v->close(b);
}
