"""A model's tokenizer.json, read as every tool of ours reads it."""

from command_line import BadInput, BadUsage, missing_package


def load_tokenizer(content, path):
    """The tokenizer of a file's bytes, which cuts nothing off, fills nothing up and leaves nothing to chance; `path` is
    for words alone."""
    try:
        import tokenizers
    except ImportError as e:
        raise BadUsage(missing_package(e)) from None
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # the library raises plain Exception, and a panic of its own that is none
        raise BadInput(f"{path}: not a Hugging Face tokenizer.json: {' '.join(str(e).split())}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:  # of BPE: other tokens of the same text at each call
        tokenizer.model.dropout = None
    return tokenizer
