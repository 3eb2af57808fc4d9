/* Owns: the forward of a few rows as one recording. The device tells the host when a layer's router is done and holds
 * until the host has the experts; meanwhile it computes the shared expert, and the cached experts while others are
 * read. Private to model/. */
#ifndef FM_MODEL_PIPELINE_H
#define FM_MODEL_PIPELINE_H

#include "model/block.h"

/* Bytes of device memory that open takes at most. */
size_t fm_pipeline_bytes(const fm_config *c, int64_t k, int64_t max_rows);
/* Sets m->pipe where the device is pipelined, the model has experts and FLASHMOE_PIPELINE is not 0. */
fm_status fm_pipeline_open(fm_model *m);
void fm_pipeline_close(fm_model *m);

/* Whether all experts that this batch can choose fit a layer's turn. */
bool fm_pipeline_fits(const fm_model *m, const fm_batch *b);
/* The same bits as the plain forward. After an error the device is idle (or lost) and nothing stays pinned. */
fm_status fm_pipeline_forward(fm_model *m, const fm_batch *b);

#endif
