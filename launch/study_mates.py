"""Batches in which one sequence counts, twice beside other ones: whether its loss depends on who is computed with it.

Steps 1 and 2 of such a training have the same sequence at the same place, and nothing else in common; so have 3 and 4,
and so on. The loss mask leaves that sequence's targets alone, so that the loss of a step is that sequence's. With a
learning rate of 0 both steps have the same weights: the two losses are the same to the bit, or something of the others
reached the sequence.
"""

import math
from dataclasses import dataclass

from command_line import BadInput, BadUsage, display
from whole_file import whole_file

PIECE = 1 << 22  # tokens that are copied at a time


def keys_of(settings):
    """What a training over such batches has for keys, whatever else it says."""
    batch = settings["train"]["micro_batch"]
    if batch < 2:
        raise BadUsage(f"train.micro_batch {batch}: a sequence alone has no mates")
    return {"data.shuffle": False, "train.global_batch": batch}  # the loss of a step is one sequence's


def order_of(pairs, batch, sequences):
    """For each place of the file the sequence that stands there; the place of the one that counts goes round."""
    taken, order = 0, []
    for pair in range(pairs):
        counted, taken = taken, taken + 1
        for _ in range(2):
            mates = range(taken, taken + batch - 1)
            taken += batch - 1
            order += [*mates[:pair % batch], counted, *mates[pair % batch:]]
    order.append(taken)  # the last target of a sequence is the first token behind it: without one it is none
    return [sequence % sequences for sequence in order]


def counted_places(pairs, batch):
    return [step * batch + step // 2 % batch for step in range(2 * pairs)]


def pairs_of(settings):
    return -(-settings["train"]["steps"] // 2)


def size_of(settings):
    """In words that tell one token file from another."""
    return f"{pairs_of(settings)}x{settings['train']['micro_batch']}x{settings['data']['seq_len']}"


def write_tokens(source, to, settings):
    """The token file of a training: its sequences out of `source`, in the order that is read without shuffling."""
    import h5py  # here alone: what plans and compares needs no token file
    import numpy as np
    length, batch, pairs = settings["data"]["seq_len"], settings["train"]["micro_batch"], pairs_of(settings)
    with whole_file(to) as part, h5py.File(source, "r") as old, h5py.File(part, "w") as new:
        sequences = len(old["tokens"]) // length
        if sequences < 2 * batch - 1:  # of a pair of steps, so that no mate is there in both
            raise BadInput(f"{display(source)}: {sequences} sequences of {length} tokens; two batches of {batch} with "
                           f"one sequence in common need {2 * batch - 1}; give a larger --text")
        order = order_of(pairs, batch, sequences)
        tokens = new.create_dataset("tokens", shape=(len(order) * length,), dtype="<u4")
        step = max(1, PIECE // length)
        for first in range(0, len(order), step):
            rows = [old["tokens"][s * length:(s + 1) * length] for s in order[first:first + step]]
            tokens[first * length:(first + len(rows)) * length] = np.concatenate(rows)
        mask = np.zeros((len(order), length), dtype="u1")
        mask[counted_places(pairs, batch), 1:] = 1  # number i says whether token i counts as a target
        new["loss_mask"] = mask.ravel()
        new["document_ends"] = np.arange(1, len(order) + 1, dtype="<i8") * length
        for name in ("format", "vocab_size", "eos_id", "tokenizer_sha256"):
            if name in old.attrs:
                new.attrs[name] = old.attrs[name]


@dataclass(frozen=True)
class Changes:
    """Of the sequences that counted beside two sets of others."""
    sequences: int
    changed: int    # whose two losses differ in any bit
    largest: float  # of the differences, nats

    @property
    def share(self):
        return self.changed / self.sequences if self.sequences else math.nan


def changes_of(records):
    """Of what every step logged; the last step may be without its other half."""
    losses = {record["step"]: record["loss"] for record in records}
    if sorted(losses) != list(range(1, len(losses) + 1)):
        raise BadInput("a training over batches with mates did not log every step; log.every must be 1")
    for step, loss in losses.items():
        if loss is None or not math.isfinite(loss):
            raise BadInput(f"step {step}: the loss is no number, which says nothing of its mates")
    pairs = [(losses[step], losses[step + 1]) for step in range(1, len(losses), 2)]
    apart = [abs(a - b) for a, b in pairs if a != b]
    return Changes(len(pairs), len(apart), max(apart, default=0.0))
