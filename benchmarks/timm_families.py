"""Pruning one member of every family of timm, ours or torch-pruning's own timm example.

``python benchmarks/timm_families.py --out cards`` runs ``spamprune zoo check`` for each network, in
a process of its own: remove half of the units, run forward and backward, save, load in a fresh
process and compare bit by bit, compare with the masked original. A stopped run goes on. ``--stock``
does what torch-pruning's example does instead (heads and channels by the same ratio, the classifier
ignored).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from spamprune import zoo

# fmt: off
#: The smallest member of each module of timm 1.0.31 that can be built.
FAMILIES = [
    "beit_base_patch16_224",
    "halonet_h1",
    "mobileone_s0",
    "cait_xxs24_224",
    "coat_tiny",
    "convit_tiny",
    "convmixer_768_32",
    "test_convnext",
    "cpubone_nano",
    "crossvit_tiny_240",
    "csatv2",
    "cs3darknet_focus_s",
    "cspnext_tiny",
    "davit_tiny",
    "deepseek_vit_412m",
    "deit_tiny_patch16_224",
    "densenet121",
    "dla46x_c",
    "dpn48b",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "efficientnet_b0",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "eva02_tiny_patch14_224",
    "fasternet_t0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "gemma4_vit_167m",
    "ghostnet_050",
    "hardcorenas_b",
    "hgnetv2_b0",
    "hiera_tiny_224",
    "hieradet_small",
    "hrnet_w18_small",
    "iformer_t",
    "inception_next_atto",
    "inception_resnet_v2",
    "inception_v3",
    "inception_v4",
    "lcnetv2_small",
    "levit_128s",
    "lowformer_b0",
    "test_mambaout",
    "maxvit_pico_rw_256",
    "poolformerv2_s12",
    "gmlp_ti16_224",
    "mobilenetv3_small_050",
    "mobilenetv5_base",
    "mobilevit_xxs",
    "mvitv2_tiny",
    "naflexvit_base_patch16_parfac_gap",
    "nasnetalarge",
    "nest_tiny",
    "nextvit_small",
    "test_nfnet",
    "pit_ti_224",
    "pnasnet5large",
    "pvt_v2_b0",
    "qwen3_vit_88m",
    "rdnet_tiny",
    "regnetx_002",
    "repghostnet_050",
    "repvit_m1",
    "res2next50",
    "resnest14d",
    "resnet10t",
    "resnetv2_18",
    "rexnet_100",
    "selecsls42",
    "legacy_seresnet18",
    "sequencer2d_s",
    "shvit_s1",
    "skresnet18",
    "starnet_s050",
    "swiftformer_xs",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window16_256",
    "swinv2_cr_tiny_224",
    "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224",
    "tresnet_m",
    "twins_svt_small",
    "vgg11",
    "visformer_tiny",
    "test_vit",
    "vit_tiny_r_s16_p8_224",
    "test_vit_relpos",
    "samvit_base_patch16_224",
    "vitamin_small_224",
    "volo_d1_224",
    "ese_vovnet19b_slim_dw",
    "legacy_xception",
    "xception41p",
    "xcit_nano_12_p8_224",
]
# fmt: on


def stock(name: str, ratio: float) -> dict[str, object]:
    """Do what torch-pruning's example for timm does, with its fixed typing errors."""
    model, example = zoo.disturbed(name)
    dense = sum(p.numel() for p in model.parameters())
    ignored, heads = [], {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features == model.num_classes:
            ignored.append(module)
        if hasattr(module, "num_heads"):
            if hasattr(module, "qkv"):
                heads[module.qkv] = module.num_heads
            elif hasattr(module, "qkv_proj"):
                heads[module.qkv_proj] = module.num_heads
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    pruner = tp.pruner.BasePruner(
        model, example, importance=importance, pruning_ratio=ratio, ignored_layers=ignored,
        num_heads=heads, prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=ratio,
        global_pruning=False, round_to=1, pruning_ratio_dict={}, channel_groups={},
    )  # fmt: skip
    pruner.step()
    for module in model.modules():
        for projection in ("qkv", "qkv_proj"):
            if hasattr(module, "num_heads") and hasattr(module, projection):
                layer: Any = getattr(module, projection)
                if layer in pruner.num_heads:
                    count = pruner.num_heads[layer]
                    module.num_heads, module.head_dim = count, layer.out_features // (3 * count)
    outputs = model(torch.cat([example, example]))
    outputs.square().sum().backward()
    params = sum(p.numel() for p in model.parameters()) / dense
    return {"params": params, "classes": list(outputs.shape)}


def run(command: list[str], limit: int) -> str:
    """Return what went wrong with a command, or nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"over {limit} s"
    return "" if done.returncode == 0 else done.stderr.strip()[-200:] or "killed"


def main() -> None:
    """Run what is missing in the folder, then print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("cards"))
    parser.add_argument("--names", nargs="*", default=FAMILIES)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--kinds", nargs="*", default=[])
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--limit", type=int, default=600, help="Seconds for one network.")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        text = json.dumps(stock(args.one, args.ratio))
        (args.out / f"{args.one}.json").write_text(text)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    failures: dict[str, str] = {}
    for name in args.names:
        path = args.out / f"{name}.{'json' if args.stock else 'yaml'}"
        if path.exists():
            continue
        if args.stock:
            command = [sys.executable, __file__, "--stock", "--one", name, "--out", str(args.out)]
        else:
            command = [sys.executable, "-m", "spamprune", "zoo", "check", name, "--out", str(path)]
            command += [word for kind in args.kinds for word in ("--kinds", kind)]
        failure = run([*command, "--ratio", str(args.ratio)], args.limit)
        if failure:
            failures[name] = failure
            print(name, failure.replace("\n", " "), flush=True)
    summarise_stock(args.out) if args.stock else summarise(args.out)
    print(f"{len(failures)} without a result: {', '.join(failures)}")


def summarise(folder: Path) -> None:
    """Print how many networks were pruned in full, and what is odd about the others."""
    cards = zoo.cards(folder)
    full = [card for card in cards if card.outcome == "full"]
    print(f"{len(cards)} networks, {len(full)} in full")
    for card in cards:
        if card.outcome != "full":
            left = f"{card.parameters.remain:.0%} remain" if card.parameters else card.why
            print(f"  {card.model}: {card.outcome}, {left}, {card.trains}, {card.reloads}")
    agreeing = [card for card in cards if card.must_agree]
    worst = max((card.difference or 0 for card in agreeing), default=0)
    inner = [card.inner_difference for card in cards if card.inner_difference is not None]
    print(f"{len(agreeing)} must agree with their masks: worst {worst:.1e}")
    print(f"{len(inner)} must where inner units alone go: worst {max(inner, default=0):.1e}")


def summarise_stock(folder: Path) -> None:
    """Print how many networks ran, kept their classes and lost 40 % of their parameters."""
    rows = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    kept = [row for row in rows if row["classes"] == [2, 1000]]
    lost = [row for row in kept if row["params"] <= 0.6]
    print(f"{len(rows)} run, {len(kept)} with 1000 classes, {len(lost)} of them lose 40 %")


if __name__ == "__main__":
    main()
