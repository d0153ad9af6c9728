"""Measures captioners: on ParaDLC-Bench and DLC-Bench with a judge, on held-out photos, and their cost.

| module | what |
| --- | --- |
| `annotations` | a benchmark's published files: images, masks, questions |
| `captioners` | the captioners that are measured: PerceptionDLM, those of `build`, a file of predictions |
| `judges` | the language models that answer questions about captions, in this process or behind a server |
| `scoring` | the published prompts, how answers are read, and how they are scored |
| `run_benchmark` | all of these for one captioner on one benchmark, resumable |
| `results_page` | the results as an HTML page |
| `quality` | measures of captions that need no judge |
| `make_benchmark` | a benchmark of your own images, which `select_images` selects |
| `held_out` | what a training run says of its model: captions of held-out photos |
| `profile` | latency and throughput |
"""
