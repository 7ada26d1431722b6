#include "k_reciprocal.h"

#include "export.h"

EXPORT(k_reciprocal_sets_cuda)
EXPORT(k_reciprocal_robust_sets_cuda)
EXPORT(k_reciprocal_listed_distance_cuda)
EXPORT(k_reciprocal_encode_cuda)
EXPORT(k_reciprocal_query_expansion_cuda)
EXPORT(k_reciprocal_invert_cuda)
EXPORT(k_reciprocal_blend_cuda)
EXPORT(k_reciprocal_topk_cuda)
EXPORT(k_reciprocal_matrix_neighbors_cuda)
