/* X(ID, on-disk id, name, bits per weight): the weight formats. On-disk ids are never renumbered. */
#define FM_QUANT_LIST(X)                                                                           \
    X(F32, 1, "f32", 32)                                                                           \
    X(F16, 2, "f16", 16)                                                                           \
    X(BF16, 3, "bf16", 16)                                                                         \
    X(AFFINE2, 12, "affine2", 2)                                                                   \
    X(AFFINE3, 13, "affine3", 3)                                                                   \
    X(AFFINE4, 14, "affine4", 4)                                                                   \
    X(AFFINE5, 15, "affine5", 5)                                                                   \
    X(AFFINE6, 16, "affine6", 6)                                                                   \
    X(AFFINE8, 18, "affine8", 8)
