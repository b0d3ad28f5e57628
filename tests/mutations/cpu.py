"""Errors in the CPU's packed products and in what is packed for them; see tests/mutants.py."""

BACKWARD = "kernels/cpu/attention_backward.cpp"
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
        "kernels/cpu/packed_operands.h", "kTile * kTileRows % kLanes", "kTile * kLanes % kLanes", "*ComputeEveryKind",
        DENSE),
    "a_deep_product_is_its_last_part": (
        "kernels/cpu/packed_product.cpp", "k == 0 ? Accumulate::kOverwrite", "k >= 0 ? Accumulate::kOverwrite",
        "*PackedBlocks*", DENSE),
    "parts_of_a_depth_have_the_first_columns": (
        "kernels/cpu/packed_product.cpp", "from_depth(p.b, k)", "from_depth(p.b, 0 * k)", "*PackedBlocks*", DENSE),
    "rows_are_packed_without_the_depth_before": (
        "kernels/cpu/packed_operands.h", "element(a, rows.begin + m, k)", "element(a, rows.begin + m, 0 * k)",
        "*PackedBlocks*", DENSE),
    "rows_of_an_odd_depth_lie_as_pairs": (
        "kernels/cpu/packed_operands.h", "depth % kPer == 0", "depth % kPer >= 0", "*LieAsUnits*", DENSE),
    "rows_an_odd_stride_apart_lie_as_pairs": (
        "kernels/cpu/packed_operands.h", "x.stride % kPer == 0", "x.stride % kPer >= 0", "*PackedBlocks*", DENSE),
    "rows_that_are_not_packed_lie_without_gaps": (
        "kernels/cpu/packed_operands.h", "stride = a.stride / kPerUnit", "stride = depth / kPerUnit",
        "*PackedBlocks*", DENSE),
    "turned_sums_begin_at_their_block": (
        "kernels/cpu/packed_gemm.h", "(columns.begin + n) * p.rows + rows.begin + m;",
        "(columns.begin + n) * p.rows + rows.begin;", "*PackedBlocks*", DENSE),
    "a_turned_bias_is_of_the_tokens": (
        "kernels/cpu/packed_gemm.h", "load(p.bias + rows.begin + m, lanes)", "load(p.bias + columns.begin + n, lanes)",
        "*PackedBlocks*", DENSE),
    "every_chunk_is_packed_as_the_first": (
        "kernels/cpu/packed_product.cpp", "pack_chunk(packed, p.b, columns_of({0, cut.panels}), p.depth);",
        "pack_chunk(packed, p.b, Range{0, std::min(chunk, p.columns)}, p.depth);", "*LargeProduct*", DENSE),
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
}
