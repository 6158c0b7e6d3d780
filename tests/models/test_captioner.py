"""The captioner against brute force: loss, causality, dropped images, guidance at 0 and 1."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.models.captioner import CaptionDecoder, Captioner, patch_features
from pipeline.models.decoding import guided
from pipeline.models.vit import VisionTransformer

VOCABULARY, LENGTH = 23, 7
SOT, EOT = VOCABULARY - 2, VOCABULARY - 1


@pytest.fixture
def model():
    torch.manual_seed(0)
    image = VisionTransformer(image_size=8, patch_size=4, width=16, layers=2, heads=2)
    decoder = CaptionDecoder(
        vocab_size=VOCABULARY, context_length=LENGTH, width=24, layers=2, heads=3
    )
    model = Captioner(image=image, decoder=decoder)
    with torch.no_grad():  # so that logits differ visibly
        decoder.token_embed.weight.mul_(30)
        model.projection.weight.mul_(5)
    return model.eval()


@pytest.fixture
def images():
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


TOKENS = torch.tensor(
    [
        [SOT, 3, 4, EOT, 0, 0, 0],
        [SOT, 5, EOT, 0, 0, 0, 0],
        [SOT, 1, 2, 3, 4, 5, EOT],
        [SOT, 0, EOT, 0, 0, 0, 0],  # the padding id is a token, too
        [SOT, EOT, 0, 0, 0, 0, 0],
    ]
)


def test_patch_features_hold_the_towers_own_output(model, images):
    features = patch_features(model.image, images)
    assert features.shape == (5, 1 + 4, 16)
    torch.testing.assert_close(features[:, 0], model.image(images))


def test_loss_by_brute_force(model, images):
    dropped = torch.tensor([False, True, False, False, True])
    losses = []
    for row in range(5):
        memory = model.null_image[None] if dropped[row] else model.memory(images[row : row + 1])
        end = TOKENS[row].tolist().index(EOT)
        for place in range(end):
            logits = model.decoder(TOKENS[row : row + 1, : place + 1], memory)[0, -1]
            losses.append(F.cross_entropy(logits, TOKENS[row, place + 1]))
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(model.loss(images, TOKENS, dropped), expected)


def test_later_tokens_change_nothing_before_them(model, images):
    memory, other = model.memory(images), TOKENS.clone()
    other[:, 4:] = 9
    torch.testing.assert_close(
        model.decoder(TOKENS, memory)[:, :4], model.decoder(other, memory)[:, :4]
    )


def test_a_dropped_pair_does_not_see_its_image(model, images):
    everything = torch.ones(5, dtype=torch.bool)
    assert torch.equal(
        model.loss(images, TOKENS, everything), model.loss(images * -3, TOKENS, everything)
    )
    assert model.loss(images, TOKENS, ~everything) != model.loss(images * -3, TOKENS, ~everything)


def greedy(model, images, guidance):
    """One image at a time, both streams always."""
    captions = []
    for image in images:
        ids = [SOT]
        while ids[-1] != EOT and len(ids) < LENGTH:
            read = torch.tensor([ids])
            c = model.decoder(read, model.memory(image[None]))[:, -1]
            u = model.decoder(read, model.null_image[None])[:, -1]
            p = guided(c, u, guidance)
            p[:, SOT] = -torch.inf
            ids.append(EOT if len(ids) == LENGTH - 1 else int(p.argmax()))
        captions.append(ids + [0] * (LENGTH - len(ids)))
    return captions


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_generate_is_the_plain_loop(model, images, guidance):
    tokens, _ = model.generate(images, guidance=guidance)
    assert tokens.tolist() == greedy(model, images, guidance)


def test_guidance_0_does_not_look_and_1_does(model, images):
    blind = model.generate(images, guidance=0.0)[0]
    assert (blind == blind[0]).all()
    assert not (model.generate(images, guidance=1.0)[0] == blind).all()


def test_score_is_the_mean_log_probability(model, images):
    tokens, scores = model.generate(images)
    for row, score, image in zip(tokens, scores, images, strict=True):
        end = row.tolist().index(EOT)
        logits = model.decoder(row[None, :end], model.memory(image[None])).log_softmax(-1)[0]
        picked = [logits[n, row[n + 1]].item() for n in range(end)]
        assert score.item() == pytest.approx(sum(picked) / end, abs=1e-5)


def test_draws_belong_to_the_row(model, images):
    uniforms = torch.rand(5, LENGTH, generator=torch.Generator().manual_seed(3))
    tokens, _ = model.generate(images, temperature=1.0, uniforms=uniforms)
    turned, _ = model.generate(images.flip(0), temperature=1.0, uniforms=uniforms.flip(0))
    assert torch.equal(tokens, turned.flip(0))
    assert not torch.equal(tokens, model.generate(images)[0])
    with pytest.raises(ValueError, match="uniforms"):
        model.generate(images, temperature=1.0)


def test_the_tower_is_frozen_unless_asked(model, images):
    nothing = torch.zeros(5, dtype=torch.bool)
    model.loss(images, TOKENS, nothing).backward()
    assert all(parameter.grad is None for parameter in model.image.parameters())
    trained = Captioner(image=model.image, decoder=model.decoder, train_image=True)
    trained.loss(images, TOKENS, nothing).backward()
    assert model.image.patch_embed.weight.grad.abs().sum() > 0


def test_it_learns_which_image_is_which(model, images):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    torch.nn.init.normal_(model.decoder.token_embed.weight, std=0.02)
    for step in range(150):
        dropped = torch.rand(5, generator=torch.Generator().manual_seed(step)) < 0.2
        optimizer.zero_grad()
        model.loss(images, TOKENS, dropped).backward()
        optimizer.step()
    assert model.generate(images)[0].tolist() == TOKENS.tolist()
