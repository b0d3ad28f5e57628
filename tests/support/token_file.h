#pragma once
// Small token files for tests.

#include "tests/support/token_file_writer.h"
