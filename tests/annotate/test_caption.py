"""A tiny LLaVA with random weights, loaded by path: batches against single questions, guidance."""

import io
import pickle

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip import CLIPImageProcessorPil

from curation.annotate.caption import GREY, Caption
from curation.annotate.gates import Gates
from curation.annotate.prompts import Ask, Question
from pipeline.models.decoding import guided

WORDS = "<pad> <s> </s> <unk> <image> a dog cat on the lawn red blue say this : describe image runs"
WORDS = WORDS.split()
OPEN = Gates(min_words=1, min_distinct=0, max_repeats=99, unchanged=False, max_copied_words=99)
CHAT = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}:"
)
TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.5,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    words = Tokenizer(WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
        ),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    processor.chat_template = CHAT
    processor.save_pretrained(folder)
    text = LlamaConfig(vocab_size=len(WORDS), num_key_value_heads=2, **TINY)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **TINY)
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=4)
    )
    with torch.no_grad():  # never the likeliest: an image token in an answer has no image
        model.lm_head.weight[4] = model.lm_head.weight[2]
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    return folder


def picture(number):
    colours = np.random.default_rng(number).integers(0, 255, (2, 3, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(colours).resize((24, 16), Image.Resampling.NEAREST).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture
def samples():
    captions = ["a dog", "the red cat on the lawn", None, "a blue dog runs"]
    return [{"uid": f"u{n}", "caption": c, "image": picture(n)} for n, c in enumerate(captions)]


TEMPLATE = "describe this image {caption}"


def captioner(folder, template=TEMPLATE, **settings):
    defaults = {"max_new_tokens": 5, "gates": OPEN, "dtype": "float32"}
    prompts = {"p": Ask(steps=template, role="long")}
    return Caption(model=str(folder), prompts=prompts, **{**defaults, **settings})


def texts(rows, bank="caption"):
    return [[caption["text"] for caption in row[f"captions_{bank}"]] for row in rows]


def greedy(annotator, sample, guidance):
    """One image at a time, both streams, no padding, no cache."""
    model, processor, _ = annotator.load()
    text = f"<image> {TEMPLATE.format(caption=sample['caption'])} :"
    image = Image.open(io.BytesIO(sample["image"])).convert("RGB")
    streams = [
        processor(text=[text], images=[[shown]], return_tensors="pt")
        for shown in (image, Image.new("RGB", image.size, GREY))
    ]
    new = []
    with torch.no_grad():
        while len(new) < 5 and (not new or new[-1] != 2):
            logits = [
                model(
                    input_ids=torch.cat([s["input_ids"], torch.tensor([new], dtype=int)], 1),
                    pixel_values=s["pixel_values"],
                ).logits[:, -1]
                for s in streams
            ]
            new.append(int(guided(*logits, guidance).argmax()))
    return processor.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.0])
def test_padded_batches_are_the_plain_loop(folder, samples, guidance):
    annotator = captioner(folder, guidance=guidance)
    rows = annotator.annotate(samples)
    asked = [sample for sample in samples if sample["caption"]]
    expected = [greedy(annotator, sample, guidance) for sample in asked]
    found = [mine for mine, sample in zip(texts(rows), samples, strict=True) if sample["caption"]]
    assert found == [[text] if text else [] for text in expected] and any(found)
    assert [entry["reason"] for entry in rows[2]["caption_refused"]] == ["no_caption"]


def test_guidance_0_does_not_look_at_the_image(folder, samples):
    def answers(guidance):
        rows = captioner(folder, "describe image", guidance=guidance).annotate(samples)
        return {tuple(mine) for mine in texts(rows)}

    assert len(answers(0.0)) == 1 and len(answers(1.0)) > 1


def test_draws_belong_to_the_uid(folder, samples):
    settings = {"temperature": 1.0, "guidance": 1.5}
    whole = texts(captioner(folder, **settings).annotate(samples))
    single = captioner(folder, batch_size=1, **settings)
    assert texts(single.annotate(samples[::-1]))[::-1] == whole
    assert texts(captioner(folder, seed=5, **settings).annotate(samples)) != whole


def test_rows_say_where_they_come_from_and_bad_images_why_not(folder, samples):
    annotator = captioner(folder, "describe image", bank="vlm")
    annotator = pickle.loads(pickle.dumps(annotator))
    samples[1]["image"] = b"broken"
    rows = annotator.annotate(samples)
    pa.Table.from_pylist(rows, schema=pa.schema(annotator.columns.items()))
    assert [entry["reason"] for entry in rows[1]["vlm_refused"]] == ["image_not_an_image"]
    entry = next(caption for row in rows for caption in row["captions_vlm"])
    assert (entry["role"], entry["source"]) == ("long", "caption")
    assert len(entry["model"]) == 16 and entry["score"] < 0


def test_a_system_message_stands_first(folder):
    annotator = captioner(folder)
    question = Question("u", "say this", "a dog", b"")
    assert annotator.spell(question) == "a dog <image> say this :"
