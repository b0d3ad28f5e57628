#pragma once
// What a command was asked for, on standard output.

#include <string_view>

namespace upmoe {

// Opens /dev/null for standard streams that the caller closed: a file of ours would otherwise get their
// numbers, and be written into by whoever prints. Once, before any file is opened.
void hold_standard_streams();
// Writes to standard output and flushes. A reader that has had enough (`| head`) is no error: the rest is
// left out. Throws Error(kBadInput) when it cannot be written for another reason, such as a full disk.
void print_result(std::string_view text);

}  // namespace upmoe
