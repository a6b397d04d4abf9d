"""Record how a Hugging Face MoE model routes a text, judge the load of every layer, and keep the record.

python examples/routing_study.py                                      # the shipped model on its held-out corpus
python examples/routing_study.py --model DIR --file TEXT.txt          # yours
"""

import argparse
from pathlib import Path

import torch

import moesaic as ms
from moesaic.hf.load import TINY, load_model
from moesaic.trace.statistics.stats import layer_reports
from moesaic.train.data import corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY, help="folder of a Hugging Face MoE model")
    parser.add_argument("--file", type=Path, help="text to route; Chinese verse from the shipped corpus unless given")
    parser.add_argument("--out", type=Path, default=Path("routing.safetensors"), help="where the record goes")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    if args.file is None:
        texts = [poem.text for poem in corpus("chinese_verse", "held_out")[:60]]
    else:
        texts = [args.file.read_text(encoding="utf-8-sig")]
    rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]

    with torch.inference_mode(), ms.record(model, detail="scores") as recorder:
        for row in rows:
            for ids in row.split(512, dim=1):
                model(input_ids=ids, use_cache=False)
    lengths = torch.tensor([row.shape[1] for row in rows])
    recorder.describe(sequences=torch.arange(len(rows)).repeat_interleave(lengths))  # a text is one document
    trace = recorder.trace
    print(trace)
    for report in layer_reports(trace):
        max_vio = report.measures["max_vio"]
        band = f"chance {max_vio.band.low:.2f} to {max_vio.band.high:.2f}"
        print(f"{report.layer}: MaxVio {max_vio.value:.2f} ({band}): {report.verdict()}")

    print("the first token, layer 0:")
    for step in ms.steps(trace, layer=0, token=0)[11:13]:
        print(f"  {step.stage.name_en}: {step.value.tolist()}")
    trace.save(args.out)
    print(f"saved {args.out}: read it with moesaic.load({str(args.out)!r})")


if __name__ == "__main__":
    main()
