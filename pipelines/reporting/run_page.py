"""One self-contained HTML page of what happened: tokenizer, cache, pre-training, probe, skipped videos, commands."""

import base64
import shlex
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ar_model.clusters import cluster_order
from ar_model.objectives import ARVideo, load_objective
from ar_model.probes import folds_in_words
from data.cache import TokenCache
from data.loading import evaluation_batches
from data.source_clips import canonical_clips
from pipelines.engine.run import RUNS, environment_of, metrics_of, read_json, summary_of
from pipelines.evaluation.collapse import COLLAPSED, collapse_warning
from pipelines.reporting.pages import write_page
from pipelines.reporting.pictures import bar_chart, line_chart, rank_maps, reconstruction_grid, to_png
from tokenizer import load_tokenizer


def write_run_page(folder: Path, page: Path, *, trust: bool) -> None:
    """Write the page of a pre-training run.

    Args:
        folder: of the run.
        trust: whether a tokenizer that is a program may run.
    """
    trained = summary_of(folder)
    cache = TokenCache.open(trained["cache"])
    probes = [
        summary_of(path.parent) for path in sorted(folder.glob("*/summary.json"), key=lambda p: p.stat().st_mtime)
    ]
    sections = {
        "title": escape(f"{trained['objective']} on {cache.name}"),
        "lead": _lead(trained, probes),
        "probe": "".join(_probe(probe) for probe in probes) or "<p>Not probed yet: run pipelines/probe.py.</p>",
        "curves": _curves(folder, trained),
        "orders": _orders(folder),
        "tokenizer": _tokenizer(cache, trust),
        "cache": _cache(cache),
        "skipped": _skipped(cache),
        "commands": _commands(folder, cache),
        "environment": _environment(folder),
    }
    write_page(page, "report.html", sections)


def _lead(trained: dict[str, Any], probes: list[dict[str, Any]]) -> str:
    """What came out, in numbers that can be read at a glance."""
    tiles = []
    if probes:
        probe = probes[-1]
        tiles += [
            (
                "frozen linear probe",
                f"{probe['linear']['mean']:.3f}",
                f"± {probe['linear']['stderr']:.3f}, n = {probe['n']}",
            ),
            ("the same, untrained network", f"{probe['untrained']['mean']:.3f}", f"chance {probe['chance']:.3f}"),
        ]
    tiles += [
        _loss_tile(trained),
        (
            "clips per second",
            f"{trained['clips_per_second']:.0f}",
            f"{trained['step']} steps in {trained['seconds']:.0f} s",
        ),
    ]
    return "".join(f"<div class=tile><span>{a}</span><b>{b}</b><small>{c}</small></div>" for a, b, c in tiles)


def _loss_tile(trained: dict[str, Any]) -> tuple[str, str, str]:
    bits, unigram = trained["bits_per_code"], trained["unigram_bits"]
    if bits is None:
        return (
            "squared error of normalised pixels, held out",
            f"{trained['loss']:.3f}",
            "1 is the mean colour of a tubelet",
        )
    saved = 1 - bits / unigram if unigram else 0
    note = f"{abs(100 * saved):.0f} % {'below' if saved >= 0 else 'above'} {unigram:.2f} unigram"
    return "bits per code, held out", f"{bits:.2f}", note


def _probe(probe: dict[str, Any]) -> str:
    names = {
        "attentive": "pre-trained, attentive",
        "linear": "pre-trained, linear",
        "knn": "pre-trained, 20 nearest neighbours",
        "untrained_attentive": "untrained network, attentive",
        "untrained": "untrained network, linear",
        "motion_energy": "motion energy of the pixels, linear",
        "one_frame": "one pixel frame, linear",
    }
    bars = {names[key]: (probe[key]["mean"], probe[key]["stderr"]) for key in names if key in probe}
    rows = [[name, f"{mean:.3f} ± {error:.3f}"] for name, (mean, error) in bars.items()]
    rows.append(["always the commonest class", f"{probe['chance']:.3f}"])
    columns = {"linear": "layers", "linear, untrained": "untrained_layers", "attentive": "attentive_layers"}
    columns = {name: key for name, key in columns.items() if key in probe}
    layers = [
        [f"layer {i}", *(f"{entry['mean']:.3f} ± {entry['stderr']:.3f}" for entry in row)]
        for i, row in enumerate(zip(*(probe[key] for key in columns.values()), strict=True), start=1)
    ]
    return (
        f"<p>{escape(Path(probe['cache']).name)}: {probe['n']} labelled clips tested, {folds_in_words(probe['folds'])}; "
        f"seeds: {probe['seeds']}; {probe['skipped']} videos skipped, {probe['unlabelled']} unlabelled. "
        f"Most often chosen: layer {probe['layer']}. Protocol: {escape(probe['protocol'])}.</p>"
        + bar_chart(bars, x="accuracy on held-out clips", level=("chance", probe["chance"]))
        + '<div class="columns">'
        + _table(["features", "accuracy ± standard error"], rows)
        + _table(["probe of", *columns], layers)
        + "</div>"
    )


def _curves(folder: Path, trained: dict[str, Any]) -> str:
    logged = metrics_of(folder)
    of_codes = trained["bits_per_code"] is not None
    measure = "bits_per_code" if of_codes else "loss"
    lines = {}
    for key, name in ((f"val_{measure}", "held out, all targets"), (measure, "training")):
        points = [(m["step"], m[key]) for m in logged if key in m]
        if points:
            xs, ys = zip(*points, strict=True)
            lines[name] = (xs, ys)
    if not of_codes:
        return line_chart(lines, x="step", y="squared error of normalised pixels")
    return line_chart(
        lines, x="step", y="bits per code", level=("unigram entropy of the cache", trained["unigram_bits"])
    )


def _orders(folder: Path) -> str:
    objective = load_objective(folder / "model")
    if not isinstance(objective, ARVideo):
        return "<p>This objective has no order.</p>"
    clusters, samples = objective.clusters, 4
    order_BN = cluster_order(clusters, objective.order, torch.arange(samples))
    rank_BN = order_BN.argsort(dim=1)
    rank_BL = torch.empty(samples, clusters.members().numel(), dtype=torch.long)
    members_NK = clusters.members()
    for b in range(samples):
        rank_BL[b, members_NK] = rank_BN[b][:, None].expand_as(members_NK)
    return (
        f"<p>Order “{escape(objective.order)}”: {len(members_NK)} clusters of {'×'.join(map(str, clusters.box))} tokens. "
        f"Four samples, one row each; time runs to the right; numbers and colours tell when a cluster is predicted. "
        f"The encoder sees {objective.kept} of the {members_NK.shape[1]} tokens of each cluster but the last.</p>"
        + rank_maps(rank_BL.view(samples, *clusters.grid).numpy(), len(members_NK))
    )


def _tokenizer(cache: TokenCache, trust: bool) -> str:
    source = cache.made_with["tokenizer"]
    try:
        tokenizer = load_tokenizer(source, trust=trust)
        rows = np.linspace(0, len(cache) - 1, min(4, len(cache))).round().astype(int).tolist()
        pixels = torch.from_numpy(np.stack(list(canonical_clips(cache, rows))))
    except ValueError as error:
        return f"<p>No pictures: {escape(str(error))}</p>"
    codes = torch.cat([batch["codes_BTHW"] for batch in evaluation_batches(cache, rows, len(rows))])
    picture = to_png(reconstruction_grid(pixels, tokenizer.decode(codes)))
    text = f"<p>{escape(source)}. Per clip: the video, what its cached codes decode to, and the difference.</p>"
    if (Path(source) / "summary.json").exists():
        made = summary_of(Path(source))
        text += (
            f"<p>Held-out clips: {made['psnr']:.2f} dB PSNR, {100 * made['code_usage']:.1f} % of the codes in use, "
            f"perplexity {made['perplexity']:.0f}; {made['step']} steps in {made['seconds']:.0f} s.</p>"
        )
        points = [(m["step"], m["val_psnr"]) for m in metrics_of(Path(source)) if "val_psnr" in m]
        if len(points) > 2:
            xs, ys = zip(*points, strict=True)
            text += line_chart({"held out": (xs, ys)}, x="step", y="PSNR in dB")
    return (
        text
        + f'<img class="pixels" alt="reconstructions" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
    )


def _cache(cache: TokenCache) -> str:
    manifest, clip = cache.manifest, cache.clip
    listed = len(cache.spec["videos"])
    warning = ""
    if manifest["codes_used"] < COLLAPSED * cache.vocab_size:
        warning = f"<p><b>{escape(collapse_warning(manifest['codes_used'], cache.vocab_size))}</b></p>"
    rows = [
        ["folder", cache.address],
        ["key", cache.key],
        [
            "videos",
            f"{listed} listed = {manifest['samples']} used + {len(manifest['skipped'])} skipped; {manifest['padded']} padded",
        ],
        [
            "clips",
            f"{manifest['clips']}: {clip.frames} frames of {clip.size}×{clip.size}, stride {clip.stride}, "
            f"views of each video: {clip.views}",
        ],
        ["codes", f"{manifest['codes']:,}; {'×'.join(map(str, cache.codes_shape))} per clip"],
        [
            "vocabulary",
            f"{manifest['codes_used']} of {cache.vocab_size} in use; unigram entropy {manifest['unigram_bits']:.3f} bits",
        ],
        ["shards", f"{len(manifest['shards'])}, {sum(s['bytes'] for s in manifest['shards']) / 2**20:.1f} MiB"],
    ]
    return warning + _table(["", ""], rows)


def _skipped(cache: TokenCache) -> str:
    skipped = cache.manifest["skipped"]
    if not skipped:
        return "<p>No video was skipped.</p>"
    shown = [[entry["path"], entry["reason"]] for entry in islice(skipped, 200)]
    more = f"<p>… and {len(skipped) - 200} more, in the cache's manifest.</p>" if len(skipped) > 200 else ""
    return _table(["video", "reason"], shown) + more


def _commands(folder: Path, cache: TokenCache) -> str:
    """The commands of the runs that this page tells of, in the order in which they were started."""
    related = [
        folder,
        Path(cache.made_with["tokenizer"]),
        *(path.parent for path in folder.glob("*/environment.json")),
    ]
    caches = {cache.address, *(summary_of(path.parent).get("cache") for path in folder.glob("*/summary.json"))}
    made_caches = (path.parent for path in RUNS.glob("tokenize-*/summary.json"))
    related += [path for path in made_caches if summary_of(path)["cache"] in caches]
    runs = {path.resolve(): environment_of(path) for path in related if (path / "environment.json").exists()}
    started = sorted(runs.values(), key=lambda environment: environment["started"])
    commands = dict.fromkeys(("accelerate", "launch", *environment["command"]) for environment in started)
    lines = (" ".join(f"<span>{escape(shlex.quote(word))}</span>" for word in command) for command in commands)
    return f"<pre>{chr(10).join(lines)}</pre>"  # a line breaks between words only


def _environment(folder: Path) -> str:
    environment = environment_of(folder)
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    choices = read_json(folder / "choices.json")
    rows = [
        ["device", f"{environment['device']}, {environment['processes']} process(es)"],
        ["chosen", ", ".join(f"{name} {value}" for name, value in sorted(choices.items()) if name != "about")],
        ["software", f"Python {environment['python']}, {versions}"],
        ["started", environment["started"]],
    ]
    return _table(["", ""], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{f'<thead><tr>{top}</tr></thead>' if any(head) else ''}<tbody>{body}</tbody></table>"
