/* Owns: which variant runs. Starts from ref, overlays supported variants in list order. */
#include <pthread.h>
#include <string.h>

#include "base/env.h"
#include "cpu/kernels_impl.h"

static const struct {
    const char *name;
    bool (*supported)(void);
    void (*overlay)(fm_kernels *k);
} variants[] = {
#define X(name) {#name, fm_kernels_supported_##name, fm_kernels_overlay_##name},
    FM_CPU_LIST(X)
#undef X
};

const char *fm_kernels_name(int i) { return i >= 0 && i < FM_COUNT(variants) ? variants[i].name : NULL; }

bool fm_kernels_supported(int i) { return i >= 0 && i < FM_COUNT(variants) && variants[i].supported(); }

static void fill(fm_kernels *k, int last, fm_numeric numeric)
{
    k->numeric = numeric;
    for (int i = 0; i <= last; i++)
        if (variants[i].supported()) {
            variants[i].overlay(k);
            k->name = variants[i].name;
        }
}

fm_status fm_kernels_variant_numeric(const char *name, fm_numeric numeric, fm_kernels *out)
{
    for (int i = 0; i < FM_COUNT(variants); i++)
        if (strcmp(name, variants[i].name) == 0) {
            if (!variants[i].supported())
                return fm_fail(FM_ERR_ARG, "CPU variant '%s' is not supported by this CPU or OS", name);
            fm_kernels k = {0};
            fill(&k, i, numeric);
            *out = k;
            return FM_OK;
        }
    char have[256] = "";
    for (int i = 0; i < FM_COUNT(variants); i++) {
        strncat(have, " ", sizeof have - strlen(have) - 1);
        strncat(have, variants[i].name, sizeof have - strlen(have) - 1);
    }
    return fm_fail(FM_ERR_ARG, "CPU variant '%s' is unknown; this build has:%s", name, have);
}

fm_status fm_kernels_variant(const char *name, fm_kernels *out)
{
    return fm_kernels_variant_numeric(name, FM_NUMERIC_EXACT, out);
}

static fm_kernels tables[FM_NUMERIC_COUNT];
static pthread_once_t tables_once = PTHREAD_ONCE_INIT;

static void fill_best(void)
{
    for (int m = 0; m < FM_NUMERIC_COUNT; m++)
        fill(&tables[m], FM_COUNT(variants) - 1, (fm_numeric)m);
}

fm_status fm_kernels_get_numeric(fm_numeric numeric, const fm_kernels **out)
{
    const char *forced = fm_env_get(FM_ENV_CPU);
    if (forced != NULL) {
        static fm_kernels forced_tables[FM_NUMERIC_COUNT]; /* the same bytes whoever fills it; guarded by the lock */
        static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
        fm_kernels k;
        FM_TRY(fm_kernels_variant_numeric(forced, numeric, &k));
        fm_kernels *t = &forced_tables[numeric];
        pthread_mutex_lock(&lock);
        if (t->name == NULL || strcmp(t->name, k.name) != 0)
            *t = k;
        pthread_mutex_unlock(&lock);
        *out = t;
        return FM_OK;
    }
    pthread_once(&tables_once, fill_best);
    *out = &tables[numeric];
    return FM_OK;
}

fm_status fm_kernels_get(const fm_kernels **out) { return fm_kernels_get_numeric(FM_NUMERIC_EXACT, out); }

fm_mat fm_mat_make(fm_quant format, int32_t group, fm_quant scale_format, int64_t n_rows, int64_t n_cols,
                   const void *codes, const void *scales, const void *biases)
{
    const fm_mat m = {
        .format = format,
        .scale_format = scale_format,
        .group = group,
        .n_rows = n_rows,
        .n_cols = n_cols,
        .codes = codes,
        .scales = scales,
        .biases = biases,
        .codes_stride = fm_quant_codes_bytes(format, n_cols),
        .scales_stride = fm_quant_scales_bytes(format, n_cols, group, scale_format),
    };
    return m;
}
