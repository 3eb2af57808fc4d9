/* What fm_desc_check and fm_arch_check refuse, and that they name it. */
#include "tiny_model.h"

#include <math.h>

static tiny t;
static fm_engine_opts opts = FM_ENGINE_OPTS_INIT;

static fm_status plan(void)
{
    fm_engine_plan p;
    return fm_engine_plan_bytes(&t.m, &opts, &p);
}

/* The statement spoils t; the plan must fail with this status and words, and leave its output alone. */
#define REFUSED(spoil, want, words)                                                                \
    do {                                                                                           \
        tiny_make(&t, true);                                                                       \
        spoil;                                                                                     \
        fm_engine_plan p_;                                                                         \
        memset(&p_, 0x5a, sizeof p_);                                                              \
        const fm_engine_plan was_ = p_;                                                            \
        CHECK_INT(fm_engine_plan_bytes(&t.m, &opts, &p_), want);                                   \
        CHECK_CONTAINS(fm_last_error()->message, words);                                           \
        CHECK(memcmp(&p_, &was_, sizeof p_) == 0);                                                 \
    } while (0)

static fm_piece *piece(int64_t i) { return (fm_piece *)(uintptr_t)t.tensors[i].pieces[0]; }

static int64_t *offset(int64_t l, int64_t i)
{
    return (int64_t *)(uintptr_t)&t.experts[l].seg_off[i * t.experts[l].n_sources];
}

static void accepts_the_model(void)
{
    for (int packed = 0; packed < 2; packed++) {
        tiny_make(&t, packed != 0);
        CHECK_INT(plan(), FM_OK);
        fm_engine_plan p;
        CHECK_INT(fm_engine_plan_bytes(&t.m, &opts, &p), FM_OK);
        CHECK_INT(p.n_experts_total, TINY_LAYERS * TINY_EXPERTS);
        CHECK_INT(p.n_slots_min, TINY_K);
        CHECK_INT(p.expert_record_bytes_max, 3 * (32 * 64 / 2 + 2 * (32 * 64 / TINY_GROUP) * 2));
        CHECK(p.slot_bytes >= (size_t)p.expert_record_bytes_max);
        fm_model_desc *copy = NULL;
        CHECK_INT(fm_desc_copy(&t.d, &copy), FM_OK);
        CHECK(copy != NULL && copy->tensors[3].source != t.tensors[3].source);
        CHECK(strcmp(copy->tensors[3].source, t.tensors[3].source) == 0);
        CHECK_INT(fm_desc_check(copy), FM_OK);
        fm_free(copy);
        tiny_free(&t);
    }
}

static void refuses_ranges(void)
{
    const fm_status F = FM_ERR_FORMAT;
    REFUSED(piece(4)->off = t.end, F, "layer 0 post_attention_layernorm: bytes"); tiny_free(&t);
    REFUSED(piece(4)->off = -1, F, "bytes -1 + 256, file has"); tiny_free(&t);
    REFUSED(piece(4)->off = INT64_MAX, F, "/nonexistent/tiny.bin"); tiny_free(&t);
    REFUSED(piece(4)->n_bytes = INT64_MAX, F, "file has"); tiny_free(&t);
    REFUSED(piece(4)->n_bytes -= 1, F, "its shape needs 256"); tiny_free(&t);
    REFUSED(piece(4)->n_bytes = -256, F, "file has"); tiny_free(&t);
    REFUSED(piece(4)->file = 1, F, "names file 1 of 1"); tiny_free(&t);
    REFUSED(piece(4)->file = -1, F, "names file -1 of 1"); tiny_free(&t);
    REFUSED(piece(4)->off = piece(3)->off + 4, F, "overlap at byte"); tiny_free(&t);
    REFUSED(*offset(1, 3) = t.end - 10, F, "layer 1 expert 3 (layers.1.experts.{}.0): bytes"); tiny_free(&t);
    REFUSED(*offset(1, 3) = -5, F, "bytes -5"); tiny_free(&t);
    REFUSED(*offset(1, 3) = INT64_MIN, F, "layer 1 expert 3"); tiny_free(&t);
    REFUSED(*offset(1, 3) += 8, F, "layer 1 experts and layer 1 experts overlap"); tiny_free(&t);
    REFUSED(*offset(1, 3) = 8, F, "overlap at byte"); tiny_free(&t);
    REFUSED(((int32_t *)(uintptr_t)t.experts[2].seg_file)[5] = 9, F, "names file 9"); tiny_free(&t);
    REFUSED(t.files[0].n_bytes = -1, F, "-1 bytes"); tiny_free(&t);
    REFUSED(t.files[0].n_bytes = t.end - 1 - TINY_STRIDE / 2, F, "layer 2 expert 7"); tiny_free(&t);
}

static void refuses_shapes_and_formats(void)
{
    const fm_status F = FM_ERR_FORMAT;
    REFUSED(t.tensors[4].format.n_cols = 63, F, "needs 252"); tiny_free(&t);
    REFUSED((t.tensors[4].format.n_cols = 32, t.tensors[4].format.n_rows = 2), F, "the config needs [1, 64]");
    tiny_free(&t);
    REFUSED(t.tensors[0].format.n_rows = 0, F, "out of range"); tiny_free(&t);
    REFUSED(t.tensors[0].format.n_rows = INT64_MAX, F, "out of range"); tiny_free(&t);
    REFUSED((t.tensors[0].format.n_rows = 1 << 30, t.tensors[0].format.n_cols = 1 << 30), F, "out of range");
    tiny_free(&t);
    REFUSED(t.tensors[0].format.quant = 99, F, "format 99"); tiny_free(&t);
    REFUSED(t.tensors[0].format.quant = -1, F, "format -1"); tiny_free(&t);
    REFUSED(t.tensors[4].format.quant = FM_QUANT_AFFINE4, F, "group"); tiny_free(&t);
    REFUSED((t.tensors[4].format.quant = FM_QUANT_AFFINE4, t.tensors[4].format.group = 64), F, "must be f32");
    tiny_free(&t);
    REFUSED(t.experts[0].role[1].group = 48, F, "group size 48"); tiny_free(&t);
    REFUSED(t.experts[0].role[1].scale_quant = FM_QUANT_AFFINE8, F, "scales must be"); tiny_free(&t);
    REFUSED(t.experts[0].role[2].n_rows = 128, F, "do not fit together"); tiny_free(&t);
    REFUSED(t.experts[0].n_sources = 3, F, "3 source names for 9 segments"); tiny_free(&t);
    REFUSED(t.experts[1].layer = 0, F, "out of order"); tiny_free(&t);
    REFUSED(t.experts[2].layer = 7, F, "layer 2: its experts are missing"); tiny_free(&t);
    REFUSED(t.experts[0].layer = -1, F, "experts"); tiny_free(&t);
    REFUSED(t.experts[1].n_experts = 7, F, "7 experts, num_experts is 8"); tiny_free(&t);
    REFUSED(t.experts[1].n_experts = 0, F, "0 experts"); tiny_free(&t);
}

static void refuses_tables(void)
{
    const fm_status F = FM_ERR_FORMAT;
    REFUSED(t.tensors[5].id = FM_TENSOR_COUNT, F, "tensor id"); tiny_free(&t);
    REFUSED(t.tensors[5].id = -1, F, "tensor id -1"); tiny_free(&t);
    REFUSED(t.tensors[4].layer = -2, F, "layer -2"); tiny_free(&t);
    REFUSED(t.tensors[4].layer = TINY_LAYERS, F, "layer 3 of 3"); tiny_free(&t);
    REFUSED(t.tensors[4].layer = INT32_MAX, F, "layer 2147483647"); tiny_free(&t);
    REFUSED(t.tensors[4].id = t.tensors[3].id, F, "is there twice"); tiny_free(&t);
    REFUSED(t.tensors[4].id = FM_TENSOR_Q_BIAS, F, "post_attention_layernorm' is missing"); tiny_free(&t);
    for (int64_t i = 0; i < 40; i++) { /* without any one of the tensors */
        tiny_make(&t, false);
        const fm_tensor_desc x = t.tensors[i];
        t.tensors[i] = t.tensors[t.d.n_tensors - 1];
        t.tensors[t.d.n_tensors - 1] = x;
        t.d.n_tensors--;
        CHECK_INT(plan(), FM_ERR_FORMAT);
        CHECK_CONTAINS(fm_last_error()->message, "is missing");
        CHECK_CONTAINS(fm_last_error()->message, fm_tensor_name(x.id));
        t.d.n_tensors++;
        tiny_free(&t);
    }
    REFUSED(t.m.arch = "qwen9", FM_ERR_UNSUPPORTED, "'qwen9' is not known; there are: "); tiny_free(&t);
    REFUSED(t.m.arch = "qwen3_moe", F, "attn_output_gate is 1"); tiny_free(&t);
}

static void refuses_config(void)
{
    const fm_status F = FM_ERR_FORMAT;
    REFUSED(t.c.hidden_size = 128, F, "the config needs"); tiny_free(&t);
    REFUSED(t.c.num_hidden_layers = 0, F, "num_hidden_layers is 0"); tiny_free(&t);
    REFUSED(t.c.num_hidden_layers = FM_MAX_LAYERS + 1, F, "num_hidden_layers"); tiny_free(&t);
    REFUSED(t.c.rms_norm_eps = NAN, F, "rms_norm_eps is"); tiny_free(&t);
    REFUSED(t.c.rope_theta = INFINITY, F, "rope_theta is inf"); tiny_free(&t);
    REFUSED(t.c.rotary_dim = 7, F, "must be even"); tiny_free(&t);
    REFUSED(t.c.num_attention_heads = 3, F, "no multiple of num_key_value_heads 2"); tiny_free(&t);
    REFUSED(t.c.num_experts_per_tok = 9, F, "num_experts_per_tok 9 of num_experts 8"); tiny_free(&t);
    REFUSED(t.c.mixers[1] = 2, F, "layer 1 has mixer 2"); tiny_free(&t);
    REFUSED(t.c.ffns[1] = -1, F, "layer 1 has ffn -1"); tiny_free(&t);
    REFUSED(t.c.ffns[1] = FM_FFN_DENSE, F, "intermediate_size"); tiny_free(&t);
    REFUSED(t.c.linear_num_key_heads = 3, F, "no multiple"); tiny_free(&t);
    REFUSED((t.c.n_group = 3, t.c.topk_group = 1), F, "n_group 3"); tiny_free(&t);
    const fm_status A = FM_ERR_ARG;
    opts.context = 0;
    REFUSED((void)0, A, "context is 0"); tiny_free(&t);
    opts.context = INT64_MAX / 8;
    REFUSED((void)0, A, "overflows"); tiny_free(&t);
    opts.context = 16;
    opts.max_rows = 65537;
    REFUSED((void)0, A, "65537"); tiny_free(&t);
    opts.max_rows = 8;
    opts.experts_per_token = 9;
    REFUSED((void)0, A, "must be 1 to 8 (trained: 2)"); tiny_free(&t);
    opts.experts_per_token = -1;
    REFUSED((void)0, A, "experts_per_token is -1"); tiny_free(&t);
    opts.experts_per_token = 0;
    opts.n_threads = -1;
    REFUSED((void)0, A, "threads: -1"); tiny_free(&t);
    opts.n_threads = 0;
}

int main(void)
{
    RUN(accepts_the_model);
    RUN(refuses_ranges);
    RUN(refuses_shapes_and_formats);
    RUN(refuses_tables);
    RUN(refuses_config);
    TEST_EXIT();
}
