/* Owns: what an architecture is to the core: a name, the values of the config it stands for, and its tensors.
 * The blocks are generic; an architecture is a table. */
#ifndef FM_MODEL_ARCH_H
#define FM_MODEL_ARCH_H

#include <stdbool.h>

#include "base/status.h"
#include "model/arch_list.h"
#include "model/config.h"
#include "store/desc.h"

/* Where a tensor belongs. */
typedef enum fm_place { FM_AT_TOP, FM_AT_EVERY, FM_AT_FULL, FM_AT_LINEAR, FM_AT_MOE, FM_AT_DENSE } fm_place;

/* Dimensions, named after config fields; FM_DIM_ONE for vectors' rows. */
typedef enum fm_dim {
    FM_DIM_ONE,
    FM_DIM_VOCAB,
    FM_DIM_HIDDEN,
    FM_DIM_Q,          /* heads * head_dim, twice that with an output gate */
    FM_DIM_ATTN,       /* heads * head_dim */
    FM_DIM_KV,         /* kv heads * head_dim */
    FM_DIM_Q_NORM,     /* head_dim, or heads * head_dim for the flat norm */
    FM_DIM_K_NORM,
    FM_DIM_CONV,       /* conv channels */
    FM_DIM_CONV_TAPS,  /* conv channels * kernel */
    FM_DIM_VALUE,      /* value heads * value head dim */
    FM_DIM_V_HEADS,
    FM_DIM_V_HEAD_DIM,
    FM_DIM_EXPERTS,
    FM_DIM_SHARED,
    FM_DIM_DENSE,
} fm_dim;

typedef struct fm_arch_tensor {
    fm_tensor_id id;
    fm_place place;
    fm_dim rows, cols;
    bool optional;
} fm_arch_tensor;

typedef struct fm_arch {
    const char *name;
    const fm_arch_tensor *tensors; /* extra to the tables of common blocks, ends with id FM_TENSOR_COUNT */
    fm_status (*check)(const fm_config *c); /* what this name promises beyond fm_config_check */
} fm_arch;

fm_status fm_arch_find(const char *name, const fm_arch **out); /* FM_ERR_UNSUPPORTED lists what exists */
const char *fm_arch_name(int i);                               /* NULL past the end */

int64_t fm_arch_dim(const fm_config *c, fm_dim dim);
/* Every tensor and expert layer that arch + config need is there with its shape, and no other. */
fm_status fm_arch_check(const fm_arch *arch, const fm_config *c, const fm_model_desc *d);

/* Helper for check(): FM_ERR_FORMAT unless have == want. */
fm_status fm_arch_require(const char *arch, const char *field, double have, double want);

#endif
