"""Valid files, and what broken or hostile ones look like: edits that hypothesis draws."""

from hypothesis import strategies as st

NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
WORDS = (
    *(b"../", b"/etc/passwd", b"\0", b"\xff\xfe", b"{", b"}", b"[" * 200, b'"', b"\n", b"9" * 30),
    *(b"-1", b"1e999", b"NaN", b"null", b"true", b"IHDR", b"IDAT", b"\xff\xd8\xff\xc0", b"RIFF"),
)


@st.composite
def edited(draw, seeds):
    """One of the seeds with up to six edits: bytes changed, cut, doubled, moved, words put in."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(("bit", "byte", "number", "word", "cut", "drop", "double")))
        if kind == "bit" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "number":
            number, size = draw(st.sampled_from(NUMBERS)), draw(st.sampled_from((1, 2, 4)))
            order = draw(st.sampled_from(("big", "little")))
            data[at : at + size] = (number & (256**size - 1)).to_bytes(size, order)
        elif kind == "word":
            word = draw(st.sampled_from(WORDS))
            data[at : at + draw(st.integers(0, len(word)))] = word
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + draw(st.integers(1, 600))]
        elif kind == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 600))]
    return bytes(data)


WRITTEN = ("a photo of", "red panda", "&amp;", "猫", "😀", "\u202e", "ﬁ", "\ud800", "")
# any text at all, lone surrogates and control characters too, and what people really write
TEXT = st.one_of(
    st.text(st.characters(codec=None, exclude_categories=()), max_size=300),
    st.lists(
        st.sampled_from(WRITTEN),
        max_size=40,
    ).map(" ".join),
)
