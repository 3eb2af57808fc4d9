/* Owns: a backend around a device that also runs every op on a judge (the CPU backend, exact mode) and stops at the
 * first result that is further from the judge's than the op's bound allows: FLASHMOE_COMPARE.
 *
 * The device computes what it would compute alone: results keep their bits. The judge reads the same inputs before
 * the device runs (unified memory) and writes to copies. Both are within the bound of cpu/kernels.h, so they may
 * differ by twice that. Made to find mistakes, not to be fast: every op waits for the device. */
#ifndef FM_BACKEND_BACKEND_COMPARE_H
#define FM_BACKEND_BACKEND_COMPARE_H

#include "backend/backend.h"

/* Owns both on success, neither on failure: FM_ERR_UNSUPPORTED when the judge cannot read the device's memory or does
 * not work at once. A difference is FM_ERR_BACKEND. */
fm_status fm_backend_compare_open(fm_backend *device, fm_backend *judge, fm_pool *pool, fm_backend **out);

/* The wrapped device, borrowed: what it computes by itself is not compared. */
fm_backend *fm_backend_compare_device(fm_backend *b);
/* The largest difference since the last call, as a share of its bound; above 1 an op has failed. */
double fm_backend_compare_worst(fm_backend *b);

#endif
