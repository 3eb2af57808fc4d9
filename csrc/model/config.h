/* Owns: the model's numbers and their range checks. The reader's config dict has exactly these names. */
#ifndef FM_MODEL_CONFIG_H
#define FM_MODEL_CONFIG_H

#include <stdint.h>

#include "base/status.h"

#define FM_MAX_LAYERS 1024
#define FM_MAX_TOP_K 64

typedef enum fm_mixer { FM_MIXER_FULL = 0, FM_MIXER_LINEAR = 1 } fm_mixer;
typedef enum fm_ffn { FM_FFN_DENSE = 0, FM_FFN_MOE = 1 } fm_ffn;
typedef enum fm_qk_norm { FM_QK_NORM_NONE = 0, FM_QK_NORM_HEAD = 1, FM_QK_NORM_FLAT = 2 } fm_qk_norm;
typedef enum fm_score { FM_SCORE_SOFTMAX = 0, FM_SCORE_SIGMOID = 1 } fm_score;

/* X(type, name, low, high): scalar fields; every value outside [low, high] is FM_ERR_FORMAT.
 * Fields that an architecture does not have are 0 (low is then 0). */
#define FM_CONFIG_LIST(X)                                                                          \
    X(int64_t, num_hidden_layers, 1, FM_MAX_LAYERS)                                                \
    X(int64_t, hidden_size, 1, 1 << 20)                                                            \
    X(int64_t, vocab_size, 1, 1 << 26)                                                             \
    X(double, rms_norm_eps, 0, 1)                                                                  \
    X(int64_t, tie_word_embeddings, 0, 1)                                                          \
    X(int64_t, max_position_embeddings, 1, INT64_C(1) << 40)                                       \
    X(int64_t, num_attention_heads, 1, 1 << 16)                                                    \
    X(int64_t, num_key_value_heads, 1, 1 << 16)                                                    \
    X(int64_t, head_dim, 1, 1 << 16)                                                               \
    X(int64_t, rotary_dim, 0, 1 << 16)               /* even, <= head_dim */                       \
    X(double, rope_theta, 1, 1e18)                                                                 \
    X(int64_t, attn_output_gate, 0, 1)               /* q_proj rows: [query, gate] per head */     \
    X(int64_t, qk_norm, 0, 2)                        /* fm_qk_norm */                              \
    X(double, clip_qkv, 0, 1e30)                     /* 0: no clipping */                          \
    X(int64_t, linear_num_key_heads, 0, 1 << 16)                                                   \
    X(int64_t, linear_num_value_heads, 0, 1 << 16)   /* a multiple of the key heads */             \
    X(int64_t, linear_key_head_dim, 0, 1 << 16)                                                    \
    X(int64_t, linear_value_head_dim, 0, 1 << 16)                                                  \
    X(int64_t, linear_conv_kernel_dim, 0, 64)                                                      \
    X(int64_t, num_experts, 0, 1 << 16)                                                            \
    X(int64_t, num_experts_per_tok, 0, FM_MAX_TOP_K) /* the trained value */                       \
    X(int64_t, moe_intermediate_size, 0, 1 << 24)                                                  \
    X(int64_t, router_score, 0, 1)                   /* fm_score */                                \
    X(int64_t, norm_topk_prob, 0, 1)                                                               \
    X(double, norm_topk_eps, 0, 1)                   /* added to the sum before dividing */        \
    X(double, routed_scaling_factor, -1e6, 1e6)                                                    \
    X(int64_t, n_group, 0, 1 << 16)                  /* 0 or 1: no groups */                       \
    X(int64_t, topk_group, 0, 1 << 16)                                                             \
    X(int64_t, shared_expert_intermediate_size, 0, 1 << 24) /* 0: none */                          \
    X(int64_t, shared_expert_gate, 0, 1)             /* sigmoid gate on the shared expert */       \
    X(int64_t, intermediate_size, 0, 1 << 24)        /* of dense layers */

typedef struct fm_config {
#define X(type, name, low, high) type name;
    FM_CONFIG_LIST(X)
#undef X
    int32_t mixers[FM_MAX_LAYERS]; /* fm_mixer per layer */
    int32_t ffns[FM_MAX_LAYERS];   /* fm_ffn per layer */
} fm_config;

/* Ranges and the rules between fields; the message names the field and both numbers. */
fm_status fm_config_check(const fm_config *c);

/* Shapes used in many places. */
static inline int64_t fm_config_key_dim(const fm_config *c)
{
    return c->linear_num_key_heads * c->linear_key_head_dim;
}
static inline int64_t fm_config_value_dim(const fm_config *c)
{
    return c->linear_num_value_heads * c->linear_value_head_dim;
}
static inline int64_t fm_config_conv_dim(const fm_config *c)
{
    return 2 * fm_config_key_dim(c) + fm_config_value_dim(c);
}

#endif
