"""Grow a LoRA adapter of a causal language model on a text, in a plain loop, on any number of devices.

    python examples/fsdp2.py --model MODEL --text FILE                                          # one GPU
    python examples/fsdp2.py --model MODEL --text FILE --four-bit                               # one small GPU
    torchrun --standalone --nproc-per-node 8 examples/fsdp2.py --model MODEL --text FILE --ddp  # the model on each GPU
    torchrun --standalone --nproc-per-node 8 examples/fsdp2.py --model MODEL --text FILE        # the model sharded
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        examples/fsdp2.py --model MODEL --text FILE                                             # over two machines

Without a model it trains a tiny random one on its own source, also on CPUs. All processes share one file system.
`--resume` resumes from what `--out` holds.
"""

import argparse
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from aroma import AromaConfig, attach, save_adapter


def options_of_launch() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of a causal language model")
    parser.add_argument("--text", default=__file__, help="text file to train on")
    parser.add_argument("--out", default="out/fsdp2", type=Path, help="folder for adapter and optimizer")
    parser.add_argument("--steps", default=60, type=int, help="optimizer steps, including those before a resume")
    parser.add_argument("--total-steps", type=int, help="optimizer steps planned in all (default: --steps)")
    parser.add_argument("--batch", default=4, type=int, help="sequences per process and step")
    parser.add_argument("--length", default=64, type=int, help="tokens per sequence")
    parser.add_argument("--learning-rate", default=1e-3, type=float)
    parser.add_argument("--ddp", action="store_true", help="keep a copy of the model in every process")
    parser.add_argument("--four-bit", action="store_true", help="keep the base model in 4 bits; one process or --ddp")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    shards = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not options.ddp
    if options.four_bit and (options.model is None or shards):
        parser.error("--four-bit needs --model, and with several processes --ddp")
    return options


def base_model(options: argparse.Namespace, device: torch.device) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return the model in bfloat16, and the text as tokens."""
    text = Path(options.text).read_text(encoding="utf-8")
    if options.model is None:
        torch.manual_seed(0)
        size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **size)).bfloat16()
        return model.to(device), torch.tensor([*text.encode()])
    tokens = torch.tensor(AutoTokenizer.from_pretrained(options.model)(text)["input_ids"])
    quantised = None
    if options.four_bit:
        quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    # Under FSDP2 the host holds the whole model for a while, and only the shards go to the devices.
    whole = int(os.environ.get("WORLD_SIZE", "1")) == 1 or options.ddp
    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype=torch.bfloat16,
        quantization_config=quantised,
        device_map={"": device} if whole else None,
    )
    return model, tokens


def batch_of(tokens: torch.Tensor, step: int, options: argparse.Namespace, rank: int, processes: int) -> torch.Tensor:
    """Return this process's sequences of a step, (batch, length)."""
    first = (step * processes + rank) * options.batch * options.length
    return tokens[(first + torch.arange(options.batch * options.length)) % len(tokens)].view(options.batch, -1)


def main() -> None:
    """Train and save."""
    options = options_of_launch()
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if processes > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    shards = processes > 1 and not options.ddp

    base, tokens = base_model(options, device)
    total = options.total_steps or options.steps
    config = AromaConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", component_seed=0, max_inner_steps=max(10, total // 6)
    )
    model = get_peft_model(base, config)
    if options.resume:
        model.load_adapter(str(options.out), "default", is_trainable=True)
    wrapped = model
    if shards:
        blocks = set(base._no_split_modules or ())
        for module in [*base.modules()]:
            if type(module).__name__ in blocks:
                fully_shard(module)
        fully_shard(model)
    elif processes > 1:
        wrapped = DistributedDataParallel(model)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.learning_rate)
    moments = options.out / "optimizer"
    if options.resume:
        # Before attach: torch loads no state of frozen pairs.
        state = {"optimizer": get_optimizer_state_dict(wrapped, optimizer)}
        checkpoint.load(state, checkpoint_id=str(moments))
        set_optimizer_state_dict(wrapped, optimizer, state["optimizer"])
    growth = attach(wrapped, optimizer, total_steps=total, resume_from=str(options.out) if options.resume else None)
    begun = growth.controller.global_step

    wrapped.train()
    for step in range(begun, options.steps):
        batch = batch_of(tokens, step, options, rank, processes).to(device)
        loss = wrapped(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}, total rank {growth.controller.total_rank}", flush=True)
        if growth.finished:
            break

    if shards or rank == 0:
        save_adapter(model, options.out)
    state = {"optimizer": get_optimizer_state_dict(wrapped, optimizer)}
    checkpoint.save(state, checkpoint_id=str(moments))
    if rank == 0:
        print(f"saved {options.out}", flush=True)


if __name__ == "__main__":
    main()
    # When DDP holds the last reference to a gloo group, its end can deadlock (torch 2.13), so DDP goes first.
    if dist.is_initialized():
        dist.destroy_process_group()
