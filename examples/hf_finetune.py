"""Fine-tune a Hugging Face MoE model with transformers' Trainer: our engine computes its experts, the selection bias
keeps their load even, and a log says how even it is.

    python examples/hf_finetune.py          # the shipped model on a play that it has not read
    python examples/hf_finetune.py --model DIR --file TEXT.txt --learning-rate 1e-5 --speed 1e-4      # yours
    moesaic watch finetuned                 # the log, also while it trains

The defaults suit the shipped model, which is tiny. Routers with sigmoid scores take --speed 1e-3.

The last tenth of the text is held out. Half a minute on two cores; where others use them,
OMP_NUM_THREADS=1 is faster. The Trainer needs accelerate: the extra [train].
"""

import argparse
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

import moesaic as ms
from moesaic.hf.load import TINY, load_model
from moesaic.trace.chance.bands import chance_bands
from moesaic.train.data import Document, corpus
from moesaic.train.packing import token_stream, windows

WINDOW, BATCH = 128, 8  # tokens, windows a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY, help="folder of a Hugging Face MoE model")
    parser.add_argument("--file", type=Path, help="text to learn; Henry V unless given")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--speed", type=float, default=3e-3, help="of a selection bias per step; 1e-4 for softmax gates"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="for the shipped model; 1e-5 for large ones")
    parser.add_argument("--out", type=Path, default=Path("finetuned"), help="where the model and its log go")
    args = parser.parse_args()

    model, tokenizer = load_model(args.model)
    train, held_out = (rows(tokenizer, part) for part in texts(args.file))
    if not (train and held_out):
        parser.error(f"--file {args.file}: too short: a tenth of it has to fill {WINDOW} tokens")
    arguments = TrainingArguments(
        str(args.out), max_steps=args.steps, per_device_train_batch_size=BATCH, learning_rate=args.learning_rate,
        logging_steps=10, save_strategy="no", report_to="none", dataloader_pin_memory=torch.cuda.is_available(),
        prediction_loss_only=True,  # else the Trainer keeps the logits of all that it evaluates
    )  # fmt: skip
    callbacks = [ms.BiasBalance(args.speed, add_bias=True), ms.LoadMonitor(args.out, resume=True)]
    trainer = Trainer(ms.attach(model), arguments, train_dataset=train, eval_dataset=held_out, callbacks=callbacks)
    print("before:", judged(trainer))
    trainer.train()
    print("after: ", judged(trainer))
    trainer.save_model()
    tokenizer.save_pretrained(args.out)
    print(f"saved {args.out}: load it as any model, then call ms.attach, which brings added biases back")


def texts(file: Path | None) -> tuple[list[Document], list[Document]]:
    """To learn, and to judge by."""
    text = corpus("english_verse", "held_out")[0].text if file is None else file.read_text(encoding="utf-8-sig")
    cut = len(text) * 9 // 10
    return [Document("learnt", text[:cut])], [Document("held out", text[cut:])]


def rows(tokenizer: PreTrainedTokenizerBase, documents: list[Document]) -> list[dict[str, torch.Tensor]]:
    found = torch.from_numpy(windows(token_stream(tokenizer, documents), WINDOW))
    return [{"input_ids": row, "labels": row} for row in found]


def judged(trainer: Trainer) -> str:
    """Loss and balance on the held-out text, recorded in one go."""
    with ms.record(trainer.model, detail="ids") as recorder:
        loss = trainer.evaluate()["eval_loss"]
    trace = recorder.trace
    worst, band = ms.stats(trace).values["max_vio"].max(), chance_bands(trace.configs[0], len(trace))["max_vio"]
    chance = f"by chance a layer has {band.low:.2f} to {band.high:.2f}"
    return f"held-out loss {loss:.3f}, MaxVio of the worst layer {worst:.2f} ({chance})"


if __name__ == "__main__":
    main()
