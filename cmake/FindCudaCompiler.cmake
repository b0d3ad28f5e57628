# Sets UPMOE_WITH_CUDA when nvcc, cuBLASLt and the runtime are there and usable, and UPMOE_WITH_NCCL and
# UPMOE_WITH_CUDNN where those libraries are too. nvcc's own flags stand here. What is not usable is said in words: a
# reason to build for the CPU alone with UPMOE_CUDA=AUTO, an error with ON.
function(upmoe_no_cuda reason)
  if(UPMOE_CUDA STREQUAL AUTO)
    message(STATUS "CUDA: ${reason}; building for the CPU alone")
  else()
    message(FATAL_ERROR "CUDA: ${reason}; -DUPMOE_CUDA=AUTO builds for the CPU alone")
  endif()
endfunction()

if(UPMOE_NVCC AND NOT EXISTS ${UPMOE_NVCC})  # uninstalled since
  unset(UPMOE_NVCC CACHE)
endif()
find_program(UPMOE_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin /usr/local/cuda/bin)
if(NOT UPMOE_NVCC)
  upmoe_no_cuda("no nvcc found (PATH, CUDA_HOME, /usr/local/cuda)")
  return()
endif()

# Every target with .cu files says which of the two it takes.
set(UPMOE_GPU_FLAGS "")
foreach(target ${UPMOE_CUDA_TARGETS})
  list(APPEND UPMOE_GPU_FLAGS -gencode=arch=compute_${target},code=sm_${target})
endforeach()
set(UPMOE_SM90_FLAGS -gencode=arch=compute_90a,code=sm_90a)
# One empty kernel by this nvcc, with this host compiler, for these targets: an nvcc that is too old for C++20, for a
# target or for the host compiler, or that does not run at all, says so here.
set(trial "${UPMOE_NVCC} ${CMAKE_CXX_COMPILER} ${UPMOE_CUDA_TARGETS}")
if(NOT UPMOE_CUDA_TRIED STREQUAL trial)
  set(trial_source ${CMAKE_BINARY_DIR}/CMakeFiles/cuda_trial.cu)
  file(WRITE ${trial_source}
       "#include <compare>\n#include <cublasLt.h>\n#include <cuda_bf16.h>\n__global__ void nothing() {}\n")
  execute_process(COMMAND ${UPMOE_NVCC} -ccbin ${CMAKE_CXX_COMPILER} -std=c++20 ${UPMOE_GPU_FLAGS} -c ${trial_source}
                          -o ${CMAKE_BINARY_DIR}/CMakeFiles/cuda_trial.o
                  RESULT_VARIABLE trial_status OUTPUT_VARIABLE trial_said ERROR_VARIABLE trial_said)
  if(NOT trial_status EQUAL 0)
    string(STRIP "${trial_said}" trial_said)
    string(REGEX REPLACE "\n.*" "" trial_said "${trial_said}")
    upmoe_no_cuda("${UPMOE_NVCC} cannot be used for sm_${UPMOE_CUDA_TARGETS} (${trial_status}: ${trial_said})")
    return()
  endif()
  set(UPMOE_CUDA_TRIED "${trial}" CACHE INTERNAL "What nvcc was tried with")
endif()

if(NOT CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_COMPILER ${UPMOE_NVCC})
endif()
set(CMAKE_CUDA_ARCHITECTURES OFF)  # CMake 3.25 does not know 90a; the targets name their GPUs
enable_language(CUDA)
# CMake 3.25.1 does not know either that nvcc 12 and later speak C++20.
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()
find_package(CUDAToolkit)
foreach(piece cudart_static cublasLt)
  if(NOT TARGET CUDA::${piece})
    upmoe_no_cuda("the toolkit of ${UPMOE_NVCC} has no ${piece} library")
    return()
  endif()
endforeach()
set(UPMOE_WITH_CUDA ON)
find_path(UPMOE_NCCL_INCLUDE nccl.h HINTS $ENV{NCCL_HOME}/include ${CUDAToolkit_INCLUDE_DIRS})
find_library(UPMOE_NCCL_LIBRARY nccl HINTS $ENV{NCCL_HOME}/lib ${CUDAToolkit_LIBRARY_DIR})
if(UPMOE_NCCL_INCLUDE AND UPMOE_NCCL_LIBRARY)
  set(UPMOE_WITH_NCCL ON)
else()
  message(STATUS "CUDA: no NCCL found (NCCL_HOME, the CUDA toolkit, the system); one GPU per run alone")
endif()
# cuDNN's graphs are written through its frontend, headers alone, which launch/setup.sh puts into .venv.
file(GLOB frontend_folders ${CMAKE_SOURCE_DIR}/.venv/lib/python3*/site-packages/include)
find_path(UPMOE_CUDNN_FRONTEND cudnn_frontend.h HINTS $ENV{CUDNN_FRONTEND_HOME}/include ${frontend_folders})
find_path(UPMOE_CUDNN_INCLUDE cudnn.h HINTS $ENV{CUDNN_HOME}/include ${CUDAToolkit_INCLUDE_DIRS})
find_library(UPMOE_CUDNN_LIBRARY cudnn HINTS $ENV{CUDNN_HOME}/lib ${CUDAToolkit_LIBRARY_DIR})
if(UPMOE_CUDNN_FRONTEND AND UPMOE_CUDNN_INCLUDE AND UPMOE_CUDNN_LIBRARY AND TARGET CUDA::nvrtc)
  set(UPMOE_WITH_CUDNN ON)
else()
  message(STATUS
          "CUDA: no cuDNN or no cudnn_frontend found (CUDNN_HOME, CUDNN_FRONTEND_HOME); attention by the portable "
          "kernel")
endif()
# nvcc cannot evaluate fmt's checks of format strings at compile time; the C++ files see to those.
add_compile_definitions("$<$<COMPILE_LANGUAGE:CUDA>:FMT_CONSTEVAL=;FMT_USE_CONSTEXPR=1>")
set(flags --expt-relaxed-constexpr -Xcompiler=-Wall,-Wextra --Werror=all-warnings -lineinfo -Xptxas=-v)
# ptxas reports beside the objects: tests/kernels/registers_test.py reads them.
set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_SOURCE_DIR}/cmake/nvcc_report.sh ${CMAKE_CXX_COMPILER_LAUNCHER})
add_compile_options("$<$<COMPILE_LANGUAGE:CUDA>:${flags}>")
message(STATUS "CUDA: ${CUDAToolkit_VERSION}, for sm_${UPMOE_CUDA_TARGETS}")
