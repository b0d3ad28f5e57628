#pragma once
// Paths as people write them. One rule for every path of a configuration file, an override and an option: a
// leading ~ is $HOME, $NAME and ${NAME} are the environment's variables, $$ is a dollar sign. What has no
// value is refused, so that no folder gets the name of a variable; ./~ is a file whose name begins with ~.

#include <string>

namespace upmoe {

struct PathText {
  std::string path;
  std::string problem;  // empty: path holds
};
PathText expand_path(const std::string& written);
std::string path_as_text(const std::string& path);  // what expand_path reads back to `path`

}  // namespace upmoe
