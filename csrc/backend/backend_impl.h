/* What a backend gives to the list. Private to backend/, metal/. */
#ifndef FM_BACKEND_IMPL_H
#define FM_BACKEND_IMPL_H

#include "backend/backend.h"

#define X(name) fm_status fm_backend_open_##name(const fm_backend_opts *opts, fm_backend **out);
FM_BACKEND_LIST(X)
#undef X

#endif
