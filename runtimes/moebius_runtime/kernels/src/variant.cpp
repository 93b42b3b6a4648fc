// All kernels for one instruction set; see the build for the flags of each.
#include "feed_forward.h"
#include "group_norm.h"
#include "int8_conv3x3.h"
#include "int8_convolution.h"
#include "int8_feed_forward.h"
#include "int8_linear.h"
#include "int8_residual_block.h"
#include "local_lambda.h"
#include "residual_block.h"
#include "winograd.h"

#define MOEBIUS_TEXT_(x) #x
#define MOEBIUS_TEXT(x) MOEBIUS_TEXT_(x)

namespace MOEBIUS_VARIANT {
extern const moebius::Kernels kernels = {MOEBIUS_TEXT(MOEBIUS_VARIANT),
                                  feed_forward,
                                  local_lambda,
                                  interactive_lambda,
                                  residual_block,
                                  conv3x3,
                                  upsample_conv3x3,
                                  group_norm,
                                  int8_linear,
                                  int8_linear_to_picture,
                                  int8_linear_of_picture,
                                  int8_feed_forward,
                                  int8_residual_block,
                                  int8_conv3x3,
                                  int8_downsample_conv3x3,
                                  int8_upsample_conv3x3,
                                  int8_conv1x1};
}  // namespace MOEBIUS_VARIANT
