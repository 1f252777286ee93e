"""Measurements:  python -m dpresnet.bench step | ops | memory

    step     a whole training step (or --infer) against PyTorch's on the same cores, interleaved
    ops      every entry of a plan against the peaks of the device, measured in the same rounds
    memory   what a training process holds, against PyTorch's

Only `ours` and `ops` see OpenCL and only `theirs` sees PyTorch: each side runs in a child process of its own.
"""
