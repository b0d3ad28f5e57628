#pragma once
// A recipe as a table for people.

#include <string>

#include "upcycle/recipe.h"

namespace upmoe {

// A table for people: tensors of one kind in one line.
std::string describe(const Recipe& recipe);

}  // namespace upmoe
