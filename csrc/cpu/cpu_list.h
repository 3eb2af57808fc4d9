/* X(name): CPU kernel variants, weakest first; a later one overlays what it implements. */
#define FM_CPU_LIST(X)                                                                             \
    X(ref)                                                                                         \
    X(avx2)                                                                                        \
    X(avx512)                                                                                      \
    X(amx)                                                                                         \
    X(neon)                                                                                        \
    X(i8mm)
