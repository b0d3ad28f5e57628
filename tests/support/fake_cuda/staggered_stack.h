#pragma once
// The stacks of fibers, which begin at different cache lines of their pages: all fibers of a block use the top of their
// stacks in turn, and at one place of a page these would drive each other out of a cache's few ways.

#include <boost/context/stack_context.hpp>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace simt {

class StaggeredStack {  // a StackAllocator, of one stack
 public:
  StaggeredStack(std::size_t bytes, std::size_t number) : bytes_(bytes), shift_(number % 64 * 192) {}
  boost::context::stack_context allocate() const {
    auto* memory = static_cast<char*>(std::malloc(bytes_));
    if (memory == nullptr) throw std::bad_alloc();
    boost::context::stack_context stack;
    stack.size = bytes_ - shift_;
    stack.sp = memory + stack.size;
    return stack;
  }
  static void deallocate(boost::context::stack_context& stack) {
    std::free(static_cast<char*>(stack.sp) - stack.size);
  }

 private:
  std::size_t bytes_, shift_;
};

}  // namespace simt
