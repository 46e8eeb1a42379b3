"""Warnings for a collapsed codebook, in which only a few codes are in use."""

COLLAPSED = 0.05
"""Fraction of codes in use below which a codebook counts as collapsed."""
_LONGER = "train the tokenizer longer (pipelines/train_tokenizer.py --steps)"


def collapse_warning(used: int, vocabulary: int, advice: str = _LONGER) -> str:
    """Return the one-line warning for a codebook of which only `used` codes are in use."""
    return (
        f"WARNING: only {used} of {vocabulary} codes are in use, so a low number of bits per code means little. "
        f"First look at the reconstructions of the tokenizer, then {advice}."
    )


class CollapseAlarm:
    """Warn during training when few codes are in use, or when their number falls below half of its maximum so far.

    Each of the two warnings is given once.

    Args:
        vocabulary: size of the codebook.
        codes: number of codes in one validation, which is an upper bound for the codes in use.
        advice: how to avoid a collapse, as the end of a sentence.
    """

    def __init__(self, vocabulary: int, codes: int, advice: str) -> None:
        self._vocabulary, self._most, self._advice = vocabulary, min(vocabulary, codes), advice
        self._best = 0.0
        self._given: set[str] = set()

    def check(self, step: int, dead: float) -> str | None:
        """Return the warning for a validation with `dead` unused codes, or None if there is none or it was given before."""
        used = self._vocabulary - dead
        self._best = max(self._best, used)
        if used < COLLAPSED * self._most:
            kind, text = "few", collapse_warning(round(used), self._vocabulary, self._advice)
        elif used < self._best / 2:
            now, best = (f"{100 * count / self._vocabulary:.0f} %" for count in (used, self._best))
            text = (
                f"WARNING: the codebook is collapsing: {now} of the codes are in use at step {step}, down from {best}."
            )
            kind, text = "fall", f"{text} To prevent this, {self._advice}."
        else:
            return None
        if kind in self._given:
            return None
        self._given.add(kind)
        return text
