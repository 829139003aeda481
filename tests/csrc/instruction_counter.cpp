// Counts the instructions that a Python call executes inside one shared library.
//
// The processor's trap flag makes it stop after every instruction, and the kernel sends SIGTRAP; the handler counts the
// stops whose next instruction lies in the library's code. What the interpreter, the C library and other threads do is
// not counted, so that the same call on the same data gives the same number, on any processor that executes the same
// code. A stop takes 20 us or so in a virtual machine: this is for calls of some 10,000 instructions.
#include <link.h>
#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>

extern "C" void* PyObject_CallObject(void* callable, void* arguments);  // of the interpreter that loads this

namespace {

struct Code {
  const char* path;
  uintptr_t begin = 0;
  uintptr_t end = 0;
};

uintptr_t code_begin, code_end;
volatile int64_t inside, stops;

int find_code(dl_phdr_info* object, size_t, void* wanted) {
  auto* code = static_cast<Code*>(wanted);
  if (std::strcmp(object->dlpi_name, code->path) != 0) return 0;
  for (int i = 0; i < object->dlpi_phnum; ++i) {
    const auto& segment = object->dlpi_phdr[i];
    if (segment.p_type == PT_LOAD && (segment.p_flags & PF_X)) {
      code->begin = object->dlpi_addr + segment.p_vaddr;
      code->end = code->begin + segment.p_memsz;
    }
  }
  return 1;
}

void on_trap(int, siginfo_t*, void* context) {
  const auto next = static_cast<uintptr_t>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
  inside = inside + (next >= code_begin && next < code_end);
  stops = stops + 1;
}

}  // namespace

// Calls callable(*arguments), whose result is dropped. Returns the instructions executed in the library at that path,
// -1 if it is not loaded, -2 if the trap flag stops nothing here, -3 if the call raised.
extern "C" int64_t count_instructions(const char* path, void* callable, void* arguments) {
  Code code{path};
  dl_iterate_phdr(find_code, &code);
  if (code.end == 0) return -1;
  code_begin = code.begin, code_end = code.end, inside = 0, stops = 0;
  struct sigaction counting = {}, before;
  counting.sa_sigaction = on_trap;
  counting.sa_flags = SA_SIGINFO;
  sigaction(SIGTRAP, &counting, &before);
  asm volatile("pushfq; orq $0x100, (%%rsp); popfq" ::: "memory", "cc");
  const void* result = PyObject_CallObject(callable, arguments);
  asm volatile("pushfq; andq $~0x100, (%%rsp); popfq" ::: "memory", "cc");
  sigaction(SIGTRAP, &before, nullptr);
  if (stops == 0) return -2;
  return result == nullptr ? -3 : inside;
}
