// The macros of the Metal library; all that the preprocessing step sees of it.
#ifndef MSL_CONSTANTS_H
#define MSL_CONSTANTS_H
#define __METAL_VERSION__ 310
#define __METAL__ 1
#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define MAXFLOAT FLT_MAX
#define INT_MAX 2147483647
#define INT_MIN (-INT_MAX - 1)
#define UINT_MAX 4294967295u
#define M_PI_F 3.14159265358979323846f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.69314718055994530942f
#define is_function_constant_defined(x) metal::msl_fc_defined(x)
#endif
