#include "cpu/ops.h"

#include <torch/csrc/stable/library.h>

#include "namespace.h"
#include "stable/boxed.h"

STABLE_TORCH_LIBRARY_IMPL(LION_KERNELS_NAMESPACE, CPU, m) {
  using lion::boxed;
  m.impl("lion_step", boxed<lion::cpu::lion_step>);
  m.impl("count_agreeing", boxed<lion::cpu::count_agreeing>);
  m.impl("encode", boxed<lion::cpu::encode>);
  m.impl("tally", boxed<lion::cpu::tally>);
  m.impl("elect", boxed<lion::cpu::elect>);
  m.impl("apply", boxed<lion::cpu::apply>);
}
