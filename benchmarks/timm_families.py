"""Pruning one member of every family of timm, ours beside torch-pruning's own timm example.

For each network, in a process of its own: remove half of the units, run forward and backward,
save, load in a fresh process and compare bit by bit, and compare with the masked original. Weights
are random, and those that timm initialises to zero or one are disturbed, so that nothing agrees by
chance.

``python benchmarks/timm_families.py --out families.jsonl`` appends one line per network and prints
the summary; a stopped run goes on. ``--stock`` runs torch-pruning's example for timm instead (heads
and channels by the same ratio, the classifier ignored).
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import spamprune as sp
from spamprune.errors import SpampruneError
from spamprune.models import create
from spamprune.pruning import cost
from spamprune.pruning.units import DEFAULT_KINDS

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


def network(name: str) -> tuple[nn.Module, Tensor]:
    """Return a model with disturbed weights and an input for it."""
    torch.manual_seed(0)
    model = create(name, num_classes=1000).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2 or parameter.abs().max() < 1e-3:
                parameter.add_(0.2 * torch.randn_like(parameter))
    size = model.default_cfg.get("input_size") or (3, 224, 224)
    return model, torch.randn(1, *size)


def ours(name: str, ratio: float, kinds: list[str] | None) -> dict[str, Any]:
    """Prune ``name`` and measure everything."""
    model, example = network(name)
    scores = {n: p.detach().square() for n, p in model.named_parameters()}
    start = time.perf_counter()
    target = sp.Target(ratio=ratio)
    plan = sp.plan(model, example, scores, target, kinds=kinds or DEFAULT_KINDS)
    seconds = time.perf_counter() - start
    small = sp.apply(model, plan)
    result: dict[str, Any] = {
        "seconds": round(seconds, 1),
        "params": cost.params(small) / cost.params(model),
        "notes": [n for n in plan.notes if "at its minimum" not in n],
        "comparable": plan.comparable,
    }
    batch = torch.cat([example, torch.randn_like(example)])
    double = copy.deepcopy(model).double()  # so that rounding is not mistaken for a difference

    def difference(plan: sp.Plan) -> float:
        return sp.verify(double, sp.apply(double, plan), plan, batch.double(), float("inf"))

    result["difference"] = difference(plan)
    # what must agree is compared even where width makes the whole incomparable
    parts = ("heads", "head_dims", "groups", "group_dims", "hidden")
    try:
        inner = sp.plan(model, example, scores, target, kinds=parts)
        result["inner_comparable"] = inner.comparable
        result["inner_difference"] = difference(inner)
    except SpampruneError as error:
        result["inner"] = str(error)
    with tempfile.TemporaryDirectory() as folder:
        with torch.no_grad():
            torch.save(example, f"{folder}/x")
            expected = small(example)
            torch.save(expected, f"{folder}/y")
        sp.save(small, f"{folder}/artifact")
        code = (
            "import sys, torch, spamprune as sp; from torch.utils._pytree import tree_leaves as t;"
            "f = sys.argv[1]; m = sp.load(f + '/artifact');"
            "x, y = torch.load(f + '/x'), torch.load(f + '/y', weights_only=False);"
            "\nwith torch.no_grad(): z = m(x)"
            "\nassert all(torch.equal(a, b) for a, b in zip(t(y), t(z), strict=True))"
        )
        done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
        result["reload"] = "identical" if done.returncode == 0 else done.stderr.strip()[-300:]
    small.train()
    try:
        outputs = small(batch)
    except Exception as error:  # some networks cannot be trained on two samples even when whole
        result["train"] = f"{type(error).__name__}: {error}"[:200]
        small.eval()
        outputs = small(batch)
    sum(o.square().sum() for o in tree_leaves(outputs)).backward()
    result["backward"] = all(p.grad is None or p.grad.shape == p.shape for p in small.parameters())
    result["classes"] = list(tree_leaves(outputs)[0].shape)
    return result


def stock(name: str, ratio: float) -> dict[str, Any]:
    """Do what torch-pruning's example for timm does, with its fixed typing errors."""
    import torch_pruning as tp

    model, example = network(name)
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
                layer = getattr(module, projection)
                if layer in pruner.num_heads:
                    module.num_heads = pruner.num_heads[layer]
                    module.head_dim = layer.out_features // (3 * module.num_heads)
    outputs = model(torch.cat([example, example]))
    outputs.square().sum().backward()
    params = sum(p.numel() for p in model.parameters()) / dense
    return {"params": params, "classes": list(outputs.shape)}


def main() -> None:
    """Run what is missing in the file, then print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("families.jsonl"))
    parser.add_argument("--names", nargs="*", default=FAMILIES)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--kinds", nargs="*")
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--limit", type=int, default=300, help="Seconds for one network.")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        function = (
            stock(args.one, args.ratio) if args.stock else ours(args.one, args.ratio, args.kinds)
        )
        print("RESULT " + json.dumps(function))
        return
    done = {}
    if args.out.exists():
        done = {r["name"]: r for r in map(json.loads, args.out.read_text().splitlines())}
    for name in args.names:
        if name not in done:
            done[name] = record = {"name": name, **_apart(name, args)}
            with args.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(json.dumps(record)[:400], flush=True)
    _summarise([done[n] for n in args.names])


def _apart(name: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", name, "--ratio", str(args.ratio)]
    command += ["--stock"] if args.stock else []
    command += ["--kinds", *args.kinds] if args.kinds else []
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=args.limit)
    except subprocess.TimeoutExpired:
        return {"error": f"over {args.limit} s"}
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        return {"error": run.stderr.strip()[-400:]}
    result: dict[str, Any] = json.loads(lines[0][7:])
    return result


def _summarise(records: list[dict[str, Any]]) -> None:
    ran = [r for r in records if "error" not in r]
    full = [r for r in ran if r["params"] <= 0.6 and r.get("reload", "identical") == "identical"]
    print(f"{len(records)} networks, {len(ran)} run after pruning, {len(full)} of them lose 40 %")
    for r in records:
        if r not in full:
            print("  ", r["name"], r.get("error") or f"{r['params']:.2f} remain", r.get("reload"))
    for key in ("difference", "inner_difference"):
        comparable = "comparable" if key == "difference" else "inner_comparable"
        bad = [(r["name"], r[key]) for r in ran if r.get(comparable) and not r[key] <= 1e-4]
        print(f"{key}: {sum(bool(r.get(comparable)) for r in ran)} comparable, over 1e-4: {bad}")


if __name__ == "__main__":
    main()
