#include "ranking.h"

#include "export.h"

EXPORT(ranking_forward_cuda)
