// The kernels that this CPU runs.
#pragma once

#include <vector>

#include "kernels.h"

namespace moebius {

// Those of every variant that the build has and this CPU runs, the best one last.
const std::vector<const Kernels*>& usable_kernels();

// The best ones, or those that MOEBIUS_KERNELS names, if the CPU runs them.
const Kernels& kernels();

}  // namespace moebius
