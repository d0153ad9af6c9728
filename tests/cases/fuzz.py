"""Readers and backends' answers by chance, with limits on time and memory.

    python -m tests.cases.fuzz 0 20000        # seeds; prints those that fail

A seed decides everything: which kind of input, and all of it. Whatever it is: nothing hangs, nothing takes
much memory, nothing raises what is no error of ours, and every build ends with each region in its ledger.

| kind | of 40 | what |
| --- | ---: | --- |
| source | 4 | a damaged source, as in `damaged`: audit, build and an independent look |
| build | 5 | a build with three odd backends, each stage in a worker of its own, and once more |
| answer | 8 | one answer of a captioner, judge or segmenter, through its stage into evidence |
| mask | 5 | foreign masks: checked, then decoded and compared by pycocotools |
| record | 4 | a record of somebody's own source, through msgpack into a ledger |
| http | 2 | what a server answers to a captioner or a judge; see `fuzz_http` |
| file | 12 | a file of any other kind, damaged, and its reader; see `fuzz_files` |
"""

from __future__ import annotations

import faulthandler
import json
import logging
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import IO, Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
from pycocotools import mask as coco

from paracaption.filters import agreement, category, rle
from paracaption.pipeline.corpus import writer
from paracaption.pipeline.corpus.ledger import ledger_table, table_bytes
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.executor.rows import outcome_of
from paracaption.pipeline.executor.worker import Worker
from paracaption.pipeline.models import answers
from paracaption.pipeline.models.protocols import Answer, Candidate
from paracaption.pipeline.sources.protocols import SOURCE_STAGE, CatalogEntry, Source, SourceOptions
from paracaption.pipeline.stages.agreement import Resegmented
from paracaption.pipeline.stages.caption import Captioned
from paracaption.pipeline.stages.category import Judged
from paracaption.pipeline.stages.evidence import Answered, EvidenceStore
from paracaption.schemas.config import Limits
from paracaption.schemas.errors import BadRecord
from paracaption.schemas.records import Credit, Drop, ImageRecord, Region, Rle
from tests import odd_values
from tests.building import build, calls, config_of
from tests.cases import damaged, fuzz_files, fuzz_http
from tests.odd_answers import ODD
from tests.synthetic import write_coconut, write_sa1b

SLOW_S = 20.0
"""CPU time of one input that counts as a hang in the making."""

HANG_S = 240.0
"""Time of one input after which the process ends with its stack, also inside of compiled code."""

MOST_MEMORY = 6 << 30
"""Address space of the process, in bytes."""

MOST_GROWTH = 1 << 30
"""By how much one input may raise the process's peak of memory, in bytes."""

SIZE = (9, 14)


class ApartEngine(LocalEngine):
    """Each stage in a worker of its own, so that units travel as they do between the actors of GPU builds."""

    def drafts(self, parts: Any, tick: Any) -> Generator[Any]:
        for job, stages, work_list, units in parts:
            with ExitStack() as stack:
                steps = [[SOURCE_STAGE], *([stage] for stage in stages), [writer.WRITE_STAGE]]
                workers = [
                    stack.enter_context(Worker(job, step, on_event=lambda _: tick())) for step in steps
                ]
                for index in units:
                    row = {"unit": work_list.unit_name(index), "index": index}
                    for worker in workers:
                        row = worker(row)
                    yield job.subset, outcome_of(row)


# The kinds. Each: what does not hold, or "".


def source(seed: int, folder: Path) -> str:
    return damaged.Run(seed, folder).run()


_shared: dict[str, Any] = {}


def odd_build(seed: int, folder: Path) -> str:
    """Three images, two masks each, and backends that answer by chance."""
    random = Random(seed)
    if not _shared:
        home = _shared["home"] = tempfile.TemporaryDirectory()
        _shared["sa1b"] = write_sa1b(Path(home.name) / "sa1b", 3, num_masks=2, size=(48, 64))
        _shared["coconut"] = write_coconut(Path(home.name) / "coconut", 3, num_masks=2, size=(48, 64))
    subset = random.choice(("sa1b", "sa1b", "coconut"))
    config = config_of(folder / "out", **{subset: _shared[subset]}, apart=True)
    odd: dict[str, Any] = {}
    for protocol, names in ODD.items():
        known = [*names, *["good"] * len(names), *(f"{kind}:{seed}" for kind in ("any", "any list") * 4)]
        backend = getattr(config, protocol)
        options = {**backend.options, "odd": random.choices(known, k=random.randint(1, 4))}
        update = {"name": f"tests.odd_answers:Odd{protocol.capitalize()}", "options": options}
        odd[protocol] = backend.model_copy(update=update | {"batch_images": random.randint(1, 3)})
    config = config.model_copy(update=odd)
    story = str({protocol: backend.options["odd"] for protocol, backend in odd.items()})
    engine = ApartEngine() if random.random() < 0.7 else LocalEngine()
    build(config, engine)
    rows = pq.read_table(sorted((folder / "out" / subset / "ledger").glob("*.parquet"))).to_pylist()
    if len(rows) != 6 or not all(row["kept"] or row["drop_reason"] for row in rows):
        return f"{story}: {len(rows)} of 6 regions in the ledger"
    asked = [calls(folder / f"{protocol}.log") for protocol in ODD]
    build(config, engine)
    if [calls(folder / f"{protocol}.log") for protocol in ODD] != asked:
        return f"{story}: asked again by the second run"
    return ""


_MASK = rle.from_mask(np.indices(SIZE).sum(0) % 5 < 2)


def answer(seed: int, folder: Path) -> str:
    """Any answer is evidence that can be stored, read and decided from, or a refusal in plain words."""
    random = Random(seed)
    kind = random.choice(list(ODD))
    given: Any
    if kind == "captioner":
        given = odd_values.value(random)
        found: Any = answers.caption(given)
        evidence = found if isinstance(found, BadRecord) else Captioned(found)
    elif kind == "judge":
        given = Answer(odd_values.value(random), odd_values.value(random))
        given = given if random.random() < 0.8 else odd_values.value(random)
        found = answers.judgment(given)
        evidence = found if isinstance(found, BadRecord) else Judged(found.text, found.margin)
        if isinstance(evidence, Judged):
            category.judge_verdict(evidence.answer, evidence.margin, 0.0)
            category.core_category(evidence.answer)
    else:
        given = [_candidate(random) for _ in range(random.randint(0, 3))]
        found = answers.candidates(given if random.random() < 0.9 else odd_values.value(random), SIZE)
        evidence = found if isinstance(found, BadRecord) else _resegmented(found)
    if isinstance(evidence, BadRecord):
        drop = Drop("caption", evidence.reason, evidence.detail)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(drop), type=Drop) == drop
        return ""
    store = EvidenceStore(folder / "evidence", type(evidence))
    store.save("u", {("a", 0): Answered("asked", evidence)})
    read = store.read("u")["a", 0].answer
    return "" if read == evidence else f"{given!r:.200}: stored as {evidence!r:.200}, read as {read!r:.200}"


def _candidate(random: Random) -> Any:
    if random.random() < 0.1:
        return odd_values.value(random)
    mask = Rle(odd_values.size(random, SIZE), odd_values.counts(random, _MASK.rle.counts))
    return Candidate(mask, 0.5 if random.random() < 0.7 else odd_values.value(random))


def _resegmented(options: list[tuple[Rle | None, float]]) -> Resegmented:
    masks = [(mask, score) for mask, score in options if mask is not None]
    best = agreement.best_candidate(masks, _MASK.rle)
    if best is None:
        return Resegmented(0.0, 0.0, None, 0)
    mask, score = masks[best[0]]
    return Resegmented(best[1], score, mask.counts, len(options))


def mask(seed: int, _folder: Path) -> str:
    """A mask that passes the check is the one that pycocotools sees, of the area that was measured."""
    random = Random(seed)
    given = [_segmentation(random) for _ in range(random.randint(1, 5))]
    found = rle.check_all(given, *SIZE)
    for segmentation, each in zip(given, found, strict=True):
        if isinstance(each, BadRecord):
            continue
        code = rle.to_coco(each.rle)
        decoded = coco.decode(code)
        if decoded.shape != SIZE or int(decoded.sum()) != each.area or int(coco.area(code)) != each.area:
            return f"{segmentation!r:.200}: {each}, decoded to {decoded.shape} and {decoded.sum()}"
        if not (decoded == rle.decode(each.rle)).all():
            return f"{segmentation!r:.200}: two decoders differ"
    return ""


def _segmentation(random: Random) -> Any:
    kind = random.random()
    if kind < 0.6:
        return {"size": odd_values.size(random, SIZE), "counts": odd_values.counts(random, _MASK.rle.counts)}
    if kind < 0.8:
        numbers = (*odd_values.NUMBERS, 0, 3, 5, 9, 14, 2.5, "4", [1, 2], [3, 4])
        return [
            [random.choice(numbers) for _ in range(random.randint(0, 9))] for _ in range(random.randint(0, 3))
        ]
    return json.dumps(odd_values.json_value(random)) if kind < 0.9 else odd_values.value(random)


class _Own(Source[SourceOptions]):
    """Gives one image by chance."""

    title, options_type, recipe = "own", SourceOptions, "verify"

    def __init__(self, random: Random):
        super().__init__(SourceOptions())
        self.random = random

    def places(self) -> list[str]:
        return []

    def fingerprint(self, catalog: Any) -> dict[str, str]:
        return {}

    def catalog(self, catalog: Any) -> Any:
        yield CatalogEntry("a", None, None)

    def fill(self, image: ImageRecord, entry: Any, limits: Any, notes: Any) -> None:
        random = self.random

        def odd(good: Any, share: float = 0.15) -> Any:
            return odd_values.value(random) if random.random() < share else good

        image.height, image.width = odd(SIZE[0], 0.05), odd(SIZE[1], 0.05)
        image.file_name, image.photo_format = odd("a.jpg"), odd("jpeg")
        image.credit = Credit(*(odd("x", 0.1) for _ in Credit.__struct_fields__))
        mask: Any = _MASK.rle
        image.regions = [
            odd(
                Region(
                    odd(number),
                    odd(Rle(odd(SIZE), odd_values.counts(random, mask.counts)) if number else mask),
                    odd(_MASK.bbox),
                    odd(_MASK.area),
                    odd(7),
                    odd("cat"),
                    odd(1),
                    odd(True),
                    odd({"predicted_iou": odd(0.5), "stability_score": odd(0.5)}),
                    odd([odd(1.0), 2.0]),
                    odd([[odd(1.0), 2.0], odd([3.0, 4.0])]),
                ),
                0.05,
            )
            for number in range(random.randint(0, 4))
        ]
        image.regions = odd(image.regions, 0.03)


def record(seed: int, _folder: Path) -> str:
    """A record of a source of one's own is clean once it is read."""
    found = _Own(Random(seed)).read(CatalogEntry("a", None, None), Limits(), subset="own")
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(found), type=ImageRecord)
    if again != found:
        return f"{found!r:.300} became {again!r:.300}"
    table = ledger_table("own-000000", [again], {})
    table_bytes(table)
    if table.num_rows != max(1, len(found.regions)):
        return f"{table.num_rows} rows of {len(found.regions)} regions"
    for region in found.live():
        if region.rle is None or int(coco.area(rle.to_coco(region.rle))) != region.area:
            return f"a live region whose mask is not what was measured: {region!r:.200}"
    return ""


KINDS: dict[str, tuple[int, Callable[[int, Path], str]]] = {
    "source": (4, source),
    "build": (5, odd_build),
    "answer": (8, answer),
    "mask": (5, mask),
    "record": (4, record),
    "http": (2, fuzz_http.served),
    "file": (12, fuzz_files.damaged_file),
}
_ORDER = [name for name, (count, _) in KINDS.items() for _ in range(count)]


def kind_of(seed: int) -> str:
    """The kind of input that a seed makes."""
    return _ORDER[seed * 7 % len(_ORDER)]


def problem_of_seed(seed: int) -> str:
    """What does not hold for a seed; "" if everything does."""
    kind = kind_of(seed)
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = KINDS[kind][1](seed, Path(folder)).replace(folder, "")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            found = traceback.format_exc()
    seconds = time.process_time() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if seconds > SLOW_S:
        found += f" took {seconds:.0f} s"
    if grown > MOST_GROWTH:
        found += f" took {grown / 1e9:.1f} GB"
    return f"seed {seed}, {kind}: {found}" if found else ""


def run(seeds: range, stack: IO[str]) -> int:
    """Run the seeds and print what fails; `stack` gets the stack of one that hangs. Returns how many fail."""
    bad, seconds, count = 0, Counter[str](), Counter[str]()
    for seed in seeds:
        stack.seek(0)
        stack.truncate()
        stack.write(f"seed {seed} hangs, or ended the process\n")
        stack.flush()
        faulthandler.dump_traceback_later(HANG_S, exit=True, file=stack)
        began = time.monotonic()
        found = problem_of_seed(seed)
        faulthandler.cancel_dump_traceback_later()
        seconds[kind_of(seed)] += time.monotonic() - began
        count[kind_of(seed)] += 1
        if found:
            bad += 1
            sys.stdout.write(f"{found}\n")
            sys.stdout.flush()
    kinds = ", ".join(f"{count[kind]:,} {kind} in {taken:.0f} s" for kind, taken in seconds.most_common())
    sys.stdout.write(f"{len(seeds):,} inputs ({kinds}), {bad} bad\n")
    return bad


def main() -> None:
    """Run the seeds from A to B; a third argument is the file for the stack of a hang."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    path = sys.argv[3] if len(sys.argv) > 3 else f"{tempfile.gettempdir()}/fuzz-{sys.argv[1]}.stack"
    with open(path, "w") as stack:
        sys.exit(run(range(*map(int, sys.argv[1:3])), stack) > 0)


if __name__ == "__main__":
    main()
