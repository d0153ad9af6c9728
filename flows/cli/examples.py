"""An example for each command, at the end of its help. A test runs those that need no model or server."""

EXAMPLES = {
    "init": "paracaption init corpus.yaml --source sa1b",
    "demo": "paracaption demo --out out/demo",
    "config": "paracaption config --training",
    "audit": "paracaption audit samples/build.yaml",
    "doctor": "paracaption doctor samples/build.yaml",
    "estimate": "paracaption estimate samples/build.yaml --run out/demo --images coconut=334000",
    "build": "paracaption build samples/build.yaml --local --set min_iou=0.6",
    "merge": "paracaption merge samples/build.yaml",
    "deploy": "PREFECT_API_URL=http://127.0.0.1:4200/api paracaption deploy",
    "verify": "paracaption verify out/demo",
    "inspect": "paracaption inspect out/demo",
    "show": "paracaption show out/demo chelsea --out chelsea.png",
    "explore": "paracaption explore out/demo --port 8080",
    "report": "paracaption report out/demo --to report.html",
    "export": "paracaption export out/demo --format coco --to out/coco",
    "copy": "paracaption copy out/demo out/copy",
    "status": "paracaption status out/demo",
    "versions": "paracaption versions out/demo --all",
    "diff": "paracaption diff out/demo 7 12",
    "undo": "paracaption undo out/demo --yes",
    "remove": "paracaption remove out/demo --keys keys.txt --yes",
    "train": "paracaption train configs/train/tiny.yaml",
    "evaluate": "paracaption evaluate configs/evaluate/toy.yaml",
    "profile": "paracaption profile --model MODEL --corpus out/demo --out out/profile",
    "caption": "paracaption caption --model MODEL --image photo.jpg --masks masks/*.png",
    "ask": 'paracaption ask --model MODEL --image photo.jpg "What color is the car?"',
    "models prepare": "paracaption models prepare gar /models/GAR-8B",
    "models convert": "paracaption models convert /models/published --to /models/PerceptionDLM",
    "models publish": "paracaption models publish out/run --to out/repository --license apache-2.0",
    "models paths": "paracaption models paths regions-distilled.yaml --part 1/8",
    "benchmark make": "paracaption benchmark make out/demo --to out/bench --judge judge.yaml",
    "benchmark coco": "paracaption benchmark coco configs/evaluate/regions/dam.yaml --to out/coco",
    "benchmark requests": "paracaption benchmark requests configs/evaluate/regions/vlm.yaml --to out/vlm",
    "benchmark table": "paracaption benchmark table runs/regions",
    "benchmark photos": "paracaption benchmark photos DLC-Bench=data/dlc --to photos.json",
}
"""By the name of the command. A command without an example fails a test."""


def example(command: str) -> str:
    """The last line of a command's help, which is not broken, so that it can be copied."""
    return f"\b\nExample: {EXAMPLES[command]}"
