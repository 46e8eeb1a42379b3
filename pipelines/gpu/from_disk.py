"""Part 5: training from disk with all cores: ARVideo reads codes from a cache, VideoMAE decodes the same videos."""

import os
from collections.abc import Iterator

from data.sources import load_source
from pipelines.benchmarks import Row, comparison
from pipelines.benchmarks.entrants import Entrant, Shape, ours, videomae
from pipelines.benchmarks.pretrain_speed import from_disk
from pipelines.gpu.part import Setting, run
from pipelines.gpu.training_speed import SMALL, TARGETS
from pipelines.gpu.videos import videos_folder


def measure(setting: Setting) -> Iterator[Row]:
    """Yield clips/s from disk, and for each model the share of that time that its steps take without data loading."""
    device, shape = setting.device, SMALL if setting.dry else Shape(batch=32)
    workers = 1 if setting.dry else os.cpu_count() or 1
    # More steps than batches that the workers hold before the clock starts; all workers deliver equally many.
    steps = 3 * workers
    source = load_source(str(videos_folder(setting)))
    # Eager, so that the time goes to the measurement and not to the compiler.
    our = ours(shape, device, attention="sdpa", compiled=False, targets=TARGETS)
    peer = videomae(shape, device, attention="sdpa", compiled=False)
    folder = setting.work / "from-disk"
    our_s, peer_s, _ = from_disk(folder, source, shape, our, peer, steps, [workers])
    what = f"from disk, {len(source.videos)} videos, VideoMAE with {workers} decoding workers"
    yield comparison(what, "clips/s", shape.batch / our_s, shape.batch / peer_s, "VideoMAE", "≥ 3")
    shares = _step_seconds(our) / our_s, _step_seconds(peer) / peer_s
    yield comparison("share of that time in which the device trains", "", *shares, "VideoMAE")


def _step_seconds(entrant: Entrant) -> float:
    """Return the time of a step on a batch that is on the device."""
    return min(entrant.seconds() for _ in range(5))


if __name__ == "__main__":
    run(measure)
