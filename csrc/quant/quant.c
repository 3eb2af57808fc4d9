/* Owns: the table of formats and the rules of legal combinations. */
#include "quant/quant.h"

#include <assert.h>
#include <inttypes.h>
#include <string.h>

#include "quant/quant_affine.h"
#include "quant/quant_plain.h"

static const fm_quant_traits table[FM_QUANT_COUNT] = {
#define X(id, disk, name, bits)                                                                    \
    [FM_QUANT_##id] = {                                                                            \
        name, disk, bits, FM_QUANT_AFFINE_##id, fm_quant_decode_##id, fm_quant_encode_##id},
    FM_QUANT_LIST(X)
#undef X
};

static bool in_table(fm_quant q)
{
    return (unsigned)q < FM_QUANT_COUNT;
}

const fm_quant_traits *fm_quant_get(fm_quant q)
{
    assert(in_table(q));
    return &table[q];
}

bool fm_quant_find_name(const char *name, fm_quant *out)
{
    for (int q = 0; q < FM_QUANT_COUNT; q++)
        if (strcmp(table[q].name, name) == 0) {
            *out = (fm_quant)q;
            return true;
        }
    return false;
}

bool fm_quant_find_disk(int32_t disk_id, fm_quant *out)
{
    for (int q = 0; q < FM_QUANT_COUNT; q++)
        if (table[q].disk_id == disk_id) {
            *out = (fm_quant)q;
            return true;
        }
    return false;
}

fm_status fm_quant_check(fm_quant q, int64_t n_cols, int32_t group, fm_quant scale_format)
{
    if (!in_table(q))
        return fm_fail(FM_ERR_ARG, "quant format %d does not exist", (int)q);
    const fm_quant_traits *const t = &table[q];
    if (n_cols < 1 || n_cols > INT64_MAX / 64)
        return fm_fail(FM_ERR_ARG, "%s: %" PRId64 " columns", t->name, n_cols);
    if (!t->affine)
        return FM_OK;
    if (group != 16 && group != 32 && group != 64 && group != 128)
        return fm_fail(FM_ERR_UNSUPPORTED, "%s: group size %d, known are 16, 32, 64, 128", t->name,
                       (int)group);
    if (n_cols % group != 0)
        return fm_fail(FM_ERR_ARG, "%s: %" PRId64 " columns are no multiple of the group size %d",
                       t->name, n_cols, (int)group);
    if (!in_table(scale_format) || table[scale_format].affine)
        return fm_fail(FM_ERR_ARG, "%s: scales must be f32, f16 or bf16", t->name);
    /* Groups are multiples of 8 codes, so rows are whole bytes; this guards a new group size. */
    if (n_cols * t->bits % 8 != 0)
        return fm_fail(FM_ERR_ARG, "%s: a row of %" PRId64 " columns is not whole bytes", t->name,
                       n_cols);
    return FM_OK;
}

int64_t fm_quant_codes_bytes(fm_quant q, int64_t n_cols)
{
    return n_cols * fm_quant_get(q)->bits / 8;
}

int64_t fm_quant_scales_bytes(fm_quant q, int64_t n_cols, int32_t group, fm_quant scale_format)
{
    return fm_quant_get(q)->affine ? fm_quant_codes_bytes(scale_format, n_cols / group) : 0;
}
