/* Owns: one sequence's memory: KV caches of full layers, conv and recurrent state of linear layers, position.
 * Linear state is double-buffered: a forward reads the present one and writes the other; only commit flips them and
 * moves the position, so a forward that fails leaves the sequence where it was. Linear state cannot be cut short,
 * so rewinding goes to a remembered position: the one before the last forward, the checkpoint, or 0. */
#ifndef FM_MODEL_STATE_H
#define FM_MODEL_STATE_H

#include <stdbool.h>
#include <stddef.h>

#include "backend/backend.h"
#include "model/config.h"

typedef struct fm_state fm_state;

/* Bytes of the memory one sequence takes: full attention for capacity positions, three copies of linear state.
 * kv is the format of K and V: f32, f16 or bf16. */
fm_status fm_state_bytes(const fm_config *c, int64_t capacity, fm_quant kv, size_t *bytes);

/* c and be are borrowed and must outlive it. Starts at position 0. */
fm_status fm_state_open(const fm_config *c, fm_backend *be, int64_t capacity, fm_quant kv, fm_state **out);
void fm_state_close(fm_state *s); /* NULL is fine */

int64_t fm_state_pos(const fm_state *s);
int64_t fm_state_capacity(const fm_state *s);
fm_kv fm_state_kv(const fm_state *s, int32_t layer); /* of a full layer */
/* Of a linear layer; [kern-1, conv_dim] and [v_heads, dk, dv] f32. */
typedef struct fm_linear_state {
    const float *conv_in, *rec_in;
    float *conv_out, *rec_out;
} fm_linear_state;
fm_linear_state fm_state_linear(const fm_state *s, int32_t layer);

void fm_state_begin(fm_state *s);             /* a forward will write the other buffer: its content is lost */
void fm_state_commit(fm_state *s, int64_t n); /* n more positions are done */

void fm_state_checkpoint(fm_state *s);
/* 0 <= want <= pos. Goes to the latest remembered position <= want; models without linear layers go to want. */
int64_t fm_state_rewind(fm_state *s, int64_t want);

/* A sequence as bytes, for the same model and KV format and any capacity that holds it. */
size_t fm_state_save_bytes(const fm_state *s);
void fm_state_save(const fm_state *s, void *out);
fm_status fm_state_load(fm_state *s, const void *data, size_t bytes);

#endif
