/* Stand-ins for backends that this build lacks, so that callers need no #ifdef. */
#include "backend/backend_impl.h"

#if !defined(FM_HAVE_METAL)
fm_status fm_backend_open_metal(const fm_backend_opts *opts, fm_backend **out)
{
    (void)opts;
    *out = NULL;
    return fm_fail(FM_ERR_UNSUPPORTED, "backend 'metal' is not in this build: it needs macOS 14 on Apple silicon");
}
#endif
