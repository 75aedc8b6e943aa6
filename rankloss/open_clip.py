"""open_clip's own trainer with a ranking loss.

    python -m rankloss.open_clip --rank-order 3 <open_clip's own arguments>
    torchrun --nproc_per_node 8 -m rankloss.open_clip --rank-order 3 <open_clip's own arguments>

runs the installed `open_clip_train.main` (open_clip_torch 3.3), unchanged but for what it takes
its loss from. The loss is attached to the model before DistributedDataParallel and the optimizer
see it, so its parameters are synchronised, optimised, saved and resumed with the model's.
`rankloss.export` leaves them out of a checkpoint for `open_clip.create_model` and CLIP_benchmark.
"""

import argparse
import contextlib
import copy
import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rankloss.attachment import attach
from rankloss.ranking import HighOrderPLLoss
from rankloss.siglip_ranking import SigLipRankingLoss

PASSED_ON = (
    *("transition_dim", "top_k", "cross_modal_weight", "in_modal_weight"),
    *("discount", "exclude_self"),
)
"""Arguments of the losses that are options `--rank-...` of the same names."""


class OpenClipLoss(nn.Module):
    """A ranking loss under open_clip's calling convention, and what else its model trains for.

    open_clip's trainer calls `loss(**model_output, output_dict=True)` and adds up the values. The
    outputs that a ranking loss does not take (CoCa's captions, the features of a distilled model)
    go to an auxiliary loss.

    Args:
        ranking: `HighOrderPLLoss` or `SigLipRankingLoss`.
        auxiliary: open_clip's own loss for the other outputs. All its terms but "contrastive_loss",
            which the ranking loss has, are added. None: the model has no other outputs.

    >>> loss = OpenClipLoss(HighOrderPLLoss(embed_dim=8, order=2))
    >>> image, text = torch.nn.functional.normalize(torch.randn(2, 4, 8), dim=2)
    >>> terms = loss(image_features=image, text_features=text, logit_scale=10.0, output_dict=True)
    >>> sorted(terms)
    ['contrastive_loss', 'ranking_loss']
    """

    def __init__(self, ranking: nn.Module, auxiliary: nn.Module | None = None) -> None:
        super().__init__()
        self.ranking, self.auxiliary = ranking, auxiliary

    def forward(self, *, output_dict: bool = False, **outputs: Any) -> Tensor | dict[str, Tensor]:
        """Return the sum of the terms, or each by its name.

        Args:
            output_dict: return {"contrastive_loss", "ranking_loss", ...}, already weighted.
            **outputs: the model's: `image_features`, `text_features`, `logit_scale` and perhaps
                `logit_bias`, as `PairLoss.forward` takes them; all others are for the auxiliary
                loss.

        Raises:
            TypeError: the model returned others, and there is no auxiliary loss to take them.
        """
        bias = outputs.pop("logit_bias", None)  # which open_clip's auxiliary losses do not take
        own = {name: outputs[name] for name in ("image_features", "text_features", "logit_scale")}
        others = outputs.keys() - own.keys()
        if others and self.auxiliary is None:
            raise TypeError(
                f"OpenClipLoss: the model also returned {sorted(others)}, which a ranking loss "
                "does not take; give the loss that does as auxiliary="
            )
        terms: dict[str, Tensor] = self.ranking(**own, logit_bias=bias, output_dict=True)
        if self.auxiliary is not None:
            more = self.auxiliary(**outputs, output_dict=True)
            terms = terms | {key: x for key, x in more.items() if key != "contrastive_loss"}
        return terms if output_dict else torch.stack(list(terms.values())).sum()


def translate_keywords(
    *, cache_labels: bool = False, use_horovod: bool = False, **keywords: Any
) -> dict[str, Any]:
    """Turn the keywords of `open_clip.ClipLoss` into those of `HighOrderPLLoss`.

    For forks of open_clip whose `create_loss` builds the loss from its own keywords.

    Args:
        cache_labels: has no consequence here: labels are never a tensor that would need a cache.
        use_horovod: must be False.
        **keywords: `local_loss`, `gather_with_grad`, `rank`, `world_size` and any others, as given.

    Raises:
        ValueError: use_horovod is True.

    >>> keywords = dict(local_loss=True, gather_with_grad=True, cache_labels=True, rank=0)
    >>> loss = HighOrderPLLoss(512, order=3, **translate_keywords(**keywords))
    """
    if use_horovod:
        raise ValueError("rankloss gathers with torch.distributed, not Horovod; use torchrun")
    return keywords


def ranking_task(model: nn.Module, loss: nn.Module, **keywords: Any) -> nn.Module:
    """Build a training task of open_clip's main branch (4.2.0.dev0), which no release has yet.

    The loss is attached to the model, the one part of a task that its trainer optimises, saves and
    wraps. In a checkout, let `open_clip_train.main.create_task` return it. FSDP2 needs the loss
    among `_get_fsdp_shard_modules()` too.

    Args:
        model: a model of open_clip, built with output_dict=True.
        loss: `HighOrderPLLoss` or `SigLipRankingLoss`.
        **keywords: `CLIPTask`'s others, `device`, `dtype`, `verbose`.

    Raises:
        ImportError: the installed open_clip has no tasks.
    """
    try:
        from open_clip.task import CLIPTask
    except ImportError as error:
        raise ImportError(
            "ranking_task is for open_clip's main branch; with a release run "
            "`python -m rankloss.open_clip`"
        ) from error
    task: nn.Module = CLIPTask(model, loss=attach(model, loss), **keywords)
    return task


def build_loss(embed_dim: int, options: argparse.Namespace, args: argparse.Namespace) -> nn.Module:
    """Build the ranking loss of a run.

    Args:
        embed_dim: D, width of the model's features.
        options: the launcher's own, see `--help`.
        args: open_clip's. Gradients are those of the global batch whether or not its
            `--local-loss --gather-with-grad` are given.
    """
    keywords: dict[str, Any] = {name: getattr(options, f"rank_{name}") for name in PASSED_ON}
    keywords["share_transitions"] = not options.rank_separate_transitions
    keywords["accum_freq"] = args.accum_freq
    if args.siglip:
        return SigLipRankingLoss(embed_dim, options.rank_order, **keywords)
    if "coca" in args.model.lower():
        keywords["contrastive_weight"] = args.coca_contrastive_loss_weight
    return HighOrderPLLoss(embed_dim, options.rank_order, **keywords)


class _Launch:
    """Stand-ins that `open_clip_train.main` finds by its own parts' names during one run."""

    def __init__(self, options: argparse.Namespace, trainer: ModuleType) -> None:
        self.options, self.trainer = options, trainer
        self.originals = SimpleNamespace(**vars(trainer))
        self.loss: nn.Module | None = None

    def parse_args(self, arguments: Sequence[str]) -> argparse.Namespace:
        args: argparse.Namespace = self.originals.parse_args(arguments)
        if args.horovod:
            translate_keywords(use_horovod=True)
        if args.torchscript or args.trace:
            raise ValueError("a scripted or traced model cannot hold the loss; leave that flag out")
        if args.distill_model and (args.accum_freq > 1 or "coca" in args.model.lower()):
            raise ValueError("open_clip distils neither with --accum-freq nor into a CoCa")
        vars(args).update(vars(self.options))  # into the run's params.txt
        self.args = args
        return args

    def create_model_and_transforms(self, *args: Any, **keywords: Any) -> Any:
        """The first model built is the trained one; a second is a teacher."""
        built = self.originals.create_model_and_transforms(*args, **keywords)
        if self.loss is None:
            loss = build_loss(_embed_dim(built[0]), self.options, self.args)
            self.loss = attach(built[0], loss)
        return built

    def create_loss(self, args: argparse.Namespace) -> OpenClipLoss:
        assert self.loss is not None
        others = copy.copy(args)
        others.local_loss = others.gather_with_grad = True
        others.coca_contrastive_loss_weight = 0  # the ranking loss has that term
        needed = args.distill or "coca" in args.model.lower()
        return OpenClipLoss(self.loss, self.originals.create_loss(others) if needed else None)

    def train_one_epoch(
        self, model: Any, data: Any, loss: Any, epoch: int, *args: Any, **keywords: Any
    ) -> Any:
        if self.options.rank_ramp:
            loss.ranking.set_progress(epoch / max(self.args.epochs - 1, 1))
        return self.originals.train_one_epoch(model, data, loss, epoch, *args, **keywords)

    def adamw(self, groups: list[dict[str, Any]], **keywords: Any) -> torch.optim.Optimizer:
        """open_clip's two groups, the first without decay, with the loss's moved to the first."""
        assert self.loss is not None
        names: set[str] = self.loss.no_weight_decay()  # type: ignore[operator]
        spared = {id(p): p for name, p in self.loss.named_parameters() if name in names}
        first, second = ([p for p in g["params"] if id(p) not in spared] for g in groups)
        groups = [{**groups[0], "params": first + list(spared.values())}]
        groups.append({"params": second, "weight_decay": self.args.wd})
        return torch.optim.AdamW(groups, **keywords)


class _CpuDistributedDataParallel(nn.parallel.DistributedDataParallel):
    """DistributedDataParallel that ignores `device_ids` for modules on the CPU.

    open_clip names its device whatever it is; torch accepts none for a module on the CPU.
    """

    def __init__(self, module: nn.Module, device_ids: Any = None, **keywords: Any) -> None:
        on_cpu = all(p.device.type == "cpu" for p in module.parameters())
        super().__init__(module, device_ids=None if on_cpu else device_ids, **keywords)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run open_clip's trainer with a ranking loss.

    Args:
        arguments: as on the command line, the launcher's (`--rank-...`) and open_clip's; None
            takes the command line's.

    Returns:
        The exit status.

    Raises:
        ImportError: open_clip's trainer, or a package it needs, is not installed.
        ValueError: an option of open_clip's cannot be combined with a ranking loss.
    """
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(others):
        print(parser.format_help(), "\nopen_clip's own arguments:\n", sep="")
    trainer, data = _import_trainer()
    launch = _Launch(options, trainer)
    parts = {
        name: getattr(launch, name)
        for name in ("parse_args", "create_model_and_transforms", "create_loss", "train_one_epoch")
    }
    optimizers = SimpleNamespace(AdamW=launch.adamw)
    group = functools.partial(_group, data.group_by_keys_nothrow)
    with (
        _replaced(trainer, **parts, optim=optimizers),
        _replaced(data, group_by_keys_nothrow=group),
        _replaced(nn.parallel, DistributedDataParallel=_CpuDistributedDataParallel),
    ):
        return int(trainer.main(others) or 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m rankloss.open_clip", add_help=False, allow_abbrev=False
    )
    loss = parser.add_argument_group("the ranking loss (see rankloss.HighOrderPLLoss)")
    add = loss.add_argument
    add("--rank-order", type=int, default=3, help="0: CLIP, 1: RankCLIP, 2 and up (default: 3)")
    add("--rank-transition-dim", type=int, default=32, help="width r of a transition term")
    add("--rank-top-k", type=int, help="places of each ranking that count (default: all)")
    add("--rank-cross-modal-weight", type=float, default=1 / 16)
    add("--rank-in-modal-weight", type=float, default=1 / 16)
    add("--rank-discount", choices=["none", "log"], default="none", help="weight of place k")
    add("--rank-exclude-self", action="store_true", help="anchors out of their in-modal lists")
    add("--rank-separate-transitions", action="store_true", help="heads for each modality")
    add("--rank-ramp", action="store_true", help="RankCLIP's ramp of the ranking terms over epochs")
    return parser


def _import_trainer() -> tuple[ModuleType, ModuleType]:
    try:
        import open_clip_train.data
        import open_clip_train.main
    except ImportError as error:
        raise ImportError(
            f"open_clip's trainer needs {error.name}; `pip install 'rankloss[open-clip]'`"
        ) from error
    return open_clip_train.main, open_clip_train.data


@torch.no_grad()
def _embed_dim(model: Any) -> int:
    """Width of the features, asked of the text tower: open_clip's kinds have no common name."""
    device = next(model.parameters()).device
    tokens = torch.zeros(1, model.context_length, dtype=torch.int64, device=device)
    return int(model.encode_text(tokens).shape[-1])


def _group(original: Any, data: Iterable[dict[str, Any]], *args: Any, **keywords: Any) -> Any:
    """Group files by key, past the marks without a name that webdataset >= 0.2.96 puts between."""
    return original((x for x in data if "fname" in x), *args, **keywords)


@contextlib.contextmanager
def _replaced(module: ModuleType, **names: Any) -> Iterator[None]:
    """Attributes of a module, replaced until the block ends."""
    originals = {name: getattr(module, name) for name in names}
    vars(module).update(names)
    try:
        yield
    finally:
        vars(module).update(originals)


if __name__ == "__main__":
    sys.exit(main())
