// Scalar functions that the NVPTX back end cannot lower by itself: through libdevice.
// Included inside namespace metal, before the overloads that use the builtins.
#define MSL_CUDA_FN __attribute__((__device__))
extern "C" {
MSL_CUDA_FN float __nv_expf(float);
MSL_CUDA_FN float __nv_exp2f(float);
MSL_CUDA_FN float __nv_logf(float);
MSL_CUDA_FN float __nv_log2f(float);
MSL_CUDA_FN float __nv_sinf(float);
MSL_CUDA_FN float __nv_cosf(float);
MSL_CUDA_FN float __nv_tanhf(float);
MSL_CUDA_FN float __nv_powf(float, float);
MSL_CUDA_FN float __nv_ldexpf(float, int);
}
#define MSL_CU1(NAME, f)                                                                           \
    template <class T> MSL_CUDA_FN inline T cu_##NAME(T x) {                                       \
        if constexpr (vinfo<T>::n == 1)                                                            \
            return (T)f((float)x);                                                                 \
        else {                                                                                     \
            T r;                                                                                   \
            for (int i = 0; i < vinfo<T>::n; i++)                                                  \
                r[i] = (typename vinfo<T>::elem)f((float)x[i]);                                    \
            return r;                                                                              \
        }                                                                                          \
    }
MSL_CU1(exp, __nv_expf) MSL_CU1(exp2, __nv_exp2f) MSL_CU1(log, __nv_logf)
MSL_CU1(log2, __nv_log2f) MSL_CU1(sin, __nv_sinf) MSL_CU1(cos, __nv_cosf)
MSL_CU1(tanh, __nv_tanhf)
template <class T> MSL_CUDA_FN inline T cu_pow(T x, T y) {
    if constexpr (vinfo<T>::n == 1)
        return (T)__nv_powf((float)x, (float)y);
    else {
        T r;
        for (int i = 0; i < vinfo<T>::n; i++)
            r[i] = (typename vinfo<T>::elem)__nv_powf((float)x[i], (float)y[i]);
        return r;
    }
}
#define __builtin_elementwise_exp(x) cu_exp(x)
#define __builtin_elementwise_exp2(x) cu_exp2(x)
#define __builtin_elementwise_log(x) cu_log(x)
#define __builtin_elementwise_log2(x) cu_log2(x)
#define __builtin_elementwise_sin(x) cu_sin(x)
#define __builtin_elementwise_cos(x) cu_cos(x)
#define __builtin_elementwise_tanh(x) cu_tanh(x)
#define __builtin_elementwise_pow(x, y) cu_pow(x, y)
#define __builtin_ldexpf __nv_ldexpf
