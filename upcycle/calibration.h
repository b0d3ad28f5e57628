#pragma once
// What tokens told about the dense model, as a recipe needs it. Made by the program, which has the trainer's layers;
// here it is data.

#include <cstdint>
#include <string>
#include <vector>

namespace upmoe {

struct Calibration {
  struct Layer {
    // The router's rows, expert by expert; empty: they are drawn.
    std::vector<float> router_ED = {};
    // All neurons: those of the shared expert, then expert by expert; empty: experts do not ask.
    std::vector<std::int32_t> order = {};
  };
  std::vector<Layer> layers;  // all of the dense model
};

// For other ranks: the same values from the text again. Between ranks of one job, not for files.
std::string to_bytes(const Calibration& calibration);
Calibration calibration_from(const std::string& bytes);

}  // namespace upmoe
