"""What is checked of each model type: everything beside plain torch hooks and plain passes over single rows."""

import logging
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from tiny import byte_tokenizer, random_dictionary
from torch import Tensor, nn

from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.errors import UserError
from saepatch.measure.attribution import attribute
from saepatch.measure.patching import patch_latents
from saepatch.model.greedy import greedy_options
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.loading.load import load_model
from saepatch.model.sites import Site
from saepatch.splicing.interventions import Steer
from saepatch.splicing.splice import splice
from zoo.shapes import tiny_model

CHECKS = ("identity", "sums", "patch", "padded", "attribution", "generation", "steered, cached", "steered, uncached")
EQUAL = [PromptPair("the red hen", "the old cow", "x", "y"), PromptPair("a big dog!", "a sad cat!", "p", "q")]
UNEQUAL = [PromptPair("a red hen", "the very old cow", "x", "y"), PromptPair("one dog", "a cat", "p", "q")]
RIGHT = "right"
NEW = 4  # tokens that are generated


class Wrong(AssertionError):
    """A number that differs from what plain hooks give, and nothing was said."""


class Subject:
    """A loaded model, and what plain torch makes of single rows of tokens in it."""

    def __init__(self, model: LanguageModel, layer: int) -> None:
        self.model, self.hf = model, model.hf
        self.block = _blocks(model)[layer]
        self._acts: dict[str, Tensor] = {}
        self.dictionary: Dictionary = random_dictionary(f"resid_post.{layer}", "standard", d_in=model.d_model)

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        """[pos, vocab] of one row, no mask, no positions, no cache."""
        return self.plain(ids)

    def plain(self, ids: list[int]) -> Tensor:
        """The same with a graph; without a cache, whose states some models change in place."""
        cache = {"use_cache": False} if "use_cache" in signature(self.hf.forward).parameters else {}
        return self.hf(input_ids=torch.tensor([ids]), **cache).logits[0].float()

    @contextmanager
    def hooked(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Pass what the block emits through a function."""

        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                return change(output)
            new = change(output[0])
            return output._replace(**{output._fields[0]: new}) if hasattr(output, "_replace") else (new, *output[1:])

        handle = self.block.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def acts(self, text: str) -> Tensor:
        """[pos, d_sae]: latents of what the block emits; kept."""
        if text not in self._acts:
            seen: list[Tensor] = []
            with self.hooked(lambda x: seen.append(x) or x):
                self.plain(self.model.encode(text))
            self._acts[text] = self.dictionary.encode(seen[0].float()).acts[0]
        return self._acts[text]

    @cached_property
    def scale(self) -> float:
        return max(1.0, float(self.logits(self.model.encode("the red hen")).abs().max()))

    def compare(self, ours: Tensor | float, plain: Tensor | float, what: str, tolerance: float = 2e-4) -> None:
        gap = float((torch.as_tensor(ours) - torch.as_tensor(plain)).abs().max())
        if not gap <= tolerance * self.scale:
            raise Wrong(f"{what} differs by {gap:.1e} of {self.scale:.1e}")


def _blocks(model: LanguageModel) -> list[nn.Module]:
    """The decoder's blocks, found without the package: the first module list that all its members run in."""
    ran: list[nn.Module] = []
    lists = [m for m in model.hf.modules() if isinstance(m, nn.ModuleList) and len(m) == model.n_layers]
    handles = [each.register_forward_hook(lambda m, *_: ran.append(m)) for some in lists for each in some]
    with torch.no_grad():
        model.hf(input_ids=torch.tensor([model.encode("the red hen")]))
    for handle in handles:
        handle.remove()
    ours = list(model.layout.blocks)
    if not any(list(some) == ours for some in lists):
        raise Wrong("the blocks are no module list of the model")
    if not set(ours) <= set(ran):
        raise Wrong("the blocks do not run")
    return ours


def identity(subject: Subject) -> None:
    ids = subject.model.encode("the red hen")
    plain = subject.logits(ids)
    tokens = subject.model.tokenize(["the red hen"])
    with splice(subject.model, subject.dictionary):
        subject.compare(subject.hf(input_ids=tokens.input_ids).logits[0].float(), plain, "the spliced model", 1e-6)
    subject.compare(subject.model.logits(tokens)[0].float(), plain, "the model's own pass", 1e-6)


def _patched_by_hand(subject: Subject, pair: PromptPair, latent: int, last: bool) -> float:
    """The corrupted run with one latent as in the clean run, positions counted from the end."""
    corrupted = subject.model.encode(pair.corrupted)
    clean, base = (subject.acts(text)[:, latent] for text in (pair.clean, pair.corrupted))
    shared = 1 if last else len(base)
    change = torch.zeros(len(corrupted), subject.model.d_model)
    change[-shared:] = (clean[-shared:] - base[-shared:])[:, None] * subject.dictionary.rows[latent]
    if not last:
        change[0] = 0  # BOS
    with subject.hooked(lambda x: x + change):
        logits = subject.logits(corrupted)[-1]
    answer, counter = (subject.model.encode(text)[-1] for text in (pair.answer, pair.counter))
    return float(logits[answer] - logits[counter])


def _patch(subject: Subject, pairs: list[PromptPair], last: bool) -> None:
    effects = patch_latents(
        subject.model,
        subject.dictionary,
        pairs,
        positions="last" if last else "all",
        align="right" if last else "equal",
    )
    moved = abs(effects.patched - effects.corrupted[:, None])
    if not moved.max() > 1e-3:
        raise Wrong(f"no edit moves the logits ({moved.max():.1e})")
    for row, pair in enumerate(pairs):
        for number in moved[row].argsort()[::-1][:2]:
            latent = effects.edits[number].units[0]
            subject.compare(effects.patched[row, number], _patched_by_hand(subject, pair, latent, last), "an effect")


def patch(subject: Subject) -> None:
    """After the first block, where all others run, and before the last, which is cut short."""
    _patch(Subject(subject.model, 0), EQUAL, last=False)
    _patch(subject, EQUAL, last=False)


def padded(subject: Subject) -> None:
    """Passes over unequal rows, which run by length where the model cannot pad; and patches, refused there."""
    texts = [pair.clean for pair in UNEQUAL]
    for side in ("left", "right"):
        logits = subject.model.next_logits(subject.model.tokenize(texts, side))
        for text, ours in zip(texts, logits, strict=True):
            subject.compare(ours.float(), subject.logits(subject.model.encode(text))[-1], f"a row padded on the {side}")
    _patch(subject, UNEQUAL, last=True)


def attribution(subject: Subject) -> None:
    scores = attribute(subject.model, subject.dictionary, EQUAL)
    for row, pair in enumerate(EQUAL):
        leaves: list[Tensor] = []
        with torch.enable_grad(), subject.hooked(lambda x: leaves.append(x.detach().requires_grad_()) or leaves[-1]):  # noqa: B023
            logits = subject.plain(subject.model.encode(pair.corrupted))[-1]
            answer, counter = (subject.model.encode(text)[-1] for text in (pair.answer, pair.counter))
            (gradient,) = torch.autograd.grad(logits[answer] - logits[counter], leaves)
        want = (subject.acts(pair.clean) - subject.acts(pair.corrupted)) * (gradient[0] @ subject.dictionary.rows.T)
        ours = torch.zeros_like(want)
        chosen = (scores.pair == row) & (scores.unit >= 0)
        ours[scores.position[chosen], scores.unit[chosen]] = torch.from_numpy(scores.score[chosen]).float()
        want[0] = 0  # BOS
        gap, size = float((ours - want).abs().max()), float(want.abs().max())
        if not gap <= 1e-3 * max(size, 1e-3):
            raise Wrong(f"a score differs by {gap:.1e} of {size:.1e}")


def sums(subject: Subject) -> None:
    """Where a block offers both, attention and MLP are together what it writes, but for what one more module adds."""
    model, tokens, outputs = subject.model, subject.model.tokenize(["the red hen"]), dict[nn.Module, Any]()
    children = [child for block in model.layout.blocks for child in block.children()]
    handles = [child.register_forward_hook(lambda m, _, output: outputs.update({m: output})) for child in children]
    held = model.capture(tokens, model.layout.all_sites, stop=False)
    for handle in handles:
        handle.remove()
    for layer, offered in enumerate(model.layout.paths):
        parts = [held[Site(layer, stream)] for stream in ("attn_out", "mlp_out") if stream in offered]
        if len(parts) != 2:
            continue
        wrote = held[Site(layer, "resid_post")] - held[Site(layer, "resid_pre")]
        others = [outputs.get(child) for child in model.layout.blocks[layer].children()]
        others = [x for x in others if isinstance(x, Tensor) and x.shape == wrote.shape]
        gap = min(float((wrote - sum(parts) - more).abs().max()) for more in [torch.zeros(()), *others])
        if gap > 1e-4 * float(wrote.abs().max()):
            raise Wrong(f"attn_out and mlp_out of block {layer} are not what it writes")


def _greedy(subject: Subject, ids: list[int]) -> list[int]:
    """Whole passes, one token after another."""
    ids = list(ids)
    for _ in range(NEW):
        ids.append(int(subject.logits(ids)[-1].argmax()))
    return ids[-NEW:]


def _same_tokens(subject: Subject, prompt: list[int], ours: list[int]) -> None:
    want = _greedy(subject, prompt)
    ends = next((at + 1 for at, token in enumerate(want) if token == 1), NEW)
    if ours[:ends] != want[:ends]:
        raise Wrong(f"generated {ours[:ends]}, not {want[:ends]}")


def generation(subject: Subject) -> None:
    texts = [pair.clean for pair in UNEQUAL]
    _check_generates(subject)
    new = subject.model.generate_ids(subject.model.tokenize(texts, "left"), NEW)
    for text, ids in zip(texts, new.tolist(), strict=True):
        _same_tokens(subject, subject.model.encode(text), ids)


def _check_generates(subject: Subject) -> None:
    """Raises UserError where the library itself does not generate with the model."""
    try:
        _generated(subject, subject.model.tokenize(["the red hen"]), cached=False)
    except AttributeError as error:
        raise UserError(f"transformers itself does not generate with it: {one_line(error)}") from error


def _generated(subject: Subject, tokens: Tokens, cached: bool) -> list[list[int]]:
    """The library's own generation."""
    options = greedy_options(subject.hf, subject.model.tokenizer) | {"eos_token_id": 1, "pad_token_id": 2}
    options["suppress_tokens"] = [0]  # a BOS that is generated is not edited, and the plain hook does not know
    ids = subject.hf.generate(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        max_new_tokens=NEW,
        use_cache=cached,
        **options,
    )
    return ids[:, tokens.width :].tolist()


def _steered(subject: Subject, cached: bool) -> None:
    """Rows in one batch, where they can be padded, beside each row alone under a plain hook."""
    _check_generates(subject)
    texts, change = [pair.clean for pair in UNEQUAL], 4.0 * subject.dictionary.rows[3]
    want = []

    def edit(x: Tensor) -> Tensor:
        where = torch.ones(x.shape[1], 1)
        where[0] = 0.0 if x.shape[1] > 1 else 1.0  # BOS begins every pass but those of one token, on a cache
        return x + where * change

    for text in texts:
        with subject.hooked(edit):
            want += _generated(subject, subject.model.tokenize([text]), cached)
    ours = []
    padding, without_cache = subject.model.padding, not cached and subject.model.takes_cache
    for batch in [texts] if padding.left and (padding.cached or without_cache) else [[text] for text in texts]:
        with splice(subject.model, subject.dictionary, Steer(3, 4.0)):
            ours += _generated(subject, subject.model.tokenize(batch, "left"), cached)
    for mine, plain in zip(ours, want, strict=True):
        end = next((at + 1 for at, token in enumerate(plain) if token == 1), NEW)  # what follows EOS means nothing
        if mine[:end] != plain[:end]:
            raise Wrong(f"generated {mine[:end]}, not {plain[:end]}")


def steered_cached(subject: Subject) -> None:
    _steered(subject, cached=True)


def steered_uncached(subject: Subject) -> None:
    _steered(subject, cached=False)


FUNCTIONS = (identity, sums, patch, padded, attribution, generation, steered_cached, steered_uncached)


def one_line(error: BaseException) -> str:
    return re.sub(re.escape(tempfile.gettempdir()) + r"/\w+", "FOLDER", " ".join(str(error).split()))[:200]


def verdict(check: Callable[[], Any]) -> str:
    """`right`, or what went wrong: a refusal of ours in one line, a wrong number, or another exception."""
    try:
        check()
    except UserError as error:
        return f"refused: {one_line(error)}"
    except Wrong as error:
        return f"wrong: {one_line(error)}"
    except Exception as error:
        return f"crash: {type(error).__name__}: {one_line(error)}"
    return RIGHT


def bare(model_type: str) -> nn.Module:
    """A tiny model that runs on text in transformers alone.

    Raises:
        Exception: whatever the library raises.
    """
    hf = tiny_model(model_type)
    ids = torch.tensor([byte_tokenizer()("the red hen")["input_ids"]])
    with torch.no_grad():
        logits, again = (hf(input_ids=ids).logits for _ in range(2))
    if not torch.equal(logits, again):
        raise ValueError("two passes over the same tokens differ")
    if not bool(torch.isfinite(logits).all()) or logits.ndim != 3:
        raise ValueError(f"logits of shape {tuple(logits.shape)}, finite: {bool(torch.isfinite(logits).all())}")
    return hf


def examine(model_type: str) -> dict[str, str]:
    """One line of the table: the class, the streams offered, and a verdict of each check."""
    logging.getLogger("saepatch").setLevel(logging.ERROR)
    row = {"type": model_type}
    try:
        hf = bare(model_type)
    except Exception as error:
        return row | {"bare": f"{type(error).__name__}: {one_line(error)}"}
    row |= {"bare": RIGHT, "class": type(hf).__name__}
    with tempfile.TemporaryDirectory() as folder:
        loaded: list[LanguageModel] = []

        def load() -> None:
            hf.save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
            loaded.append(load_model(str(Path(folder))))

        row["load"] = verdict(load)
        if not loaded:
            return row
        model = loaded[0]
        counts = {stream: len(model.layout.of_stream(stream)) for stream in _streams(model)}
        row |= {"sites": ", ".join(f"{stream} {n}" for stream, n in counts.items()), "padding": str(model.padding)}
        row["layers"] = str(model.n_layers)
        row["step"] = str(model.step_limit)
        try:
            subject = Subject(model, max(0, model.n_layers - 2))
        except (Wrong, UserError) as error:
            return row | {"patch": f"wrong: {one_line(error)}"}
        for name, function in zip(CHECKS, FUNCTIONS, strict=True):
            row[name] = verdict(lambda function=function: function(subject))
    return row


def _streams(model: LanguageModel) -> list[str]:
    return list(dict.fromkeys(site.stream for site in model.layout.all_sites))
