// Which path runs: the widest that the processor has, or the one that is asked for.
#include "paths.h"

#include <phyla/kernel.h>

#include <atomic>

namespace phyla::quantized {
namespace {

bool supports_avx512() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("bmi2");
#else
  return false;
#endif
}
bool supports_avx2() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("bmi2");
#else
  return false;
#endif
}

struct Choice {
  const char* name;
  const Path* path;
  bool supported;
};

const std::array<Choice, 3>& choices() {
  static const std::array<Choice, 3> all{
      {{"avx512", avx512_path(), supports_avx512()}, {"avx2", avx2_path(), supports_avx2()}, {"portable", portable_path(), true}}};
  return all;
}

const Path* widest() {
  for (const Choice& c : choices())
    if (c.path != nullptr && c.supported) return c.path;
  return portable_path();
}

std::atomic<const Path*>& chosen() {
  static std::atomic<const Path*> in_use{widest()};
  return in_use;
}

// Name of the path in use, after changing to `name` where that is not empty.
std::string use_path(const std::string& name) {
  for (const Choice& c : choices()) {
    if (name != c.name) continue;
    STD_TORCH_CHECK(c.path != nullptr, "the path ", name, " is not in this build of phyla.quantized");
    STD_TORCH_CHECK(c.supported, "this processor lacks the instructions of the path ", name);
    chosen() = c.path;
  }
  return path().name;
}

}  // namespace

const Path& path() { return *chosen().load(); }

}  // namespace phyla::quantized

STABLE_TORCH_LIBRARY_FRAGMENT(phyla_quantized, m) { m.def("use_path(str name) -> str"); }
STABLE_TORCH_LIBRARY_IMPL(phyla_quantized, CompositeExplicitAutograd, m) { m.impl("use_path", TORCH_BOX(&phyla::quantized::use_path)); }
