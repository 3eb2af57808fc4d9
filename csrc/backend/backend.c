/* Owns: choosing a backend by name, and one to compare it with. */
#include "backend/backend.h"

#include <string.h>

#include "backend/backend_compare.h"
#include "backend/backend_impl.h"
#include "base/env.h"

static const struct {
    const char *name;
    fm_status (*open)(const fm_backend_opts *opts, fm_backend **out);
} backends[] = {
#define X(name) {#name, fm_backend_open_##name},
    FM_BACKEND_LIST(X)
#undef X
};

const char *fm_backend_name_at(int i) { return i >= 0 && i < FM_COUNT(backends) ? backends[i].name : NULL; }

static fm_status find(const char *name, const char *what, int *out)
{
    for (int i = 0; i < FM_COUNT(backends); i++)
        if (strcmp(name, backends[i].name) == 0) {
            *out = i;
            return FM_OK;
        }
    return fm_fail(FM_ERR_ARG, "%s '%s' is unknown; there are: cpu, metal", what, name);
}

static fm_status open_compared(const fm_backend_opts *opts, int device, int judge, fm_backend **out)
{
    if (device == judge)
        return fm_fail(FM_ERR_ARG, "FLASHMOE_COMPARE=%s compares another backend with '%s', which runs here itself",
                       backends[judge].name, backends[judge].name);
    const fm_backend_opts exact = {backends[judge].name, opts->pool, FM_NUMERIC_EXACT};
    fm_backend *d = NULL, *j = NULL;
    fm_status s = backends[judge].open(&exact, &j);
    if (s == FM_OK)
        s = backends[device].open(opts, &d);
    if (s == FM_OK)
        s = fm_backend_compare_open(d, j, opts->pool, out);
    if (s != FM_OK) {
        fm_backend_close(d);
        fm_backend_close(j);
    }
    return s;
}

fm_status fm_backend_open(const fm_backend_opts *opts, fm_backend **out)
{
    *out = NULL;
    int device = 0, judge = 0;
    const char *with = fm_env_get(FM_ENV_COMPARE);
    FM_TRY(find(opts->name ? opts->name : backends[0].name, "backend", &device));
    if (!with)
        return backends[device].open(opts, out);
    FM_TRY(find(with, "FLASHMOE_COMPARE: backend", &judge));
    return open_compared(opts, device, judge, out);
}

void fm_backend_close(fm_backend *b)
{
    if (b)
        b->v->close(b);
}
