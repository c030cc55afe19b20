#include "cpu/ops.h"

#include "register.h"
#include "stable/boxed.h"
#include "stable/library.h"

void lion::register_cpu_ops(const char* name_space) {
  implement(name_space, "CPU",
            {{"lion_step", boxed<cpu::lion_step>},
             {"count_agreeing", boxed<cpu::count_agreeing>},
             {"encode", boxed<cpu::encode>},
             {"tally", boxed<cpu::tally>},
             {"elect", boxed<cpu::elect>},
             {"apply", boxed<cpu::apply>}});
}
