/* Owns: fm_model_desc, the description of a checkpoint that a reader hands in, and its validation.
 * Knows files, tensors and expert segments; no architecture, no shapes of a model. Trusts no number: every range
 * is checked against the real file sizes. The Python twin is flashmoe/checkpoint/description.py. */
#ifndef FM_STORE_DESC_H
#define FM_STORE_DESC_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "cpu/kernels.h"
#include "quant/quant.h"
#include "store/tensor_list.h"

typedef enum fm_tensor_id {
#define X(id, name, kind) FM_TENSOR_##id,
    FM_TENSOR_LIST(X)
#undef X
    FM_TENSOR_COUNT
} fm_tensor_id;

const char *fm_tensor_name(int id);          /* "self_attn.q_proj"; "?" out of range */
bool fm_tensor_is_vector(int id);            /* decoded to f32 at load */
bool fm_tensor_find(const char *name, int *id);

typedef struct fm_desc_file {
    const char *path;
    int64_t n_bytes;
} fm_desc_file;

typedef struct fm_piece {
    int32_t file;
    int64_t off, n_bytes;
} fm_piece;

enum { FM_AREA_CODES, FM_AREA_SCALES, FM_AREA_BIASES, FM_AREA_COUNT };
enum { FM_ROLE_GATE, FM_ROLE_UP, FM_ROLE_DOWN, FM_ROLE_COUNT };
enum { FM_MAX_SEGMENTS = FM_ROLE_COUNT * FM_AREA_COUNT };

/* A matrix's format and shape. A vector is one row. */
typedef struct fm_format {
    int32_t quant, group, scale_quant; /* fm_quant */
    int64_t n_rows, n_cols;
} fm_format;

typedef struct fm_tensor_desc {
    int32_t id, layer; /* fm_tensor_id; -1 outside the layers */
    const char *source;
    fm_format format;
    bool add_one;                          /* vectors: apply 1 + w */
    const fm_piece *pieces[FM_AREA_COUNT]; /* concatenated they are the area */
    int64_t n_pieces[FM_AREA_COUNT];
} fm_tensor_desc;

typedef struct fm_expert_desc {
    int32_t layer;
    int64_t n_experts;
    fm_format role[FM_ROLE_COUNT];
    const int32_t *seg_file; /* [n_experts, n_segments] */
    const int64_t *seg_off;
    const uint32_t *crc;     /* [n_experts] over the segments in order; NULL: none recorded */
    int n_sources;
    const char *source[FM_MAX_SEGMENTS]; /* per segment, for messages; "{}" is the expert */
} fm_expert_desc;

typedef struct fm_model_desc {
    const fm_desc_file *files;
    int32_t n_files;
    const fm_tensor_desc *tensors;
    int64_t n_tensors;
    const fm_expert_desc *experts; /* layers ascending */
    int64_t n_expert_layers;
} fm_model_desc;

/* Segments of one expert in reading order: role by role, codes then scales then biases. */
typedef struct fm_segment {
    int role, area;
    int64_t n_bytes;
} fm_segment;
int fm_expert_segments(const fm_expert_desc *e, fm_segment out[FM_MAX_SEGMENTS]);

int64_t fm_format_area_bytes(const fm_format *f, int area); /* 0 for areas it does not have */

/* Every number: formats legal, areas complete, ranges inside files, no tensor twice, no bytes used twice. */
fm_status fm_desc_check(const fm_model_desc *d);

/* The deep copy that an engine keeps; one allocation, freed with fm_free. */
fm_status fm_desc_copy(const fm_model_desc *d, fm_model_desc **out);

#endif
