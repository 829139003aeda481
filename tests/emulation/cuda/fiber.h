// Switching between stacks, in the few instructions that the calling convention asks for.
#pragma once

#include <cstring>

// Saves the registers that a callee must keep on this stack, stores its top in *save and goes on with the stack `to`.
extern "C" void grank_emulation_switch(void** save, void* to);

#if defined(__x86_64__)
asm(R"(.text
.local grank_emulation_switch
.type grank_emulation_switch,@function
grank_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size grank_emulation_switch,.-grank_emulation_switch
)");
#elif defined(__aarch64__)
asm(R"(.text
.local grank_emulation_switch
.type grank_emulation_switch,%function
grank_emulation_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size grank_emulation_switch,.-grank_emulation_switch
)");
#else
#error "the emulator needs a context switch for this processor"
#endif

namespace grank::emulation {

// The stack pointer of a new stack, such that switching to it calls `start`, which must not return. `top` is a multiple
// of 16.
inline void* new_stack(char* top, void (*start)()) {
#if defined(__x86_64__)
  constexpr int kWords = 8, kStart = 6;  // six registers, the return address, and a hole that makes the alignment right
#else
  constexpr int kWords = 20, kStart = 11;  // x30
#endif
  void** words = reinterpret_cast<void**>(top) - kWords;
  std::memset(words, 0, kWords * sizeof(void*));
  words[kStart] = reinterpret_cast<void*>(start);
  return words;
}

}  // namespace grank::emulation
