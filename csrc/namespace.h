// Where the ops stand in torch.ops: lion_kernels, unless a build names another place, so that two
// versions fit into one process.
#pragma once

#ifndef LION_KERNELS_NAMESPACE
#define LION_KERNELS_NAMESPACE lion_kernels
#endif
