"""Supervised fine-tuning with the options of `trl sft`. AROMA finds the ranks, so those of a LoRA say nothing here.

    python examples/trl_sft.py --model_name_or_path MODEL --dataset_name DATASET \
        --learning_rate 1e-3 --max_steps 500 --output_dir out

`--config FILE.yaml` reads options from a file.
"""

from __future__ import annotations

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser

from aroma import AromaCallback, AromaConfig


def main() -> None:
    """Train, and save the adapter in `--output_dir`."""
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    script, args, model = parser.parse_args_and_config()
    args.model_init_kwargs = {"dtype": model.dtype, "attn_implementation": model.attn_implementation}
    examples = load_dataset(script.dataset_name, name=script.dataset_config)[script.dataset_train_split]
    callback = AromaCallback()
    trainer = SFTTrainer(
        model.model_name_or_path,
        args,
        train_dataset=examples,
        peft_config=AromaConfig(task_type="CAUSAL_LM"),
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    print(callback.controller.explanation())


if __name__ == "__main__":
    main()
