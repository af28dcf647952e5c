"""Ask a finetuned model.

python generate.py --model PATH_OR_NAME [--adapter PATH] --prompt TEXT
python generate.py --model PATH_OR_NAME [--adapter PATH] --prompts FILE.txt|.jsonl --output FILE.jsonl
"""

import argparse
import sys


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="a folder that sft.py wrote, or a name on the Hub")
    parser.add_argument("--adapter", help="a folder with a LoRA adapter for the model")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", help="the user's message")
    asked.add_argument("--prompts", help="a file with many: a line each, or .jsonl with `prompt` or `messages`")
    parser.add_argument("--output", help="with --prompts: the .jsonl file to write replies and their channels to")
    parser.add_argument("--batch_size", type=int, default=8, help="with --prompts: at a time (default: %(default)s)")
    parser.add_argument("--raw", action="store_true", help="with --prompt: show the reply's markers as they are")
    parser.add_argument("--system", help="instructions that come before it")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="longest reply (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token (the default)")
    parser.add_argument("--reasoning_effort", choices=["low", "medium", "high"], default="medium")
    parser.add_argument("--conversation_date", default="2025-06-28", help="default: %(default)s, as in training")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto")
    parser.add_argument("--base_weights", choices=["mxfp4", "bf16"], default="bf16", help="mxfp4: the experts of an "
                        "MXFP4 checkpoint stay packed, a quarter of the memory (default: %(default)s)")  # fmt: skip
    parser.add_argument("--attn_implementation", default="gptoss_triton", help="default: %(default)s")
    args = parser.parse_args()
    if bool(args.prompts) != bool(args.output):
        parser.error("--prompts and --output: expected both or neither")
    if args.batch_size < 1:
        parser.error(f"--batch_size: expected >= 1, got {args.batch_size}")

    # Imported here, so that --help need not wait for them.
    from gptoss_kernels.finetune.errors import SetupError
    from gptoss_kernels.finetune.sample import answer, stream

    keys = vars(args)
    others = ("prompt", "raw") if args.prompts else ("prompts", "output", "batch_size")
    for key in others:
        del keys[key]
    try:
        if "prompts" in keys:
            print(f"{answer(**keys)} replies written to {keys['output']}")
        else:
            stream(**keys)
    except SetupError as error:
        sys.exit(f"generate.py: error: {error}")


if __name__ == "__main__":
    main()
