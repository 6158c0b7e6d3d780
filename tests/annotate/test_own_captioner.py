"""Our own captioner as an annotator: a function of (seed, uid, image), whatever the batch."""

import pickle

import pyarrow as pa
import pytest
import torch
from omegaconf import OmegaConf

from curation.annotate.gates import Gates
from curation.annotate.own_captioner import OwnCaptioner
from pipeline.config import build
from pipeline.evals.trained_captioner import make_captioner, speller

CONFIG = {
    "train_image": False,
    "image": {
        "_target_": "pipeline.models.vit.VisionTransformer",
        "image_size": 8,
        "patch_size": 4,
        "width": 16,
        "layers": 1,
        "heads": 2,
    },
    "decoder": {
        "_target_": "pipeline.models.captioner.CaptionDecoder",
        "_partial_": True,
        "width": 16,
        "layers": 1,
        "heads": 2,
    },
    "tokenizer": {
        "_target_": "pipeline.data.tokenizer.BpeTokenizer",
        "path": "clip",
        "context_length": 8,
    },
    "transform": {"_target_": "pipeline.data.images.ImageTransform", "image_size": 8},
}


@pytest.fixture(scope="module")
def tokenizer():
    return build(OmegaConf.create(CONFIG["tokenizer"]))


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("run")
    config = OmegaConf.create(CONFIG)
    OmegaConf.save(config, folder / "config.yaml")
    torch.manual_seed(0)
    model = make_captioner(config, tokenizer)
    with torch.no_grad():  # an untrained model that tells images apart
        model.decoder.token_embed.weight.mul_(30)
        model.projection.weight.mul_(20)
    (folder / "checkpoints").mkdir()
    content = {"state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}}
    torch.save(content, folder / "checkpoints" / "step-1.ckpt")
    return folder


OPEN = Gates(min_words=1, min_distinct=0, max_repeats=99, max_words=999)


@pytest.fixture
def samples(make_picture):
    return [{"uid": f"u{n}", "caption": "a", "image": make_picture(n)} for n in range(6)]


def texts(rows, bank="own"):
    return [[caption["text"] for caption in row[f"captions_{bank}"]] for row in rows]


def test_rows_fit_the_columns_and_say_where_they_come_from(run, samples):
    annotator = pickle.loads(pickle.dumps(OwnCaptioner(run=str(run), gates=OPEN)))
    rows = annotator.annotate(samples)
    pa.Table.from_pylist(rows, schema=pa.schema(annotator.columns.items()))
    entry = rows[0]["captions_own"][0]
    assert entry["role"] == "short" and entry["source"] == "own_captioner"
    assert entry["model"] and '"guidance": 1.0' in entry["sampling"] and entry["score"] < 0
    assert annotator.inputs["run"].endswith("step-1.ckpt")


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "copies": 2}, {"guidance": 2.0}])
def test_the_batch_does_not_matter(run, samples, settings):
    whole = OwnCaptioner(run=str(run), gates=OPEN, **settings).annotate(samples)
    one = OwnCaptioner(run=str(run), gates=OPEN, batch_size=1, **settings)
    turned = one.annotate(samples[::-1])[::-1]
    assert texts(whole) == texts(turned)


def test_copies_and_seeds_draw_anew(run, samples):
    first = texts(OwnCaptioner(run=str(run), gates=OPEN, temperature=1, copies=2).annotate(samples))
    assert all(len(pair) == 2 for pair in first) and any(a != b for a, b in first)
    other = OwnCaptioner(run=str(run), gates=OPEN, temperature=1, copies=2, seed=1)
    assert texts(other.annotate(samples)) != first


def test_guidance_0_is_blind(run, samples):
    blind = texts(OwnCaptioner(run=str(run), gates=OPEN, guidance=0).annotate(samples))
    assert len({caption for (caption,) in blind}) == 1
    seen = texts(OwnCaptioner(run=str(run), gates=OPEN).annotate(samples))
    assert len({caption for (caption,) in seen}) > 1


def test_bad_images_and_bad_captions_are_counted(run, samples):
    samples[2]["image"] = b"no image"
    rows = OwnCaptioner(run=str(run), gates=Gates(min_words=50)).annotate(samples)
    reasons = [[refused["reason"] for refused in row["own_refused"]] for row in rows]
    assert reasons[2] == ["image_not_an_image"]
    assert reasons[0] == ["too_short"] and texts(rows) == [[]] * 6


def test_two_banks_stand_side_by_side(run):
    one, two = (OwnCaptioner(run=str(run), bank=bank) for bank in ("one", "two"))
    assert one.name != two.name and not set(one.columns) & set(two.columns)


def test_bad_settings_are_named(run, tmp_path):
    with pytest.raises(ValueError, match="top_p 0"):
        OwnCaptioner(run=str(run), top_p=0)
    with pytest.raises(ValueError, match="train_captioner"):
        OwnCaptioner(run=str(tmp_path))


@pytest.mark.parametrize(
    "text", ["a dog, 2 cats (and more)!", "ein schönes bild", "猫と犬", "100% wool; new"]
)
def test_spelling_turns_the_tokenizer_around(tokenizer, text):
    spelled = speller(tokenizer)(
        build(CONFIG["tokenizer"] | {"context_length": 40})([text])[0].tolist()
    )
    assert spelled.replace(" ", "") == text.replace(" ", "")


def test_spelling_puts_spaces_where_they_mostly_stand(tokenizer):
    tokens = build(CONFIG["tokenizer"] | {"context_length": 40})(["Woman: dark skin, hat (red)."])
    assert speller(tokenizer)(tokens[0].tolist()) == "woman: dark skin, hat (red)."
