"""Measurements:  python -m dpresnet.bench step | layers | ops | memory | scaling | reduce | exchanges | project

    step       a whole training step (or --infer) against PyTorch's on the same cores, interleaved
    layers     single convolutions against PyTorch's, interleaved
    ops        every entry of a plan against the peaks of the device, measured in the same rounds
    memory     what a training process holds, against PyTorch's
    scaling    a job of several ranks against one rank, and against PyTorch's DistributedDataParallel, interleaved
    reduce     the sum of gradients over the ranks of a job
    exchanges  what sums of gradients, shared statistics and a trace cost a step of a job
    project    a step on machines that are not here, by a model that jobs check

Only `ours`, `ops`, `exchanges` and `project` see OpenCL and only `theirs` sees PyTorch: what is compared with a peer runs in
child processes.
"""
