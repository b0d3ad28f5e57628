// A program for a processor that does not exist (tests/kernels/CMakeLists.txt): its first own code
// is an illegal instruction.

namespace {

struct CompiledForMore {
  CompiledForMore() { __builtin_trap(); }
};
const CompiledForMore kFirst;

}  // namespace

int main() {
  return 0;
}
