"""Documents to tokens: what one process makes of its tasks, and what there is to tell of it."""

import collections
import copy
import functools
import json

import numpy

from command_line import BadInput
from text_documents import NOTHING, TEXT, Refused, documents_of
from tokenizer_file import load_tokenizer


def without_prefix(part):
    """A normalizer or pre-tokenizer of a tokenizer.json that puts no blank before what it is given; the same object
    where it does not anyway."""
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    if part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never":
        return part | {"prepend_scheme": "never"}
    if part.get("type") == "ByteLevel" and part.get("add_prefix_space"):
        return part | {"add_prefix_space": False}
    for key in ("normalizers", "pretokenizers"):
        if part.get("type") == "Sequence" and key in part:
            kept = [without_prefix(one) for one in part[key]]
            if any(new is not old for new, old in zip(kept, part[key], strict=True)):
                return part | {key: [one for one in kept if one is not None]}
    return part


class Speller:
    """A tokenizer for documents that come in pieces. Many put a blank before a text; where that is none of the text's
    own, a piece that goes on with one must not have it again, or the model would learn to begin what it says so."""

    def __init__(self, content, path, parse_special, controls=()):
        self.path, self.unknowns = path, 0
        self.tokenizer = load_tokenizer(content, path)
        # Text that spells a control token is text, unless asked otherwise: data must not be able to end documents.
        # Where a file does not mark such a token (`special`), `controls` names those that are used as such.
        if not parse_special:
            added = {token.content for token in self.tokenizer.get_added_tokens_decoder().values()}
            self.tokenizer.add_special_tokens([name for name in controls if name in added])
        self.tokenizer.encode_special_tokens = not parse_special

    @functools.cached_property
    def form(self):
        return json.loads(self.tokenizer.to_str())

    @functools.cached_property
    def going_on(self):
        """The tokenizer of what follows a text, and whether of what follows a control token: as within one text."""
        form = copy.copy(self.form)
        for key in ("normalizer", "pre_tokenizer"):
            form[key] = without_prefix(form[key])
        if all(form[key] is self.form[key] for key in ("normalizer", "pre_tokenizer")):
            return self.tokenizer, False
        made = load_tokenizer(json.dumps(form).encode(), self.path)
        made.encode_special_tokens = self.tokenizer.encode_special_tokens
        return made, '"prepend_scheme": "first"' in json.dumps(self.form["pre_tokenizer"])

    def token(self, name):
        return self.tokenizer.token_to_id(name)

    def spell(self, text, before=NOTHING):
        tokenizer = self.tokenizer
        if before != NOTHING:
            going_on, after_control = self.going_on
            tokenizer = going_on if before == TEXT or after_control else tokenizer
        try:
            # The same tokens as of encode(), without their places in the text: less memory and, of long texts, time.
            ids = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except Exception as e:  # noqa: BLE001  the library has no other kind
            raise BadInput(f"{self.path}: cannot spell the text {text[:40]!r}...: {' '.join(str(e).split())}") from None
        self.unknowns += ids.count(self.unknown)
        return ids

    @functools.cached_property
    def unknown(self):
        """The token that stands for what the tokenizer does not know, or -1."""
        model = self.form["model"]
        name, number = model.get("unk_token"), model.get("unk_id")
        return number if number is not None else self.token(name) if name and self.token(name) is not None else -1

    def loses_characters(self):
        """Whether what it does not know leaves no trace at all."""
        model = self.form["model"]
        return (model["type"] == "BPE" and self.unknown < 0 and not model.get("byte_fallback") and
                '"ByteLevel"' not in json.dumps([self.form["normalizer"], self.form["pre_tokenizer"]]))

    def begins_with(self):
        """The names of the tokens that the tokenizer itself puts before a text."""
        try:
            own, bare = self.tokenizer.encode("a"), self.tokenizer.encode("a", add_special_tokens=False)
        except Exception:  # noqa: BLE001  a vocabulary without this letter: a text that meets it is told
            return []
        first = own.special_tokens_mask.index(0) if 0 in own.special_tokens_mask else 0
        return own.tokens[:first] if own.ids != bare.ids else []


class Notes(collections.Counter):
    """How often what is to be told happened: 'replaced', 'empty', 'tokenless', 'unknown', 'refused', ('why', words) of
    the first that were refused, and ('unread', key) of keys of turns that have no place in a template."""


class Encoder:
    """One process's tokenizer."""

    def __init__(self, content, path, choices, parse_special, bos, controls):
        self.speller, self.choices = Speller(content, path, parse_special, controls), choices
        self.bos = None if bos is None else self.speller.token(bos)

    def run(self, task, eos):
        """(tokens, which of them count, lengths of the documents, notes, bytes of files that are done)"""
        tokens, masks, lengths, notes, unknowns = [], [], [], Notes(), self.speller.unknowns
        refused = Refused() if self.choices.skip_refused else None
        for piece in task:
            notes["empty"] += piece.kind == "empty"
            for document, wrong in documents_of([piece], self.choices, refused):
                notes["replaced"] += wrong
                notes.update(("unread", key) for key in self.choices.unread(document))
                try:
                    ids, mask = self.encoded(document, piece, eos)
                except BadInput as e:
                    if refused is None:
                        raise
                    refused.add(e)
                    continue
                if not ids:
                    notes["tokenless" if document else "empty"] += 1
                    continue
                tokens.append(numpy.asarray(ids, dtype="<u4"))
                masks.append(numpy.asarray(mask, dtype="u1"))
                lengths.append(len(ids))
        joined = numpy.concatenate(tokens) if tokens else numpy.empty(0, dtype="<u4")
        mask = numpy.concatenate(masks) if masks else numpy.empty(0, dtype="u1")
        notes["unknown"] += self.speller.unknowns - unknowns
        if refused is not None:
            notes["refused"] = refused.count
            notes.update(("why", words) for words in refused.words)
        return joined, mask, lengths, notes, sum(piece.consumed for piece in task)

    def encoded(self, document, piece, eos):
        try:
            ids, mask = self.choices.encode(document, self.speller, eos)
        except BadInput as e:
            raise BadInput(f"{piece.path}: {e}") from None
        if ids and self.bos is not None:
            return [self.bos, *ids], [0, *mask] if mask else mask
        return ids, mask
