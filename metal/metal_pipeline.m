/* Pipelines are specialised at run time: a format, group and dimension become constants for the compiler. */
#include "metal_pipeline.h"

#include <string.h>

static const char *reason(NSError *error) { return error ? [[error localizedDescription] UTF8String] : "unknown"; }

fm_status fm_metal_pipelines_open(fm_metal *m)
{
    fm_status status = FM_OK;
    @autoreleasepool {
        NSError *error = nil;
        NSString *source = [NSString stringWithUTF8String:fm_metal_source];
        MTLCompileOptions *options = [[MTLCompileOptions alloc] init];
        [options setLanguageVersion:MTLLanguageVersion3_1];
        [options setFastMathEnabled:NO]; /* infinities and rounding are part of the contracts */
        m->library = [m->device newLibraryWithSource:source options:options error:&error];
        [options release];
        if (!m->library)
            status = fm_fail(FM_ERR_BACKEND, "backend 'metal': the shaders do not compile: %s", reason(error));
    }
    return status;
}

void fm_metal_pipelines_close(fm_metal *m)
{
    for (int i = 0; i < m->n_pipelines; i++)
        [m->pipelines[i].state release];
    m->n_pipelines = 0;
    [m->library release];
    m->library = nil;
}

static fm_status build(fm_metal *m, const char *kernel, fm_metal_constants c, id<MTLComputePipelineState> *out)
{
    fm_status status = FM_OK;
    @autoreleasepool {
        NSError *error = nil;
        MTLFunctionConstantValues *values = [[MTLFunctionConstantValues alloc] init];
        for (NSUInteger i = 0; i < FM_METAL_N_CONSTANTS; i++)
            [values setConstantValue:&c.v[i] type:MTLDataTypeUInt atIndex:i];
        NSString *name = [NSString stringWithUTF8String:kernel];
        id<MTLFunction> function = [m->library newFunctionWithName:name constantValues:values error:&error];
        [values release];
        *out = function ? [m->device newComputePipelineStateWithFunction:function error:&error] : nil;
        [function release];
        if (!*out)
            status = fm_fail(FM_ERR_BACKEND, "backend 'metal': kernel '%s': %s", kernel, reason(error));
    }
    return status;
}

fm_status fm_metal_pipeline_get(fm_metal *m, const char *kernel, fm_metal_constants c,
                                id<MTLComputePipelineState> *out)
{
    for (int i = 0; i < m->n_pipelines; i++) {
        const fm_metal_pipeline *p = &m->pipelines[i];
        if (memcmp(p->constants, c.v, sizeof c.v) == 0 && strcmp(p->kernel, kernel) == 0) {
            *out = p->state;
            return FM_OK;
        }
    }
    if (m->n_pipelines == FM_METAL_MAX_PIPELINES)
        return fm_fail(FM_ERR_UNSUPPORTED, "backend 'metal': more than %d kernel variants", FM_METAL_MAX_PIPELINES);
    fm_metal_pipeline *p = &m->pipelines[m->n_pipelines];
    FM_TRY(build(m, kernel, c, &p->state));
    p->kernel = kernel;
    memcpy(p->constants, c.v, sizeof c.v);
    m->n_pipelines++;
    *out = p->state;
    return FM_OK;
}
