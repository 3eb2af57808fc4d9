/* Owns: the only getenv of the core. */
#include "base/env.h"

#include <stdlib.h>

static const struct {
    const char *name, *meaning;
} table[FM_ENV_COUNT] = {
#define X(id, name, meaning) [FM_ENV_##id] = {name, meaning},
    FM_ENV_LIST(X)
#undef X
};

const char *fm_env_name(fm_env v)
{
    return table[v].name;
}
const char *fm_env_meaning(fm_env v)
{
    return table[v].meaning;
}

const char *fm_env_get(fm_env v)
{
    const char *value = getenv(table[v].name);
    return value != NULL && value[0] != '\0' ? value : NULL;
}
