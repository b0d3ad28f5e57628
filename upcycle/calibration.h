#pragma once
// What tokens told about the dense model, as a recipe needs it. Made by the program, which has the trainer's layers;
// here it is data.

#include <string>
#include <vector>

namespace upmoe {

struct Calibration {
  struct Layer {
    std::vector<float> router_ED;  // the router's rows, expert by expert; of every layer
  };
  std::vector<Layer> layers;
};

// For other ranks: the same values from the text again. Between ranks of one job, not for files.
std::string to_bytes(const Calibration& calibration);
Calibration calibration_from(const std::string& bytes);

}  // namespace upmoe
