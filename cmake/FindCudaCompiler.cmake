# Sets UPMOE_WITH_CUDA when nvcc, cuBLASLt and the runtime are there. nvcc's own flags stand here.
find_program(UPMOE_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin /usr/local/cuda/bin)
if(NOT UPMOE_NVCC)
  message(STATUS "CUDA: no nvcc found (PATH, CUDA_HOME, /usr/local/cuda); building for the CPU alone")
  return()
endif()
if(NOT CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_COMPILER ${UPMOE_NVCC})
endif()
set(CMAKE_CUDA_ARCHITECTURES OFF)  # CMake 3.25 does not know 90a; the targets stand below
enable_language(CUDA)
# CMake 3.25.1 does not know either that nvcc 12 and later speak C++20.
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()
find_package(CUDAToolkit REQUIRED)
set(UPMOE_WITH_CUDA ON)
# nvcc cannot evaluate fmt's checks of format strings at compile time; the C++ files see to those.
add_compile_definitions("$<$<COMPILE_LANGUAGE:CUDA>:FMT_CONSTEVAL=;FMT_USE_CONSTEXPR=1>")
set(flags --expt-relaxed-constexpr -Xcompiler=-Wall,-Wextra --Werror=all-warnings -lineinfo -Xptxas=-v)
# ptxas reports beside the objects: tests/kernels/registers_test.py reads them.
set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_SOURCE_DIR}/cmake/nvcc_report.sh ${CMAKE_CXX_COMPILER_LAUNCHER})
foreach(target ${UPMOE_CUDA_TARGETS})
  list(APPEND flags -gencode=arch=compute_${target},code=sm_${target})
endforeach()
add_compile_options("$<$<COMPILE_LANGUAGE:CUDA>:${flags}>")
message(STATUS "CUDA: ${CUDAToolkit_VERSION}, for sm_${UPMOE_CUDA_TARGETS}")
