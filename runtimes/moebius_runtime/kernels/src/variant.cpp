// All kernels for one instruction set; see the build for the flags of each.
#include "feed_forward.h"
#include "group_norm.h"
#include "local_lambda.h"
#include "residual_block.h"
#include "winograd.h"

#define MOEBIUS_TEXT_(x) #x
#define MOEBIUS_TEXT(x) MOEBIUS_TEXT_(x)

namespace MOEBIUS_VARIANT {
extern const moebius::Kernels kernels;
const moebius::Kernels kernels = {MOEBIUS_TEXT(MOEBIUS_VARIANT), feed_forward, local_lambda,
                                  residual_block,                conv3x3,      upsample_conv3x3, group_norm};
}  // namespace MOEBIUS_VARIANT
