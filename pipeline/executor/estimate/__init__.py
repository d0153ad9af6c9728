"""Estimates a build from a pilot: wall time, GPU-hours, the bottleneck, idle GPUs, bytes written.

    rates     what a region costs in each stage, measured from a pilot's events or read from a file
    sizes     how many images and regions the build has
    pools     the operators of the streams, what each of their actors holds, and which subsets share them
    allocate  shares out GPUs and cores among the pools
    predict   rates, sizes and actors -> `Estimate`
    advice    what would make the build faster
    report    an estimate as tables for the terminal

`paracaption estimate` runs them in this order; docs/estimate.md explains the numbers.
"""
