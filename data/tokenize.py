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
import array  # noqa: E402
import collections  # noqa: E402
import concurrent.futures  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import multiprocessing  # noqa: E402
import signal  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

from chat_documents import FORMS, ChatChoices  # noqa: E402
from hdf5_child import die_with, in_child  # noqa: E402
from staged_file import StagedFile, Taken  # noqa: E402
from text_documents import Choices, Refused, documents_of, plan_tasks  # noqa: E402

END_OF_TEXT = "<|endoftext|>"
# What a word is, before merging: contractions, letters, single digits, punctuation, line ends, blanks (as in Qwen2).
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")


def import_libraries():
    """The packages of launch/requirements.txt, with words for their absence."""
    global document_encoder, token_file_writer, tokenizers
    try:
        import document_encoder
        import token_file_writer
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
    refused = Refused() if args.skip_refused else None

    def texts():
        for task in plan_tasks(paths, args.choices):
            for text, _ in documents_of(task, args.choices, refused):
                yield text
            progress.add(sum(piece.consumed for piece in task))
        progress.close()

    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True)])  # behind the others, as in Qwen2
    if refused is not None:
        tell_refused(refused.count, refused.words)
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


def start_process(parent, *arguments):
    global encoder
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    encoder = document_encoder.Encoder(*arguments)


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


def encode_files(paths, raw, raw_mask, arguments, eos, processes):
    """Writes the tokens of all documents, and which of them count, to open files; returns (ends, counted, notes)."""
    ends, count, counted, notes = array.array("q"), 0, 0, document_encoder.Notes()
    progress = Progress(sum(os.path.getsize(p) for p in paths), "tokenizing")
    for result in results_in_order(plan_tasks(paths, arguments[2]), eos, processes, arguments):
        tokens, mask, lengths, more, consumed = result
        raw.write(tokens.tobytes())
        raw_mask.write(mask.tobytes())
        counted += int(mask.sum())
        for length in lengths:
            count += length
            ends.append(count)
        notes.update(more)
        progress.add(consumed)
    progress.close()
    return ends, counted, notes


def tell_refused(count, words):
    if count > 0:
        warn(f"{count} records left out that are refused; {'the first' if count > 1 else 'it'}: {words[0]}")
    for more in words[1:Refused.TOLD]:
        warn(f"another: {more}")


def tell(notes, tokens, args):
    """What happened to the text beside being tokenized, as far as it did."""
    if notes["empty"]:
        say(f"{notes['empty']} empty documents left out")
    if notes["tokenless"]:
        warn(f"{notes['tokenless']} documents left out of whose text {args.tokenizer} makes no token at all")
    if notes["replaced"]:
        warn(f"{notes['replaced']} invalid UTF-8 sequences replaced by U+FFFD")
    if notes["unknown"]:
        warn(f"{notes['unknown']} of {tokens} tokens stand for text that {args.tokenizer} does not know; the model "
             "cannot tell what it was")
    unread = [f"{key[1]} ({count})" for key, count in sorted(notes.items(), key=str) if key[0] == "unread"]
    if unread:
        warn(f"of what records say --template {args.template} has no place for: {', '.join(unread)}")


def said_beside(args, option):
    """What tokenizer_config.json says of the token that an option names, as advice."""
    try:
        path = Path(args.tokenizer).with_name("tokenizer_config.json")
        token = json.loads(path.read_text(encoding="utf-8")).get(option.removeprefix("--") + "_token")
        token = token["content"] if isinstance(token, dict) else token
    except (OSError, ValueError, AttributeError, KeyError):
        return ""
    return f" ({path.name} says '{token}')" if isinstance(token, str) else ""


def controls_of(args):
    return [name for name in (args.eos, args.bos, *args.choices.controls()) if name is not None]


def speller_for(content, args):
    """The tokenizer, with words about what of a text it does not keep."""
    speller = document_encoder.Speller(content, args.tokenizer, args.parse_special, controls_of(args))
    for option, name, what in (("--eos", args.eos, "the one that ends documents"),
                               ("--bos", args.bos, "the one that begins documents")):
        if name is not None and speller.token(name) is None:
            raise BadInput(f"{args.tokenizer}: has no token '{name}'; name {what} with {option}" +
                           said_beside(args, option))
    args.choices.check(speller)
    if speller.loses_characters():
        warn(f"{args.tokenizer} has neither bytes nor a token for what it does not know: such characters are lost")
    if args.bos is None and not args.choices.begins_texts() and (own := speller.begins_with()):
        say(f"{args.tokenizer} begins a text with {' '.join(own)}, as `upmoe generate` and transformers do, and "
            f"documents of this file begin without; --bos '{own[0]}' puts it there")
    return speller


def tokenize(paths, args):
    # Threads of the library beside our processes would only fight over the processors, and do not survive the fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    content = Path(args.tokenizer).read_bytes()
    speller = speller_for(content, args)
    eos = speller.token(args.eos)
    vocab_size = 1 + max(speller.tokenizer.get_vocab(with_added_tokens=True).values())
    with StagedFile(args.out, warn) as staged:
        with open(staged.part("tokens"), "wb") as raw, open(staged.part("loss_mask"), "wb") as raw_mask:
            arguments = (content, args.tokenizer, args.choices, args.parse_special, args.bos,
                         controls_of(args))
            ends, counted, notes = encode_files(paths, raw, raw_mask, arguments, eos, args.processes)
        if args.train_vocab is None:  # else it was told when that was trained on the same
            tell_refused(notes["refused"], [key[1] for key in notes if key[0] == "why"])
        if not ends:
            raise BadInput(f"no text in {len(paths)} files; {args.out} is not written")
        attributes = {"format": token_file_writer.FORMAT, "vocab_size": vocab_size, "eos_id": eos,
                      "tokenizer_sha256": hashlib.sha256(content).hexdigest()}
        in_child(staged.part("tokens.h5"), lambda: token_file_writer.write_token_file(
            staged.part("tokens.h5"), staged.part("tokens"), ends[-1], ends, attributes,
            staged.part("loss_mask") if args.chat else None))
        staged.commit("tokens.h5")
    targets = f", {counted} targets that count" if args.chat else ""
    say(f"{args.out}: {ends[-1]} tokens, {len(ends)} documents{targets}")
    tell(notes, ends[-1], args)


# ---- command line ---------------------------------------------------------------------------------------------------

def names_in(path):
    """The names of files in a list: more of them than a command line takes."""
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    return [os.fsdecode(name) for name in data.split(b"\0" if b"\0" in data else b"\n") if name]


def parse_arguments():
    parser = ToolParser(prog="tokenize.py", description=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, metavar="tokenizer.json",
                        help="Hugging Face tokenizer, or a folder with one; written when --train-vocab is given")
    parser.add_argument("--out", metavar="TOKENS.h5",
                        help="token file to write, replaced if it exists; may be left out with --train-vocab")
    parser.add_argument("--eos", default=END_OF_TEXT, metavar="TOKEN",
                        help=f"token that ends each document (default {END_OF_TEXT})")
    parser.add_argument("--bos", metavar="TOKEN",
                        help="token that begins each document (default: none; it never counts as a target of --chat)")
    parser.add_argument("--key", help="where a JSON record or a Parquet row holds its text (default text), or with "
                        "--chat its turns (default messages)")
    parser.add_argument("--chat", action="store_true",
                        help="records are conversations; writes which targets count, those of the assistant")
    parser.add_argument("--template", choices=sorted(FORMS), help="how --chat spells a conversation; "
                        "model: by the chat template beside the tokenizer")
    parser.add_argument("--as", dest="kind", choices=("auto", "text", "jsonl", "json"), default="auto",
                        help="what every FILE is: text, JSON lines, or one JSON value (default: as its bytes look)")
    parser.add_argument("--replace-invalid", action="store_true",
                        help="replace what is not UTF-8 by U+FFFD (default: such a file is refused)")
    parser.add_argument("--skip-refused", action="store_true",
                        help="leave out JSON records and Parquet rows that are refused, and tell how many, and of the "
                        "first why (default: the first ends it)")
    parser.add_argument("--train-vocab", type=int, metavar="N",
                        help=f"train a byte-level BPE of N tokens, {END_OF_TEXT} included (at least 257)")
    parser.add_argument("--force", action="store_true", help="replace another tokenizer at --tokenizer")
    parser.add_argument("--parse-special", action="store_true",
                        help="read control tokens spelt out in the text as such (default: as plain text)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), metavar="P",
                        help="how many work in parallel (default: the processors available, %(default)s)")
    parser.add_argument("--files-from", metavar="LIST",
                        help="a file with more names, one a line, or with a zero byte behind each as of find -print0; "
                        "-: standard input")
    parser.add_argument("files", nargs="*", metavar="FILE", help="text, JSON lines or JSON, also packed, or Parquet")
    args = parser.parse_args()
    if args.files_from is not None:
        args.files += names_in(args.files_from)
    if not args.files:
        parser.error("no FILE is given" if args.files_from is None else f"{args.files_from}: holds no names of files")
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
    args.choices = Choices(args.key or "text", args.kind, args.replace_invalid, args.skip_refused)
    if args.chat:
        args.choices = ChatChoices(args.key or "messages", args.kind, args.replace_invalid, args.skip_refused,
                                   args.template, args.parse_special)
    if args.bos is not None and args.choices.begins_texts():
        parser.error(f"--template {args.template}: puts in front what texts begin with; leave --bos out")
    return args


def check_paths(args):
    for path in args.files:
        if os.path.isdir(path):
            raise BadInput(f"{path}: is a folder; give the files in it, for example {os.path.join(path, '*')}, or all "
                           "below it: find FOLDER -type f -print0 | sort -z | ... --files-from -")
        if not os.path.isfile(path):
            raise BadInput(f"{path}: is not a file" if os.path.exists(path) else f"{path}: no such file")
    files = collections.Counter(map(os.path.realpath, args.files))
    twice = [path for path, count in files.items() if count > 1]
    if twice:
        warn(f"{twice[0]} is given {files[twice[0]]} times and is read as often" +
             (f", as are {len(twice) - 1} more" if len(twice) > 1 else ""))
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
        largest = max(args.files, key=os.path.getsize)
        print("tokenize: error: a process ended unexpectedly (out of memory? each takes many times the bytes of "
              "the text that it works on: of JSON lines and Parquet a record, of plain text the whole file; "
              f"{largest} is the largest, {os.path.getsize(largest)} bytes); try --processes 1, or cut long texts",
              file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("tokenize", main))
