"""What tests of the whole program share: ranks on this machine, small models, the losses of a run, faults by strace."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                            "OMP_NUM_THREADS": "1"}
DENSE = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 64,
         "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
         "tie_word_embeddings": False, "initializer_range": 0.1, "use_sliding_window": False}
RECIPE = """target: {num_experts: 10, num_experts_per_tok: 2, moe_intermediate_size: 44,
          shared_expert_intermediate_size: 176, norm_topk_prob: false}
experts: {method: shuffle, reinit: 0.5}
"""


def mpirun(ranks):
    """The words before a command that runs as so many ranks."""
    return ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks)] if ranks > 1 else []


def write_dense(folder, vocab_size=DENSE["vocab_size"]):
    """A small model directory with random weights."""
    config = folder.with_suffix(".json")
    config.write_text(json.dumps(DENSE | {"vocab_size": vocab_size}))
    subprocess.run([sys.executable, ROOT / "launch/make_random_dense.py", folder, "--config", config, "--dtype", "fp32",
                    "--std", "0.1"], check=True, capture_output=True)
    (folder / "tokenizer.json").write_text("{}")


def losses_of(run_dir):
    """{step: (loss, aux_loss, grad_norm)}, to the bit."""
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: (r["loss"], r["aux_loss"], r["grad_norm"]) for r in records if "loss" in r}


def state_of(pid):
    """One letter; Z for what has ended, whether or not the machine's first process asks for it, as a container's own
    command does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def why_no_strace():
    """What keeps strace from working here; None when nothing does."""
    if not shutil.which("strace"):
        return "strace is not installed"
    probe = subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], capture_output=True, check=False)
    return "strace may not trace here" if probe.returncode else None


def strace(*filters, log="/dev/null"):
    """The words before a command whose system calls are watched, and refused where the filters say so."""
    # A sanitizer's own search for leaks does not work in a traced program.
    return ["strace", "-f", "-qq", "-o", str(log), "-E", "ASAN_OPTIONS=detect_leaks=0", *map(str, filters)]


def mount_tmpfs(test, disk, size):
    """A file system of so many bytes at the new folder `disk` while the test runs; it is skipped where none can be
    mounted."""
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)],
                                      capture_output=True, check=False).returncode:
        test.skipTest("no tmpfs can be mounted here")
    test.addCleanup(subprocess.run, ["umount", str(disk)], check=True)
    return disk
