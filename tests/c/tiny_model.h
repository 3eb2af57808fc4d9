/* A tiny qwen3_5_moe model built in C: a linear and two full layers, MoE in all, bf16 trunk, affine4 experts,
 * described in exactly sized heap arrays (so that a sanitizer sees one element too far) and, when asked, written
 * to one file of random weights. */
#ifndef FM_TESTS_TINY_MODEL_H
#define FM_TESTS_TINY_MODEL_H

#include "harness.h"

#include <unistd.h>

#include "base/crc32c.h"
#include "base/mem.h"
#include "flashmoe.h"
#include "model/arch.h"
#include "model/config.h"
#include "quant/half.h"
#include "quant/quant.h"
#include "store/desc.h"

enum { TINY_LAYERS = 3, TINY_EXPERTS = 8, TINY_K = 2, TINY_GROUP = 32, TINY_VOCAB = 48, TINY_STRIDE = 4096 };

typedef struct tiny {
    fm_config c;
    fm_model_desc d;
    fm_engine_model m;
    fm_desc_file *files;
    fm_tensor_desc *tensors;
    fm_expert_desc *experts;
    int64_t end; /* bytes of the file so far */
    char path[4096];
} tiny;

static inline fm_config tiny_config(void)
{
    fm_config c = {.num_hidden_layers = TINY_LAYERS, .hidden_size = 64, .vocab_size = TINY_VOCAB,
                   .rms_norm_eps = 1e-6, .max_position_embeddings = 4096, .num_attention_heads = 4,
                   .num_key_value_heads = 2, .head_dim = 16, .rotary_dim = 8, .rope_theta = 1e4,
                   .attn_output_gate = 1, .qk_norm = FM_QK_NORM_HEAD, .linear_num_key_heads = 2,
                   .linear_num_value_heads = 4, .linear_key_head_dim = 16, .linear_value_head_dim = 16,
                   .linear_conv_kernel_dim = 4, .num_experts = TINY_EXPERTS, .num_experts_per_tok = TINY_K,
                   .moe_intermediate_size = 32, .router_score = FM_SCORE_SOFTMAX, .norm_topk_prob = 1,
                   .routed_scaling_factor = 1, .shared_expert_intermediate_size = 32, .shared_expert_gate = 1};
    for (int l = 0; l < TINY_LAYERS; l++) {
        c.mixers[l] = l == 0 ? FM_MIXER_LINEAR : FM_MIXER_FULL;
        c.ffns[l] = FM_FFN_MOE;
    }
    return c;
}

static inline void *tiny_alloc(size_t n, size_t bytes)
{
    void *const p = calloc(n > 0 ? n : 1, bytes);
    if (p == NULL)
        exit(1);
    return p;
}

static inline void tiny_tensor(tiny *t, int id, int32_t layer, fm_dim rows, fm_dim cols)
{
    fm_tensor_desc *const x = &t->tensors[t->d.n_tensors++];
    char *const source = tiny_alloc(64, 1);
    snprintf(source, 64, "layer %d %s", layer, fm_tensor_name(id));
    const bool vector = fm_tensor_is_vector(id);
    *x = (fm_tensor_desc){.id = id, .layer = layer, .source = source, .add_one = vector};
    x->format = (fm_format){vector ? FM_QUANT_F32 : FM_QUANT_BF16, 0, FM_QUANT_BF16, fm_arch_dim(&t->c, rows),
                            fm_arch_dim(&t->c, cols)};
    fm_piece *const p = tiny_alloc(1, sizeof *p);
    *p = (fm_piece){0, t->end, fm_format_area_bytes(&x->format, FM_AREA_CODES)};
    x->pieces[FM_AREA_CODES] = p;
    x->n_pieces[FM_AREA_CODES] = 1;
    t->end += p->n_bytes;
}

static inline void tiny_trunk(tiny *t)
{
    tiny_tensor(t, FM_TENSOR_EMBED, -1, FM_DIM_VOCAB, FM_DIM_HIDDEN);
    tiny_tensor(t, FM_TENSOR_NORM, -1, FM_DIM_ONE, FM_DIM_HIDDEN);
    tiny_tensor(t, FM_TENSOR_LM_HEAD, -1, FM_DIM_VOCAB, FM_DIM_HIDDEN);
    for (int32_t l = 0; l < TINY_LAYERS; l++) {
        tiny_tensor(t, FM_TENSOR_INPUT_NORM, l, FM_DIM_ONE, FM_DIM_HIDDEN);
        tiny_tensor(t, FM_TENSOR_POST_NORM, l, FM_DIM_ONE, FM_DIM_HIDDEN);
        if (t->c.mixers[l] == FM_MIXER_FULL) {
            tiny_tensor(t, FM_TENSOR_Q_PROJ, l, FM_DIM_Q, FM_DIM_HIDDEN);
            tiny_tensor(t, FM_TENSOR_K_PROJ, l, FM_DIM_KV, FM_DIM_HIDDEN);
            tiny_tensor(t, FM_TENSOR_V_PROJ, l, FM_DIM_KV, FM_DIM_HIDDEN);
            tiny_tensor(t, FM_TENSOR_O_PROJ, l, FM_DIM_HIDDEN, FM_DIM_ATTN);
            tiny_tensor(t, FM_TENSOR_Q_NORM, l, FM_DIM_ONE, FM_DIM_Q_NORM);
            tiny_tensor(t, FM_TENSOR_K_NORM, l, FM_DIM_ONE, FM_DIM_K_NORM);
        } else {
            tiny_tensor(t, FM_TENSOR_LIN_QKV, l, FM_DIM_CONV, FM_DIM_HIDDEN);
            tiny_tensor(t, FM_TENSOR_LIN_Z, l, FM_DIM_VALUE, FM_DIM_HIDDEN);
            tiny_tensor(t, FM_TENSOR_LIN_B, l, FM_DIM_V_HEADS, FM_DIM_HIDDEN);
            tiny_tensor(t, FM_TENSOR_LIN_A, l, FM_DIM_V_HEADS, FM_DIM_HIDDEN);
            tiny_tensor(t, FM_TENSOR_LIN_CONV, l, FM_DIM_ONE, FM_DIM_CONV_TAPS);
            tiny_tensor(t, FM_TENSOR_LIN_A_LOG, l, FM_DIM_ONE, FM_DIM_V_HEADS);
            tiny_tensor(t, FM_TENSOR_LIN_DT_BIAS, l, FM_DIM_ONE, FM_DIM_V_HEADS);
            tiny_tensor(t, FM_TENSOR_LIN_NORM, l, FM_DIM_ONE, FM_DIM_V_HEAD_DIM);
            tiny_tensor(t, FM_TENSOR_LIN_OUT, l, FM_DIM_HIDDEN, FM_DIM_VALUE);
        }
        tiny_tensor(t, FM_TENSOR_ROUTER, l, FM_DIM_EXPERTS, FM_DIM_HIDDEN);
        tiny_tensor(t, FM_TENSOR_SHARED_GATE_PROJ, l, FM_DIM_SHARED, FM_DIM_HIDDEN);
        tiny_tensor(t, FM_TENSOR_SHARED_UP_PROJ, l, FM_DIM_SHARED, FM_DIM_HIDDEN);
        tiny_tensor(t, FM_TENSOR_SHARED_DOWN_PROJ, l, FM_DIM_HIDDEN, FM_DIM_SHARED);
        tiny_tensor(t, FM_TENSOR_SHARED_GATE, l, FM_DIM_ONE, FM_DIM_HIDDEN);
    }
}

/* packed: an expert is one record at a multiple of TINY_STRIDE; else each segment is a table of its own. */
static inline void tiny_experts(tiny *t, int32_t layer, bool packed)
{
    fm_expert_desc *const e = &t->experts[t->d.n_expert_layers++];
    const int64_t H = t->c.hidden_size, I = t->c.moe_intermediate_size, n = t->c.num_experts;
    *e = (fm_expert_desc){.layer = layer, .n_experts = n};
    for (int r = 0; r < FM_ROLE_COUNT; r++)
        e->role[r] = (fm_format){FM_QUANT_AFFINE4, TINY_GROUP, FM_QUANT_BF16, r == FM_ROLE_DOWN ? H : I,
                                 r == FM_ROLE_DOWN ? I : H};
    fm_segment seg[FM_MAX_SEGMENTS];
    e->n_sources = fm_expert_segments(e, seg);
    int32_t *const file = tiny_alloc((size_t)(n * e->n_sources), sizeof *file);
    int64_t *const off = tiny_alloc((size_t)(n * e->n_sources), sizeof *off);
    if (packed)
        t->end = (int64_t)fm_round_up((size_t)t->end, TINY_STRIDE);
    for (int s = 0; s < e->n_sources; s++) {
        char *const source = tiny_alloc(64, 1);
        snprintf(source, 64, "layers.%d.experts.{}.%d", layer, s);
        e->source[s] = source;
    }
    for (int64_t i = 0; i < n; i++)
        for (int s = 0; s < e->n_sources; s++) {
            int64_t at = t->end, before = 0;
            for (int k = 0; k < s; k++)
                before += packed ? seg[k].n_bytes : n * seg[k].n_bytes;
            at += before + i * (packed ? TINY_STRIDE : seg[s].n_bytes);
            off[i * e->n_sources + s] = at;
        }
    for (int s = 0; s < e->n_sources && !packed; s++)
        t->end += n * seg[s].n_bytes;
    t->end += packed ? n * TINY_STRIDE : 0;
    e->seg_file = file;
    e->seg_off = off;
}

/* The description only; path is a name that need not exist. */
static inline void tiny_make(tiny *t, bool packed)
{
    memset(t, 0, sizeof *t);
    t->c = tiny_config();
    t->files = tiny_alloc(1, sizeof *t->files);
    t->tensors = tiny_alloc(64, sizeof *t->tensors);
    t->experts = tiny_alloc(TINY_LAYERS, sizeof *t->experts);
    snprintf(t->path, sizeof t->path, "/nonexistent/tiny.bin");
    tiny_trunk(t);
    for (int32_t l = 0; l < TINY_LAYERS; l++)
        tiny_experts(t, l, packed);
    fm_tensor_desc *const exact = realloc(t->tensors, (size_t)t->d.n_tensors * sizeof *exact);
    t->tensors = exact != NULL ? exact : t->tensors;
    t->files[0] = (fm_desc_file){t->path, t->end};
    t->d.files = t->files;
    t->d.n_files = 1;
    t->d.tensors = t->tensors;
    t->d.experts = t->experts;
    t->m = (fm_engine_model){"qwen3_5_moe", &t->c, &t->d};
}

static inline void tiny_fill(uint8_t *data, int64_t off, fm_quant q, int64_t n, float scale, uint64_t *rng)
{
    for (int64_t i = 0; i < n; i++) {
        const float v = scale * ((float)(test_rand(rng) >> 40) / 16777216.0f - 0.5f);
        const uint16_t h = fm_f32_to_bf16(v);
        if (q == FM_QUANT_F32)
            memcpy(data + off + 4 * i, &v, 4);
        else
            memcpy(data + off + 2 * i, &h, 2);
    }
}

/* Random weights to a new file; records the checksums. */
static inline void tiny_write(tiny *t, uint64_t seed)
{
    const char *const dir = getenv("TMPDIR");
    snprintf(t->path, sizeof t->path, "%s/fm_tiny_XXXXXX", dir != NULL && dir[0] ? dir : "/tmp");
    const int fd = mkstemp(t->path);
    uint8_t *const data = tiny_alloc((size_t)t->end, 1);
    for (int64_t i = 0; i < t->d.n_tensors; i++) {
        const fm_tensor_desc *const x = &t->tensors[i];
        const int64_t n = x->format.n_rows * x->format.n_cols;
        tiny_fill(data, x->pieces[0][0].off, (fm_quant)x->format.quant, n, x->layer < 0 ? 2.0f : 0.5f, &seed);
    }
    for (int64_t l = 0; l < t->d.n_expert_layers; l++) {
        fm_expert_desc *const e = &t->experts[l];
        uint32_t *const crc = tiny_alloc((size_t)e->n_experts, sizeof *crc);
        fm_segment seg[FM_MAX_SEGMENTS];
        const int n = fm_expert_segments(e, seg);
        for (int64_t i = 0; i < e->n_experts * n; i++) {
            const fm_segment *const s = &seg[i % n];
            if (s->area == FM_AREA_CODES)
                for (int64_t b = 0; b < s->n_bytes; b++)
                    data[e->seg_off[i] + b] = (uint8_t)test_rand(&seed);
            else
                tiny_fill(data, e->seg_off[i], FM_QUANT_BF16, s->n_bytes / 2, 0.05f, &seed);
            crc[i / n] = fm_crc32c(crc[i / n], data + e->seg_off[i], (size_t)s->n_bytes);
        }
        e->crc = crc;
    }
    if (fd < 0 || write(fd, data, (size_t)t->end) != t->end) {
        perror(t->path);
        exit(1);
    }
    close(fd);
    free(data);
}

static inline void tiny_free(tiny *t)
{
    unlink(t->path);
    for (int64_t i = 0; i < t->d.n_tensors; i++) {
        free((void *)(uintptr_t)t->tensors[i].source);
        free((void *)(uintptr_t)t->tensors[i].pieces[FM_AREA_CODES]);
    }
    for (int64_t l = 0; l < t->d.n_expert_layers; l++) {
        fm_expert_desc *const e = &t->experts[l];
        for (int s = 0; s < FM_MAX_SEGMENTS; s++)
            free((void *)(uintptr_t)e->source[s]);
        free((void *)(uintptr_t)e->seg_file);
        free((void *)(uintptr_t)e->seg_off);
        free((void *)(uintptr_t)e->crc);
    }
    free(t->files);
    free(t->tensors);
    free(t->experts);
}

#endif
