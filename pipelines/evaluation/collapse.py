"""Warnings for a collapsed codebook, in which only a few codes are in use."""

_COLLAPSED = 0.05
"""Share of the codes that could be in use below which a codebook counts as collapsed."""
_LARGE = 4096
"""Larger vocabularies are judged like this size: videos with little variety use a small share of 65,536 codes."""
_LONGER = "train the tokenizer longer (pipelines/train_tokenizer.py --steps)"


def collapse_warning(used: float, vocabulary: int, codes: int, advice: str = _LONGER) -> str | None:
    """Return the one-line warning for a collapsed codebook, or None if enough codes are in use.

    Args:
        used: number of different codes among those counted.
        vocabulary: size of the codebook.
        codes: number of codes that were counted, which is an upper bound for the codes in use.
        advice: how to avoid a collapse, as the end of a sentence.
    """
    if used >= _COLLAPSED * min(vocabulary, codes, _LARGE):
        return None
    return (
        f"WARNING: only {round(used)} of {vocabulary} codes are in use, so a low number of bits per code means little. "
        f"First look at the reconstructions of the tokenizer, then {advice}."
    )


class CollapseAlarm:
    """Warn during training when few codes are in use, or when their number falls below half of its maximum so far.

    Each of the two warnings is given once.

    Args:
        vocabulary: size of the codebook.
        codes: number of codes in one validation.
        advice: how to avoid a collapse, as the end of a sentence.
    """

    def __init__(self, vocabulary: int, codes: int, advice: str) -> None:
        self._vocabulary, self._codes, self._advice = vocabulary, codes, advice
        self._best = 0.0
        self._given: set[str] = set()

    def check(self, step: int, dead: float) -> str | None:
        """Return the warning for a validation with `dead` unused codes, or None if there is none or it was given before."""
        used = self._vocabulary - dead
        self._best = max(self._best, used)
        if few := collapse_warning(used, self._vocabulary, self._codes, self._advice):
            kind, text = "few", few
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
