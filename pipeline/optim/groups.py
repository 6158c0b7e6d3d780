"""Which learning rate and weight decay each parameter has: by tower, by depth, by dimensions."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

MODULE_PREFIX = "model."  # the Lightning module holds the model under this name
TOWER_KEYS = ("lr", "weight_decay", "layer_decay")
# What comes before a tower's first block, by a part of the dotted name: ours, then the words of
# EVA, OpenAI and Hugging Face towers.
EMBEDDING_PARTS = frozenset(
    {"patch_embed", "class_token", "position", "token_embed", "ln_pre", "norm_pre"}
    | {"pos_embed", "cls_token", "mask_token", "conv1", "class_embedding"}
    | {"positional_embedding", "token_embedding"}
    | {"embeddings", "embed_tokens", "shared", "wte", "wpe"}
)
BLOCK = re.compile(r"(?:^|\.)(?:\w*blocks?|layers?|h)\.(\d+)\.")


def model_name(name: str) -> str:
    """A parameter's name within the model, whoever holds the model."""
    return name.removeprefix(MODULE_PREFIX)


def block_of(name: str) -> int | None:
    """The index of the transformer block a parameter is in; None outside of blocks."""
    match = BLOCK.search(name)
    return int(match[1]) if match else None


def layer_of(name: str, *, num_blocks: int) -> int:
    """0 for what embeds, i + 1 in block i, num_blocks + 1 for what follows (EVA-CLIP's rule)."""
    if EMBEDDING_PARTS & set(name.split(".")):
        return 0
    block = block_of(name)
    return num_blocks + 1 if block is None else block + 1


def shape_of(parameter: nn.Parameter) -> Sequence[int]:
    """The whole parameter's shape, also where DeepSpeed's ZeRO-3 has left an empty tensor."""
    return getattr(parameter, "ds_shape", parameter.shape)


def moments(betas: Sequence[float], eps: float) -> tuple[tuple[float, float], float]:
    """Adam's (betas, eps). Raises ValueError for what would end in NaN, or in no step at all."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas) or not eps > 0:
        raise ValueError(f"betas={list(betas)}, eps={eps}: two betas in [0, 1), and eps above 0")
    return (betas[0], betas[1]), eps


class Rates:
    """Learning rates and weight decays of a model, as groups for a torch optimizer.

    lr, weight_decay: of every parameter that no tower overrides.
    towers: {tower: {lr, weight_decay, layer_decay}}, each optional; a tower `image` owns the
      parameters `image.*` and `image_projection.*`. layer_decay d in (0, 1]: layer l of L blocks
      has lr * d ** (L + 1 - l), where embeddings are layer 0, block i is layer i + 1, and the
      last norm and the projection have the tower's full rate (EVA-CLIP, arXiv:2303.15389).
    no_decay: shell patterns of names within the model (`*.token_embed.weight`) that are not
      decayed, besides parameters of at most one dimension and biases, which never are (CLIP,
      arXiv:2103.00020, sec. 2.5: "all weights that are not gains or biases").
    Raises ValueError for rates that make no sense and keys that a tower does not have.
    """

    def __init__(
        self,
        *,
        lr: float,
        weight_decay: float,
        towers: Mapping[str, Mapping[str, float]] | None = None,
        no_decay: Sequence[str] = (),
    ) -> None:
        self.lr, self.weight_decay = lr, weight_decay
        self.towers = {name: dict(rates or {}) for name, rates in (towers or {}).items()}
        self.no_decay = tuple(no_decay)
        for where, rates in {"": {"lr": lr, "weight_decay": weight_decay}, **self.towers}.items():
            path = f"towers.{where}." if where else ""
            for key, value in rates.items():
                if key not in TOWER_KEYS:
                    raise ValueError(f"{path}{key}: a tower has only {', '.join(TOWER_KEYS)}")
                low, high = (value > 0, value <= 1 or key != "layer_decay")
                if not (low or (value == 0 and key == "weight_decay")) or not high:
                    raise ValueError(
                        f"{path}{key}={value}: lr must be positive, weight_decay not negative, "
                        "layer_decay in (0, 1]"
                    )

    def groups(
        self,
        model: nn.Module,
        *,
        kind: Callable[[str, nn.Parameter], str] = lambda name, parameter: "",
    ) -> list[dict[str, Any]]:
        """Parameters that are trained, each in one group; frozen ones are left out.

        A group has `params`, their `names`, `lr` = `base_lr` (what schedules multiply),
        `weight_decay`, `decayed` (whether its parameters are of the kind that is decayed, at
        whatever rate), `tower` and `kind`. The largest rates come first, decayed before spared.
        kind: splits groups further by a word for each (name within the model, parameter).
        Raises ValueError if a tower or a pattern of no_decay fits no parameter, or layer_decay is
        asked of a tower without blocks.
        """
        named = [(model_name(name), name, p) for name, p in model.named_parameters()]
        self._check_names([short for short, _, _ in named])
        blocks = {tower: self._num_blocks(tower, named) for tower in self.towers}
        found: dict[tuple, dict[str, Any]] = {}
        for short, name, parameter in named:
            if not parameter.requires_grad:
                continue
            tower, decayed = self._tower_of(short), self._is_decayed(short, parameter)
            rates = self.towers.get(tower, {})
            lr, decay = rates.get("lr", self.lr), rates.get("weight_decay", self.weight_decay)
            if rates.get("layer_decay", 1.0) < 1:
                layer = layer_of(short, num_blocks=blocks[tower])
                lr *= rates["layer_decay"] ** (blocks[tower] + 1 - layer)
            group = {
                "params": [],
                "names": [],
                "lr": lr,
                "base_lr": lr,
                "weight_decay": decay if decayed else 0.0,
                "decayed": decayed,
                "tower": tower,
                "kind": kind(short, parameter),
            }
            # torch's fused and foreach steps take no mixture of sharded and whole tensors, and
            # FSDP2 leaves scalars whole
            sharded = isinstance(parameter, DTensor)
            group = found.setdefault((tower, lr, decayed, group["kind"], sharded), group)
            group["params"].append(parameter)
            group["names"].append(name)
        return sorted(found.values(), key=lambda group: (-group["lr"], not group["decayed"]))

    def _tower_of(self, name: str) -> str:
        first = name.partition(".")[0].removesuffix("_projection")
        return first if first in self.towers else ""

    def _is_decayed(self, name: str, parameter: nn.Parameter) -> bool:
        spared = len(shape_of(parameter)) <= 1 or name.endswith(".bias")
        return not spared and not any(fnmatchcase(name, pattern) for pattern in self.no_decay)

    def _num_blocks(self, tower: str, named: Sequence[tuple[str, str, nn.Parameter]]) -> int:
        inside = [block_of(short) for short, _, _ in named if self._tower_of(short) == tower]
        known = [block for block in inside if block is not None]
        if not known and self.towers[tower].get("layer_decay", 1.0) < 1:
            raise ValueError(
                f"towers.{tower}.layer_decay: the tower's parameters are in no numbered blocks: "
                "leave layer_decay out"
            )
        return 1 + max(known, default=-1)

    def _check_names(self, names: Sequence[str]) -> None:
        present = {self._tower_of(name) for name in names}
        for tower in self.towers.keys() - present:
            known = sorted({name.partition(".")[0] for name in names})
            raise ValueError(
                f"towers.{tower}: no parameter is in it; the model has {', '.join(known)}"
            )
        for pattern in self.no_decay:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"no_decay: '{pattern}' fits no parameter; names look like {names[0]}"
                )


def on_meta(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether they are of a model without weights, for which torch has no fused step."""
    return any(parameter.is_meta for group in groups for parameter in group["params"])


def check_whole(groups: Sequence[Mapping[str, Any]], what: str) -> None:
    """Raise ValueError if a strategy has replaced matrices by flat pieces of them.

    For optimizers whose step depends on a whole parameter: on pieces they would be silently
    another optimizer.
    """
    for group in groups:
        whole = len(group["names"]) == len(group["params"])
        if not whole or (group["decayed"] and any(p.ndim <= 1 for p in group["params"])):
            raise ValueError(
                f"{what} needs whole parameters, and this strategy hands the optimizer flat "
                "pieces of them (ZeRO does): use strategy ddp or fsdp, or optimizer=adamw"
            )


def describe(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A row of text for each group, for the table a run begins with.

    Columns: lr, weight decay, tensors, parameters (elements), names (block numbers as `*` where
    a group has several blocks).
    """
    rows = []
    for group in groups:
        names = [model_name(name) for name in group["names"]]
        if len({block_of(name) for name in names} - {None}) > 1:
            names = [re.sub(r"\.\d+\.", ".*.", name) for name in names]
        count = sum(math.prod(shape_of(parameter)) for parameter in group["params"])
        rows.append(
            {
                "lr": f"{group['base_lr']:.3g}",
                "weight decay": f"{group['weight_decay']:g}",
                "tensors": f"{len(names):,}",
                "parameters": f"{count:,}",
                "names": ", ".join(dict.fromkeys(names)),
            }
        )
    return rows
