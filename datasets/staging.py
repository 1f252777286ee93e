"""Decoded images on their way into a data set, in files that outlive an interruption.

Each split has a file with room for all its images, mapped into memory, and one with a byte for each that says whether it is
there. Whoever is killed has lost the images that were being decoded; whoever comes with the same plan goes on.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from dpresnet.datasets.pictures import BadPicture

TODO, DONE, BAD = 0, 1, 2
AT_ONCE = 16  # images for each worker that wait to be decoded


class Staging:
    """Room for ``counts`` images by split, uint8 [C, H, W] = ``shape``; ``key`` stands for everything that decides the pixels.

    ``resumed``: how many were there already.
    """

    def __init__(self, folder: Path, key: str, shape: tuple[int, int, int], counts: dict[str, int]):
        self.folder, self._shape = folder, shape
        plan, path = {"key": key, "shape": list(shape), "counts": counts}, folder / "plan.json"
        if not path.exists() or json.loads(path.read_text()) != plan:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for split, count in counts.items():
                np.memmap(folder / f"{split}.u8", np.uint8, "w+", shape=(count, *shape)).flush()
                np.memmap(folder / f"{split}.status", np.uint8, "w+", shape=(count,)).flush()
            path.write_text(json.dumps(plan))  # last: without it everything begins anew
        self.images = {split: self._map(f"{split}.u8", (count, *shape)) for split, count in counts.items()}
        self.status = {split: self._map(f"{split}.status", (count,)) for split, count in counts.items()}
        self.resumed = sum(int((status == DONE).sum()) for status in self.status.values())

    def _map(self, name: str, shape: tuple[int, ...]) -> np.memmap:
        return np.memmap(self.folder / name, np.uint8, "r+", shape=shape)

    def fill(self, split: str, decode: Callable[[int], np.ndarray], workers: int) -> Iterator[tuple[int, str]]:
        """Decodes what is not there, by several threads: yields each (index, "" or why it is bad), in order."""
        images, status = self.images[split], self.status[split]

        def one(index: int) -> tuple[int, str]:
            try:
                images[index] = decode(index)
                status[index] = DONE  # after the pixels: a process that is killed here decodes once more
            except BadPicture as error:
                status[index] = BAD
                return index, str(error)
            return index, ""

        todo = iter(np.flatnonzero(status != DONE).tolist())
        with ThreadPoolExecutor(workers, "dpresnet-decode") as pool:
            try:
                while some := list(islice(todo, AT_ONCE * workers)):
                    yield from pool.map(one, some)
            finally:
                pool.shutdown(cancel_futures=True)

    def good(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """The images that are there [n, C, H, W], in order, in mapped memory, and their indices [n]."""
        images, chosen = self.images[split], np.flatnonzero(self.status[split] == DONE)
        if len(chosen) == len(images):
            return images, chosen
        kept = np.memmap(self.folder / f"{split}.good.u8", np.uint8, "w+", shape=(max(1, len(chosen)), *self._shape))
        for place, index in enumerate(chosen):
            kept[place] = images[index]
        return kept[: len(chosen)], chosen

    def remove(self) -> None:
        """When the data set is whole."""
        self.images, self.status = {}, {}
        shutil.rmtree(self.folder)
