/* Owns: the resident tensors (the trunk) in backend memory, found by semantic id and layer.
 * Matrices lie as stored; vectors are decoded to f32 with their +1 applied. Knows no architecture. */
#ifndef FM_STORE_WEIGHTS_H
#define FM_STORE_WEIGHTS_H

#include "backend/backend.h"
#include "base/threads.h"
#include "io/io.h"
#include "store/desc.h"

typedef struct fm_weights fm_weights;

/* Backend memory that the trunk takes [bytes]. */
fm_status fm_weights_bytes(const fm_model_desc *d, size_t *bytes);

/* Reads everything; refuses NaN and infinity by tensor name. d, io, be and pool are borrowed and must outlive it
 * (pool only for the call). */
fm_status fm_weights_open(const fm_model_desc *d, fm_io *io, fm_backend *be, fm_pool *pool, fm_weights **out);
void fm_weights_close(fm_weights *w); /* NULL is fine */

/* NULL when the checkpoint has no such tensor. Borrowed until close. */
const fm_mat *fm_weights_mat(const fm_weights *w, int id, int32_t layer);
const float *fm_weights_vec(const fm_weights *w, int id, int32_t layer);
const fm_tensor_desc *fm_weights_desc(const fm_weights *w, int id, int32_t layer);

/* FM_ERR_FORMAT naming path, source and element if a plain area, or an affine one's scales or biases, holds
 * NaN or infinity. */
fm_status fm_format_check_finite(const fm_format *f, const uint8_t *const area[FM_AREA_COUNT], const char *path,
                                 const char *source);

#endif
