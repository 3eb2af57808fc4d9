/* Region pragmas: the functions between BEGIN and END may use the named instruction sets, the rest of the
 * program may not. So one build runs everywhere and no file needs flags of its own. */
#ifndef FM_CPU_TARGET_H
#define FM_CPU_TARGET_H

#define FM_PRAGMA_(x) _Pragma(#x)
#define FM_PRAGMA(x) FM_PRAGMA_(x)

#if defined(__clang__)
#define FM_TARGET_BEGIN(isa)                                                                       \
    FM_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define FM_TARGET_END FM_PRAGMA(clang attribute pop)
#else
#define FM_TARGET_BEGIN(isa) FM_PRAGMA(GCC push_options) FM_PRAGMA(GCC target(isa))
#define FM_TARGET_END FM_PRAGMA(GCC pop_options)
#endif

#endif
