"""A batch that does not fit is halved: by the backend in tensors, by the worker in images."""

import msgspec
import pytest

from paracaption.pipeline.corpus.writer import Draft
from paracaption.pipeline.models.batching import Batches
from paracaption.pipeline.stages import recipes
from paracaption.schemas.errors import OutOfMemory
from tests.building import drops
from tests.pipeline.executor.test_worker import NUM_IMAGES, Bench
from tests.synthetic import write_coconut


@pytest.fixture(scope="module")
def coconut(tmp_path_factory):
    return write_coconut(tmp_path_factory.mktemp("source") / "coconut", num_images=NUM_IMAGES)


def bench_with(root, source, room: int) -> Bench:
    bench = Bench(root, source, failures={"unit_retries": 0})
    small = {"name": "tests.odd_backends:SmallCaptioner", "options": {"room": room}}
    bench.config = bench.config.model_copy(
        update={"captioner": bench.config.captioner.model_copy(update=small)}
    )
    bench.stages = recipes.recipe_of(bench.config, "coconut")
    return bench


@pytest.mark.parametrize("room", [4, 9, 23])
def test_every_region_is_captioned_if_one_image_fits(tmp_path, coconut, room):
    draft = bench_with(tmp_path, coconut, room).draft()
    assert (draft.manifest.kept, draft.failures) == (4 * NUM_IMAGES, {})


def test_an_image_that_does_not_fit_alone_is_dropped_with_the_reason(tmp_path):
    crowded = write_coconut(tmp_path / "source", num_images=NUM_IMAGES)
    bench = bench_with(tmp_path, crowded, room=4)
    source = bench.worker(["source", *bench.stages[:1]])(bench.row)
    unit = msgspec.msgpack.decode(source["state"])
    unit["images"][2]["regions"].append({**unit["images"][2]["regions"][0], "id": 99})
    row = {"unit": unit["name"], "state": msgspec.msgpack.encode(unit)}
    told = bench.worker([*bench.stages[1:], "write"])(row)
    draft = msgspec.msgpack.decode(told["draft"], type=Draft)
    assert draft.manifest.dropped == {"caption/model_error": 5}
    from paracaption.pipeline.corpus import writer

    writer.commit(bench.folder, draft)
    assert {why for _, _, why in drops(bench.out, "coconut").values()} == {
        "OutOfMemory: 5 regions, room for 4"
    }


def test_a_stage_for_which_nothing_fits_says_so_to_the_driver(tmp_path, coconut):
    draft = bench_with(tmp_path, coconut, room=3).draft()
    assert draft.failures == {"caption": "OutOfMemory: 4 regions, room for 3"}


def test_a_backends_batch_halves_and_stays_halved_and_the_cache_is_emptied(monkeypatch):
    torch = pytest.importorskip("torch")
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    sizes = []

    def work(batch):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [2 * item for item in batch]

    batches = Batches(8, "tiles")
    assert batches.run(list(range(10)), work) == [2 * item for item in range(10)]
    assert sizes == [8, 4, 2, 2, 2, 2, 2] and batches.size == 2 and len(emptied) == 2
    assert batches.run([7], work) == [14]


def test_one_tensor_that_does_not_fit_is_out_of_memory_by_name():
    torch = pytest.importorskip("torch")

    def work(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemory, match="tiles: out of memory with a batch of one \\(CUDA out of memory"):
        Batches(8, "tiles").run([1, 2, 3], work)
