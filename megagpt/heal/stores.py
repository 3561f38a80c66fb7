"""What befell the reads from stores since the ranks last compared: told where it is more than a network's everyday."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megagpt.data.corpus import Corpus
from megagpt.data.fetch import Remote
from megagpt.parallel import ranks

_FEW, _SHARE = 10, 0.01  # reads that are tried again or late without being worth a word: no more than either


@dataclass(frozen=True)
class Trouble:
    """What is told of the reads of one corpus."""

    corpus: str
    cause: str
    action: str


class StoreTimes:
    """Counts of this rank's reads, and those that the ranks had at the last comparison."""

    def __init__(self, corpora: Sequence[Corpus]) -> None:
        self._remote = [(corpus.location, corpus.remote) for corpus in corpora if corpus.remote is not None]
        self._before = [0] * len(self._counts())

    def _counts(self) -> list[int]:
        return [count for _, remote in self._remote for count in _counts(remote)]

    def compare(self) -> list[Trouble]:
        """What there is to tell, the same on every rank. Every rank must call it."""
        if not self._remote:
            return []
        now = self._counts()
        since = [float(count - before) for count, before in zip(now, self._before, strict=True)]
        self._before = now
        totals = iter(ranks.sum_over_ranks(since))
        found = []
        for location, remote in self._remote:
            reads, retries, hedged, faults = (int(next(totals)) for _ in _counts(remote))
            bound = max(_FEW, _SHARE * reads)
            causes = []
            if faults:
                causes.append(f"downloads that failed their check: {faults:,}")
            if retries > bound:
                causes.append(f"{retries:,} tries of {reads:,} reads failed")
            if hedged > bound:
                causes.append(f"{hedged:,} of {reads:,} reads had no answer in {remote.store.patience.hedge:g} s")
            if causes:
                kept = f"; what was broken lies in {remote.cache.folder}, as *.bad" if faults else ""
                found.append(Trouble(location, ", ".join(causes), f"fetched again{kept}"))
        return found


def _counts(remote: Remote) -> tuple[int, int, int, int]:
    traffic = remote.store.traffic
    return traffic.reads, traffic.retries, traffic.hedged, remote.cache.faults
