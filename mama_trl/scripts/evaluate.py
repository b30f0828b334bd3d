"""`mama evaluate`: perplexity with its protocol, sparsity and size of a saved model."""

from pathlib import Path

from ..disk.folders import check_output_file
from ..disk.writing import write_json
from .parser import CommandParser, positive

DESCRIPTION = """Measure a saved model on a text.

  mama evaluate MODEL --text heldout.txt --json numbers.json

Perplexity is the exponential of the mean negative log-likelihood over blocks of the text that do not overlap, with
every position of a block but the first scored. Compare numbers only at the same text and sequence length."""


def make_parser():
    parser = CommandParser("evaluate", DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", help="model folder or hub id")
    parser.add_argument(
        "--text", required=True, metavar="FILE", help="held-out text: .txt, .jsonl with `text`, or a datasets name"
    )
    parser.add_argument("--blocks", type=positive, metavar="N", help="only the first N blocks (default: all)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    parser.add_measuring()
    return parser


def size_of(source: str, model) -> int:
    """Bytes of the weight files, or of the parameters where the model has no local folder."""
    from ..evaluation.size import model_bytes

    on_disk = model_bytes(source) if Path(source).is_dir() else 0
    return on_disk or sum(p.numel() * p.element_size() for p in model.parameters())


def main(args) -> dict:
    from ..evaluation.loading import (
        check_ids,
        check_model_source,
        check_tokenizer,
        load_model,
        load_tokenizer,
        sequence_length,
    )
    from ..evaluation.perplexity import perplexity
    from ..evaluation.size import sparsity_by_kind
    from ..evaluation.text import blocks, heldout_text

    output = check_output_file(args.json, {"the model": args.model, "the text": args.text})
    check_model_source(args.model, trust_remote_code=args.trust_remote_code)
    text = heldout_text(args.text)
    length = sequence_length(args.model, args.sequence_length, args.trust_remote_code)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    check_tokenizer(tokenizer, args.model, args.trust_remote_code)
    rows = blocks(tokenizer, text, length, limit=args.blocks)
    check_ids(rows, args.model, args.trust_remote_code)
    model = load_model(args.model, args.dtype, args.trust_remote_code)
    numbers = {
        "model": args.model,
        "text": args.text,
        **perplexity(model, rows, args.batch_size, progress=True),
        "sparsity": sparsity_by_kind(model),
        "bytes": size_of(args.model, model),
    }
    show(numbers)
    if output is not None:
        write_json(output, numbers)
    return numbers


def show(numbers: dict) -> None:
    """The numbers as a table on standard output."""
    print(f"{numbers['model']} on {numbers['text']}")
    print(f"  perplexity  {numbers['perplexity']:.4f}   ({numbers['nats']:.5f} nats a token)")
    print(
        f"  protocol    {numbers['tokens']} scored tokens, blocks of {numbers['sequence_length']} that do not overlap, "
        "no special tokens"
    )
    print(f"  size        {numbers['bytes'] / 2**20:.2f} MiB")
    sparsity = dict(numbers["sparsity"])
    print(f"  sparsity    {sparsity.pop('all'):.4%} of the prunable weights")
    for kind, value in sparsity.items():
        print(f"    {kind:<16} {value:.4%}")


def run(argv: list[str]) -> int:
    main(make_parser().parse_args(argv))
    return 0
