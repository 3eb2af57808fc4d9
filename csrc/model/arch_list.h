/* X(name): the architectures, by the checkpoint's model_type. Each is model/arch_<name>.c. */
#define FM_ARCH_LIST(X)                                                                            \
    X(qwen3_5_moe)                                                                                 \
    X(qwen3_5)                                                                                     \
    X(qwen3_next)                                                                                  \
    X(qwen3_moe)                                                                                   \
    X(mixtral)                                                                                     \
    X(olmoe)                                                                                       \
    X(glm4_moe)
