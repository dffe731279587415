// The CUDA build. Both functions enqueue on params' stream of the current device and return null, or what went wrong.
#pragma once

#include "params.h"

namespace unigendet {
namespace cuda {

const char* alignment_loss(const AlignmentLossParams&);
const char* scale(const ScaleParams&);

}  // namespace cuda
}  // namespace unigendet
