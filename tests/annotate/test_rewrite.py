"""A tiny Llama with random weights, loaded by path: our decoding against plain forwards."""

import pickle

import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from curation.annotate.gates import Gates
from curation.annotate.language_models import generate
from curation.annotate.prompts import Ask
from curation.annotate.rewrite import Rewrite
from pipeline.models.decoding import guided

WORDS = "<pad> <s> </s> <unk> a dog cat on the lawn red blue say this anew : user sits runs one"
WORDS = WORDS.split()
OPEN = Gates(min_words=1, min_distinct=0, max_repeats=99, unchanged=False, max_copied_words=99)
TEMPLATE = "say this anew : {caption} :"
CAPTIONS = ["a dog", "the red cat on the lawn", "a blue dog runs", "cat", "one dog sits on a lawn"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    words = Tokenizer(WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.6,  # far from uniform, so that choices are clear
        )
    )
    model.generation_config.eos_token_id, model.generation_config.bos_token_id = 2, 1
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.3
    model.save_pretrained(folder)
    return folder


def rewrite(folder, prompts=None, **settings):
    defaults = {"temperature": 0.0, "max_new_tokens": 6, "gates": OPEN, "dtype": "float32"}
    prompts = prompts or {"p": Ask(steps=TEMPLATE)}
    return Rewrite(model=str(folder), prompts=prompts, **{**defaults, **settings})


def samples():
    return [{"uid": f"u{n}", "caption": caption} for n, caption in enumerate(CAPTIONS)]


def texts(rows, bank="rewrite"):
    return [[caption["text"] for caption in row[f"captions_{bank}"]] for row in rows]


def greedy(annotator, caption, guidance):
    """One caption at a time, without padding or cache, by the formula."""
    model, tokenizer, _ = annotator.load()
    seen = tokenizer(TEMPLATE.format(caption=caption))["input_ids"]
    blind = tokenizer(TEMPLATE.format(caption=""))["input_ids"]
    new = []
    with torch.no_grad():
        while len(new) < 6 and (not new or new[-1] != 2):
            c = model(torch.tensor([seen + new])).logits[:, -1]
            u = model(torch.tensor([blind + new])).logits[:, -1]
            new.append(int(guided(c, u, guidance).argmax()))
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.0])
def test_padded_batches_are_the_plain_loop(folder, guidance):
    annotator = rewrite(folder, guidance=guidance)
    answers = [greedy(annotator, c, guidance) for c in CAPTIONS]
    found = texts(annotator.annotate(samples()))
    assert found == [[answer] if answer else [] for answer in answers]
    assert (len(set(answers)) == 1) == (guidance == 0)


def test_scores_are_mean_log_probabilities(folder):
    annotator = rewrite(folder)
    model, tokenizer, _ = annotator.load()
    inputs = tokenizer(CAPTIONS, return_tensors="pt", padding=True)
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    keys = [(caption, 0) for caption in CAPTIONS]
    tokens, scores = generate(model, inputs, annotator.decoding, keys, name="x")
    for caption, row, score in zip(CAPTIONS, tokens.tolist(), scores, strict=True):
        new = row[: row.index(2) + 1] if 2 in row else row
        prompt = tokenizer(caption)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + new])).logits.log_softmax(-1)[0]
        picked = [logits[len(prompt) - 1 + n, token].item() for n, token in enumerate(new)]
        assert score == pytest.approx(sum(picked) / len(picked), abs=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 1.7])
def test_draws_belong_to_the_uid(folder, guidance):
    settings = {"temperature": 1.0, "top_p": 0.95, "guidance": guidance}
    two = {"p": Ask(steps=TEMPLATE, copies=2)}
    whole = texts(rewrite(folder, two, **settings).annotate(samples()))
    single = rewrite(folder, two, batch_size=1, **settings)
    assert texts(single.annotate(samples()[::-1]))[::-1] == whole
    assert any(a != b for a, b in (pair for pair in whole if len(pair) == 2))
    assert texts(rewrite(folder, two, seed=1, **settings).annotate(samples())) != whole


def test_rows_say_where_they_come_from(folder):
    annotator = pickle.loads(pickle.dumps(rewrite(folder, bank="mine")))
    rows = annotator.annotate([*samples(), {"uid": "n", "caption": None}])
    pa.Table.from_pylist(rows, schema=pa.schema(annotator.columns.items()))
    assert [entry["reason"] for entry in rows[-1]["mine_refused"]] == ["no_caption"]
    entry = rows[0]["captions_mine"][0]
    assert entry["source"] == "rewrite" and '"temperature": 0.0' in entry["sampling"]
    assert len(entry["model"]) == len(entry["prompt"]) == 16


def test_long_prompts_are_refused_not_cut(folder):
    rows = rewrite(folder, max_prompt_tokens=8).annotate(samples())
    reasons = [[entry["reason"] for entry in row["rewrite_refused"]] for row in rows]
    assert reasons[1] == ["prompt_too_long"] and reasons[0] == []


def test_chat_template(folder):
    annotator = rewrite(folder)
    assert annotator.spell("a dog", "say") == "say\n\na dog"
    annotator.load()[
        1
    ].chat_template = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}a :"
    assert annotator.spell("a dog", None) == "user : a dog a :"
    annotator.chat = False
    assert annotator.spell("a dog", None) == "a dog"


def test_inputs_name_the_weights(folder, tmp_path):
    inputs = rewrite(folder).inputs
    assert any(path.endswith("model.safetensors") for path in inputs.values())
    assert "model" in inputs  # the folder may move without new answers
    with pytest.raises(ValueError, match="no weights"):
        rewrite(tmp_path)


def test_bad_settings_are_named(folder):
    with pytest.raises(ValueError, match="dtype 'int4'"):
        rewrite(folder, dtype="int4")
    with pytest.raises(ValueError, match="prompts is empty"):
        Rewrite(model=str(folder), prompts={})
    with pytest.raises(ValueError, match="guidance -1"):
        rewrite(folder, guidance=-1)
    with pytest.raises(ValueError, match="model=no/such-model cannot be loaded"):
        rewrite("no/such-model").annotate(samples())
