#!/usr/bin/env python3
"""Text to a token file.

Each FILE is UTF-8 text (one document), JSON lines or a JSON array (one document each record, its text under --key),
plain or packed with gzip, bzip2, xz or zstd, or Parquet (one document each row, in column --key); its bytes tell which.
What is no text is refused. Every document is followed by the end-of-document token; empty documents are left out. The
result is the same for any number of processes. With --train-vocab N, first trains a byte-level BPE tokenizer of the
Qwen2 kind on the same files and writes it to --tokenizer.

Exit status: 0 done, 1 unexpected failure, 2 usage, 3 bad input, 130 stopped.
"""

import os
import sys

# This file has the name of a standard module, which others import: its folder is searched last.
FOLDER = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [p for p in sys.path if os.path.realpath(p or ".") != FOLDER] + [
    os.path.join(os.path.dirname(FOLDER), "launch"), FOLDER]

# First: a key pressed while libraries load is heard.
from command_line import BadInput, BadUsage, ToolParser, line_time, missing_package, run_tool  # noqa: E402

import argparse  # noqa: E402
import collections  # noqa: E402
import concurrent.futures  # noqa: E402
import errno  # noqa: E402
import hashlib  # noqa: E402
import multiprocessing  # noqa: E402
import signal  # noqa: E402
import time  # noqa: E402
import zlib  # noqa: E402
from pathlib import Path  # noqa: E402

from chat_documents import TEMPLATES, ChatChoices  # noqa: E402
from hdf5_child import die_with, in_child  # noqa: E402
from staged_file import StagedFile, Taken  # noqa: E402
from text_documents import Choices, documents_of, plan_tasks  # noqa: E402
from tokenizer_file import load_tokenizer  # noqa: E402

FORMAT = "upmoe-tokens-1"
END_OF_TEXT = "<|endoftext|>"
# What a word is, before merging: contractions, letters, single digits, punctuation, line ends, blanks (as in Qwen2).
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")
COPY_TOKENS = 4 << 20
CHUNK_TOKENS = 16384  # one checksum each (data/token_file_format.h); divides COPY_TOKENS


def import_libraries():
    """The packages of launch/requirements.txt, with words for their absence."""
    global h5py, numpy, tokenizers
    try:
        import h5py
        import numpy
        import tokenizers
    except ImportError as e:
        raise BadUsage(missing_package(e)) from None


# ---- tokenizer ------------------------------------------------------------------------------------------------------

def train_tokenizer(paths, args):
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=args.train_vocab - 1, initial_alphabet=alphabet, special_tokens=[],
                                  show_progress=False)
    progress = Progress(sum(os.path.getsize(p) for p in paths), "reading for the tokenizer")

    def texts():
        for task in plan_tasks(paths, args.choices):
            for text, _ in documents_of(task, args.choices):
                yield text
            progress.add(sum(piece.consumed for piece in task))
        progress.close()

    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True)])  # behind the others, as in Qwen2
    made = tokenizer.get_vocab_size()
    if made < args.train_vocab:
        say(f"the text gives a vocabulary of {made} tokens only, fewer than the {args.train_vocab} asked for")
    content = tokenizer.to_str(pretty=True) + "\n"
    if os.path.exists(args.tokenizer) and not args.force:
        if Path(args.tokenizer).read_bytes() == content.encode():
            return
        raise SystemExit(usage_error(f"{args.tokenizer} exists and is another tokenizer; remove it, or replace it "
                                     "with --force"))
    with StagedFile(args.tokenizer, warn) as staged:
        Path(staged.part("tokenizer.json")).write_bytes(content.encode())
        staged.commit("tokenizer.json")
    say(f"{args.tokenizer}: {made} tokens")


class Encoder:
    """One process's tokenizer."""

    def __init__(self, content, path, choices, parse_special):
        self.tokenizer = load_tokenizer(content, path)
        # Text that spells a control token is text, unless asked otherwise: data must not be able to end documents.
        self.tokenizer.encode_special_tokens = not parse_special
        self.choices = choices

    def run(self, task, eos):
        tokens, masks, lengths, replaced, empty = [], [], [], 0, 0
        for document, wrong in documents_of(task, self.choices):
            replaced += wrong
            ids, mask = self.choices.encode(document, self.tokenizer, eos)
            if not ids:
                empty += 1
                continue
            tokens.append(numpy.asarray(ids, dtype="<u4"))
            masks.append(numpy.asarray(mask, dtype="u1"))
            lengths.append(len(ids))
        joined = numpy.concatenate(tokens) if tokens else numpy.empty(0, dtype="<u4")
        mask = numpy.concatenate(masks) if masks else numpy.empty(0, dtype="u1")
        return joined, mask, lengths, replaced, empty, sum(piece.consumed for piece in task)


def start_process(parent, *arguments):
    global encoder
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    encoder = Encoder(*arguments)


def run_task(task, eos):
    return encoder.run(task, eos)


def results_in_order(tasks, eos, processes, arguments):
    """Results of all tasks in their order; a few tasks per process are under way at a time."""
    pool = concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), start_process,
                                                  (os.getpid(), *arguments))
    under_way = collections.deque()
    try:
        for task in tasks:
            under_way.append(pool.submit(run_task, task, eos))
            if len(under_way) >= 4 * processes:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# ---- writing --------------------------------------------------------------------------------------------------------

def say(text):
    print(f"{line_time()}tokenize: {text}", file=sys.stderr)


def warn(text):
    say(f"warning: {text}")


def usage_error(text):
    print(f"tokenize: error: {text}", file=sys.stderr)
    return 2


class Progress:
    """A bar with rate and time left on a terminal; nothing elsewhere."""

    def __init__(self, total, what):
        self.total, self.what, self.done = max(total, 1), what, 0
        self.start = self.shown = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def add(self, amount):
        self.done += amount
        now = time.monotonic()
        if not self.terminal or (now - self.shown < 0.1 and self.done < self.total):
            return
        self.shown = now
        share, rate = self.done / self.total, self.done / max(now - self.start, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        bar = "#" * int(30 * share) + "." * (30 - int(30 * share))
        print(f"\r{self.what} [{bar}] {100 * share:3.0f}%  {rate / 1e6:.1f} MB/s  {left:.0f} s left ", end="",
              file=sys.stderr, flush=True)

    def close(self):
        if self.terminal:
            print(file=sys.stderr)


def checksum_of(attributes, count, ends, chunks, mask_chunks):
    """Of what a token file says, as in data/token_file_format.h."""
    summary = (f"{attributes['format']} vocab_size {attributes['vocab_size']} eos_id {attributes['eos_id']} "
               f"tokenizer_sha256 {attributes['tokenizer_sha256']} tokens {count} documents {len(ends)}\n")
    tokens = zlib.crc32(chunks.tobytes(), zlib.crc32(ends.tobytes(), zlib.crc32(summary.encode())))
    return zlib.crc32(mask_chunks.tobytes(), tokens)


def read_numbers(raw, dtype, begin, end):
    size = numpy.dtype(dtype).itemsize
    with open(raw, "rb") as file:
        file.seek(size * begin)
        content = file.read(size * (end - begin))
    if len(content) != size * (end - begin):
        raise OSError(errno.EIO, "has lost its end", raw)
    return numpy.frombuffer(content, dtype=dtype)


def write_column(out, name, raw, dtype, count):
    """A number for each token out of the file `raw`; returns the checksums of its chunks."""
    column, chunks = out.create_dataset(name, shape=(count,), dtype=dtype), []
    for begin in range(0, count, COPY_TOKENS):
        end = min(count, begin + COPY_TOKENS)
        block = read_numbers(raw, dtype, begin, end)
        column[begin:end] = block
        chunks += [zlib.crc32(block[i:i + CHUNK_TOKENS].tobytes()) for i in range(0, len(block), CHUNK_TOKENS)]
    return numpy.asarray(chunks, dtype="<u4")


def write_token_file(path, raw, count, document_ends, attributes, raw_mask=None):
    """`raw`: the tokens as they came, in a file; `raw_mask`: which of them count, or None. A contiguous dataset needs
    its size first, hence two files."""
    ends, mask_chunks = numpy.asarray(document_ends, dtype="<i8"), numpy.empty(0, dtype="<u4")
    columns = ["tokens", "document_ends"]
    with h5py.File(path, "w") as out:
        chunks = write_column(out, "tokens", raw, "<u4", count)
        out.create_dataset("document_ends", data=ends)
        out.create_dataset("checksums", data=chunks)
        if raw_mask is not None:
            mask_chunks = write_column(out, "loss_mask", raw_mask, "u1", count)
            out.create_dataset("loss_mask_checksums", data=mask_chunks)
            columns.append("loss_mask")
        for name, value in attributes.items():
            # Texts of fixed length: others lie in a heap of the file that the HDF5 library reads without checking.
            out.attrs[name] = numpy.bytes_(value.encode()) if isinstance(value, str) else value
        out.attrs["checksum"] = checksum_of(attributes, count, ends, chunks, mask_chunks)
    # A full disk can pass the library without an error.
    with h5py.File(path, "r") as made:
        whole = all(d.id.get_offset() is not None and
                    d.id.get_offset() + d.size * d.dtype.itemsize <= os.path.getsize(path)
                    for d in (made[name] for name in columns))
        if not whole or made["tokens"].shape != (count,) or made["document_ends"][-1] != count:
            raise OSError(errno.ENOSPC, "was not written whole; is the disk full?", str(path))


def encode_files(paths, raw, raw_mask, arguments, eos, processes):
    """Writes the tokens of all documents, and which of them count, to open files; returns (ends, counted, replaced,
    empty)."""
    ends, count, counted, replaced, empty = [], 0, 0, 0, 0
    progress = Progress(sum(os.path.getsize(p) for p in paths), "tokenizing")
    for result in results_in_order(plan_tasks(paths, arguments[2]), eos, processes, arguments):
        tokens, mask, lengths, wrong, without_text, consumed = result
        raw.write(tokens.tobytes())
        raw_mask.write(mask.tobytes())
        counted += int(mask.sum())
        for length in lengths:
            count += length
            ends.append(count)
        replaced += wrong
        empty += without_text
        progress.add(consumed)
    progress.close()
    return ends, counted, replaced, empty


def tokenize(paths, args):
    # Threads of the library beside our processes would only fight over the processors, and do not survive the fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    content = Path(args.tokenizer).read_bytes()
    tokenizer = load_tokenizer(content, args.tokenizer)
    eos = tokenizer.token_to_id(args.eos)
    if eos is None:
        raise BadInput(f"{args.tokenizer}: has no token '{args.eos}'; name the one that ends documents with --eos")
    args.choices.check(tokenizer, args.tokenizer)
    vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    with StagedFile(args.out, warn) as staged:
        with open(staged.part("tokens"), "wb") as raw, open(staged.part("loss_mask"), "wb") as raw_mask:
            arguments = (content, args.tokenizer, args.choices, args.parse_special)
            ends, counted, replaced, empty = encode_files(paths, raw, raw_mask, arguments, eos, args.processes)
        empty += sum(os.path.getsize(p) == 0 for p in paths)
        if not ends:
            raise BadInput(f"no text in {len(paths)} files; {args.out} is not written")
        attributes = {"format": FORMAT, "vocab_size": vocab_size, "eos_id": eos,
                      "tokenizer_sha256": hashlib.sha256(content).hexdigest()}
        in_child(staged.part("tokens.h5"), lambda: write_token_file(
            staged.part("tokens.h5"), staged.part("tokens"), ends[-1], ends, attributes,
            staged.part("loss_mask") if args.chat else None))
        staged.commit("tokens.h5")
    targets = f", {counted} targets that count" if args.chat else ""
    say(f"{args.out}: {ends[-1]} tokens, {len(ends)} documents{targets}")
    if empty:
        say(f"{empty} empty documents left out")
    if replaced:
        warn(f"{replaced} invalid UTF-8 sequences replaced by U+FFFD")


# ---- command line ---------------------------------------------------------------------------------------------------

def parse_arguments():
    parser = ToolParser(prog="tokenize.py", description=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, metavar="tokenizer.json",
                        help="Hugging Face tokenizer, or a folder with one; written when --train-vocab is given")
    parser.add_argument("--out", metavar="TOKENS.h5",
                        help="token file to write, replaced if it exists; may be left out with --train-vocab")
    parser.add_argument("--eos", default=END_OF_TEXT, metavar="TOKEN",
                        help=f"token that ends each document (default {END_OF_TEXT})")
    parser.add_argument("--key", help="where a JSON record or a Parquet row holds its text (default text), or with "
                        "--chat its turns (default messages)")
    parser.add_argument("--chat", action="store_true",
                        help="records are conversations; writes which targets count, those of the assistant")
    parser.add_argument("--template", choices=sorted(TEMPLATES), help="how --chat spells a conversation")
    parser.add_argument("--as", dest="kind", choices=("auto", "text", "jsonl", "json"), default="auto",
                        help="what every FILE is: text, JSON lines, or one JSON value (default: as its bytes look)")
    parser.add_argument("--replace-invalid", action="store_true",
                        help="replace what is not UTF-8 by U+FFFD (default: such a file is refused)")
    parser.add_argument("--train-vocab", type=int, metavar="N",
                        help=f"train a byte-level BPE of N tokens, {END_OF_TEXT} included (at least 257)")
    parser.add_argument("--force", action="store_true", help="replace another tokenizer at --tokenizer")
    parser.add_argument("--parse-special", action="store_true",
                        help="read control tokens spelt out in the text as such (default: as plain text)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), metavar="P",
                        help="how many work in parallel (default: the processors available, %(default)s)")
    parser.add_argument("files", nargs="+", metavar="FILE", help="text, JSON lines or JSON, also packed, or Parquet")
    args = parser.parse_args()
    if args.train_vocab is not None and args.train_vocab < 257:
        parser.error(f"--train-vocab {args.train_vocab}: 256 bytes and {END_OF_TEXT} need at least 257")
    if args.out is None and args.train_vocab is None:
        parser.error("--out TOKENS.h5 is missing")
    if args.processes < 1:
        parser.error("--processes: at least 1")
    if os.path.isdir(args.tokenizer):  # a model's folder
        args.tokenizer = os.path.join(args.tokenizer, "tokenizer.json")
    outputs = [args.out] if args.train_vocab is None else [args.out, args.tokenizer]
    for out in filter(None, outputs):
        taken = [*args.files, args.tokenizer] if out == args.out else args.files
        if any(os.path.exists(out) and os.path.exists(path) and os.path.samefile(out, path) for path in taken):
            parser.error(f"{out} is read and would be overwritten; choose another name for the output")
    if args.chat != bool(args.template) or (args.chat and (args.train_vocab is not None or args.kind == "text")):
        parser.error("--chat and --template belong together, and are neither for --train-vocab nor for --as text")
    args.choices = Choices(args.key or "text", args.kind, args.replace_invalid)
    if args.chat:
        args.choices = ChatChoices(args.key or "messages", args.kind, args.replace_invalid, args.template)
    return args


def check_paths(args):
    for path in args.files:
        if os.path.isdir(path):
            raise BadInput(f"{path}: is a folder; give the files in it, for example {os.path.join(path, '*')}")
        if not os.path.isfile(path):
            raise BadInput(f"{path}: is not a file" if os.path.exists(path) else f"{path}: no such file")
    for path in filter(None, (args.out, args.tokenizer)):
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise BadInput(f"{path}: its folder does not exist")
    if args.out is not None and os.path.isdir(args.out):
        raise BadInput(f"{args.out}: is a folder; name the file to write")
    if args.train_vocab is None and not os.path.isfile(args.tokenizer):
        others = sorted({"tokenizer.model", "vocab.json", "qwen.tiktoken"} & set(
            os.listdir(os.path.dirname(os.path.abspath(args.tokenizer)))))
        beside = (f"{' and '.join(others)} beside it {'is' if len(others) == 1 else 'are'} of another form: save it "
                  "anew with transformers' AutoTokenizer; or ") if others else ""
        raise BadInput(f"{args.tokenizer}: no such file; {beside}train one with --train-vocab N")


def main():
    args = parse_arguments()
    import_libraries()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that unfinished files go
    check_paths(args)
    try:
        if args.train_vocab is not None:
            train_tokenizer(args.files, args)
        if args.out is not None:
            tokenize(args.files, args)
    except OSError as e:  # HDF5 hands its own text instead of a number and a name
        e.filename = e.filename or args.out or args.tokenizer
        raise
    except Taken as e:
        return usage_error(str(e))
    except concurrent.futures.BrokenExecutor:
        print("tokenize: error: a process ended unexpectedly (out of memory?); try --processes 1", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("tokenize", main))
