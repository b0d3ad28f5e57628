"""The project's own checks find what they are for: each is run over a small tree with one fault in it."""

import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

LAUNCH = Path(__file__).resolve().parent.parent.parent / "launch"


def run_check(script, files):
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(LAUNCH.parent / ".clang-format", folder)
        for name, text in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        done = subprocess.run([sys.executable, LAUNCH / script, "--root", folder], capture_output=True, text=True,
                              check=False)
        return done.returncode, done.stdout + done.stderr


class Layers(unittest.TestCase):
    BASE = {"kernels/core/tensor.h": "#pragma once\n", "kernels/ops/gemm.h": "#pragma once\n",
            "kernels/ops/backend.h": "#pragma once\n", "kernels/cpu/simd.h": "#pragma once\n",
            "kernels/cuda/choose/gpu.h": "#pragma once\n", "kernels/cuda/portable/bias.h": "#pragma once\n",
            "kernels/cuda/library/sdpa.h": "#pragma once\n", "data/store.h": "#pragma once\n",
            "trainer/step.h": "#pragma once\n", "parallel/mpi_comm.h": "#pragma once\n"}

    def check(self, name, text):
        return run_check("check_layers.py", self.BASE | {name: text})

    def refused(self, name, text, words):
        code, output = self.check(name, text)
        self.assertEqual(code, 1, output)
        self.assertIn(words, output)
        self.assertIn(f"{name}:1:", output)

    def test_allowed(self):
        gemm = '#include "kernels/ops/gemm.h"\n'
        for name, text in (("trainer/step.cpp", '#include "trainer/step.h"\n#include "data/store.h"\n'
                                                "#include <vector>\n#include <fmt/core.h>\n"),
                           ("kernels/ops/gemm.cpp", gemm + '#include "kernels/ops/backend.h"\n'),
                           ("kernels/cpu/gemm.cpp", gemm),
                           ("kernels/cuda/gemm.cpp", gemm + '#include "kernels/cuda/library/sdpa.h"\n'),
                           ("tests/kernels/gemm_test.cpp", '#include "kernels/ops/backend.h"\n'),
                           ("parallel/mpi_comm.cpp", '#include "parallel/mpi_comm.h"\n#include <mpi.h>\n'),
                           ("tests/data/store_test.cpp", "#include <gtest/gtest.h>\n#include <hdf5.h>\n")):
            code, output = self.check(name, text)
            self.assertEqual(code, 0, output)

    def test_sources_without_a_header_of_their_own(self):
        for name, text in (("data/other.cpp", '#include "data/store.h"\n'), ("trainer/step.cpp", ""),
                           ("kernels/cpu/norm.cpp", '#include "kernels/ops/gemm.h"\n'),
                           ("kernels/cpu/rope.cpp", '#include "kernels/ops/gemm.h"\n'),
                           ("launch/train.cpp", '#include "trainer/step.h"\n')):
            code, output = self.check(name, text)
            self.assertEqual(code, 1, output)
            self.assertIn(f"{name}: includes no header of its name", output)

    def test_upwards(self):
        self.refused("upcycle/recipe.cpp", '#include "trainer/step.h"\n', "upcycle may include only")
        self.refused("kernels/core/tensor.cpp", '#include "kernels/ops/gemm.h"\n', "kernels/core may include only")
        self.refused("trainer/model/block.cpp", '#include "data/store.h"\n', "trainer/model may include only")

    def test_backends_seen_from_elsewhere(self):
        for header in ("kernels/cpu/simd.h", "kernels/cuda/choose/gpu.h"):
            self.refused("trainer/model/block.cpp", f'#include "{header}"\n', "trainer/model may include only")
            self.refused("launch/train.cpp", f'#include "{header}"\n', "launch may include only")
            self.refused("kernels/ops/gemm.cpp", f'#include "{header}"\n', "kernels/ops may include only")
        for name in ("trainer/model/block.cpp", "trainer/step.cpp", "launch/train.cpp"):
            self.refused(name, '#include "kernels/ops/backend.h"\n', "seen by kernels/ and tests alone")
        self.refused("kernels/ops/norm.h", '#include "kernels/ops/backend.h"\n', "only sources see a backend")

    def test_rooms_of_kernels_cuda(self):
        other = {"portable": "library/sdpa.h", "library": "choose/gpu.h", "choose": "portable/bias.h"}
        for room, header in other.items():
            self.refused(f"kernels/cuda/{room}/x.cpp", f'#include "kernels/cuda/{header}"\n', "may include only")
        self.refused("kernels/cuda/choose/gemm.cpp", "#include <cuda_runtime.h>\n", "CUDA belongs in")
        self.refused("kernels/cuda/portable/norm.cu", "#include <cudnn.h>\n", "cuDNN belongs in kernels/cuda/library/")

    def test_inline_assembly(self):
        self.refused("kernels/cuda/portable/norm.cu", 'asm volatile("trap;");\n', "inline assembly belongs in")
        ptx = "kernels/cuda/sm90/sm90_ptx.cuh"
        code, output = self.check(ptx, 'asm("trap;");\n')
        self.assertEqual(code, 1, output)
        self.assertIn(f"{ptx}: no tests/support/fake_cuda/{ptx}", output)

    def test_third_party_away_from_home(self):
        self.refused("trainer/loop.cpp", "#include <mpi.h>\n", "MPI belongs in")
        self.refused("data/store.cpp", "#include <yaml-cpp/yaml.h>\n", "yaml-cpp belongs in")
        self.refused("data/reader.h", "#include <hdf5.h>\n", "no header of ours")
        self.refused("data/store.cpp", "#include <boost/any.hpp>\n", "Boost belongs in tests/")
        self.refused("data/store.cpp", "#include <abseil/any.h>\n", "unknown")

    def test_missing_and_relative(self):
        self.refused("data/store.cpp", '#include "data/nowhere.h"\n', "does not exist")
        self.refused("data/store.cpp", '#include "store.h"\n', "from the root of the project")


class Style(unittest.TestCase):
    def refused(self, name, text, words):
        code, output = run_check("check_style.py", {name: text})
        self.assertEqual(code, 1, output)
        self.assertIn(words, output)

    def test_allowed(self):
        text = ("// A {\nnamespace upmoe {\n\nclass A {\n public:\n  int f() const { return 1; }\n};\n\n"
                "}  // namespace upmoe\n")
        code, output = run_check("check_style.py", {"data/a.cpp": text})
        self.assertEqual(code, 0, output)

    def test_a_test_with_files_in_a_folder_of_all(self):
        for call in ("testing::TempDir()", "std::filesystem::temp_directory_path()"):
            self.refused("tests/data/a_test.cpp", f"const auto path = {call};\n", "in a folder of its own")
        code, output = run_check("check_style.py", {"data/a.cpp": "const auto path = temp_directory_path();\n"})
        self.assertEqual(code, 0, output)

    def test_long_comment(self):
        self.refused("data/a.cpp", "// " + "word " * 24 + "end\n", "columns, at most 120")

    def test_long_function(self):
        body = "".join(f"  x += {i};\n" for i in range(80))
        inside = f"namespace a {{\n\nvoid f(int x) {{\n{body}}}\n\n}}  // namespace a\n"
        self.refused("data/a.cpp", inside, "data/a.cpp:3: a function of 82 lines")
        self.refused("data/a.py", "def f(x):\n" + body.replace(";", "").replace("  ", "    "), "a function of 81 lines")

    def test_long_class_is_no_function(self):
        members = "".join(f"  int x{i} = 0;\n" for i in range(80))
        code, output = run_check("check_style.py", {"data/a.cpp": f"struct A {{\n{members}}};\n"})
        self.assertEqual(code, 0, output)

    def test_long_file(self):
        self.refused("data/a.cpp", "int x;\n" * 401, "401 lines")

    def test_wide_op(self):
        header = "#pragma once\nvoid add(Exec& ex, Pair<int, int> a, B b = {1, 2}, C c, D d, E e, F f);\n"
        code, output = run_check("check_style.py", {"kernels/ops/add.h": header})
        self.assertEqual(code, 0, output)
        self.refused("kernels/ops/add.h", header.replace("F f", "F f, G g"), "add.h:2: add takes 8 parameters")

    def test_names_and_left_overs(self):
        self.refused("data/string_utils.h", "#pragma once\n", "name it by what it holds")
        self.refused("data/a.h", "int x;\n", "#pragma once")
        self.refused("data/a.cpp", "// TO" + "DO: later\n", "finish it")

    def test_formatting(self):
        self.refused("data/a.cpp", "int   x ;\n", "not formatted")
        words = "all of them, also where a library refuses to take as many as there are"
        self.refused("data/a.cpp", f"int of_all_heads(int heads, int slices, int of) {{\n  return heads * slices /\n"
                     f"         of;  // {words}\n}}\n", "data/a.cpp:2: split by its own trailing comment")


if __name__ == "__main__":
    unittest.main()
