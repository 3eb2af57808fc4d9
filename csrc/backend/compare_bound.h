/* Owns: how far two computations of a matrix product or an expert may lie apart: the bounds of cpu/kernels.h with
 * their sums of magnitudes. Private to backend/. */
#ifndef FM_BACKEND_COMPARE_BOUND_H
#define FM_BACKEND_COMPARE_BOUND_H

#include "backend/backend.h"

/* bound[i * W->n_rows + r], 0 <= i < n: in, what is added to the product, in magnitude; out, the largest difference of
 * two results of  sum_c W[r,c] * x[c] + that,  x row rows[i] (NULL: row i). */
fm_status fm_bound_matmul(fm_pool *pool, const fm_mat *W, const float *x, int64_t ldx, const int32_t *rows, int64_t n,
                          float *bound);
/* bound[(out0 + i) * hidden + r] of one expert's outputs. */
fm_status fm_bound_expert(fm_pool *pool, const fm_expert_job *job, const float *x, float *bound);
/* bound[c] of the decoded row r. */
fm_status fm_bound_row(const fm_mat *W, int64_t r, float *bound);

#endif
