"""Rows of tokens for every process, in an order that no number of processes and no restart changes.

    >>> from training.data import Stream
    >>> from training.sources import open_sources
    >>> sources = open_sources("code.jsonl:0.3 text/:0.7", tokenizer, cache)          # doctest: +SKIP
    >>> batch = next(iter(Stream(sources, sequence_length=1024, seed=0, lanes=8)))    # doctest: +SKIP
    >>> batch["input_ids"].shape, batch["state"]                                      # doctest: +SKIP

Why it is built this way. The order of the data must not depend on how many processes there are, and a restart at 20B
tokens must not read the first 19B again. So the files, in an order drawn from the seed, are dealt to a fixed number of
*lanes* (8), each an endless stream of rows of its own, and row n of the run is the next row of lane n mod 8. A process
reads only its lanes; any number of processes that divides 8 sees the same batches. A lane's place is a few numbers (file,
position in it, tokens of it already used), travels with every batch, is saved with every checkpoint, and lets the next
batch be the batch that would have come. Where there are fewer files than lanes, a lane takes every 8th document.

Documents of a lane follow each other, each between BOS and EOS, and are cut into rows wherever a row is full.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import IterableDataset

from .sources import DataError, Source

IGNORED = -100  # label that no loss counts


class Lane:
    """One dataset's share of one lane: an endless sequence of rows, and its place in it."""

    def __init__(self, source: Source, lane: int, lanes: int, seed: int, place: dict | None = None):
        self.source, self.lane, self.lanes, self.seed = source, lane, lanes, seed
        place = place or {"epoch": 0, "file": 0, "index": 0, "state": None, "used": 0}
        self.place = dict(place)  # of the chunk that is being used, and how many tokens of it are
        self.chunks, self.skip = self._chunks(place), place["used"]
        self.ids, self.starts = np.empty(0, np.int32), np.empty(0, bool)

    def row(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The next ``length`` token numbers, and where documents begin among them."""
        ids, starts, missing = [], [], length
        while missing:
            if self.place["used"] >= len(self.ids):
                place, self.ids, self.starts = next(self.chunks)
                self.place, self.skip = {**place, "used": self.skip}, 0
            used = self.place["used"]
            ids.append(self.ids[used : used + missing])
            starts.append(self.starts[used : used + missing])
            self.place["used"] = used + len(ids[-1])
            missing -= len(ids[-1])
        return np.concatenate(ids), np.concatenate(starts)

    def _files(self, epoch: int) -> tuple[list[int], bool]:
        """The lane's files in this epoch's order, and whether it takes all of their documents."""
        order = list(range(len(self.source.files.paths)))
        random.Random(f"{self.seed} {epoch}").shuffle(order)
        return (order[self.lane :: self.lanes], True) if len(order) >= self.lanes else (order, False)

    def _chunks(self, place: dict) -> Iterator[tuple[dict, np.ndarray, np.ndarray]]:
        epoch, first, index, state = (place[name] for name in ("epoch", "file", "index", "state"))
        while True:
            files, whole = self._files(epoch)
            any_tokens = bool(first or index)  # read before this place
            for position in range(first, len(files)):
                wanted = (lambda i: True) if whole else (lambda i: i % self.lanes == self.lane)
                for index, state, documents in self.source.documents(files[position], index, state, wanted):
                    if documents:
                        any_tokens = True
                        starts = np.zeros(sum(map(len, documents)), bool)
                        starts[np.cumsum([0, *map(len, documents[:-1])])] = True
                        at = {"epoch": epoch, "file": position, "index": index, "state": state}
                        yield at, np.concatenate(documents), starts
                index, state = 0, None
            if not any_tokens:
                raise DataError(
                    f"dataset={self.source.files.name!r} has no training document for lane {self.lane} of {self.lanes}: "
                    "it is too small; use fewer lanes (--lanes 1) or more text."
                )
            epoch, first = epoch + 1, 0


class Stream(IterableDataset):
    """Batches of rows for one process, endless.

    Args:
        sources: from ``open_sources``.
        sequence_length: tokens per row.
        seed: of the order of files, and of which dataset of a mixture a row is taken from.
        lanes: see the module's docstring; the number of processes must divide it.
        rows: rows per batch.
        boundaries: documents in a row are kept apart.
        rank, world: this process, of how many.
        place: where to go on: the ``state`` of the last batch used, of every process (``merge_states``).

    Yields:
        input_ids [rows, sequence_length] int64 and labels, the same (shifted by the model); with ``boundaries``
        position_ids, which restart at each document, and labels that ignore each document's first token; and ``state``,
        the place after the batch, which no model wants: take it out.
    """

    def __init__(
        self,
        sources: list[Source],
        *,
        sequence_length: int,
        seed: int,
        lanes: int,
        rows: int = 1,
        boundaries: bool = False,
        rank: int = 0,
        world: int = 1,
        place: dict | None = None,
    ):
        if lanes % world:
            raise DataError(f"lanes={lanes} cannot be dealt to {world} processes evenly: use --lanes {world}.")
        self.sources, self.sequence_length, self.seed, self.lanes = sources, sequence_length, seed, lanes
        self.rows, self.boundaries, self.rank, self.world = rows, boundaries, rank, world
        self.place = place or {"rows": 0, "lanes": {}}

    def __iter__(self) -> Iterator[dict]:
        given, opened, counts = self.place["lanes"], {}, {}
        for lane in range(self.rank, self.lanes, self.world):
            place = given.get(str(lane), {"rows": 0, "sources": [None] * len(self.sources)})
            opened[lane] = [
                Lane(source, lane, self.lanes, self.seed, at) for source, at in zip(self.sources, place["sources"])
            ]
            counts[lane] = place["rows"]
        n, taken = self.place["rows"] + self.rank, self.place["rows"]
        while True:
            batch = []
            for _ in range(self.rows):
                lane, n = n % self.lanes, n + self.world
                batch.append(opened[lane][self._choose(lane, counts[lane])].row(self.sequence_length))
                counts[lane] += 1
            taken += self.rows * self.world
            state = {
                str(lane): {"rows": counts[lane], "sources": [one.place for one in readers]}
                for lane, readers in opened.items()
            }
            yield {**self._tensors(batch), "state": {"rows": taken, "lanes": copy.deepcopy(state)}}

    def _choose(self, lane: int, row: int) -> int:
        """The dataset of a mixture that a lane's next row comes from."""
        weights = [source.files.weight for source in self.sources]
        return random.Random(f"{self.seed} {lane} {row}").choices(range(len(weights)), weights)[0]

    def _tensors(self, batch: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(np.stack([ids for ids, _ in batch]).astype(np.int64))
        if not self.boundaries:
            return {"input_ids": ids, "labels": ids.clone()}
        starts = torch.from_numpy(np.stack([starts for _, starts in batch]))
        starts[:, 0] = True
        columns = torch.arange(ids.shape[1]).expand_as(ids)
        position_ids = columns - torch.where(starts, columns, 0).cummax(1).values
        return {"input_ids": ids, "labels": ids.masked_fill(starts, IGNORED), "position_ids": position_ids}


def merge_states(states: list[dict]) -> dict:
    """One place out of those that the processes of a run had after the same step.

    Raises:
        ValueError: they are not of the same step.
    """
    if len({state["rows"] for state in states}) != 1:
        raise ValueError(f"data states are of different steps: {[state['rows'] for state in states]} rows.")
    lanes = {lane: place for state in states for lane, place in state["lanes"].items()}
    return {"rows": states[0]["rows"], "lanes": lanes}


__all__ = ["IGNORED", "Lane", "Stream", "merge_states"]
