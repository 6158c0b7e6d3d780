"""SigLIP to transformers' SiglipModel and back: the rest of the exports is in test_export.py."""

import io

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, AutoProcessor, PreTrainedTokenizerFast

from pipeline.data.hf_tokenizer import HfTokenizer
from pipeline.data.images import ImageTransform
from pipeline.data.tokenizer import BpeTokenizer
from pipeline.evals.trained import TrainedClip
from pipeline.formats.initial import InitialWeights
from pipeline.formats.transformers import Transformers
from pipeline.models.clip import CLIP
from pipeline.models.text import TextTransformer
from pipeline.models.transformer import BlockStyle
from pipeline.models.vit import VisionTransformer
from tests.test_export import MEAN, STD, picture


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer of whole words that pads with 1, as transformers saves it."""
    spelled = ["<unk>", "<pad>", "</s>", "a", "red", "panda", "photo", "of", "cat", "eating"]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(spelled)}, "<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    folder = tmp_path_factory.mktemp("words")
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    whole.save_pretrained(folder)
    return str(folder)


def make_siglip(path, *, text_projection="biased", logit_bias=-3.0, image=None, text=None):
    """Our towers with SigLIP's options, every parameter off its initial value."""
    torch.manual_seed(0)
    block = BlockStyle(norm_eps=1e-6)
    shared = {"layers": 2, "heads": 4, "activation": "gelu_tanh", "block": block}
    model = CLIP(
        image=VisionTransformer(
            **{
                **{"image_size": 24, "patch_size": 8, "width": 32, "class_token": False},
                **{"pooling": "map", "norm_before_pooling": True, "ln_pre": False},
                **{"patch_bias": True, **shared, **(image or {})},
            }
        ),
        text=TextTransformer(
            **{
                **{"vocab_size": 12, "context_length": 8, "width": 24, "causal": False},
                **{"pooling": "last", **shared, **(text or {})},
            }
        ),
        embed_dim=32,
        image_projection="none",
        text_projection=text_projection,
        init_logit_bias=logit_bias,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    tokenizer = HfTokenizer(path=path, context_length=8)
    transform = ImageTransform(image_size=24, mean=MEAN, std=STD)
    return TrainedClip(model=model, tokenizer=tokenizer, transform=transform)


def siglip_logits(model, processor, pictures, texts):
    given = processor(
        text=texts,
        images=[Image.open(io.BytesIO(data)) for data in pictures],
        return_tensors="pt",
        padding="max_length",
        truncation=True,
    )
    with torch.no_grad():
        return model(**given).logits_per_image


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"text_projection": "linear", "logit_bias": None},
        {"text_projection": "none", "text": {"width": 32}, "image": {"patch_bias": False}},
        {"image": {"positions": "sincos"}},
    ],
)
def test_a_siglip_gives_our_logits_in_transformers(options, words, tmp_path):
    trained = make_siglip(words, **options)
    Transformers().write(trained, tmp_path)
    model, loaded = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model).__name__ == "SiglipModel" and not any(loaded.values()), loaded
    processor = AutoProcessor.from_pretrained(tmp_path)
    pictures = [picture(48, 48, seed=1), picture(64, 48, seed=2), picture(20, 30, seed=3)]
    texts = ["a red panda", "", "Eating a photo of a cat a cat a cat a cat", "what is it"]
    theirs = siglip_logits(model, processor, pictures, texts)
    scale, bias = trained.logit_scale, trained.model.logit_bias
    ours = scale * trained.image_embed(pictures) @ trained.text_embed(texts).T
    ours = ours if bias is None else ours + bias.detach()
    assert ours.std() > 1e-2
    torch.testing.assert_close(theirs, ours, atol=1e-5 * scale, rtol=0)


def test_what_a_siglip_has_no_place_for(words, tmp_path):
    for options, message in (
        ({"text": {"pooling": "mean"}}, r"model\.text\.pooling = mean, only last"),
        ({"text": {"causal": True}}, r"model\.text\.causal = True, only False"),
        ({"image": {"norm_before_pooling": False}}, r"norm_before_pooling = False, only True"),
        ({"image": {"class_token": True}}, r"class_token = True, only False"),
    ):
        with pytest.raises(ValueError, match=message):
            Transformers().write(make_siglip(words, **options), tmp_path)
    trained = make_siglip(words)
    trained.model = CLIP(
        image=trained.model.image, text=trained.model.text, embed_dim=20, init_logit_bias=-10.0
    )
    with pytest.raises(ValueError, match="image_projection behind an attention pool"):
        Transformers().write(trained, tmp_path)
    trained = make_siglip(words, text={"vocab_size": 49408})
    trained.tokenizer = BpeTokenizer(path="clip", context_length=8)
    with pytest.raises(ValueError, match="tokenizer = BpeTokenizer, only HfTokenizer"):
        Transformers().write(trained, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_siglip_comes_back_as_first_weights(words, tmp_path):
    """And so does one that transformers has written."""
    trained = make_siglip(words)
    Transformers().write(trained, tmp_path / "ours")
    AutoModel.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        fresh = make_siglip(words)
        with torch.no_grad():
            for parameter in fresh.model.parameters():
                parameter.normal_()
        report = InitialWeights(model=str(tmp_path / folder)).apply(fresh.model)
        assert report.new == [] == report.unused
        for name, tensor in trained.model.state_dict().items():
            if name in ("image.position", "image.patch_embed.bias"):  # exported as their sum
                continue
            torch.testing.assert_close(fresh.model.state_dict()[name], tensor, msg=name)
        pixels = torch.randn(3, 3, 24, 24)
        with torch.no_grad():
            expected = trained.model.encode_image(pixels)
            torch.testing.assert_close(fresh.model.encode_image(pixels), expected)
    # another number of heads is seen from the config beside the weights
    other = make_siglip(words, image={"heads": 2})
    with pytest.raises(ValueError, match=r"model\.image\.heads was 4, here 2"):
        InitialWeights(model=str(tmp_path / "theirs")).apply(other.model)
