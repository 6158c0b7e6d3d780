"""How a caption is cut before entries are looked for in it: shared by matching and by counting
n-grams.
"""

# The seven characters that MetaCLIP wraps in spaces, and the three that it turns into one.
_SPACED = str.maketrans({mark: f" {mark} " for mark in ",.;:?!`"} | dict.fromkeys("\t\n\r", " "))


def spaced(caption: str) -> str:
    """A space at each end and around , . ; : ? ! ` and one for each tab, LF and CR (MetaCLIP 1, 2).

    No lower-casing, no Unicode normalisation, no strip, no collapsing of spaces.
    """
    return f" {caption} ".translate(_SPACED)
