"""ParaDLC-Bench and DLC-Bench: captions of regions, judged by multiple-choice questions on what they say.

| module | what |
| --- | --- |
| `annotations` | the published files: images, masks, questions |
| `captioners` | who is examined: PerceptionDLM, the pipeline's captioners, a file of predictions |
| `judges` | who answers the questions: a language model in this process, or behind a server |
| `protocol` | what is asked, how an answer is read, and what it is worth |
| `examine` | all of that for one captioner and one benchmark, resumable |
| `quality` | what captions are worth without a judge |
| `page` | the results to look at |
| `make` | a benchmark of one's own images |
"""
