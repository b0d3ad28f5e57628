"""Errors in what is read of the formats that data comes in; see tests/mutants.py."""

_MEGATRON = "data/token_formats/megatron_token_file.cpp"

MUTANTS = {
    "a_token_of_the_index_too_few": (
        _MEGATRON, "length > num_tokens_ - begins.back())", "length > num_tokens_)", "MegatronFiles.*",
        "token_dataset_test"),
    "where_a_sequence_begins_is_not_read": (
        _MEGATRON, "    if (at != expected)", "    if (false)", "MegatronFiles.*", "token_dataset_test"),
    "documents_may_go_back": (
        _MEGATRON, "sequence < before || sequence > sequences)", "sequence < 0 || sequence > sequences)",
        "MegatronFiles.*", "token_dataset_test"),
    "the_last_documents_may_be_missing": (
        _MEGATRON, "  if (before != sequences)", "  if (false)", "MegatronFiles.*", "token_dataset_test"),
    "counts_of_the_index_are_believed": (
        _MEGATRON, "    if (left != expected) bad(words(\"\"));\n", "", "MegatronFiles.*", "token_dataset_test"),
    "the_version_of_an_index_does_not_count": (
        _MEGATRON, "version != kVersion)", "version == 0)", "MegatronFiles.*", "token_dataset_test"),
    "negative_tokens_are_large_ones": (
        _MEGATRON, "if (value < 0 || value >", "if (value >", "MegatronFiles.*", "token_dataset_test"),
    "tokens_of_8_bytes_are_cut": (
        _MEGATRON, "if (value < 0 || value > std::numeric_limits<std::uint32_t>::max())", "if (value < 0)",
        "MegatronFiles.*", "token_dataset_test"),
    "reading_begins_at_a_byte": (
        _MEGATRON, "static_cast<std::uint64_t>(first) * type_->bytes", "static_cast<std::uint64_t>(first)",
        "MegatronFiles.*", "token_dataset_test"),
    "another_index_is_the_same_data": (
        _MEGATRON, "return fmt::format(\"{} bytes {:08x}\", bytes_, crc_);",
        "return fmt::format(\"{} bytes\", bytes_);", "MegatronFiles.*", "token_dataset_test"),
    "a_set_that_changed_is_read_on": (
        _MEGATRON, "now != opened_) bad_change", "now.bytes == 0) bad_change", "MegatronFiles.*", "token_dataset_test"),
    "a_document_without_tokens_is_one": (
        _MEGATRON, "if (end > (document_ends_.empty() ? 0 : document_ends_.back()))", "if (i > 0)", "MegatronFiles.*",
        "token_dataset_test"),
}
