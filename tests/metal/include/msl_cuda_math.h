// Scalar functions that the NVPTX back end cannot lower by itself: through libdevice.
extern "C" MSL_CUDA_DEVICE {
    float __nv_expf(float);
    float __nv_exp2f(float);
    float __nv_logf(float);
    float __nv_log2f(float);
    float __nv_sinf(float);
    float __nv_cosf(float);
    float __nv_tanhf(float);
    float __nv_powf(float, float);
    float __nv_ldexpf(float, int);
}
