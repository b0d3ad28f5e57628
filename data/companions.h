#pragma once
// Files that lie beside a model's weights and are carried along with it: tokenizer, chat templates,
// generation settings, licence.

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace upmoe {

bool is_companion(const std::string& name);  // a file of this name right in the folder
// Relative paths of those there are. Regular files inside the folder alone, and links to the blobs of the
// Hugging Face cache that the folder belongs to; of a link to anywhere else a warning says that it is not
// carried along: what somebody else's folder points to is not ours to publish.
std::vector<std::filesystem::path> companions_in(const std::filesystem::path& dir);
std::uint64_t companion_bytes(const std::filesystem::path& dir);
// Copies them into an existing folder, fsynced.
void copy_companions(const std::filesystem::path& from, const std::filesystem::path& to);

}  // namespace upmoe
