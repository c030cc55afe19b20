// Where the ops stand in torch.ops is said when the library is loaded, by lion_kernels/native.py:
// one library serves any namespace, and two versions fit into one process.
#pragma once

namespace lion {

// Each registers its ops as torch.ops.<name_space>.<op>; raises where it has done so before.
void register_cpu_ops(const char* name_space);
void register_cuda_ops(const char* name_space);

}  // namespace lion
