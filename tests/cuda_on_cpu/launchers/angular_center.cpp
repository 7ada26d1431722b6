#include "angular_center.h"

#include "export.h"

EXPORT(angular_center_forward_cuda)
EXPORT(angular_center_backward_cuda)
