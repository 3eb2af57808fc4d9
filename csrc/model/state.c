/* Layout of the region: per full layer K then V, [kv heads, capacity, head_dim] in the KV format; from the next cache
 * line on three equal sets of linear state (two that take turns, one checkpoint), f32, each per linear layer conv then
 * recurrent state. */
#include "model/state.h"

#include <inttypes.h>
#include <string.h>

#include "base/mem.h"

enum { SETS = 3, CHECKPOINT = 2, LONG_STRIP = 8 << 20 };

struct fm_state {
    const fm_config *c;
    fm_backend *be;
    uint8_t *region;
    size_t bytes;
    fm_quant kv;
    int64_t capacity, kv_bytes /* of K or V of one layer */, sets_off, set_floats, conv_floats, rec_floats;
    int32_t index[FM_MAX_LAYERS]; /* among the layers of its kind */
    int64_t n_full, n_linear;
    int now;                      /* which set is the present one: 0 or 1 */
    int64_t pos;
    int64_t other_pos;            /* position of set 1 - now, -1: none */
    int64_t checkpoint_pos;       /* -1: none */
};

typedef struct sizes {
    int64_t n_full, n_linear, kv_bytes, sets_off, conv_floats, rec_floats, set_floats, total_bytes;
} sizes;

static fm_status measure(const fm_config *c, int64_t capacity, fm_quant kv, sizes *z)
{
    memset(z, 0, sizeof *z);
    for (int64_t l = 0; l < c->num_hidden_layers; l++)
        *(c->mixers[l] == FM_MIXER_FULL ? &z->n_full : &z->n_linear) += 1;
    int64_t kv_all = 0, sets = 0;
    bool ok = capacity >= 1 &&
              fm_mul_i64(c->num_key_value_heads * c->head_dim * fm_quant_get(kv)->bits / 8, capacity, &z->kv_bytes) &&
              fm_mul_i64(z->kv_bytes, 2 * z->n_full, &kv_all) && fm_add_i64(kv_all, FM_CACHE_LINE - 1, &z->sets_off);
    z->sets_off = z->sets_off / FM_CACHE_LINE * FM_CACHE_LINE;
    if (z->n_linear > 0) {
        z->conv_floats = (c->linear_conv_kernel_dim - 1) * fm_config_conv_dim(c);
        ok = ok && fm_mul_i64(fm_config_value_dim(c), c->linear_key_head_dim, &z->rec_floats) &&
             fm_mul_i64(z->conv_floats + z->rec_floats, z->n_linear, &z->set_floats) &&
             fm_mul_i64(z->set_floats, SETS * (int64_t)sizeof(float), &sets);
    }
    ok = ok && fm_add_i64(z->sets_off, sets, &z->total_bytes) && z->total_bytes < INT64_MAX / 2;
    if (!ok)
        return fm_fail(FM_ERR_ARG, "state for %" PRId64 " positions: the size overflows", capacity);
    z->total_bytes = z->total_bytes > 0 ? z->total_bytes : FM_CACHE_LINE;
    return FM_OK;
}

fm_status fm_state_bytes(const fm_config *c, int64_t capacity, fm_quant kv, size_t *bytes)
{
    sizes z;
    FM_TRY(measure(c, capacity, kv, &z));
    *bytes = (size_t)z.total_bytes;
    return FM_OK;
}

static float *set_base(const fm_state *s, int set)
{
    return (float *)(void *)(s->region + s->sets_off) + set * s->set_floats;
}

fm_status fm_state_open(const fm_config *c, fm_backend *be, int64_t capacity, fm_quant kv, fm_state **out)
{
    *out = NULL;
    sizes z;
    FM_TRY(measure(c, capacity, kv, &z));
    void *mem, *region;
    FM_TRY(fm_alloc(sizeof(fm_state), &mem));
    fm_state *s = mem;
    const fm_status status = be->v->alloc(be, (size_t)z.total_bytes, FM_USAGE_STATE, &region);
    if (status != FM_OK) {
        fm_free(s);
        return status;
    }
    *s = (fm_state){.c = c,
                    .be = be,
                    .region = region,
                    .bytes = (size_t)z.total_bytes,
                    .kv = kv,
                    .capacity = capacity,
                    .kv_bytes = z.kv_bytes,
                    .sets_off = z.sets_off,
                    .set_floats = z.set_floats,
                    .conv_floats = z.conv_floats,
                    .rec_floats = z.rec_floats,
                    .n_full = z.n_full,
                    .n_linear = z.n_linear,
                    .other_pos = -1,
                    .checkpoint_pos = -1};
    int32_t full = 0, linear = 0;
    for (int64_t l = 0; l < c->num_hidden_layers; l++)
        s->index[l] = c->mixers[l] == FM_MIXER_FULL ? full++ : linear++;
    /* Long strips of K and V are read faster in huge pages, and taken in fewer faults; the end of a short one would stay
     * unused. */
    if (z.kv_bytes / c->num_key_value_heads >= LONG_STRIP)
        fm_region_huge(region, (size_t)(z.kv_bytes * 2 * z.n_full));
    /* The first two forwards write all of both sets; positions not used yet shall cost no memory. */
    fm_region_fill(set_base(s, 0), (size_t)s->set_floats * 2 * sizeof(float));
    *out = s;
    return FM_OK;
}

void fm_state_close(fm_state *s)
{
    if (!s)
        return;
    s->be->v->free(s->be, s->region, s->bytes, FM_USAGE_STATE);
    fm_free(s);
}

int64_t fm_state_pos(const fm_state *s) { return s->pos; }

int64_t fm_state_capacity(const fm_state *s) { return s->capacity; }

fm_kv fm_state_kv(const fm_state *s, int32_t layer)
{
    uint8_t *k = s->region + s->index[layer] * 2 * s->kv_bytes;
    const fm_kv kv = {k, k + s->kv_bytes, s->capacity, s->kv};
    return kv;
}

fm_linear_state fm_state_linear(const fm_state *s, int32_t layer)
{
    const int64_t at = s->index[layer] * (s->conv_floats + s->rec_floats);
    const float *in = set_base(s, s->now) + at;
    float *out = set_base(s, 1 - s->now) + at;
    const fm_linear_state l = {in, in + s->conv_floats, out, out + s->conv_floats};
    return l;
}

void fm_state_begin(fm_state *s) { s->other_pos = -1; }

void fm_state_commit(fm_state *s, int64_t n)
{
    s->other_pos = s->pos;
    s->pos += n;
    s->now = 1 - s->now;
}

void fm_state_checkpoint(fm_state *s)
{
    if (s->n_linear > 0)
        memcpy(set_base(s, CHECKPOINT), set_base(s, s->now), (size_t)s->set_floats * sizeof(float));
    s->checkpoint_pos = s->pos;
}

int64_t fm_state_rewind(fm_state *s, int64_t want)
{
    if (s->n_linear == 0 || want == s->pos) {
        if (s->checkpoint_pos > want)
            s->checkpoint_pos = -1;
        s->other_pos = -1;
        s->pos = want;
        return want;
    }
    const int64_t other = s->other_pos <= want ? s->other_pos : -1;
    const int64_t mark = s->checkpoint_pos <= want ? s->checkpoint_pos : -1;
    if (other >= 0 && other >= mark) {
        s->now = 1 - s->now;
        s->pos = other;
    } else if (mark >= 0) {
        memcpy(set_base(s, s->now), set_base(s, CHECKPOINT), (size_t)s->set_floats * sizeof(float));
        s->pos = mark;
    } else {
        memset(set_base(s, s->now), 0, (size_t)s->set_floats * sizeof(float));
        s->pos = 0;
    }
    s->other_pos = -1;
    if (s->checkpoint_pos > s->pos)
        s->checkpoint_pos = -1; /* it remembers a future that is no more */
    return s->pos;
}

/* ---- as bytes: header, KV rows up to pos, the present linear state ------------------------------------ */

typedef struct save_header {
    char magic[8];
    int64_t version, kv_format /* disk id */, pos, n_full, n_linear, n_kv_heads, head_dim, conv_floats, rec_floats;
} save_header;

static save_header header_of(const fm_state *s)
{
    const save_header h = {"fmstate", 2, fm_quant_get(s->kv)->disk_id, s->pos, s->n_full, s->n_linear,
                           s->c->num_key_value_heads, s->c->head_dim, s->conv_floats, s->rec_floats};
    return h;
}

/* Of the first pos positions of one KV head's K or V. */
static size_t kv_row_bytes(const fm_state *s, int64_t pos)
{
    return (size_t)(pos * s->c->head_dim * fm_quant_get(s->kv)->bits / 8);
}

static size_t saved_bytes(const fm_state *s, int64_t pos)
{
    return sizeof(save_header) + (size_t)(s->n_full * 2 * s->c->num_key_value_heads) * kv_row_bytes(s, pos) +
           (size_t)s->set_floats * sizeof(float);
}

size_t fm_state_save_bytes(const fm_state *s) { return saved_bytes(s, s->pos); }

void fm_state_save(const fm_state *s, void *out)
{
    uint8_t *to = out;
    const save_header h = header_of(s);
    memcpy(to, &h, sizeof h);
    to += sizeof h;
    const size_t row = kv_row_bytes(s, s->pos);
    const int64_t n = s->n_full * 2 * s->c->num_key_value_heads;
    for (int64_t i = 0; i < n; i++, to += row)
        memcpy(to, s->region + (size_t)i * kv_row_bytes(s, s->capacity), row);
    memcpy(to, set_base(s, s->now), (size_t)s->set_floats * sizeof(float));
}

fm_status fm_state_load(fm_state *s, const void *data, size_t bytes)
{
    save_header h;
    if (bytes < sizeof h)
        return fm_fail(FM_ERR_FORMAT, "saved session: %zu bytes, the header alone has %zu", bytes, sizeof h);
    memcpy(&h, data, sizeof h);
    fm_quant kv;
    if (h.kv_format >= 0 && h.kv_format <= INT32_MAX && fm_quant_find_disk((int32_t)h.kv_format, &kv) && kv != s->kv &&
        h.version == header_of(s).version)
        return fm_fail(FM_ERR_FORMAT, "saved session: its KV cache is %s, this engine's %s; open it with kv_format %s",
                       fm_quant_get(kv)->name, fm_quant_get(s->kv)->name, fm_quant_get(kv)->name);
    save_header mine = header_of(s);
    mine.pos = h.pos;
    if (memcmp(&h, &mine, sizeof h) != 0)
        return fm_fail(FM_ERR_FORMAT, "saved session: it belongs to another model or format version");
    if (h.pos < 0 || h.pos > s->capacity)
        return fm_fail(FM_ERR_ARG, "saved session: %" PRId64 " positions, this session's context is %" PRId64, h.pos,
                       s->capacity);
    if (bytes != saved_bytes(s, h.pos))
        return fm_fail(FM_ERR_FORMAT, "saved session: %zu bytes, %zu are needed", bytes, saved_bytes(s, h.pos));
    const uint8_t *from = (const uint8_t *)data + sizeof h;
    const size_t row = kv_row_bytes(s, h.pos);
    const int64_t n = s->n_full * 2 * s->c->num_key_value_heads;
    for (int64_t i = 0; i < n; i++, from += row)
        memcpy(s->region + (size_t)i * kv_row_bytes(s, s->capacity), from, row);
    memcpy(set_base(s, s->now), from, (size_t)s->set_floats * sizeof(float));
    s->pos = h.pos;
    s->other_pos = -1;
    s->checkpoint_pos = -1;
    return FM_OK;
}
