"""Errors in the CPU's packed products and in what is packed for them; see tests/mutants.py."""

BACKWARD = "kernels/cpu/attention_backward.cpp"
MATRICES = "matrix_registers_test"
DENSE = "dense_product_test"

MUTANTS = {
    "units_on_the_diagonal_end_early": (
        "kernels/cpu/block_matmul.h", "units_of<Unit>(m + kRows)", "(m + kRows) / kPerUnit<Unit>", "*bf16*",
        "attention_test"),
    "last_columns_in_too_narrow_a_panel": (
        "kernels/cpu/block_matmul.h", "p.columns - first_column < kVectors * kLanes",
        "p.columns - first_column <= kVectors * kLanes", "Shapes/*", "attention_test"),
    "unscaled_scores_of_pairs_in_the_backward": (
        BACKWARD, "load(tiles.scores + place) * scale - lse[r + i]", "load(tiles.scores + place) - lse[r + i]",
        "*bf16*", "attention_test"),
    "unscaled_gradient_of_the_keys_of_pairs": (
        BACKWARD, "Scales<UnitOf<T>>(s.head_dim).score);", "1.0f);", "*bf16*", "attention_test"),
    "neighbours_of_a_column_change_places": (
        BACKWARD, "bf16_pairs(even, odd)", "bf16_pairs(odd, even)", "*bf16*", "attention_test"),
    "probabilities_of_pairs_summed_unscaled": (
        "kernels/cpu/attention.cpp", "Scales<Unit>(shape.head_dim).score", "1.0f", "*bf16*", "attention_test"),
    "rows_of_a_ring_in_the_order_of_their_slots": (
        "kernels/cpu/attention.cpp", "(first + r) % seq.slots", "(row + r) % rows", "*AttentionRuns*",
        "attention_decode_test"),
    "rows_of_a_tile_from_a_vector's_begin": (
        "kernels/cpu/packed_vectors.h", "kTile * kTileRows % kLanes", "kTile * kLanes % kLanes", "*ComputeEveryKind",
        DENSE),
    "a_deep_product_is_its_last_part": (
        "kernels/cpu/packed_product.cpp", "k == 0 ? Accumulate::kOverwrite", "k >= 0 ? Accumulate::kOverwrite",
        "*PackedBlocks*", DENSE),
    "parts_of_a_depth_have_the_first_columns": (
        "kernels/cpu/packed_product.cpp", "from_depth(p.b, k)", "from_depth(p.b, 0 * k)", "*PackedBlocks*", DENSE),
    "rows_are_packed_without_the_depth_before": (
        "kernels/cpu/packed_vectors.h", "element(a, rows.begin + m, k)", "element(a, rows.begin + m, 0 * k)",
        "*PackedBlocks*", DENSE),
    "rows_of_an_odd_depth_lie_as_pairs": (
        "kernels/cpu/packed_operands.h", "depth % kPer == 0", "depth % kPer >= 0", "*LieAsUnits*", DENSE),
    "rows_an_odd_stride_apart_lie_as_pairs": (
        "kernels/cpu/packed_operands.h", "x.stride % kPer == 0", "x.stride % kPer >= 0", "*PackedBlocks*", DENSE),
    "rows_that_are_not_packed_lie_without_gaps": (
        "kernels/cpu/packed_vectors.h", "stride = a.stride / kPerUnit", "stride = depth / kPerUnit",
        "*PackedBlocks*", DENSE),
    "turned_sums_begin_at_their_block": (
        "kernels/cpu/packed_gemm.h", "(columns.begin + n) * p.rows + rows.begin + m;",
        "(columns.begin + n) * p.rows + rows.begin;", "*PackedBlocks*", DENSE),
    "a_turned_bias_is_of_the_tokens": (
        "kernels/cpu/packed_gemm.h", "load(p.bias + rows.begin + m, lanes)", "load(p.bias + columns.begin + n, lanes)",
        "*PackedBlocks*", DENSE),
    "every_chunk_is_packed_as_the_first": (
        "kernels/cpu/packed_product.cpp", "pack_chunk<Form>(packed, p.b, columns_of({0, cut.panels}), p.depth);",
        "pack_chunk<Form>(packed, p.b, Range{0, std::min(chunk, p.columns)}, p.depth);", "*LargeProduct*", DENSE),
    "every_task_has_the_first_panels": (
        "kernels/cpu/packed_product.cpp", "packed + panels.begin * kPanelColumns",
        "packed + 0 * panels.begin * kPanelColumns",
        "*AnyNumberOfThreads", DENSE),
    "sums_of_a_tile_change_places": (
        "kernels/cpu/simd.h", "fold_groups<kGroup>(v[2 * i], v[2 * i + 1],", "fold_groups<kGroup>(v[i], v[i + kGroup],",
        "*AreRight*", "row_products_test"),
    "keys_behind_the_last_are_seen": (
        "kernels/cpu/attention_decode.cpp", "g.scores_GB + head * kBlock + n, kBlock - n,",
        "g.scores_GB + head * kBlock + n, 0 * n,", "*", "attention_decode_test"),
    "subnormals_are_zero_in_bf16": (
        "kernels/cpu/simd.h", "_mm512_fpclass_ps_mask(lanes, kSubnormal) != 0", "false && kSubnormal != 0",
        "Simd.*", "vector_math_test"),
    "a_panel_ends_within_a_register": (
        "kernels/cpu/packed_matrices.h", "out + end * kMatrixRows, Unit{}", "out + units * kMatrixRows, Unit{}",
        "*EveryKind", MATRICES),
    "registers_of_columns_by_depth_lie_as_vectors": (
        "kernels/cpu/units.h", "to + i / kLanes * strides.vector; };", "to + i; };", "*EveryKind", MATRICES),
    "registers_of_turned_columns_lie_as_vectors": (
        "kernels/cpu/units.h", "u * strides.unit + i / kLanes * strides.vector;", "u * strides.unit + i;",
        "*EveryKind", MATRICES),
    "rows_end_within_a_register": (
        "kernels/cpu/packed_matrices.h", "if (whole * kDepth == depth) return;", "if (whole * kDepth <= depth) return;",
        "*EveryKind", MATRICES),
    "depth_major_rows_of_one_register": (
        "kernels/cpu/packed_matrices.h", "tile(m) + k / step * kMatrixUnits", "tile(m) + 0 * k / step * kMatrixUnits",
        "*EveryKind", MATRICES),
    "matrices_of_the_first_rows": (
        "kernels/cpu/packed_matrices.h", "+= first_row / kMatrixRows *", "+= 0 * first_row *",
        "*EveryKind", MATRICES),
    "columns_of_one_register_twice": (
        "kernels/cpu/matrix_product.h", "load<7>(b + p.b.tile_stride, b_stride)", "load<7>(b, b_stride)", "*",
        MATRICES),
    "matrices_overwrite_what_they_add_to": (
        "kernels/cpu/matrix_product.h", "if constexpr (kAdd) {", "if constexpr (false && kAdd) {", "*OfAttention",
        MATRICES),
    "a_diagonal_cuts_a_register_of_keys_too_many": (
        "kernels/cpu/block_matrices.h", "m / kRows + 1) : steps", "m / kRows) : steps", "*OfAttention", MATRICES),
    "a_diagonal_cuts_a_register_of_queries_too_many": (
        "kernels/cpu/block_matrices.h", "kQueryDepth ? m / kRows : 0", "kQueryDepth ? m / kRows + 1 : 0",
        "*OfAttention", MATRICES),
    "columns_before_the_diagonal_are_left_out": (
        "kernels/cpu/block_matrices.h", "std::min(p.columns, m + kRows)", "std::min(p.columns, std::max(kRows, m))",
        "*OfAttention", MATRICES),
    "pairs_behind_the_last_are_turned": (
        "kernels/cpu/block_matrices.h", "i < std::min(kLanes, units - u)",
        "i < std::min(kLanes, kUnits - u + 0 * units)", "*OfAttention", MATRICES),
    "bits_of_a_block_from_a_counter's_begin": (
        "kernels/cpu/adamw8bit.cpp", "all + place % kRoundedAtOnce", "all + 0 * place", "*", "adamw8bit_test"),
    "runs_that_are_cut_draw_as_neighbours": (
        "kernels/cpu/adamw8bit.cpp", "last - begin == block.count - 1", "last - begin >= block.count - 1", "*",
        "adamw8bit_test"),
    "a_slow_thread_is_waited_for": (
        "kernels/cpu/parallel_for.h", "for (std::int64_t i = 0; i < threads; ++i) {\n    LoopShare",
        "for (std::int64_t i = 0; i < 1; ++i) {\n    LoopShare", "*WhoIsFree*", "parallel_for_test"),
    "parts_of_a_share_overlap": (
        "kernels/cpu/parallel_for.h", "k < std::min(first + part, share.end)", "k < share.end", "*RunsEachOnce*",
        "parallel_for_test"),
    "a_loop_within_a_loop_takes_its_shares": (
        "kernels/cpu/parallel_for.h", " && !omp_in_parallel()", "", "*MayStandInALoop", "parallel_for_test"),
}
