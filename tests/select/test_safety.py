import numpy as np
import pyarrow as pa
import pytest

from curation.select.safety import Safety, read_block_list

SHA = ["a" * 64, "b" * 64]


@pytest.fixture
def listed(tmp_path):
    def listed(*lines):
        path = tmp_path / "blocked.txt"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return listed


def decide(selector, **columns):
    kinds = {"punsafe": pa.float32(), "phash": pa.uint64()}
    number = len(next(iter(columns.values())))
    arrays = {name: pa.array(v, kinds.get(name, pa.string())) for name, v in columns.items()}
    table = pa.table({"uid": pa.array([str(i) for i in range(number)]), **arrays})
    answer = selector.apply(table.select(["uid", *selector.reads]), selector.combine([]), 0)
    assert answer.type == pa.string()
    return answer.to_pylist()


def test_scores_at_the_threshold_are_unsafe():
    scores = [0.0, np.nextafter(np.float32(0.3), np.float32(0)), np.float32(0.3), 1.0, None, np.nan]
    reasons = [None, None, "unsafe_score", "unsafe_score", "unscored", "unscored"]
    assert decide(Safety(threshold=0.3), punsafe=scores) == reasons
    kept = decide(Safety(threshold=0.3, keep_unscored=True), punsafe=scores)
    assert kept == [None, None, "unsafe_score", "unsafe_score", None, None]


def test_another_column():
    selector = Safety(score_column="gore", threshold=2)
    assert selector.reads == ("gore",)
    table = pa.table({"uid": ["a", "b"], "gore": pa.array([1, 2], pa.int64())})
    assert selector.apply(table, None, 0).to_pylist() == [None, "unsafe_score"]


def test_block_lists_of_every_kind(listed):
    file = listed("# who may keep it", "", SHA[0].upper() + "  # why", "c" * 32, "00000000000000ff")
    selector = Safety(score_column=None, block_list=file)
    assert selector.reads == ("phash", "pixel_hash", "sha256")
    assert selector.inputs == {"block_list": file}
    found = decide(
        selector,
        sha256=[SHA[0], SHA[1], None, SHA[1], SHA[1]],
        pixel_hash=["d" * 32, "c" * 32, "d" * 32, None, "d" * 32],
        phash=[0, 1, 255, 254, None],
    )
    assert found == ["blocked_hash", "blocked_hash", "blocked_hash", None, None]


def test_a_blocked_hash_counts_before_the_score(listed):
    selector = Safety(block_list=listed(SHA[0]))
    found = decide(selector, punsafe=[0.9, 0.9, None], sha256=[SHA[0], SHA[1], SHA[0]])
    assert found == ["blocked_hash", "unsafe_score", "blocked_hash"]


@pytest.mark.parametrize("distance", [0, 1, 4, 64])
def test_phash_distance_equals_counting_bits(listed, distance, monkeypatch):
    monkeypatch.setattr("curation.select.safety._BLOCK_NUMBERS", 1000)  # several blocks
    rng = np.random.default_rng(0)
    blocked = rng.integers(0, 2**64, 9, dtype=np.uint64)
    hashes = rng.integers(0, 2**64, 400, dtype=np.uint64)
    for i in range(0, 300):
        flips = rng.choice(64, rng.integers(0, 7), replace=False)
        hashes[i] = int(blocked[i % 9]) ^ sum(1 << int(bit) for bit in flips)
    expected = [
        "blocked_hash" if min((int(h) ^ int(b)).bit_count() for b in blocked) <= distance else None
        for h in hashes
    ]
    file = listed(*(f"{b:016x}" for b in blocked))
    selector = Safety(score_column=None, block_list=file, max_phash_distance=distance)
    assert decide(selector, phash=hashes) == expected
    assert distance == 64 or {None, "blocked_hash"} == set(expected)


def test_no_rows(listed):
    selector = Safety(block_list=listed("0" * 16, SHA[0]), max_phash_distance=3)
    assert decide(selector, punsafe=[], sha256=[], phash=[]) == []


def test_bad_lists(listed, tmp_path):
    for line in ("g" * 64, "a" * 63, "md5 of it", "0x" + "0" * 14):
        with pytest.raises(ValueError, match="blocked.txt, line 2: .* is no hash"):
            read_block_list(listed(SHA[0], line))
    with pytest.raises(ValueError, match="holds no hash"):
        Safety(block_list=listed("# nothing"))
    with pytest.raises(ValueError, match=r"block_list .*none\.txt does not exist"):
        Safety(block_list=str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"score_column": None}, "nothing to look at"),
        ({"threshold": float("nan")}, "NaN"),
        ({"max_phash_distance": 65}, "max_phash_distance 65"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        Safety(**knobs)
