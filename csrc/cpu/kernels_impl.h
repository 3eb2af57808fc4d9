/* What a variant file gives to the list: supported() and overlay(). Private to cpu/. */
#ifndef FM_CPU_KERNELS_IMPL_H
#define FM_CPU_KERNELS_IMPL_H

#include "cpu/kernels.h"

#define X(name)                                                                                    \
    bool fm_kernels_supported_##name(void);                                                        \
    void fm_kernels_overlay_##name(fm_kernels *k);
FM_CPU_LIST(X)
#undef X

void fm_kernels_overlay_amx_attn(fm_kernels *k); /* a part of amx */

#endif
