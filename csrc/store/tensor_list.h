/* X(ID, "name", kind): the resident tensors. Names are the checkpoint's own, without prefix, layer number and
 * ".weight". kind VECTOR: decoded to f32 at load (norms, biases, conv taps); MATRIX: kept as stored. */
#define FM_TENSOR_LIST(X)                                                                          \
    X(EMBED, "embed_tokens", MATRIX)                                                               \
    X(NORM, "norm", VECTOR)                                                                        \
    X(LM_HEAD, "lm_head", MATRIX)                                                                  \
    X(INPUT_NORM, "input_layernorm", VECTOR)                                                       \
    X(POST_NORM, "post_attention_layernorm", VECTOR)                                               \
    X(Q_PROJ, "self_attn.q_proj", MATRIX)                                                          \
    X(K_PROJ, "self_attn.k_proj", MATRIX)                                                          \
    X(V_PROJ, "self_attn.v_proj", MATRIX)                                                          \
    X(O_PROJ, "self_attn.o_proj", MATRIX)                                                          \
    X(Q_BIAS, "self_attn.q_proj.bias", VECTOR)                                                     \
    X(K_BIAS, "self_attn.k_proj.bias", VECTOR)                                                     \
    X(V_BIAS, "self_attn.v_proj.bias", VECTOR)                                                     \
    X(O_BIAS, "self_attn.o_proj.bias", VECTOR)                                                     \
    X(Q_NORM, "self_attn.q_norm", VECTOR)                                                          \
    X(K_NORM, "self_attn.k_norm", VECTOR)                                                          \
    X(LIN_QKV, "linear_attn.in_proj_qkv", MATRIX)                                                  \
    X(LIN_Z, "linear_attn.in_proj_z", MATRIX)                                                      \
    X(LIN_B, "linear_attn.in_proj_b", MATRIX)                                                      \
    X(LIN_A, "linear_attn.in_proj_a", MATRIX)                                                      \
    X(LIN_CONV, "linear_attn.conv1d", VECTOR)                                                      \
    X(LIN_A_LOG, "linear_attn.A_log", VECTOR)                                                      \
    X(LIN_DT_BIAS, "linear_attn.dt_bias", VECTOR)                                                  \
    X(LIN_NORM, "linear_attn.norm", VECTOR)                                                        \
    X(LIN_OUT, "linear_attn.out_proj", MATRIX)                                                     \
    X(ROUTER, "mlp.gate", MATRIX)                                                                  \
    X(ROUTER_BIAS, "mlp.gate.e_score_correction_bias", VECTOR)                                     \
    X(SHARED_GATE_PROJ, "mlp.shared_expert.gate_proj", MATRIX)                                     \
    X(SHARED_UP_PROJ, "mlp.shared_expert.up_proj", MATRIX)                                         \
    X(SHARED_DOWN_PROJ, "mlp.shared_expert.down_proj", MATRIX)                                     \
    X(SHARED_GATE, "mlp.shared_expert_gate", MATRIX)                                               \
    X(MLP_GATE_PROJ, "mlp.gate_proj", MATRIX)                                                      \
    X(MLP_UP_PROJ, "mlp.up_proj", MATRIX)                                                          \
    X(MLP_DOWN_PROJ, "mlp.down_proj", MATRIX)
