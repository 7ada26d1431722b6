#include "nearest_neighbors.h"

#include "export.h"

EXPORT(nearest_neighbors_scan_cuda)
EXPORT(nearest_neighbors_select_cuda)
EXPORT(nearest_neighbors_rescan_cuda)
