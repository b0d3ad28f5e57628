#!/usr/bin/env python3
"""The layering rule as a test: who may include whom, which header declares what, where third-party libraries live.

Reads every #include of the C++ sources under the folders below. Three tables decide; changing the architecture means
changing them here, in the open.
"""

import argparse
import re
import sys
from pathlib import Path

FOLDERS = ["kernels", "configs", "parallel", "data", "trainer", "upcycle", "launch", "tests"]
SUFFIXES = {".h", ".cpp", ".cu", ".cuh", ".inc"}

# layer -> layers it may include besides itself. A file belongs to the layer with the longest matching path.
MAY_INCLUDE = {
    "kernels/core": set(),
    "kernels/ops": {"kernels/core"},
    "kernels/cpu": {"kernels/core", "kernels/ops"},   # the op headers it implements
    # Its own files choose among the rooms, which do not know each other.
    "kernels/cuda": {"kernels/core", "kernels/ops", "kernels/cuda/choose", "kernels/cuda/runtime",
                     "kernels/cuda/portable", "kernels/cuda/library", "kernels/cuda/sm90"},
    "kernels/cuda/choose": {"kernels/core", "kernels/ops"},
    "kernels/cuda/runtime": {"kernels/core", "kernels/ops"},
    "kernels/cuda/portable": {"kernels/core", "kernels/ops", "kernels/cuda/runtime"},
    "kernels/cuda/library": {"kernels/core", "kernels/ops", "kernels/cuda/runtime"},
    "kernels/cuda/sm90": {"kernels/core", "kernels/cuda/runtime"},   # block.cuh and exponential.cuh of it
    "configs": {"kernels/core"},
    "parallel": {"kernels/core", "configs"},
    "data": {"kernels/core", "configs", "parallel"},
    "trainer/model": {"kernels/core", "kernels/ops", "configs", "parallel"},
    "upcycle": {"kernels/core", "kernels/ops", "configs", "parallel", "data"},
    "trainer": {"kernels/core", "kernels/ops", "configs", "parallel", "data", "trainer/model"},
    "trainer/cost": {"kernels/core", "configs", "trainer"},
    "trainer/diagnosis": {"kernels/core", "kernels/ops", "configs", "parallel", "data", "trainer"},
    "launch": {"kernels/core", "kernels/ops", "configs", "parallel", "data", "trainer", "trainer/cost",
               "trainer/diagnosis", "trainer/model", "upcycle"},
}
MAY_INCLUDE["tests"] = set(MAY_INCLUDE)
# What stands between an op and its backends: for the sources of kernels/ and for tests.
BETWEEN_OPS_AND_BACKENDS = {"kernels/ops/backend.h", "kernels/ops/op_names.inc", "kernels/ops/dispatch.h"}
# The files of kernels/cuda with inline assembly. The pretended GPU finds another file first by the path of each.
INLINE_ASSEMBLY = {"kernels/cuda/sm90/sm90_ptx.cuh"}
TWINS = "tests/support/fake_cuda/"

# A source's functions are declared in the header of its name, which it includes: beside it or, of an op's backends,
# in kernels/ops. The exceptions, each with the header that has them:
DECLARED_IN = {
    # a constant in a file with compiler options of its own
    "kernels/core/compiled_features.cpp": "kernels/core/processor.h",
    # several files of one family of ops
    "kernels/cpu/attention_backward.cpp": "kernels/ops/backend.h",
    "kernels/cpu/rope.cpp": "kernels/ops/attention.h",
    "kernels/cuda/portable/attention_backward.cu": "kernels/cuda/portable/attention_tiles.cuh",
    "kernels/cuda/portable/attention_forward.cu": "kernels/cuda/portable/attention_tiles.cuh",
    "kernels/cuda/portable/rope.cu": "kernels/ops/attention.h",
    "kernels/cuda/portable/routing_sort.cu": "kernels/ops/routing.h",
    # kernels of one family, a source each
    **{f"kernels/cuda/sm90/experts_{kernel}.cu": "kernels/cuda/sm90/experts.cuh"
       for kernel in ("dhidden", "down", "dweights", "up")},
    # two ways to compute what one header describes
    "kernels/cpu/onednn_product.cpp": "kernels/cpu/dense_product.h",
    "kernels/cpu/packed_product.cpp": "kernels/cpu/dense_product.h",
    # what kernels/core may call of a GPU, without knowing CUDA
    "kernels/cuda/library/product_library.cu": "kernels/core/gpu.h",
    "kernels/cuda/portable/slice_sums.cu": "kernels/core/gpu.h",
    "kernels/cuda/runtime/device.cu": "kernels/core/gpu.h",
    "kernels/cuda/libraries.cpp": "kernels/core/gpu.h",
    "kernels/cuda/runtime/memory.cu": "kernels/core/gpu.h",
    # what stands in for a library that a build does without
    "kernels/cuda/library/cudnn_sdpa_stub.cpp": "kernels/cuda/library/cudnn_sdpa.h",
    "kernels/cuda/stub.cpp": "kernels/core/gpu.h",
    "parallel/mpi_stub.cpp": "parallel/mpi_comm.h",
    "parallel/nccl_stub.cpp": "parallel/nccl_comm.h",
    # the second half of a class
    "data/hdf5_values.cpp": "data/hdf5_cursor.h",
    # one table of commands
    **{f"launch/{command}.cpp": "launch/commands.h"
       for command in ("cost", "doctor", "eval", "export", "generate", "inspect", "main", "plan", "report", "study",
                       "train", "upcycle")},
}

# library -> (pattern of its headers, files or folders that may include it). Headers of ours may include only the
# libraries of IN_HEADERS, so that what includes them compiles without the others; a .cuh is for kernels/cuda alone.
THIRD_PARTY = {
    "CUDA": (r"cuda", [f"kernels/cuda/{room}/" for room in ("runtime", "portable", "library", "sm90")]),
    "cuBLASLt and cuDNN": (r"cublas|cudnn|cutlass", ["kernels/cuda/library/"]),
    "NCCL": (r"nccl\.h$", ["parallel/nccl_channel.cpp"]),
    "MPI": (r"^mpi\.h$", ["parallel/mpi_comm.cpp", "parallel/mpi_messages.cpp", "parallel/mpi_signs.cpp"]),
    "HDF5": (r"(hdf5|H5\w*)\.h$", ["data/"]),
    "yaml-cpp": (r"yaml-cpp/", ["configs/yaml_reader.cpp"]),
    "oneDNN": (r"(oneapi/|dnnl)", ["kernels/cpu/"]),
    "CLI11": (r"CLI/", ["launch/", "tests/bench/"]),
    "nlohmann": (r"nlohmann/", ["configs/", "data/", "launch/", "trainer/", "upcycle/"]),
    "spdlog": (r"spdlog/", ["kernels/core/log.cpp"]),
    "OpenMP": (r"omp\.h$", ["kernels/", "parallel/threads.cpp", "data/", "trainer/", "upcycle/", "launch/"]),
    "fmt": (r"fmt/", [""]),
    "GoogleTest": (r"(gtest|gmock)/", []),
    "Benchmark": (r"benchmark/", []),
    "Boost": (r"boost/", []),
}
IN_HEADERS = {"fmt", "CLI11", "OpenMP"}
SYSTEM = re.compile(r"^(?:sys/|linux/|arpa/|netinet/)?[a-z0-9_]+(?:\.h)?$")  # <vector>, <sys/mman.h>, <immintrin.h>

ASSEMBLY = re.compile(r"\b(asm|__asm__)\b\s*(volatile|__volatile__)?\s*\(")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')


def layer_of(path):
    fits = [layer for layer in MAY_INCLUDE if path.startswith(layer + "/")]
    return max(fits, key=len) if fits else None


def third_party_of(header):
    return next((name for name, (pattern, _) in THIRD_PARTY.items() if re.match(pattern, header)), None)


def check_own(path, layer, header, root):
    target = layer_of(header)
    if target is None:
        return f'"{header}" is not in one of our folders; write the path from the root of the project'
    if not (root / header).is_file():
        return f'"{header}" does not exist'
    if header in BETWEEN_OPS_AND_BACKENDS and header != path and layer != "tests":
        if not layer.startswith("kernels/"):
            return f'"{header}": a backend is seen by kernels/ and tests alone; call the op'
        if path not in BETWEEN_OPS_AND_BACKENDS and Path(path).suffix not in {".cpp", ".cu"}:
            return f'"{header}": only sources see a backend, no header does'
    if target != layer and target not in MAY_INCLUDE[layer]:
        return f'"{header}": {layer} may include only {", ".join(sorted(MAY_INCLUDE[layer])) or "itself"}'
    return None


def check_foreign(path, layer, header):
    library = third_party_of(header)
    if library is None:
        return None if SYSTEM.match(header) else f"<{header}>: unknown; give it a home in launch/check_layers.py"
    if layer == "tests":
        return None
    homes = THIRD_PARTY[library][1]
    if not any(path == home or (home in ("",) or home.endswith("/")) and path.startswith(home) for home in homes):
        return f"<{header}>: {library} belongs in {', '.join(homes) or 'tests/'}"
    if Path(path).suffix == ".h" and library not in IN_HEADERS:
        return f"<{header}>: no header of ours may include {library}"
    return None


def check_header(root, path, text):
    """Whether a source of the product includes the header that declares what it defines."""
    stem = Path(path).with_suffix("")
    homes = [str(stem) + suffix for suffix in (".h", ".cuh")]
    if path.startswith(("kernels/cpu/", "kernels/cuda/")):
        homes.append(f"kernels/ops/{stem.name}.h")
    if path in DECLARED_IN:
        homes = [DECLARED_IN[path]]
    if not any((root / home).is_file() and f'#include "{home}"' in text for home in homes):
        return f"{path}: includes no header of its name ({homes[0]}); declare there what it defines"
    return None


def check_file(root, path):
    layer = layer_of(path)
    if layer is None:
        yield f"{path}: belongs to no layer; add its folder to launch/check_layers.py"
        return
    if path in INLINE_ASSEMBLY and not (root / (TWINS + path)).is_file():
        yield f"{path}: no {TWINS + path}, which the pretended GPU must find in its place"
    text = (root / path).read_text(encoding="utf-8")
    if layer != "tests" and Path(path).suffix in {".cpp", ".cu"} and (problem := check_header(root, path, text)):
        yield problem
    for number, line in enumerate(text.splitlines(), 1):
        if layer.startswith("kernels/cuda") and ASSEMBLY.search(line) and path not in INLINE_ASSEMBLY:
            yield f"{path}:{number}: inline assembly belongs in {', '.join(sorted(INLINE_ASSEMBLY))}"
        match = INCLUDE.match(line)
        if not match:
            continue
        kind, header = match.groups()
        foreign = kind == "<" or third_party_of(header)
        problem = check_foreign(path, layer, header) if foreign else check_own(path, layer, header, root)
        if problem:
            yield f"{path}:{number}: {problem}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    root = parser.parse_args().root
    files = sorted(str(p.relative_to(root)) for folder in FOLDERS for p in (root / folder).rglob("*")
                   if p.suffix in SUFFIXES and p.is_file())
    if not files:
        sys.exit(f"check_layers: no sources under {root}")
    problems = [problem for path in files for problem in check_file(root, path)]
    print("\n".join(problems) if problems else f"check_layers: {len(files)} files keep the rule")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
