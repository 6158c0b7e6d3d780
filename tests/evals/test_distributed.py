"""The same numbers, to the bit, for any number of processes."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.evals.retrieval import Retrieval
from pipeline.evals.task import run_task
from pipeline.evals.text_spotting import TextSpotting
from pipeline.evals.trained import TrainedClip
from pipeline.evals.zero_shot import ZeroShot

ROOT = Path(__file__).parents[2]
DATA = str(ROOT / "examples" / "emoji" / "eval")


class Counted(TrainedClip):
    """Knows how many images this process has embedded."""

    images = 0

    def _embed_images(self, images):
        self.images += len(images)
        return super()._embed_images(images)


def numbers(index: int, world: int, run: str, out: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{out}/init-{world}", rank=index, world_size=world
        )
    trained = Counted.load(run, device="cpu")
    tasks = {
        # 1,190 images: the last batch is short, and one round has fewer batches than ranks
        "zero_shot": ZeroShot(data=DATA, batch_size=96),
        "retrieval": Retrieval(data=DATA, max_pairs=50, batch_size=7),
        "text_spotting": TextSpotting(
            data=DATA, side=32, band=0.3, max_letters=4, seed=0, batch_size=96
        ),
    }
    found = {}
    for name, task in tasks.items():
        found |= run_task(name, task, trained)
    embeds = trained.image_embed([b for b, _ in ZeroShot(data=DATA).images.samples()][:10])
    found = {k: [float(v), getattr(v, "low", None)] for k, v in found.items()}
    seen = {"numbers": found, "images": trained.images}
    torch.save({**seen, "embeds": embeds}, Path(out) / f"{world}-{index}.pt")
    if world > 1:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tiny_run, tmp_path_factory) -> dict[tuple[int, int], dict]:
    out = tmp_path_factory.mktemp("ranks")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch"])
    found = {}
    for world in (1, 2, 4):
        mp.start_processes(
            numbers, (world, str(tiny_run), str(out)), nprocs=world, start_method="forkserver"
        )
        for index in range(world):
            found[world, index] = torch.load(out / f"{world}-{index}.pt", weights_only=True)
    return found


def test_every_rank_has_the_numbers_of_one_process(results):
    alone = results[1, 0]
    assert len(alone["numbers"]) > 10
    for key, found in results.items():
        assert found["numbers"] == alone["numbers"], key
        assert torch.equal(found["embeds"], alone["embeds"]), key


def test_each_rank_embeds_its_share(results):
    alone = results[1, 0]["images"]
    for world in (2, 4):
        shares = [results[world, index]["images"] for index in range(world)]
        assert sum(shares) >= alone
        assert max(shares) < 1.3 * alone / world


@pytest.mark.slow
def test_the_command_with_two_processes(tiny_run, tmp_path):
    written = []
    for devices in (1, 2):
        out = tmp_path / f"on-{devices}"
        command = [sys.executable, "-m", "pipeline.evaluate", f"run={tiny_run}", f"out={out}"]
        command += ["eval=emoji", f"devices={devices}", "accelerator=cpu"]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("mean_per_class_recall") == 1
        written.append(
            [json.loads((out / f"{t}.json").read_text()) for t in ("zero_shot", "retrieval")]
        )
    assert written[0] == written[1]
