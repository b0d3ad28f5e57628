"""Errors in what runs on a GPU; see tests/mutants.py."""

MUTANTS = {
    "nccl_operations_begin_in_any_order": (
        "parallel/nccl_channel.cpp", 'setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "1", 0)',
        'setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "0", 0)', "*OneOrder", "nccl_test"),
    "log_sum_exps_of_other_heads_in_a_slice": (
        "kernels/cuda/library/cudnn_sdpa.cpp", "(slice.first_sequence * s.heads + first_head()) * s.seq_len",
        "(slice.first_sequence * s.heads) * s.seq_len", "*Slices", "cudnn_test_on_gpu"),
    "attention_backward_in_one_go": (
        "kernels/cuda/library/cudnn_sdpa.cpp", "if (!deterministic) return", "if (s.heads > 0) return", "*Slices",
        "cudnn_test_on_gpu"),
    "arenas_grow_by_an_eighth": (
        "kernels/cuda/runtime/memory.cu", "std::min(committed_ / 8, kMostAhead)", "committed_ / 8", "*GrowsByLittle",
        "gpu_test_on_gpu"),
    "code_of_one_architecture_for_its_family": (
        "kernels/cuda/runtime/device.cu", "(alone ? gpu_minor == minor : gpu_minor >= minor)", "gpu_minor >= minor",
        "*ThatAlone", "gpu_test_on_gpu"),
    "pointers_in_structs_unseen": (
        "tests/support/fake_cuda/cuda_runtime.h", "    add_pointers_in(&argument, sizeof argument, reads);", "",
        "*PointersInStructs", "stream_order_test_on_gpu"),
    "what_is_done_again_untold": (
        "kernels/core/exec.h", "      ledger->again(op, flops, work);", "", "*Again*", "core_test"),
    "fused_products_are_no_model_work": (
        "kernels/ops/experts.cpp",
        "          bytes_of(out_RN), Work::kModel);", "          bytes_of(out_RN));", "*SameModelWork",
        "expert_ffn_test_on_gpu"),
    "fused_experts_of_any_width": (
        "kernels/cuda/choose/expert_ffn.cpp", "s.width % kColumns != 0", "s.width % 8 != 0", "*SaysWhyNot",
        "choose_test"),
    "experts_in_any_order": (
        "kernels/cuda/portable/expert_index.cu", "  ranking[place] = e;", "  ranking[place] = e / 2;",
        "*WeightGradients*", "experts_test_on_gpu"),
    "parts_of_weight_gradients_left_out": (
        "kernels/cuda/portable/expert_index.cu", "for (int p = 0; p < each; ++p)", "for (int p = 1; p < each; ++p)",
        "*DHidden*", "experts_test_on_gpu"),
    "shared_gate_is_no_work_of_the_model": (
        "kernels/ops/activation.cpp", "          bytes_of(gate_T), Work::kModel);", "          bytes_of(gate_T));",
        "ModelCost.*", "cost_test"),
    "work_done_again_is_the_models": (
        "kernels/core/exec.h", "      ledger->again(op, flops, work);",
        "      ledger->book(op, flops, bytes_read, bytes_written, work);", "ModelCost.*", "cost_test"),
}
