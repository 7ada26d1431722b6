#include "pairwise_distance.h"

#include "export.h"

EXPORT(pairwise_distance_max_abs_cuda)
EXPORT(pairwise_distance_norm_cuda)
EXPORT(pairwise_distance_prepare_cuda)
EXPORT(pairwise_distance_block_cuda)
EXPORT(pairwise_distance_tiled_cuda)
