#pragma once
// Small token files for tests.

#include "data/token_file_writer.h"
