"""The sub-commands `scan` and `repair`: arguments, and what is printed and written."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from bankwise.config import DataSource
from bankwise.errors import ConfigError, DataError
from bankwise.files import write_json
from bankwise.report import write_report

SCAN_HELP = "find the layer that breaks a metric at long context"
REPAIR_HELP = "mend the layer that a scan found, and only it"
_REPORT = "report.json"


def add_scan_arguments(parser: argparse.ArgumentParser) -> None:
    from bankwise.repair.metrics import NAMES

    parser.add_argument("checkpoint", type=Path, help="sparse checkpoint")
    parser.add_argument("--metric", default="cwe_nll", help=f"{NAMES} (%(default)s)")
    parser.add_argument("--lengths", type=_integers, default=[1024, 4096], help="tokens, comma-separated (1024,4096)")
    parser.add_argument(
        "--samples", type=int, default=8, help="of each length; half choose, half confirm (%(default)s)"
    )
    parser.add_argument("--layers", type=_integers, help="layers, comma-separated; default: all sparse ones")
    parser.add_argument("--companion", type=Path, help="dense companion; default: the checkpoint with all its channels")
    parser.add_argument(
        "--permutation", choices=["per_sample", "upstream"], default="per_sample",
        help="layouts of RULER's lists: one for each sample, or NVIDIA's shared one (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="scan file; default: scan.json in the checkpoint's folder")
    parser.add_argument(
        "--report", type=Path, help=f"folder with a {_REPORT}, which gets the map of layers and lengths"
    )
    _add_shared(parser)
    parser.set_defaults(seed=42)


def add_repair_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="sparse checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="folder of the repaired checkpoint; must not exist")
    parser.add_argument("--scan", type=Path, help="what `bankwise scan` wrote; default: scan.json in the checkpoint")
    parser.add_argument("--layer", type=int, help="mend this layer instead of the scan's choice")
    parser.add_argument("--companion", type=Path, help="dense companion, where the scan had one")
    parser.add_argument("--samples", type=int, default=32, help="of each length, that judge a remedy (%(default)s)")
    parser.add_argument("--guards", help="plan of what must not get worse: a preset or a YAML file of `bankwise eval`")
    _add_shared(parser)
    parser.set_defaults(seed=0)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=_names, default=["package:pydoc"], help="text sources, comma-separated; as in a recipe"
    )
    parser.add_argument("--held-out-fraction", type=float, default=0.05, help="as in training (%(default)s)")
    parser.add_argument("--data-dir", default="", help="folder of RULER's own essay and QA files")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast where a pass reads many tokens")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens that are read together (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="print the result only")


def run_scan(options: argparse.Namespace) -> int:
    from bankwise.models.checkpoint import load_checkpoint
    from bankwise.repair.scanning import scan

    report = None if options.report is None else _read_report(options.report / _REPORT)
    output = options.output or options.checkpoint / "scan.json"
    companion = _companion(options.companion)
    model, tokenizer = load_checkpoint(options.checkpoint)
    result = scan(
        model,
        tokenizer,
        options.metric,
        options.lengths,
        samples=options.samples,
        layers=options.layers,
        companion=companion,
        permutation=options.permutation,
        data=_sources(options.data),
        data_dir=options.data_dir,
        held_out_fraction=options.held_out_fraction,
        seed=options.seed,
        bf16=options.bf16,
        batch_tokens=options.batch_tokens,
        resume=output.with_suffix(".values.jsonl"),
        say=_speaker(options.quiet),
    )
    result.save(output)
    print(f"{result.table()}\n\nscan        {output}")
    if report is not None:
        write_json(options.report / _REPORT, report | {"scan": result.heat_map()})
        print(f"report      {write_report(options.report)}")
    return 0


def run_repair(options: argparse.Namespace) -> int:
    if options.output.exists():
        raise ConfigError(f"{options.output} exists already; choose another folder or remove it")
    from bankwise.config import load_plan
    from bankwise.models.checkpoint import load_checkpoint
    from bankwise.repair.patch import save_repaired
    from bankwise.repair.repairing import repair

    guards = None if options.guards is None else load_plan(options.guards, [])
    companion = _companion(options.companion)
    model, tokenizer = load_checkpoint(options.checkpoint)
    patch = repair(
        model,
        tokenizer,
        options.scan or options.checkpoint / "scan.json",
        layer=options.layer,
        companion=companion,
        data=_sources(options.data),
        held_out_fraction=options.held_out_fraction,
        data_dir=options.data_dir,
        samples=options.samples,
        guards=guards,
        seed=options.seed,
        bf16=options.bf16,
        batch_tokens=options.batch_tokens,
        say=_speaker(options.quiet),
    )
    if not patch.is_repair:
        print(f"no repair: {patch.reason}")
        return 0
    folder = save_repaired(model, tokenizer, patch, options.output)
    print(f"layer {patch.layer}: {patch.remedy} ({patch.reason})\ncheckpoint  {folder}\npatch       {folder / 'patch'}")
    return 0


def _companion(folder: Path | None) -> PreTrainedModel | None:
    if folder is None:
        return None
    from bankwise.upcycle import load_dense

    return load_dense(folder, tokenizer=False).model


def _read_report(path: Path) -> dict[str, object]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); write it with `bankwise eval --output`") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no report; write it anew with `bankwise eval --output`") from error
    if not isinstance(report, dict):
        raise DataError(f"{path} is no report; write it anew with `bankwise eval --output`")
    return report


def _sources(paths: list[str]) -> list[DataSource]:
    return [DataSource(path=path) for path in paths]


def _speaker(quiet: bool) -> Callable[[str], None]:
    return (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of integers such as 1024,4096") from None
