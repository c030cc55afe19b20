#include "simd/levels.h"

#include <atomic>
#include <cstdlib>

#include "stable/errors.h"

namespace lion {
namespace {

std::vector<const SimdLevel*> available() {
  std::vector<const SimdLevel*> levels;
  for (const SimdLevel* level : {portable_level(), avx2_level(), avx512_level()})
    if (level != nullptr) levels.push_back(level);
  return levels;
}

const SimdLevel* find(const std::string& name) {
  std::string known;
  for (const SimdLevel* level : available()) {
    if (name == level->name) return level;
    known += (known.empty() ? "" : ", ") + std::string(level->name);
  }
  raise_value_error("SIMD level must be one of ", known, " on this machine, got ", name);
}

std::atomic<const SimdLevel*>& current() {
  static std::atomic<const SimdLevel*> level = [] {
    const char* wanted = std::getenv("LION_KERNELS_SIMD");
    return wanted != nullptr ? find(wanted) : available().back();
  }();
  return level;
}

}  // namespace

const SimdLevel& simd_level() { return *current().load(std::memory_order_relaxed); }

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (const SimdLevel* level : available()) names.emplace_back(level->name);
  return names;
}

void set_simd_level(const std::string& name) { current().store(find(name)); }

}  // namespace lion
