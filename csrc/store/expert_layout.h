/* Owns: where an expert's bytes lie in files and in its slot. A window is one contiguous range of a file:
 * neighbouring segments merged, widened to the alignment of direct I/O; a large window is read in several parts. */
#ifndef FM_STORE_EXPERT_LAYOUT_H
#define FM_STORE_EXPERT_LAYOUT_H

#include "store/desc.h"

enum { FM_MAX_PARTS = 2 * FM_MAX_SEGMENTS };

/* One read. crc_skip and crc_bytes: the record's bytes in it (without what alignment added). */
typedef struct fm_part {
    int32_t file;
    int64_t off;          /* in the file, aligned */
    size_t bytes, wanted; /* wanted: what must exist */
    size_t place;         /* in the slot */
    size_t crc_skip, crc_bytes;
} fm_part;

typedef struct fm_expert_layout {
    int n_parts, n_segments;
    fm_part part[FM_MAX_PARTS];
    size_t segment[FM_MAX_SEGMENTS]; /* place of each segment's first byte in the slot */
    size_t bytes;                    /* of the slot */
} fm_expert_layout;

/* split_bytes: parts of at most about this size; 0: one part per window. */
void fm_expert_lay_out(const fm_expert_desc *e, int64_t id, size_t align, size_t split_bytes, fm_expert_layout *l);

/* The largest slot that any expert of the model needs [bytes], whole OS pages. */
size_t fm_expert_layout_max(const fm_model_desc *d, size_t align);

#endif
