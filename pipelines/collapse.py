"""A tokenizer whose codes have collapsed onto a few: noticed, and what to do about it."""

COLLAPSED = 0.05
"""Share of the codes in use below which nothing that comes later means much."""
_LONGER = "train the tokenizer longer (pipelines/train_tokenizer.py --steps)"


def collapse_warning(used: int, vocabulary: int, advice: str = _LONGER) -> str:
    """One line for people."""
    return (
        f"WARNING: only {used} of {vocabulary} codes are in use. Bits per code will look good and mean little: "
        f"{advice}, and look at the tokenizer's pictures first."
    )


class CollapseAlarm:
    """Watches the share of codes in use over a training; warns when it is tiny, and when it falls to half of what it was."""

    def __init__(self, vocabulary: int, advice: str) -> None:
        self._vocabulary, self._advice = vocabulary, advice
        self._best = 0.0
        self._said: set[str] = set()

    def check(self, step: int, usage: float, codes: int) -> str | None:
        """A warning, if there is a new one, of the usage of a validation of that many codes."""
        most = min(1.0, codes / self._vocabulary)
        self._best = max(self._best, usage)
        if usage < COLLAPSED * most:
            return self._once("few", collapse_warning(round(usage * self._vocabulary), self._vocabulary, self._advice))
        if usage < self._best / 2:
            return self._once(
                "fall",
                f"WARNING: at step {step} {100 * usage:.0f} % of the codes are in use, after {100 * self._best:.0f} %: the "
                f"codebook is collapsing; {self._advice}, or stop here and use an earlier checkpoint.",
            )
        return None

    def _once(self, kind: str, text: str) -> str | None:
        if kind in self._said:
            return None
        self._said.add(kind)
        return text
