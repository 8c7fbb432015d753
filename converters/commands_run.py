"""Commands that run a model on its packed weights: ``run``, ``perplexity``, ``compare``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click

from converters.commands_imatrix import read_text
from converters.flags import TARGET, check_report, output_flags, output_of, report_flag
from converters.output import Output, count
from qformats.errors import UsageError

__all__ = ["compare", "perplexity", "run"]

_PATH = click.Path(path_type=Path)
_DTYPES = ("float32", "bfloat16", "float16")


_QUANTIZE = "Quantize {} while it is loaded, from floats."


def _model_flags(command: Callable[..., Any], which: str = "MODEL") -> Callable[..., Any]:
    """Where and how a model runs."""
    for option in (
        click.option("--device", metavar="DEVICE", help="Where it runs: cpu, cuda, cuda:1 (default: cuda where there is one)."),
        click.option("--dtype", type=click.Choice(_DTYPES), help="Of the activations (default: the checkpoint's own)."),
        click.option(
            "--activations", type=click.Choice(("published", "float")), default="published", show_default=True,
            help="Round the inputs of linear layers as the format's owner does, or run the weights alone.",
        ),
        click.option(
            "--compute", type=click.Choice(("exact", "int8")), default="exact", show_default=True,
            help="int8 rounds the inputs of every product to bytes too: faster on a CPU, and not exact.",
        ),
        click.option("--allow-pickle", is_flag=True, help="Read files of torch.save, as data."),
        click.option("--quantize", type=TARGET, metavar="FORMAT:TYPE[,key=value…]", help=_QUANTIZE.format(which)),
    ):  # fmt: skip
        command = option(command)
    return command


def _text_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """What the models read, and in which windows."""
    for option in (
        click.option("--windows", type=click.IntRange(1), metavar="N", help="At most this many windows of the text (default: all)."),
        click.option("--context", type=click.IntRange(2, 1 << 20), default=512, show_default=True, metavar="N", help="Tokens of a window."),
        click.option("--text", type=_PATH, required=True, metavar="FILE", help="Plain text, UTF-8."),
    ):
        command = option(command)
    return command


def _load(path: Path, output: Output, device: str | None, dtype: str | None, **how: Any) -> Any:
    import torch

    from qformats.runtime.loader import load_model

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted = None if dtype is None else getattr(torch, dtype)
    with output.working(f"loading {path.name}"):
        return load_model(path, device=where, dtype=wanted, **how)


@click.command(short_help="Generate text.", epilog='Example: qconvert run model.gguf -p "The capital of France is"')
@click.argument("model", type=_PATH)
@click.option("--prompt", "-p", required=True, metavar="TEXT", help="What the model goes on from.")
@click.option("--chat", is_flag=True, help="Put the prompt as a user's message into the model's chat template.")
@click.option("--tokens", "-n", type=click.IntRange(1), default=128, show_default=True, metavar="N", help="At most so many new tokens.")
@click.option("--temperature", type=click.FloatRange(0.0), default=0.0, show_default=True, help="0 takes the best token each time.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling.")
@_model_flags
@output_flags
def run(
    model: Path, prompt: str, chat: bool, tokens: int, temperature: float, seed: int, as_json: bool, quiet: bool, **how: Any
) -> None:
    """Load MODEL, in any format, on its packed weights and print what it says, as it says it."""
    import torch

    from qformats.runtime.tokenizer import load_tokenizer

    output = output_of(as_json, quiet)
    tokenizer = load_tokenizer(model)
    began = time.perf_counter()
    loaded = _load(model, output, **how)
    loaded_at = time.perf_counter()
    ids = _prompt_ids(tokenizer, prompt, chat).to(loaded.device)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = None if as_json else _Printer(tokenizer, output)
    found = loaded.generate(ids, max_new_tokens=tokens, streamer=streamer, pad_token_id=tokenizer.eos_token_id, **sampling)
    new = found[0, ids.shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    if as_json:
        data = {"version": 1, "prompt_tokens": ids.shape[1], "new_tokens": len(new), "text": text}
        output.result({**data, **_speed(len(new), loaded_at - began, time.perf_counter() - loaded_at)}, list)


def _speed(tokens: int, load_seconds: float, seconds: float) -> dict[str, float | None]:
    """``seconds``: of the prompt and the new tokens together."""
    speed = round(tokens / seconds, 3) if seconds > 0 else None
    return {"load_seconds": round(load_seconds, 3), "seconds": round(seconds, 3), "tokens_per_second": speed}


def _prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> Any:
    """(1, n) token ids; transformers renders templates in jinja's sandbox."""
    if not chat:
        return tokenizer(prompt, return_tensors="pt").input_ids
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("chat-template", "the model has no chat template", hint="leave --chat out")
    messages = [{"role": "user", "content": prompt}]
    made = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return made["input_ids"]


class _Printer:
    """Prints new tokens as text; characters that several tokens make are held back until they are whole."""

    def __init__(self, tokenizer: Any, output: Output) -> None:
        self._output, self._tokenizer = output, tokenizer
        self._ids: list[int] = []
        self._shown, self._prompt = 0, True

    def put(self, ids: Any) -> None:
        if self._prompt:
            self._prompt = False
            return
        self._ids.extend(ids.reshape(-1).tolist())
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            self._show(text)

    def end(self) -> None:
        self._show(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        self._output.stream("\n")

    def _show(self, text: str) -> None:
        self._output.stream(text[self._shown :])
        self._shown = len(text)


@click.command(short_help="How well a model predicts a text.", epilog="Example: qconvert perplexity model.gguf --text wiki.txt")
@click.argument("model", type=_PATH)
@_text_flags
@_model_flags
@output_flags
def perplexity(model: Path, text: Path, context: int, windows: int | None, as_json: bool, quiet: bool, **how: Any) -> None:
    """Print the mean negative log-likelihood and the perplexity of MODEL, in any format, over a text."""
    from qformats.runtime import measuring
    from qformats.runtime.tokenizer import load_tokenizer

    output = output_of(as_json, quiet)
    runs = measuring.windows(load_tokenizer(model), read_text(text), context, windows)
    loaded = _load(model, output, **how)
    with output.steps("perplexity", "windows") as progress:
        found = measuring.perplexity(loaded, runs, progress)
    data = {"version": 1, "nll": found.nll, "perplexity": found.perplexity, "tokens": found.tokens, "windows": len(runs)}

    def lines() -> Iterator[str]:
        yield f"perplexity {found.perplexity:.4f}  nll {found.nll:.5f}  over {count(found.tokens, 'token')}, {count(len(runs), 'window')}"

    output.result(data, lines)


@click.command(short_help="How much two models agree.", epilog="Example: qconvert compare model-awq/ model.gguf --text wiki.txt")
@click.argument("first", type=_PATH)
@click.argument("second", type=_PATH)
@_text_flags
@partial(_model_flags, which="SECOND")
@report_flag
@output_flags
def compare(
    first: Path, second: Path, text: Path, context: int, windows: int | None, report: Path | None, as_json: bool, quiet: bool,
    quantize: str | None, **how: Any,
) -> None:
    """Run two checkpoints, of any formats, over a text: mean KL divergence of SECOND from FIRST, equal best tokens, both NLLs.

    Both read the tokens of FIRST's tokenizer. With --quantize, FIRST and SECOND may be one checkpoint of floats: what would be lost.
    With --report the weights of both files are measured too.
    """
    from qformats.runtime import measuring
    from qformats.runtime.tokenizer import load_tokenizer

    output = output_of(as_json, quiet)
    check_report(report, first, second, text)
    runs = measuring.windows(load_tokenizer(first), read_text(text), context, windows)
    one, other = _load(first, output, **how), _load(second, output, quantize=quantize, **how)
    with output.steps("compare", "windows") as progress:
        found = measuring.agreement(one, other, runs, progress)
    data = {
        "version": 1, "kl": found.kl, "top1": found.top1, "nll": [found.first.nll, found.second.nll],
        "perplexity": [found.first.perplexity, found.second.perplexity], "tokens": found.first.tokens, "windows": len(runs),
    }  # fmt: skip
    if report is not None:
        from converters.comparing import agreement_report

        said = {**{key: value for key, value in data.items() if key != "version"}, "text": text.name, "context": context}
        with output.working("comparing weights"):
            agreement_report(first, second, said, quantized=quantize, allow_pickle=how["allow_pickle"]).write(report)

    def lines() -> Iterator[str]:
        yield f"KL divergence {found.kl:.6f} nats a token  equal best tokens {found.top1:.2%}  over {count(found.first.tokens, 'token')}"
        for name, fit in ((first.name, found.first), (second.name, found.second)):
            yield f"  {name}: nll {fit.nll:.5f}, perplexity {fit.perplexity:.4f}"

    output.result(data, lines)
