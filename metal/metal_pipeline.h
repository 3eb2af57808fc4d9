/* Owns: the compiled shader library and its pipelines, one per kernel and set of function constants. */
#ifndef FM_METAL_PIPELINE_H
#define FM_METAL_PIPELINE_H

#include "metal_device.h"

/* The shaders' text, made by metal/embed.py from metal/kernels. */
extern const char fm_metal_source[];

/* Values of FM_FC_*, in that order; zero where a kernel does not look. */
typedef struct fm_metal_constants {
    fm_u32 v[FM_METAL_N_CONSTANTS];
} fm_metal_constants;

fm_status fm_metal_pipelines_open(fm_metal *m);
void fm_metal_pipelines_close(fm_metal *m);
/* `kernel` is a string literal: its address is kept. The result is borrowed until close. */
fm_status fm_metal_pipeline_get(fm_metal *m, const char *kernel, fm_metal_constants c,
                                id<MTLComputePipelineState> *out);

#endif
