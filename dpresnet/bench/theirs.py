"""PyTorch's side: the same network, optimizer and loss on the CPU, in the variant that is fastest here.

A variant is "contiguous" or a combination of the words in `WORDS`, joined by "+". All compute in fp32 except those with
"bf16", which autocast; PyTorch has no fp16 training on CPUs. Several processes exchange gradients with gloo, through
DistributedDataParallel; each normalises by itself, because SyncBatchNorm is for GPUs only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from dpresnet.bench.torch_resnet import resnet
from dpresnet.bench.workload import Facts, Sgd, Workload

WARM_STEPS = 3


class Variant:
    """One network with its optimizer and a batch that stays in memory; with a ``rank`` that of a `Ddp` process."""

    def __init__(self, work: Workload, name: str, rank: int | None = None):
        torch.manual_seed(rank or 0)
        self.name, words, sgd = name, set(name.split("+")), Sgd()
        self.net = resnet(work.arch, num_classes=work.classes, stem=work.stem)
        for module in self.net.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = True
        self.images = torch.randn(work.batch, 3, work.image, work.image)
        self.labels = torch.randint(0, work.classes, (work.batch,))
        if "channels_last" in words:
            self.net = self.net.to(memory_format=torch.channels_last)
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.net.parameters(), sgd.lr, sgd.momentum, weight_decay=sgd.weight_decay)
        self.criterion = nn.CrossEntropyLoss()
        self._bf16 = "bf16" in words
        model = self.net if rank is None else DistributedDataParallel(self.net, gradient_as_bucket_view=True)
        self._model: Callable[[torch.Tensor], torch.Tensor] = torch.compile(model) if "compile" in words else model
        self.step = self._infer if work.infer else self._train
        self.net.train(not work.infer)

    def _forward(self) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            return self._model(self.images)

    def _train(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.criterion(self._forward().float(), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _infer(self) -> torch.Tensor:
        with torch.inference_mode():
            return self._forward()

    def run(self, steps: int) -> list[float]:
        """Seconds of each step."""
        seconds = []
        for _ in range(steps):
            begin = time.perf_counter()
            self.step()
            seconds.append(time.perf_counter() - begin)
        return seconds


class Theirs:
    """The fastest of the variants; the others are gone after `warm`."""

    def __init__(self, work: Workload, variants: Sequence[str], rank: int | None = None):
        torch.set_num_threads(work.threads)
        self._work, self._variants = work, list(variants)
        self._best: Variant | None = Variant(work, variants[0], rank) if len(variants) == 1 else None

    @property
    def name(self) -> str:
        """The library and its version."""
        return f"PyTorch {torch.__version__}"

    def warm(self) -> Facts:
        """Measures the variants, round by round, and keeps the best; seconds of a step of each."""
        variants = [self._best] if self._best else [Variant(self._work, name) for name in self._variants]
        for variant in variants:
            variant.run(2)
        rounds = [[variant.run(1)[0] for variant in variants] for _ in range(WARM_STEPS)]
        seconds = [min(times) for times in zip(*rounds, strict=True)]
        fastest = min(range(len(variants)), key=seconds.__getitem__)
        self._best = variants[fastest]
        return {"step_s": seconds[fastest], "variant": self._variants[fastest],
                "variants": dict(zip(self._variants, seconds, strict=True))}  # fmt: skip

    def run(self, steps: int) -> Facts:
        """Seconds of each step."""
        return {"seconds": self._best.run(steps)}

    def memory(self) -> Facts:
        """Bytes of parameters, of their gradients and of the momentum."""
        nbytes = sum(parameter.nbytes for parameter in self._best.net.parameters())
        return {"parts": dict.fromkeys(("parameter", "gradient", "momentum"), nbytes)}


class Ddp(Theirs):
    """One of ``size`` processes that train together in one variant; they find each other through the file ``store``."""

    def __init__(self, work: Workload, variant: str, rank: int, size: int, store: str):
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        super().__init__(work, [variant], rank)

    def run(self, steps: int) -> Facts:
        """Seconds of each step, from when all are there."""
        distributed.barrier()
        return super().run(steps)
