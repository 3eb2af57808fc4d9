// Math functions as plain overloads, so that overload resolution behaves as in MSL: min(uint, 7)
// is ambiguous here too.
#ifndef MSL_MATH_H
#define MSL_MATH_H
namespace metal {
#ifdef MSL_CUDA
#include "msl_cuda_math.h"
#endif
#define MSL_EACHF(M, ...)                                                                          \
    M(float, __VA_ARGS__) M(float2, __VA_ARGS__) M(float3, __VA_ARGS__) M(float4, __VA_ARGS__)     \
    M(half, __VA_ARGS__) M(half2, __VA_ARGS__) M(half3, __VA_ARGS__) M(half4, __VA_ARGS__)
#define MSL_EACHI1(M, T) M(T) M(T##2) M(T##3) M(T##4)
#define MSL_EACHI(M)                                                                               \
    MSL_EACHI1(M, char) MSL_EACHI1(M, uchar) MSL_EACHI1(M, short) MSL_EACHI1(M, ushort)            \
    MSL_EACHI1(M, int) MSL_EACHI1(M, uint) MSL_EACHI1(M, long) MSL_EACHI1(M, ulong)
#define MSL_D1(T, name, expr)                                                                      \
    static inline T name(T x) { return expr; }
#define MSL_D2(T, name, expr)                                                                      \
    static inline T name(T x, T y) { return expr; }
#define MSL_D3(T, name, expr)                                                                      \
    static inline T name(T x, T y, T z) { return expr; }
// each function also in metal::precise and metal::fast
#define MSL_FUN(D, name, expr)                                                                     \
    MSL_EACHF(D, name, expr) namespace fast { MSL_EACHF(D, name, expr) }                           \
    namespace precise { MSL_EACHF(D, name, expr) }
MSL_FUN(MSL_D1, exp, __builtin_elementwise_exp(x))
MSL_FUN(MSL_D1, exp2, __builtin_elementwise_exp2(x))
MSL_FUN(MSL_D1, log, __builtin_elementwise_log(x))
MSL_FUN(MSL_D1, log2, __builtin_elementwise_log2(x))
MSL_FUN(MSL_D1, sqrt, __builtin_elementwise_sqrt(x))
MSL_FUN(MSL_D1, rsqrt, (decltype(x))1 / __builtin_elementwise_sqrt(x))
MSL_FUN(MSL_D1, sin, __builtin_elementwise_sin(x))
MSL_FUN(MSL_D1, cos, __builtin_elementwise_cos(x))
MSL_FUN(MSL_D1, tanh, __builtin_elementwise_tanh(x))
MSL_FUN(MSL_D1, floor, __builtin_elementwise_floor(x))
MSL_FUN(MSL_D1, ceil, __builtin_elementwise_ceil(x))
MSL_FUN(MSL_D1, rint, __builtin_elementwise_rint(x))
MSL_FUN(MSL_D1, trunc, __builtin_elementwise_trunc(x))
MSL_FUN(MSL_D1, fabs, __builtin_elementwise_abs(x))
MSL_FUN(MSL_D2, pow, __builtin_elementwise_pow(x, y))
MSL_FUN(MSL_D2, fmin, __builtin_elementwise_min(x, y))
MSL_FUN(MSL_D2, fmax, __builtin_elementwise_max(x, y))
MSL_FUN(MSL_D2, divide, x / y)
MSL_FUN(MSL_D3, fma, __builtin_elementwise_fma(x, y, z))
MSL_EACHF(MSL_D1, abs, __builtin_elementwise_abs(x))
MSL_EACHF(MSL_D2, min, __builtin_elementwise_min(x, y))
MSL_EACHF(MSL_D2, max, __builtin_elementwise_max(x, y))
MSL_EACHF(MSL_D3, clamp, __builtin_elementwise_min(__builtin_elementwise_max(x, y), z))
#define MSL_INT(T)                                                                                 \
    static inline T min(T x, T y) { return __builtin_elementwise_min(x, y); }                      \
    static inline T max(T x, T y) { return __builtin_elementwise_max(x, y); }                      \
    static inline T clamp(T x, T y, T z) {                                                         \
        return __builtin_elementwise_min(__builtin_elementwise_max(x, y), z);                      \
    }
MSL_EACHI(MSL_INT)
static inline int abs(int x) { return x < 0 ? -x : x; }
static inline bool isnan(float x) { return __builtin_isnan(x); }
static inline bool isinf(float x) { return __builtin_isinf(x); }
static inline bool isfinite(float x) { return __builtin_isfinite(x); }
static inline float ldexp(float x, int k) { return __builtin_ldexpf(x, k); }
#define MSL_DOT(T, N)                                                                              \
    static inline T dot(T##N a, T##N b) {                                                          \
        T s = a[0] * b[0];                                                                         \
        for (int i = 1; i < N; i++)                                                                \
            s += a[i] * b[i];                                                                      \
        return s;                                                                                  \
    }
MSL_DOT(float, 2) MSL_DOT(float, 3) MSL_DOT(float, 4) MSL_DOT(half, 4)
template <class T> inline T select(T a, T b, bool c) { return c ? b : a; }
static inline uint popcount(uint x) { return __builtin_popcount(x); }
static inline uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
static inline uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }
static inline uint extract_bits(uint x, uint o, uint n) {
    return n == 0 ? 0 : (x >> o) & (n == 32 ? ~0u : ((1u << n) - 1));
}
} // namespace metal
#endif
