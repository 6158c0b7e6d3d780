"""Under FSDP2 a model is built without weights and filled from rank 0, or from a checkpoint."""

import lightning.pytorch as pl
import pytest
import torch
import torch.multiprocessing as mp
from omegaconf import OmegaConf

from pipeline.models.vit import VisionTransformer
from pipeline.phases import phases
from pipeline.trainer.run import first_model, make_module
from tests.trainer import strategy_runs as runs

WORDS = [
    *runs.WORDS["fsdp"],
    "ema=constant",
    "+model.image.positions=sincos",  # a table that is no weight
    f"model.image._target_={__name__}.Counting",
    "allow_foreign_targets=true",
]


class Counting(VisionTransformer):
    """With a number that is kept in checkpoints, as batch norms have."""

    def __init__(self, **options):
        super().__init__(**options)
        self.register_buffer("count", torch.tensor(3))


class AtStart(pl.Callback):
    """What each rank holds when the fit begins."""

    def __init__(self):
        self.whole, self.tables, self.held = {}, {}, 0

    def on_train_start(self, trainer, pl_module):
        parameters = dict(pl_module.model.named_parameters())
        self.held = sum(p.to_local().numel() for p in parameters.values())
        self.whole = {name: p.full_tensor().clone() for name, p in parameters.items()}
        self.tables = {name: table.clone() for name, table in pl_module.model.named_buffers()}


def in_pieces(index, port, data, folder):
    runs.launched(index, port)
    fresh, resumed = AtStart(), AtStart()
    cfg = runs.config_of(data, folder, "x", 4, WORDS)
    runs.run(cfg, fresh, runs.StopAt(2))
    runs.run(cfg, resumed)
    wrong = runs.config_of(data, folder, "y", 4, WORDS)
    weights = {"_target_": "pipeline.formats.initial.InitialWeights", "model": f"{folder}/none.pt"}
    OmegaConf.update(wrong, "init", weights, force_add=True)
    try:
        runs.run(wrong)
        message = "none"
    except ValueError as error:
        message = str(error)
    found = [(one.whole, one.tables, one.held) for one in (fresh, resumed)]
    torch.save((found, message), folder / f"{index}.pt")


@pytest.fixture(scope="module")
def ranks(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    torch.save({"nothing.weight": torch.zeros(2)}, folder / "none.pt")
    mp.spawn(in_pieces, args=(runs.free_port(), data, folder), nprocs=2)
    return folder, [torch.load(folder / f"{index}.pt") for index in range(2)]


def test_a_module_has_no_weights_until_it_is_cut(data, tmp_path):
    (phase,) = phases(runs.config_of(data, tmp_path, "x", 4, WORDS))
    module = make_module(phase, fresh=True, in_pieces=True)
    assert all(parameter.is_meta for parameter in module.model.parameters())


def test_a_fresh_run_starts_from_the_weights_of_its_seed(ranks, data, tmp_path):
    _, ((((whole, tables, held), _), _), (((_, _, other), _), _)) = ranks
    expected = first_model(runs.config_of(data, tmp_path, "x", 4, WORDS), fresh=True)
    parameters = dict(expected.named_parameters())
    assert whole.keys() == parameters.keys()
    for name, parameter in parameters.items():
        assert torch.equal(whole[name].reshape(parameter.shape), parameter), name
    kept = dict(expected.named_buffers())
    assert kept and all(torch.equal(tables[name], table) for name, table in kept.items())
    assert held + other == sum(parameter.numel() for parameter in parameters.values())


def test_a_resumed_run_starts_from_its_checkpoint(ranks):
    folder, (((_, (whole, tables, _)), _), _) = ranks
    path = folder / "x" / "checkpoints" / "step-00000002.ckpt"
    weights = torch.load(path, weights_only=True)["state_dict"]
    for name, tensor in whole.items():
        assert torch.equal(tensor.reshape(weights[f"model.{name}"].shape), weights[f"model.{name}"])
    assert all(table.abs().sum() > 0 for table in tables.values())


def test_what_rank_0_cannot_read_ends_all_ranks(ranks):
    _, found = ranks
    messages = [message for _, message in found]
    assert messages[0] == messages[1] and "none.pt" in messages[0]
