"""Finetune gpt-oss.

  python sft.py --config FILE [--key value ...]      any key of the file can be overridden, --key=value works too
  accelerate launch --config_file configs/zero3.yaml sft.py --config configs/sft_full.yaml

Configurations
  configs/sft_tiny.yaml   a small model on shipped data, minutes on a laptop, no download
  configs/sft_lora.yaml   adapters on the attention of openai/gpt-oss-20b, one GPU
  configs/sft_full_single.yaml   all weights of openai/gpt-oss-20b, one GPU with 141 GB
  configs/sft_full.yaml   all weights of openai/gpt-oss-20b, eight GPUs
  configs/sft_full_120b.yaml   all weights of openai/gpt-oss-120b, eight GPUs and a large host

Keys that are asked for most
  --model_name_or_path NAME    openai/gpt-oss-20b, openai/gpt-oss-120b or a folder
  --model_init random          real shapes without a checkpoint, to measure speed and memory
  --dataset_name NAME          a .jsonl or .csv file, a folder with train.jsonl and test.jsonl, or a name on the Hub
  --channel_weights JSON       loss by channel, '{"analysis": 0.5, "final": 1.0}'; --train_turns all or last
  --bad_rows skip              leave out malformed rows, counted, instead of stopping at the first
  --output_dir DIR             where the result goes
  --max_length N               tokens in a packed row
  --max_steps N                stop after N optimizer steps
  --learning_rate X, --num_train_epochs X, --per_device_train_batch_size N, --gradient_accumulation_steps N
  --resume_from_checkpoint true    go on with the interrupted run in output_dir
  --overwrite true                 start anew in an output_dir that holds an earlier run
  --router_aux_loss_coef X         load-balancing loss of the router, off by default
  --report_to none                 no experiment tracker
  --verify true                    check the combination first, as python -m gptoss_kernels.verify does

  python -m gptoss_kernels.finetune.data show --config FILE    what of the data is trained, token by token

  --help_all lists every key. An unknown or misspelt key is an error.
"""

import os
import sys
import warnings


def main() -> None:
    if not sys.argv[1:] or {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        return
    if "LOCAL_RANK" not in os.environ:
        # One process trains on one GPU, the first unless told otherwise; Trainer would spread it over all of them.
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    # Threads that spin while they wait make a busy CPU ten times slower, and small tensors wait most of the time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Transformers renamed gradient_checkpointing in 5.23 and warns about TRL's default; the old name works in all.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    # Imported here, so that --help need not wait for them.
    from gptoss_kernels.finetune.config import help_text, parse
    from gptoss_kernels.finetune.errors import SetupError

    if "--help_all" in sys.argv[1:]:
        print(help_text())
        return
    arguments = parse(sys.argv[1:])
    from gptoss_kernels.finetune.train import run

    try:
        run(arguments)
    except SetupError as error:
        sys.exit(f"sft.py: error: {error}")


if __name__ == "__main__":
    main()
